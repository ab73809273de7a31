"""Reference frames of a system, and the negative log likelihood no model can beat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.chains import mean_with_error
from openmm_eqflow.analysis.weights import Estimate
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import augment_together
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.fit import split_frames
from openmm_eqflow.runs.reference.data import ReferenceData, load_reference
from openmm_eqflow.runs.stages import build_target, run_stage
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.target import BoltzmannTarget

#: Log Z in nm on the mean-free subspace, with its error (docs/benchmarks.md).
LOG_Z = {"dw4": Estimate(29.662, 0.005), "lj13": Estimate(59.86, 0.02)}
_REFERENCE_SECONDS = 600.0


class Frames(NamedTuple):
    """Equilibrium frames (n, N, D) in nm, each turned and relabelled at random once.

    ``pool`` is for training sets, ``test`` for measurements. ``floor`` is the least possible
    mean of -log q, ``log_z`` the log partition function; ``identity`` says which data these are.
    """

    target: BoltzmannTarget
    pool: Tensor
    test: Tensor
    log_z: Estimate
    floor: Estimate
    identity: dict[str, Any]


def reference_run(
    name: str, path: Path, n_frames: int, report: Callable[[float, str], None]
) -> RunDirectory:
    """Open the run directory ``path``; make one of at least ``n_frames`` frames if it is none."""
    if (path / "config.yaml").is_file():
        run = RunDirectory.open(path)
        if Path(run.config.system).name != name:
            raise ConfigurationError(
                f"{path} is a run of {run.config.system}, expected one of {name}; pass --runs"
            )
    else:
        system = load_system(name)
        wanted = {
            "reference_seconds": _REFERENCE_SECONDS,
            "min_frames": n_frames,
            "max_frames": n_frames,
        }
        settings = {k: v for k, v in system.settings.items() if k == "reference"}
        system = replace(system, settings=settings | {"recipe": wanted})
        with build_target(system) as target:
            run = RunDirectory.create(path, system, target, budget="standard", seed=0)
    run_stage(run, "reference", progress=report)
    return run


def load_frames(run: RunDirectory, name: str, *, n_pool: int, n_test: int) -> Frames:
    """Split the frames of a run into pool and test and put each into a random orientation.

    Frames of a simulation keep the order of their particles and, over short times, their
    orientation. The target does not, and a non-equivariant flow must not be measured on that
    memory.
    """
    if name not in LOG_Z:
        raise ConfigurationError(f"log Z of {name} is not known; expected one of {list(LOG_Z)}")
    data = load_reference(run.path)
    target = build_target(run.load_system())
    pool, test = (_turned(x, target, seed) for seed, x in enumerate(split_frames(data)))
    for x, n, what in ((pool, n_pool, "training"), (test, n_test, "test")):
        if len(x) < n:
            raise ConfigurationError(
                f"{run.path} has {len(x)} {what} frames, {n} are wanted: lower --sizes or "
                "--n-test, or name another folder of --runs, where a longer one is made"
            )
    test = test[torch.linspace(0, len(test) - 1, n_test).long()]
    u = _mean_energy(target, data)
    floor = Estimate(
        float(u.value) + float(LOG_Z[name].value),
        math.hypot(float(u.error), float(LOG_Z[name].error)),
    )
    identity = {
        "system_hash": target.system_hash,
        "n_frames": data.n_frames,
        "seed": run.config.seed,
        "checksum": float(np.abs(data.positions.astype(np.float64)).sum()),
    }
    return Frames(target, pool, test, LOG_Z[name], floor, identity)


def _turned(x: Tensor, target: BoltzmannTarget, seed: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    (moved,) = augment_together(
        x, classes=target.symmetry.classes, proper=target.check_chirality, generator=stream
    )
    return moved


def _mean_energy(target: BoltzmannTarget, data: ReferenceData) -> Estimate:
    """Mean of u over all frames; energies of the simulation include what the flow never sees."""
    u = target.reduced_potential(torch.from_numpy(data.positions).double()).numpy()
    walkers = [u[data.walker == w] for w in np.unique(data.walker)]
    shortest = min(len(w) for w in walkers)
    return mean_with_error(np.stack([w[:shortest] for w in walkers]))
