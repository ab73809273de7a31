"""From reference frames or from a path without data to an audited flow.

From a target to a stochastic flow: no data, one pass along the path, a regression per level.

From reference frames to a flow: which prior, field and objective a recipe means.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import (
    Estimate,
    forward_ess_with_error,
    relative_ess,
    relative_ess_with_error,
)
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import PATH_COLUMNS, write_history
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.softcore import SoftCorePath, energy_and_force
from openmm_eqflow.flows.softcore_fit import FittedPath, fit_path
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import (
    available_threads,
    is_main,
    one_torch_thread,
    share,
    share_tensors,
    world_size,
)
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.fit import fit_internal_prior, refine_internal_prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.runs.evaluation import latent_log_weights
from openmm_eqflow.runs.reference.data import ReferenceData
from openmm_eqflow.seeds import EarlierSeed, child, child_seed
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.loop import TrainingResult, TrainingSettings, join_trainings, train
from openmm_eqflow.training.objectives import MAX_FRAMES, build_objective, thin
from openmm_eqflow.training.precision import check_precision, training_precision
from openmm_eqflow.training.recipes import Recipe
from openmm_eqflow.training.schedule import SIMULATING, Schedule
from openmm_eqflow.vector_fields import ChartField, ContactField, LeaveOneOutField
from openmm_eqflow.vector_fields.contact import CONTACT_OPTIONS

__all__ = [
    "build_field",
    "fit_prior",
    "hot_frames",
    "keep_prior",
    "split_frames",
    "train_flow",
    "train_stochastic_flow",
    "training_settings",
]

_FOREIGN = 50.0  # log of w / mean(w) beyond which a frame is of a state that a density lacks
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
        (:data:`~openmm_eqflow.training.recipes.STOCHASTIC_OPTIONS` has their defaults).
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
    generator = child(seed, "fit")
    chunk = 256
    n_batches = max(2, -(-int(options["n_fit"]) // chunk))
    batches = []
    for _ in range(n_batches):
        z = prior.sample_latent(chunk, generator=generator)
        batches.append((z, RowStreams.drawn(chunk, generator)))
    _check(target, path, batches[0][0])
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
        audit(flow, n=16, generator=child(seed, "audit"))
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


def _check(target: BoltzmannTarget, path: SoftCorePath, x: Tensor) -> None:
    """Refuse a target that is not what the path ends in."""
    # Spread out, so that no pair is so close that float32 shows.
    spread = (3.0 * x[:16]).float().double()
    ours = energy_and_force(spread, path.levels(np.array([1.0]))[0])[1][: len(spread)]
    theirs = target.reduced_potential(spread).numpy()
    gap = np.abs(ours - theirs)
    if not (gap <= _AGREEMENT + _ROUNDING * np.abs(theirs)).all():
        raise ConfigurationError(
            f"the System is no lennard-jones cluster of {x.shape[1]} particles (energies "
            f"differ by {gap.max():.2g} kT): take 'stochastic' out of its recipe; other "
            "potentials have no path yet"
        )

Progress = Callable[[float, str], None]
logger = logging.getLogger(__name__)
_MONITOR = 1000
_CHECKPOINTS = ("checkpoint", "finetune")


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
    frames = thin(frames, MAX_FRAMES)
    _, gradient = target.reduced_potential_and_gradient(frames)
    bonds = [(b[0].index, b[1].index) for b in target.topology.bonds()]
    masses = [
        target.system.getParticleMass(i)._value for i in range(target.system.getNumParticles())
    ]
    hot_gradient = None if hot is None else target.reduced_potential_and_gradient(hot)[1]
    prior = fit_internal_prior(
        frames,
        bonds,
        masses,
        gradient=gradient,
        hot=hot,
        hot_gradient=hot_gradient,
        constraints=target.constraints,
    )
    return refine_internal_prior(
        prior,
        frames,
        target.reduced_potential_and_gradient,
        rounds=recipe.prior_rounds,
        n_samples=recipe.prior_samples,
        generator=generator,
    )


def _shared_prior(prior: Prior | None, generator: torch.Generator) -> Prior:
    """Prior of rank 0, and its random stream after the fit, in every process."""
    if prior is not None and world_size() == 1:
        return prior
    config, tensors = (None, None) if prior is None else prior.state()
    gaussian = share(isinstance(prior, MeanFreeGaussian))
    config, tensors = share(config), share_tensors(tensors)
    generator.set_state(share_tensors({"state": generator.get_state()})["state"])
    if prior is not None:
        return prior
    kind: Any = MeanFreeGaussian if gaussian else InternalCoordinatePrior
    made: Prior = kind.from_state(config, tensors)
    return made


def hot_frames(recipe: Recipe, data: ReferenceData) -> Tensor | None:
    """Frames of the higher temperatures that help the recipe's prior, (n, N, D) nm, if any."""
    if recipe.prior != "internal" or len(data.temperatures) < 2:
        return None
    warm = data.all_positions[1:]
    return thin(torch.from_numpy(warm.reshape(-1, *warm.shape[2:])).double(), MAX_FRAMES)


