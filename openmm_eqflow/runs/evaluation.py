"""How good is a flow: raw importance weights of independent samples, nothing dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.analysis.chains import weighted_mean_with_error
from openmm_eqflow.analysis.temperatures import log_weights_at
from openmm_eqflow.analysis.weights import (
    log_z,
    max_weight_share,
    pareto_k,
    relative_ess,
    relative_ess_with_error,
)
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_tensors, save_tensors
from openmm_eqflow.flows.temperatures import AtTemperature, continued
from openmm_eqflow.parallel import available_threads, in_rounds, is_main
from openmm_eqflow.priors.base import Prior, check_space
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import kelvin as in_kelvin

__all__ = [
    "FlowSamples",
    "at_other_temperatures",
    "draw_weighted",
    "evaluate_flow",
    "latent_log_weights",
    "prior_log_weights",
]

Progress = Callable[[float, str], None]
_GPU_BLOCK = 16_384
_CHUNKS_PER_BLOCK = 4  # fixed, so that a seed means the same on every machine


class FlowSamples(NamedTuple):
    """Independent samples: positions (n, N, D), u, log q and log weight (n,); seconds spent."""

    x: Tensor
    u: Tensor
    log_q: Tensor
    log_weight: Tensor
    seconds: float


def draw_weighted(
    flow: FlowPath,
    target: BoltzmannTarget,
    n: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> FlowSamples:
    """Draw ``n`` samples with their log weights -u - log q (-inf where invalid).

    Chunk k depends on ``seed`` and k only; with ``folder`` finished chunks are kept there, so that
    an interrupted evaluation continues. Under torchrun the processes share the chunks: all return
    all samples.
    """
    check_space(flow.prior, target)
    parts: list[FlowSamples] = []
    block = _CHUNKS_PER_BLOCK * flow.chunk_size if flow.device.type == "cpu" else _GPU_BLOCK
    starts = list(range(0, n, block))

    def path(k: int) -> Path | None:
        return None if folder is None else folder / f"{seed}-{n}-{k:05d}.safetensors"

    def work(k: int) -> dict[str, Tensor]:
        size = min(block, n - starts[k])
        samples = _stored(path(k))
        if samples is None or len(samples.u) != size:  # on another device blocks are others
            samples = _drawn(flow, target, size, seed, k)
        seconds = torch.tensor(samples.seconds, dtype=torch.float64)
        return samples._replace(seconds=seconds)._asdict()  # type: ignore[arg-type]

    for k, tensors in enumerate(in_rounds(work, range(len(starts)))):
        seconds = float(tensors.pop("seconds"))
        parts.append(FlowSamples(**tensors, seconds=seconds))
        file = path(k)
        if file is not None and is_main() and not file.is_file():
            save_tensors(file, tensors, {"seconds": seconds})
        if progress is not None:
            done = min(starts[k] + block, n)
            progress(done / n, f"{done} samples")
    return FlowSamples(
        torch.cat([p.x for p in parts]),
        torch.cat([p.u for p in parts]),
        torch.cat([p.log_q for p in parts]),
        torch.cat([p.log_weight for p in parts]),
        sum(p.seconds for p in parts),
    )


def _drawn(
    flow: FlowPath,
    target: BoltzmannTarget,
    n: int,
    seed: int,
    k: int,
) -> FlowSamples:
    generator = child(seed, "evaluation", k)
    clock = time.perf_counter()
    x, log_q = flow.sample_and_log_prob(n, generator=generator)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
    u = target.reduced_potential(x)
    x, log_q, u = x.cpu(), log_q.cpu(), u.cpu()
    return FlowSamples(x, u, log_q, -u - log_q, seconds)


def _stored(path: Path | None) -> FlowSamples | None:
    if path is None or not path.is_file():
        return None
    tensors, words = load_tensors(path)
    return FlowSamples(
        tensors["x"], tensors["u"], tensors["log_q"], tensors["log_weight"], words["seconds"]
    )


def at_other_temperatures(
    flow: FlowPath,
    target: BoltzmannTarget,
    samples: FlowSamples,
    kelvins: Sequence[float],
    *,
    seed: int = 0,
) -> list[AtTemperature]:
    """Carry samples on to other temperatures by levels, or where there is no chart by weights.

    Parameters
    ----------
    flow, target, samples
        Samples of the flow at the target's own temperature.
    kelvins
        Temperatures asked for, K.
    seed
        Of the levels' random streams.
    """
    if isinstance(flow.prior, InternalCoordinatePrior):
        return continued(flow, target, samples.x, samples.log_weight, kelvins, seed=seed)
    own, log_w, u = in_kelvin(target.temperature), samples.log_weight.numpy(), samples.u.numpy()
    return [
        AtTemperature(
            k, samples.x, samples.u, torch.from_numpy(log_weights_at(log_w, u, own, k))
        )
        for k in kelvins
    ]


def prior_log_weights(
    flow: FlowPath,
    target: BoltzmannTarget,
    n: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log weights of the prior alone, (n,): what the flow has to beat."""
    prior = flow.prior_on_cpu
    latents = [
        prior.sample_latent(min(4096, n - start), generator=generator)
        for start in range(0, n, 4096)
    ]
    weigh = partial(latent_log_weights, prior, target)
    return torch.cat([part["log_w"] for part in in_rounds(lambda y: {"log_w": weigh(y)}, latents)])


