"""From reference frames to a flow: which prior, field and objective a recipe means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_eqflow.audit import audit
from openmm_eqflow.diagnostics import relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.losses.flow_matching import FlowMatchingLoss
from openmm_eqflow.losses.liouville import LiouvilleLoss
from openmm_eqflow.losses.pool import PoolFeeder, build_pool
from openmm_eqflow.parallel import available_threads, one_torch_thread
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.fit import fit_internal_prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.refine import refine_internal_prior
from openmm_eqflow.recipes import Recipe
from openmm_eqflow.reference import ReferenceData
from openmm_eqflow.target import BoltzmannTarget
from openmm_eqflow.training import TrainingResult, TrainingSettings, train
from openmm_eqflow.vector_fields import ChartField, LeaveOneOutField

__all__ = ["fit_prior", "split_frames", "train_flow"]

Progress = Callable[[float, str], None]
_MAX_FIT_FRAMES = 20_000
_MONITOR = 1000


def split_frames(data: ReferenceData) -> tuple[Tensor, Tensor]:
    """Training frames and test frames (the last tenth of every walker, in time)."""
    x = torch.from_numpy(data.positions.astype(np.float64))
    test = np.zeros(len(x), dtype=bool)
    for walker in np.unique(data.walker):
        rows = np.flatnonzero(data.walker == walker)
        test[rows[int(0.9 * len(rows)) :]] = True
    return x[torch.from_numpy(~test)], x[torch.from_numpy(test)]


def fit_prior(
    recipe: Recipe,
    target: BoltzmannTarget,
    frames: Tensor,
    hot: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Prior:
    """Fit the prior the recipe names; ``hot`` are frames of higher temperatures.

    Raises
    ------
    ConfigurationError
        Unknown prior name.
    """
    if recipe.prior == "gaussian":
        return MeanFreeGaussian.fit(frames)
    if recipe.prior != "internal":
        raise ConfigurationError(f"prior is {recipe.prior!r}, expected 'internal' or 'gaussian'")
    frames = _thin(frames, _MAX_FIT_FRAMES)
    _, gradient = target.reduced_potential_and_gradient(frames)
    bonds = [(b[0].index, b[1].index) for b in target.topology.bonds()]
    masses = [
        target.system.getParticleMass(i)._value for i in range(target.system.getNumParticles())
    ]
    hot_gradient = None if hot is None else target.reduced_potential_and_gradient(hot)[1]
    prior = fit_internal_prior(
        frames, bonds, masses, gradient=gradient, hot=hot, hot_gradient=hot_gradient
    )
    return refine_internal_prior(
        prior,
        frames,
        target.reduced_potential_and_gradient,
        rounds=recipe.prior_rounds,
        n_samples=recipe.prior_samples,
        generator=generator,
    )


def _thin(frames: Tensor, limit: int) -> Tensor:
    return frames[:: max(1, -(-len(frames) // limit))]


def _field(recipe: Recipe, prior: Prior, target: BoltzmannTarget, frames: Tensor) -> nn.Module:
    options: dict[str, Any] = dict(recipe.field or {})
    if recipe.prior == "internal":
        return ChartField(prior.n_stiff, prior.n_soft, prior.fold, **options)  # type: ignore[attr-defined]
    return LeaveOneOutField.fit(frames, classes=target.symmetry.classes, **options)


def train_flow(
    recipe: Recipe,
    target: BoltzmannTarget,
    data: ReferenceData,
    *,
    seed: int,
    folder: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[EquivariantFlow, TrainingResult]:
    """Fit prior, train field, freeze the grid, audit log q. Resumable through ``folder``."""
    with one_torch_thread():
        return _train_flow(recipe, target, data, seed, folder, device, progress)


def _train_flow(
    recipe: Recipe,
    target: BoltzmannTarget,
    data: ReferenceData,
    seed: int,
    folder: Path,
    device: str,
    progress: Progress | None,
) -> tuple[EquivariantFlow, TrainingResult]:
    report = progress or (lambda fraction, text: None)
    torch.manual_seed(seed)  # initial weights only; everything else has its own generator
    frames, test = split_frames(data)
    report(0.0, "fitting the prior")
    hot = None
    if recipe.prior == "internal" and len(data.temperatures) > 1:
        warm = data.all_positions[1:]
        hot = _thin(torch.from_numpy(warm.reshape(-1, *warm.shape[2:])).double(), _MAX_FIT_FRAMES)
    generator = torch.Generator().manual_seed(seed + 2)
    prior = fit_prior(recipe, target, frames, hot, generator)
    field = _field(recipe, prior, target, frames).to(device)
    settings = TrainingSettings(
        seconds=recipe.train_seconds,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        average=recipe.average,
        gradient_clip=recipe.gradient_clip,
        seed=seed,
        evaluate_seconds=max(20.0, recipe.train_seconds / 12),
        n_threads=available_threads(),
    )
    checkpoint = folder / "checkpoint.safetensors"
    feeder = None
    if recipe.objective == "liouville":
        report(0.0, "filling the training pool")
        feeder = PoolFeeder(
            prior, target, chunk=recipe.chunk, n_chunks=recipe.n_chunks, seed=seed + 1000
        )
        feeder.prefetch()
        pool = build_pool(
            prior,
            target,
            n_prior=recipe.n_pool,
            frames=_thin(frames, _MAX_FIT_FRAMES),
            generator=generator,
        )
        held_out = build_pool(
            prior, target, n_prior=4096, frames=_thin(test, 4096), generator=generator
        )
        objective: Any = LiouvilleLoss(
            field, pool, held_out=held_out, feeder=feeder, grow_every=recipe.grow_every
        )
    elif recipe.objective == "flow-matching":
        objective = FlowMatchingLoss(
            field,
            prior,
            frames,
            classes=target.symmetry.classes,
            proper=target.check_chirality,
        )
    else:
        raise ConfigurationError(
            f"objective is {recipe.objective!r}, expected 'liouville' or 'flow-matching'"
        )
    monitor = _monitor(prior, target, generator)
    try:
        result = train(
            field,
            objective,
            settings,
            checkpoint=checkpoint,
            evaluate=monitor,
            progress=progress,
        )
    finally:
        if feeder is not None:
            feeder.close()
    report(1.0, "calibrating the time grid and auditing log q")
    # A Cartesian field costs a hundred times more per evaluation than a chart field.
    n = 256 if len(prior.event_shape) == 1 else 64
    flow = EquivariantFlow(prior, result.average.eval(), chunk_size=2 * n)  # type: ignore[arg-type]
    flow.calibrate(n, tolerance=recipe.grid_tolerance, generator=generator)
    audit(flow, n=n // 2, x=test[: n // 2], generator=generator)
    return flow, result


def _monitor(
    prior: Prior, target: BoltzmannTarget, generator: torch.Generator
) -> Callable[[nn.Module], dict[str, float]]:
    """Raw relative ESS on the same few latents every time: a trend, not a claim."""
    latents = prior.sample_latent(
        _MONITOR if len(prior.event_shape) == 1 else 256, generator=generator
    )

    def evaluate(module: nn.Module) -> dict[str, float]:
        flow = EquivariantFlow(prior, module, grid=tuple(k / 6 for k in range(7)))  # type: ignore[arg-type]
        with torch.no_grad():
            parts = [flow.transform(z) for z in latents.to(flow.device).split(128)]
        x, log_q = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"relative_ess": relative_ess((-target.reduced_potential(x) - log_q).numpy())}

    return evaluate