def build_field(
    recipe: Recipe, prior: Prior, target: BoltzmannTarget, frames: Tensor
) -> nn.Module:
    """Untrained field of the recipe; its weights come from torch's global random stream."""
    options: dict[str, Any] = dict(recipe.field or {})
    # Contacts need the chart's Jacobian: three atoms or more, no nearly linear angle.
    if isinstance(prior, InternalCoordinatePrior) and (prior.bends or prior.n_particles < 3):
        options = {k: v for k, v in options.items() if k not in CONTACT_OPTIONS}
    if recipe.prior == "internal" and "contacts" in options:
        return ContactField.fit(prior, **options)
    if recipe.prior == "internal":
        return ChartField(prior.n_stiff, prior.n_soft, prior.fold, **options)  # type: ignore[attr-defined]
    return LeaveOneOutField.fit(frames, classes=target.symmetry.classes, **options)


def training_settings(recipe: Recipe, *, seed: int, device: str) -> TrainingSettings:
    """How a recipe is trained on ``device`` of this machine."""
    return TrainingSettings(
        seconds=recipe.train_seconds,
        max_steps=recipe.max_steps or TrainingSettings.max_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        average=recipe.average,
        gradient_clip=recipe.gradient_clip,
        seed=seed,
        evaluate_seconds=max(20.0, recipe.train_seconds / 12),
        n_threads=available_threads(),
        patience=recipe.patience,
        n_shards=recipe.n_shards or (available_threads(together=True) if device == "cpu" else 0),
    )


def train_flow(
    recipe: Recipe,
    target: BoltzmannTarget,
    data: ReferenceData,
    *,
    seed: int,
    folder: Path,
    device: str = "cpu",
    log: Path | None = None,
    progress: Progress | None = None,
    prior: Prior | None = None,
) -> tuple[FlowPath, TrainingResult]:
    """Fit prior, train field, freeze the grid, audit log q. Resumable through ``folder``.

    ``prior`` is one that needs no fit, as an annealed path has. ``log`` is the CSV file of the
    history; that of a fine-tuning is beside it. Under torchrun all processes train together; the
    flow that rank 0 returns is calibrated and audited, the others' is not.
    """
    if recipe.stochastic is not None:
        return train_stochastic_flow(
            recipe.stochastic_options(), target, seed=seed, log=log, progress=progress
        )
    with one_torch_thread():
        return _train_flow(recipe, target, data, seed, folder, device, log, progress, prior)