def latent_log_weights(prior: Prior, target: BoltzmannTarget, y: Tensor) -> Tensor:
    """Log weights (n,) of latents of a prior alone, -inf outside its chart."""
    with torch.no_grad():
        x, log_volume = prior.to_cartesian(y)
        log_q = prior.latent_log_prob(y) - log_volume
    # A point outside the chart has log_volume nan.
    log_w = -target.reduced_potential(x) - log_q
    return torch.where(torch.isnan(log_w), -torch.inf, log_w)


def evaluate_flow(
    flow: FlowPath,
    target: BoltzmannTarget,
    *,
    n_samples: int,
    seed: int,
    name: str,
    test_frames: Tensor | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], FlowSamples, Tensor]:
    """Measure a flow on fresh independent samples.

    Parameters
    ----------
    n_samples, seed
        Number of samples of flow and of prior; reported with every figure.
    test_frames
        Frames of the target the flow was not trained on, for ``test_nll`` (None without them);
        evenly thinned to a tenth of ``n_samples`` but at least 100: one costs more than a sample.
    folder
        Keeps finished chunks, so that an interrupted evaluation continues.

    Returns
    -------
    dict
        The keys of ``openmm-eqflow evaluate --json``.
    FlowSamples, Tensor
        The samples, and the log weights of the prior.
    """
    samples = draw_weighted(flow, target, n_samples, seed=seed, folder=folder, progress=progress)
    prior_weights = prior_log_weights(
        flow, target, n_samples, generator=child(seed, "prior")
    )
    log_w = samples.log_weight.numpy()
    u = samples.u.numpy()
    ess, estimate = relative_ess_with_error(log_w), log_z(log_w)
    mean_u = weighted_mean_with_error(np.where(np.isfinite(u), u, 0.0), log_w)
    report = flow.audit_report
    if report is None:
        report = audit(flow, n=128, generator=child(seed, "evaluation audit"))
    if test_frames is not None:
        most = max(100, n_samples // 10)
        test_frames = test_frames[:: max(1, -(-len(test_frames) // most))]
    nll, nll_error = _test_nll(flow, test_frames)
    mean_log_w, mean_log_w_error = _mean_log_weight(log_w)
    result = {
        "system": name,
        "n_samples": n_samples,
        "seed": seed,
        "relative_ess": float(ess.value),
        "relative_ess_error": _finite(float(ess.error)),
        "prior_relative_ess": relative_ess(prior_weights.numpy()),
        "pareto_k": _finite(pareto_k(log_w)),
        "max_weight_share": max_weight_share(log_w),
        "mean_log_weight": mean_log_w,
        "mean_log_weight_error": mean_log_w_error,
        "log_z": _finite(float(estimate.value)),
        "log_z_error": _finite(float(estimate.error)),
        "test_nll": nll,
        "test_nll_error": nll_error,
        "mean_reduced_potential": float(mean_u.value),
        "mean_reduced_potential_error": float(mean_u.error),
        "n_invalid": int((~np.isfinite(log_w)).sum()),
        "seconds_per_sample": samples.seconds / n_samples,
        "energies_per_sample": flow.n_energies,
        "log_q_error_p99": report["log_q_error_p99"],
        "n_ode_steps": flow.maps.n_ode_steps,
        "n_threads": available_threads(),
        "device": str(flow.device),
    }
    return result, samples, prior_weights


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _mean_log_weight(log_w: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """E_q[log w] = log Z - KL(q|p) and its error; None if a weight is zero (KL infinite)."""
    if len(log_w) < 2 or not np.isfinite(log_w).all():
        return None, None
    return float(log_w.mean()), float(log_w.std(ddof=1) / np.sqrt(len(log_w)))


def _test_nll(flow: FlowPath, frames: Tensor | None) -> tuple[float | None, float | None]:
    """Mean of -log q over frames and its naive error."""
    if frames is None or not len(frames):
        return None, None
    blocks = frames.double().split(_CHUNKS_PER_BLOCK * flow.chunk_size)
    parts = in_rounds(lambda x: {"log_q": flow.log_prob(x).cpu()}, blocks)
    nll = -torch.cat([part["log_q"] for part in parts]).numpy()
    return float(nll.mean()), float(nll.std(ddof=1) / np.sqrt(len(nll)))
