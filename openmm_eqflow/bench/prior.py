"""How good is the internal-coordinate prior alone, from how many frames: raw weights, all seeds.

The prior is what a training starts from and what the flow has to beat. Its tails decide whether a
weight explodes, so that every case is drawn with several seeds and the largest weight is named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.weights import max_weight_share, pareto_k, relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_json
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.parallel import machine_name, one_torch_thread
from openmm_eqflow.runs.evaluation import prior_log_weights
from openmm_eqflow.runs.fit import fit_prior
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.training.recipes import make_recipe
from openmm_eqflow.vector_fields import ChartField

__all__ = [
    "read_frames",
    "run_bench",
]


def read_frames(trajectory: str | Path, topology: Any) -> Tensor:
    """All frames of a trajectory file as (n, N, 3) float64 nm.

    Raises
    ------
    ConfigurationError
        The file does not belong to the topology.
    """
    try:
        frames = mdtraj.load(str(trajectory), top=mdtraj.Topology.from_openmm(topology))
    except ValueError as error:
        raise ConfigurationError(f"{trajectory} does not fit the system: {error}") from None
    return torch.from_numpy(frames.xyz.astype(np.float64))


def run_bench(
    system_name: str,
    trajectory: str | Path,
    *,
    sizes: Sequence[int] = (2_000, 20_000),
    seeds: Sequence[int] = (0, 1, 2),
    n_samples: int = 20_000,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Fit priors to evenly spaced frames of ``trajectory`` and weigh samples of each.

    Parameters
    ----------
    system_name
        A bonded molecule.
    trajectory
        Frames of the system at its temperature, anything mdtraj reads.
    sizes
        Numbers of frames to fit to; more than there are means all of them. Seed k takes every
        frame number that is k modulo the stride, so that seeds differ in data too.
    seeds
        For the samples of the refinement and of the evaluation.
    n_samples
        Samples per case.

    Returns
    -------
    dict
        ``cases``: n_frames, seed, relative_ess, pareto_k, max_weight_share, fit_seconds.
    """
    system = load_system(system_name)
    if system.kind != "molecule":
        raise ConfigurationError(
            f"{system_name} has no internal-coordinate prior; name a bonded molecule"
        )
    recipe = make_recipe("molecule", "standard", system.settings)
    frames = read_frames(trajectory, system.topology)
    cases = []
    with one_torch_thread(), build_target(system) as target:
        for size in sizes:
            stride = max(1, len(frames) // size)
            for seed in seeds:
                chosen = frames[seed % stride :: stride][:size]
                clock = time.perf_counter()
                stream = child(seed, "pool")
                prior: Any = fit_prior(recipe, target, chosen, generator=stream)
                seconds = time.perf_counter() - clock
                field: Any = ChartField(prior.n_stiff, prior.n_soft, prior.fold)
                still = EquivariantFlow(prior, field)
                fresh = child(seed, "prior")
                log_w = prior_log_weights(still, target, n_samples, generator=fresh).numpy()
                cases.append(
                    {
                        "n_frames": len(chosen),
                        "seed": seed,
                        "relative_ess": relative_ess(log_w),
                        "pareto_k": pareto_k(log_w),
                        "max_weight_share": max_weight_share(log_w),
                        "fit_seconds": seconds,
                    }
                )
    result = {
        "system": system.name,
        "trajectory": Path(trajectory).name,
        "n_samples": n_samples,
        "prior_rounds": recipe.prior_rounds,
        "prior_samples": recipe.prior_samples,
        "device_name": machine_name(),
        "cases": cases,
    }
    if json_path is not None:
        write_json(Path(json_path), result)
    return result
