"""ESS of one training against its seconds: same start, same clock, whatever the objective.

The clock of :func:`~openmm_eqflow.training.loop.train` stands still while the average is measured.
Every measurement draws the same independent latents, so that two objectives differ by what they
learnt only.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import max_weight_share, pareto_k, relative_ess
from openmm_eqflow.errors import TrainingError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.parallel import available_threads, machine_name
from openmm_eqflow.runs.directory import package_versions
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.runs.fit import training_settings
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.objectives import build_objective
from openmm_eqflow.training.precision import training_precision
from openmm_eqflow.training.recipes import Recipe

__all__ = [
    "Start",
    "learning_curve",
    "measure",
    "prior_alone",
    "tensors_sha256",
    "times",
]

Progress = Callable[[float, str], None]
_GRIDS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
_TOLERANCE = 0.02  # kT: nothing to a relative ESS
_N_VALIDATION = 512


@dataclass(frozen=True)
class Start:
    """What all trainings share.

    Attributes
    ----------
    flow
        Fitted prior and untrained field, which is copied and never changed.
    frames, test
        Training and held-out configurations (n, N, D), nm.
    seconds, n_points
        Training time and number of measurements; see :func:`times`.
    n_samples, seed
        Independent samples per measurement; seed of everything.
    warmup_steps
        First steps, over which the learning rate rises.
    """

    recipe: Recipe
    target: BoltzmannTarget
    flow: EquivariantFlow
    frames: Tensor
    test: Tensor
    device: str
    seconds: float
    n_points: int
    n_samples: int
    seed: int
    warmup_steps: int = TrainingSettings.warmup_steps


def times(seconds: float, n_points: int) -> tuple[float, ...]:
    """When to measure, in seconds of training: each time twice the one before, the last the end.

    Examples
    --------
    >>> times(300.0, 3)
    (75.0, 150.0, 300.0)
    """
    return tuple(seconds / 2 ** (n_points - 1 - k) for k in range(n_points))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, hexadecimal: names and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _raw(log_weight: Tensor) -> dict[str, float]:
    log_w = log_weight.numpy()
    return {
        "relative_ess": relative_ess(log_w),
        "pareto_k": pareto_k(log_w),
        "max_weight_share": max_weight_share(log_w),
        "n": len(log_w),
        "n_invalid": int((log_weight == -torch.inf).sum()),
    }


class _Still(nn.Module):
    """A field that moves nothing: its flow is the prior."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0 * y

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return 0 * y, y.new_zeros(len(y))


def prior_alone(start: Start) -> dict[str, float]:
    """Measure the prior, which every training starts from, on the same latents as all others."""
    still = _Still(tuple(start.flow.prior.event_shape)).to(start.device)
    return measure(start, still)


def _set_grid(flow: EquivariantFlow, seed: int) -> float:
    """Set the coarsest grid that the next finer one agrees with; return their difference in kT.

    That is the 99th percentile of the change of log q over a few latents.
    :meth:`~openmm_eqflow.flows.flow.EquivariantFlow.calibrate` compares with an adaptive solve,
    which
    may never end on a field that went wrong.
    """
    stream = child(seed, "calibration")
    z = flow.prior.sample_latent(flow.chunk_size // 2, generator=stream).to(flow.device)
    before: Tensor | None = None
    error = math.inf
    for n in _GRIDS:
        earlier = flow.grid
        flow.grid = tuple(k / n for k in range(n + 1))
        with torch.no_grad():
            log_q = flow.transform(z)[1]
        if before is not None:
            # A sample off the chart on both grids has weight zero on both.
            gap = torch.where(log_q == before, 0.0, (log_q - before).abs())
            error = float(torch.quantile(torch.nan_to_num(gap, torch.inf), 0.99))
            if error <= _TOLERANCE:
                flow.grid = earlier
                break
        before = log_q
    return error


def measure(start: Start, module: nn.Module, progress: Progress | None = None) -> dict[str, float]:
    """Raw relative ESS of a field on ``n_samples`` independent samples.

    Returns
    -------
    dict
        ``relative_ess``, ``pareto_k``, ``max_weight_share``, ``n``, ``n_invalid`` (weight zero),
        ``n_ode_steps`` and ``grid_error``: change of log q on the next finer grid, kT, 99th
        percentile.
    """
    n = 256 if len(start.flow.prior.event_shape) == 1 else 64
    flow = EquivariantFlow(start.flow.prior, module, chunk_size=2 * n)  # type: ignore[arg-type]
    error = _set_grid(flow, start.seed)
    samples = draw_weighted(
        flow, start.target, start.n_samples, seed=start.seed, progress=progress
    )
    return _raw(samples.log_weight) | {"n_ode_steps": flow.n_ode_steps, "grid_error": error}


def learning_curve(
    start: Start, objective: Any, folder: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a copy of the start by ``objective`` (name or schedule) and measure on the way.

    Continues from the checkpoint in ``folder`` if there is one. A training that diverges is a
    result: its rows so far, and why it ended.

    Returns
    -------
    dict
        ``status`` (done or aborted), ``error``, ``rows`` (seconds of training, steps, loss and
        the figures of :func:`measure`), ``setup_seconds`` before the training (pool, forces at
        frames), ``initial_sha256`` of the weights, machine and versions.

    Raises
    ------
    ConfigurationError
        The objective does not suit the prior.
    """
    report = progress or (lambda fraction, text: None)
    recipe = replace(start.recipe, objective=objective)
    field = copy.deepcopy(start.flow.module).train()
    initial = tensors_sha256(field.state_dict())
    settings = replace(
        training_settings(recipe, seed=start.seed, device=start.device),
        seconds=start.seconds,
        max_steps=10**9,
        warmup_steps=start.warmup_steps,
        patience=0,
        validation_size=_N_VALIDATION,
        evaluate_at=times(start.seconds, start.n_points),
    )
    done = [0.0]

    def advance(fraction: float, text: str) -> None:
        done[0] = min(fraction, 1.0)
        report(done[0], text)

    def evaluate(average: nn.Module) -> dict[str, float]:
        return measure(start, average, lambda _, text: report(done[0], f"measuring, {text}"))

    error = None
    with training_precision(field, recipe.precision, start.device) as trained:
        clock = time.perf_counter()
        loss, close = build_objective(
            recipe,
            trained,
            start.flow.prior,
            start.target,
            start.frames,
            start.test,
            generator=child(start.seed, "pool"),
            seed=start.seed,
            report=report,
        )
        setup_seconds = time.perf_counter() - clock
        try:
            history = train(
                field,
                loss,
                settings,
                checkpoint=folder / "checkpoint.safetensors",
                evaluate=evaluate,
                progress=advance,
            ).history
        except TrainingError as failure:
            history, error = failure.history, str(failure)
        finally:
            close()
    rows = [{"steps": int(row["step"])} | row for row in history]
    for row in rows:
        del row["step"]
    return {
        "objective": objective,
        "status": "done" if error is None else "aborted",
        "error": error,
        "rows": rows,
        "setup_seconds": setup_seconds,
        "initial_sha256": initial,
        "n_threads": available_threads(),
        "machine": machine_name(),
        "versions": package_versions(),
    }
