"""From a target to a stochastic flow: no data, one pass along the path, a regression per level."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_eqflow.audit import audit
from openmm_eqflow.distributed import is_main
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.stochastic.annealing import Batch
from openmm_eqflow.stochastic.fit import FittedPath, fit_path
from openmm_eqflow.stochastic.flow import StochasticFlow
from openmm_eqflow.stochastic.path import SoftCorePath
from openmm_eqflow.target import BoltzmannTarget
from openmm_eqflow.training import TrainingResult
from openmm_eqflow.training_log import PATH_COLUMNS, write_history

__all__ = ["train_stochastic_flow"]

_AGREEMENT, _ROUNDING = 1e-2, 1e-5  # kT, and a share of u; the layers compute in float32


def train_stochastic_flow(
    options: Mapping[str, Any],
    target: BoltzmannTarget,
    *,
    seed: int,
    log: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[StochasticFlow, TrainingResult]:
    """Fit a stochastic flow of a Lennard-Jones cluster.

    Parameters
    ----------
    options
        Entries of ``stochastic`` in a recipe
        (:data:`~openmm_eqflow.recipes.STOCHASTIC_OPTIONS` has their defaults).
    target
        Its System is compared with the last level of the path.

    Raises
    ------
    ConfigurationError
        The System is no ``lennard-jones`` cluster.
    """
    report = progress or (lambda fraction, text: None)
    path = SoftCorePath()
    n_particles = target.system.getNumParticles()
    prior = MeanFreeGaussian(n_particles, 3, 1.0)
    generator = torch.Generator().manual_seed(seed)
    chunk = 256
    n_batches = max(2, -(-int(options["n_fit"]) // chunk))
    batches = []
    for index in range(n_batches):
        z = prior.sample_latent(chunk, generator=generator).numpy()
        batches.append(Batch(z, np.random.default_rng([seed, index])))
    _check(target, path, batches[0])
    started = time.monotonic()
    reach, n_splines = float(options["reach"]), int(options["n_splines"])
    fit = fit_path(
        path,
        batches,
        spacing=reach / n_splines,
        n_splines=n_splines,
        stride=float(options["stride"]),
        n_leapfrog=int(options["n_leapfrog"]),
        progress=lambda t, text: report(0.95 * t, text),
    )
    seconds = time.monotonic() - started
    history = _history(fit, seconds)
    if log is not None and is_main():
        write_history(log, history, PATH_COLUMNS)
    flow = StochasticFlow.from_fit(
        path,
        fit,
        n_particles=n_particles,
        reach=reach,
        n_levels=int(options["n_levels"]),
        n_leapfrog=int(options["n_leapfrog"]),
        chunk_size=chunk,
    )
    result = TrainingResult(flow.module, history, len(fit.times), seconds)
    if is_main():
        report(0.95, "auditing the log determinants")
        audit(flow, n=16, generator=generator)
    return flow, result


def _history(fit: FittedPath, seconds: float) -> list[dict[str, float]]:
    """One row per level; the seconds are shared out evenly."""
    n = len(fit.times)
    return [
        {
            "step": float(k + 1),
            "seconds": seconds * (k + 1) / n,
            "time": float(fit.times[k]),
            "spread": float(fit.spread[k]),
            "residual": float(fit.residual[k]),
            "acceptance": float(fit.acceptance[k]),
        }
        for k in range(n)
    ]


def _check(target: BoltzmannTarget, path: SoftCorePath, batch: Batch) -> None:
    """Refuse a target that is not what the path ends in."""
    # Spread out, so that no pair is so close that float32 shows.
    spread = Batch(3.0 * batch.positions()[:16], batch.rng)
    ours = spread.energy(path.levels(np.array([1.0]))[0]).astype(float)
    theirs = target.reduced_potential(torch.from_numpy(spread.positions())).numpy()
    gap = np.abs(ours - theirs)
    if not (gap <= _AGREEMENT + _ROUNDING * np.abs(theirs)).all():
        raise ConfigurationError(
            f"the System is no lennard-jones cluster of {batch.x.shape[0]} particles (energies "
            f"differ by {gap.max():.2g} kT): take 'stochastic' out of its recipe; other "
            "potentials have no path yet"
        )