def _train_flow(
    recipe: Recipe,
    target: BoltzmannTarget,
    data: ReferenceData,
    seed: int,
    folder: Path,
    device: str,
    log: Path | None,
    progress: Progress | None,
    prior: Prior | None,
) -> tuple[EquivariantFlow, TrainingResult]:
    report = progress or (lambda fraction, text: None)
    check_precision(recipe.precision, device)
    # Initial weights only; everything else has its own generator.
    torch.manual_seed(child_seed(seed, "weights"))
    frames, test = split_frames(data)
    report(0.0, "fitting the prior")
    hot = hot_frames(recipe, data)
    generator = child(seed, "pool")

    def stream(name: str) -> torch.Generator:
        # A run that version 0.1 began goes on with the one stream that it had.
        return generator if isinstance(seed, EarlierSeed) else child(seed, name)

    if prior is None and is_main():
        prior = fit_prior(recipe, target, frames, hot, generator)
    prior = _shared_prior(prior if is_main() else None, generator)
    field = build_field(recipe, prior, target, frames).to(device)
    trainings = recipe.trainings()
    done: list[TrainingResult] = []
    monitor, part_seed = None, seed
    with training_precision(field, recipe.precision, device) as trained:
        for part, name in zip(trainings, _CHECKPOINTS, strict=False):
            if done:
                field.load_state_dict(done[-1].average.state_dict())
                if not isinstance(seed, EarlierSeed):
                    part_seed = child_seed(seed, "fine-tuning")
            objective, close = build_objective(
                part,
                trained,
                prior,
                target,
                frames,
                test,
                generator=generator,
                seed=part_seed,
                report=report,
            )
            monitor = monitor or _monitor(prior, target, stream("monitoring"))
            try:
                result = train(
                    field,
                    objective,
                    _settings(part, prior, seed=part_seed, device=device),
                    checkpoint=folder / f"{name}.safetensors",
                    log=log if log is None or not done else log.with_stem(f"{log.stem}-{name}"),
                    evaluate=monitor,
                    progress=_part_of(report, trainings, len(done)),
                )
            finally:
                close()
            done.append(result)
    result = join_trainings(done)
    # A Cartesian field costs a hundred times more per evaluation than a chart field.
    n, chunk = 256, 512
    if len(prior.event_shape) == 2:
        n, chunk = _affordable(64, prior, 16), _affordable(128, prior, 32)
    flow = EquivariantFlow(prior, result.average.eval(), chunk_size=chunk)  # type: ignore[arg-type]
    if not is_main():
        return flow, result  # rank 0 calibrates, audits and saves
    report(1.0, "calibrating the time grid and auditing log q")
    # Before the calibration, which takes forever on a field that went astray.
    # Where a path of levels is at hand, the field is one way of several, measured again.
    size = min(1024 if recipe.method == "annealing" else 4096, recipe.n_evaluate)
    if len(prior.event_shape) == 2:
        size = _affordable(512, prior, 128)
    # Of an annealed run the field is one way of several, and not missed.
    level = logging.INFO if recipe.method == "annealing" else logging.WARNING
    flow, result.prior_kept = keep_prior(flow, target, size, test, seed=seed, level=level)
    if result.prior_kept is not None:
        logger.log(
            level,
            "training made the flow worse than its prior (relative ESS %.3g against %.3g, lower "
            "of %d draws and of held-out frames): the prior is kept",
            *result.prior_kept.values(),
        )
    else:
        flow.calibrate(n, tolerance=recipe.grid_tolerance, generator=stream("calibration"))
    audit(flow, n=n // 2, x=test[: n // 2], generator=stream("audit"))
    return flow, result


def keep_prior(
    flow: EquivariantFlow,
    target: BoltzmannTarget,
    n: int,
    frames: Tensor,
    *,
    seed: int,
    level: int = logging.WARNING,
) -> tuple[EquivariantFlow, dict[str, float] | None]:
    """Put the field to rest where the flow has a lower relative ESS than its prior, beyond chance.

    The ESS of each is the lower of two estimates: from ``n`` draws (the same latents for both, of
    a stream that ``seed`` gives to this alone, the flow on a grid of at least 16 steps) and from
    at most ``n`` of the target's ``frames``, to which the flow was not trained. What a flow gives
    too little density its own draws hardly ever show. Frames whose weight is more than e^50 times
    the mean by both (ten widths of a Gaussian), such as three of an amide that turned over, belong
    to a state that both lack and do not say which is better: they are left out, which is logged
    at ``level``. A field at rest is zero, so that flow and prior are one density.

    Returns
    -------
    EquivariantFlow, dict or None
        The flow, or a new one at rest and the figures that decided (``flow``, ``prior``, ``n``).
    """
    z = flow.prior.sample_latent(n, generator=child(seed, "comparison"))
    steps = max(flow.n_ode_steps, 16)
    grid = tuple(k / steps for k in range(steps + 1))
    fine = EquivariantFlow(flow.prior, flow.module, grid=grid)  # type: ignore[arg-type]
    frames = frames[:: max(1, -(-len(frames) // n))].double()
    with torch.no_grad():
        parts = [fine.transform(part) for part in z.to(flow.device).split(flow.chunk_size)]
        x, log_q = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        log_f = torch.cat([fine.log_prob(part).cpu() for part in frames.split(flow.chunk_size)])
    log_f = torch.where(torch.isnan(log_f), -torch.inf, log_f)  # a field that runs away
    u = target.reduced_potential(frames)
    here: Any = flow.prior_on_cpu
    drawn = -target.reduced_potential(x) - log_q, latent_log_weights(here, target, z)
    seen = -u - log_f, -u - here.log_prob(frames)
    known = [
        w - torch.logsumexp(d, 0) + np.log(len(d)) < _FOREIGN
        for w, d in zip(seen, drawn, strict=True)
    ]
    foreign = int((~(known[0] | known[1])).sum())
    if foreign:
        logger.log(
            level,
            "%d of %d held-out frames are of a state that neither flow nor prior has: it is "
            "missing from what they sample",
            foreign,
            len(frames),
        )
    ours, prior = (
        _lower(d, w[known[0] | known[1]]) for d, w in zip(drawn, seen, strict=True)
    )
    # Compared by their logarithms: an ESS of .01 +- .01 may be far below one of .1 +- .1.
    # A flow without any weight has no error to go by.
    chance = 2.0 * np.hypot(ours.error / (ours.value or 1.0), prior.error / (prior.value or 1.0))
    lost = prior.value > 0.0 and (
        ours.value == 0.0 or np.log(prior.value / ours.value) > chance
    )
    if not lost:
        return flow, None
    module = copy.deepcopy(flow.module)
    with torch.no_grad():
        for weights in module.parameters():
            weights.zero_()
    rest = EquivariantFlow(flow.prior, module, grid=(0.0, 1.0), chunk_size=flow.chunk_size)  # type: ignore[arg-type]
    return rest, {"flow": float(ours.value), "prior": float(prior.value), "n": float(n)}


def _lower(draws: Tensor, frames: Tensor) -> Estimate:
    """Return the lower of the relative ESS that draws and frames of the target show."""
    found = [relative_ess_with_error(draws.numpy())]
    if len(frames):
        found.append(forward_ess_with_error(frames.numpy()))
    return min(found, key=lambda ess: ess.value)


def _settings(recipe: Recipe, prior: Prior, *, seed: int, device: str) -> TrainingSettings:
    """Make the settings of one training, with as many validation points as it can afford."""
    settings = training_settings(recipe, seed=seed, device=device)
    size = _affordable(settings.validation_size, prior, 512)
    if len(prior.event_shape) == 2 and not SIMULATING.isdisjoint(
        Schedule(recipe.objective).knots
    ):
        size = _affordable(128, prior, 32)
    return replace(settings, validation_size=size)


def _part_of(report: Progress, trainings: tuple[Recipe, ...], index: int) -> Progress:
    """Report one training as its share of the seconds of all."""
    seconds = [part.train_seconds for part in trainings]
    before, own = sum(seconds[:index]) / sum(seconds), seconds[index] / sum(seconds)
    title = "fine-tuning, " if index else ""
    return lambda fraction, text: report(before + own * min(fraction, 1.0), title + text)


def _affordable(n: int, prior: Prior, least: int) -> int:
    """Fewer points, at least ``least``, where a Cartesian field has more than 16 x 16 pairs."""
    shape = prior.event_shape
    return n if len(shape) == 1 else max(least, round(n * min(1.0, (16 / shape[0]) ** 2)))


def _monitor(
    prior: Prior, target: BoltzmannTarget, generator: torch.Generator
) -> Callable[[nn.Module], dict[str, float]]:
    """Raw relative ESS on the same few latents every time: a trend, not a claim."""
    n = _MONITOR if len(prior.event_shape) == 1 else _affordable(256, prior, 64)
    latents = prior.sample_latent(n, generator=generator)

    def evaluate(module: nn.Module) -> dict[str, float]:
        flow = EquivariantFlow(prior, module, grid=tuple(k / 6 for k in range(7)))  # type: ignore[arg-type]
        with torch.no_grad():
            parts = [flow.transform(z) for z in latents.to(flow.device).split(128)]
        x, log_q = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"relative_ess": relative_ess((-target.reduced_potential(x) - log_q).cpu().numpy())}

    return evaluate
