r"""From a recipe to a loss over a field: one objective, or several by schedule.

Several objectives as one: :math:`L = \sum_k w_k(s)\, L_k`, s the fraction of training done.

From the recipe's ``objective`` to a loss over a field: one, or several by schedule.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.parallel import is_main, share
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.divergences import (
    ChartTarget,
    ForwardPathLoss,
    LikelihoodLoss,
    ReverseKLLoss,
    ReversePathLoss,
)
from openmm_eqflow.training.flow_matching import FlowMatchingLoss
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.loop import Objective
from openmm_eqflow.training.pool import PathSampler, Pool, PoolFeeder, build_pool, share_pool
from openmm_eqflow.training.recipes import Recipe
from openmm_eqflow.training.schedule import Schedule, schedule_misfit

__all__ = [
    "MAX_FRAMES",
    "ScheduledLoss",
    "build_objective",
    "thin",
]

_SEEDS = 2**62


class ScheduledLoss:
    """Weighted sum of objectives over the same field; one of weight zero is not evaluated.

    Every objective has a stream of its own, seeded from the caller's by one draw per batch: which
    batch an objective sees at a step does not depend on the weights, which follow the clock where
    training does.

    Parameters
    ----------
    objectives
        By name; those of the schedule.
    schedule
        Weights over the fraction of training done.
    """

    def __init__(self, objectives: Mapping[str, Any], schedule: Schedule) -> None:
        if list(objectives) != list(schedule.knots):
            raise ValueError(
                f"objectives {list(objectives)} and those of the schedule, "
                f"{list(schedule.knots)}, differ: give one for each, in the same order"
            )
        self.objectives, self.schedule = dict(objectives), schedule
        self.weights = schedule.weights(0.0)

    def advance(self, fraction: float) -> None:
        """Set the weights for ``fraction`` of the training done."""
        self.weights = self.schedule.weights(fraction)

    def grow(self, step: int) -> None:
        """Let objectives add the data that are due at ``step``."""
        for objective in self.objectives.values():
            if hasattr(objective, "grow"):
                objective.grow(step)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Weighted sum over one batch of each objective."""
        seeds = torch.randint(_SEEDS, (len(self.objectives),), generator=generator).tolist()
        total: Tensor | None = None
        for (name, objective), seed in zip(self.objectives.items(), seeds, strict=True):
            if self.weights[name] > 0:
                stream = torch.Generator().manual_seed(seed)
                term = self.weights[name] * objective(batch_size, stream)
                total = term if total is None else total + term
        if total is None:
            raise ValueError(f"every weight is zero: {self.weights}")
        return total

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Weighted sum with the weights at the *end* of training: comparable all the way."""
        final = self.schedule.weights(1.0)
        seeds = torch.randint(_SEEDS, (len(self.objectives),), generator=generator).tolist()
        parts = [
            final[name] * objective.validation(n, torch.Generator().manual_seed(seed))
            for (name, objective), seed in zip(self.objectives.items(), seeds, strict=True)
            if final[name] > 0
        ]
        return torch.stack([part.double() for part in parts]).sum()

#: Reference frames used at most where their energies or forces are needed.
MAX_FRAMES = 20_000
_N_HELD_OUT = 4096
_MARGIN = 50.0  # kT above the highest training frame the energy is bounded


class _Parts(NamedTuple):
    recipe: Recipe
    field: nn.Module
    prior: Prior
    target: BoltzmannTarget
    frames: Tensor
    test: Tensor
    generator: torch.Generator
    seed: int
    report: Callable[[float, str], None]
    stack: ExitStack


def thin(frames: Tensor, limit: int) -> Tensor:
    """Return at most ``limit`` frames, evenly spaced."""
    return frames[:: max(1, -(-len(frames) // limit))]


def build_objective(
    recipe: Recipe,
    field: nn.Module,
    prior: Prior,
    target: BoltzmannTarget,
    frames: Tensor,
    test: Tensor,
    *,
    generator: torch.Generator,
    seed: int,
    report: Callable[[float, str], None] | None = None,
) -> tuple[Objective, Callable[[], None]]:
    """Make the objective a recipe names, and what closes it.

    Parameters
    ----------
    recipe
        ``objective`` is a name, or a schedule of several.
    field
        What is trained.
    prior, target
        Both ends of the flow.
    frames, test
        Training and held-out configurations (n, N, D), nm.
    generator, seed
        Random stream of the initial pool; seed of later chunks.
    report
        Called with a fraction and a short text before slow work.

    Raises
    ------
    ConfigurationError
        Unknown objective, malformed schedule, or an objective that does not suit the prior.
    """
    wanted = schedule_misfit(recipe.objective)
    if wanted is not None:
        raise ConfigurationError(f"objective is {recipe.objective!r}, expected {wanted}")
    quiet = report or (lambda fraction, text: None)
    schedule = Schedule(recipe.objective)
    with ExitStack() as stack:
        parts = _Parts(
            recipe, field, prior, target, frames, test, generator, seed, quiet, stack
        )
        made = {name: _BUILDERS[name](parts) for name in schedule.knots}
        close = stack.pop_all().close
    if isinstance(recipe.objective, str):
        return made[recipe.objective], close
    return ScheduledLoss(made, schedule), close


def _feeder(p: _Parts, source: PathSampler | None) -> PoolFeeder:
    feeder = PoolFeeder(
        p.prior,
        p.target,
        chunk=p.recipe.chunk,
        n_chunks=p.recipe.n_chunks,
        seed=p.seed,
        source=source,
    )
    p.stack.callback(feeder.close)
    feeder.prefetch()
    return feeder


def _path_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of the path sampler; an unknown one is an error."""
    options: dict[str, Any] = dict(recipe.annealed or {})
    for key in options:
        if key not in PathSampler.OPTIONS:
            near = difflib.get_close_matches(key, PathSampler.OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {PathSampler.OPTIONS}"
            raise ConfigurationError(f"annealed: unknown key {key!r}; {hint}")
    return options


def _liouville(p: _Parts) -> Any:
    if len(p.prior.event_shape) != 1:
        raise ConfigurationError(
            "objective 'liouville' needs a prior that overlaps the target: set prior: internal, "
            "or objective: flow-matching"
        )
    p.report(0.0, "filling the training pool")

    def pool(n_prior: int, frames: Tensor) -> Pool:
        if not is_main():
            return share_pool(None)
        made = build_pool(
            p.prior, p.target, n_prior=n_prior, frames=frames, generator=p.generator
        )
        return share_pool(made)

    def sampler(base: Pool, k: int) -> PathSampler:
        # Its own stream, so that every process finds the same step sizes.
        stream = child(p.seed, "path sampler", k)
        return PathSampler(p.prior, p.target, base, generator=stream, **options)

    annealed, options = p.recipe.annealed is not None, _path_options(p.recipe)
    feeder = None if annealed else _feeder(p, None)  # works while the pools are filled
    first = pool(p.recipe.n_pool, thin(p.frames, MAX_FRAMES))
    held_out = pool(_N_HELD_OUT, thin(p.test, _N_HELD_OUT))
    if annealed:
        p.report(0.0, "tuning the trajectories of the training pool")
        feeder = _feeder(p, sampler(first, 0))
        source = sampler(held_out, 1)
        held_out = share_pool(source.chunk(2 * _N_HELD_OUT, p.generator) if is_main() else None)
    return LiouvilleLoss(
        p.field,
        first,
        held_out=held_out,
        feeder=feeder,
        grow_every=p.recipe.grow_every,
        capacity=p.recipe.max_pool,
    )


def _flow_matching(p: _Parts) -> Any:
    if len(p.prior.event_shape) != 2:
        raise ConfigurationError(
            "objective 'flow-matching' moves Cartesian coordinates: set prior: gaussian, or "
            "objective: liouville"
        )
    return FlowMatchingLoss(
        p.field,
        p.prior,
        p.frames,
        classes=p.target.symmetry.classes,
        proper=p.target.check_chirality,
        held_out=p.test,
    )


def _likelihood(p: _Parts) -> Any:
    return LikelihoodLoss(
        p.field, p.prior, p.frames, held_out=p.test, n_steps=p.recipe.ode_steps
    )


def _chart_target(p: _Parts) -> ChartTarget:
    """Target with energies bounded above those of the training frames."""
    u = p.target.reduced_potential(thin(p.frames, 1000))
    high = float(u[torch.isfinite(u)].max()) + _MARGIN
    return ChartTarget(p.prior, p.target, energy_high=share(high))


def _reverse_kl(p: _Parts) -> Any:
    return ReverseKLLoss(p.field, _chart_target(p), n_steps=p.recipe.ode_steps)


def _path_reverse(p: _Parts) -> Any:
    return ReversePathLoss(p.field, _chart_target(p), n_steps=p.recipe.ode_steps)


def _path_forward(p: _Parts) -> Any:
    p.report(0.0, "forces at the reference frames")
    return ForwardPathLoss(
        p.field,
        _chart_target(p),
        thin(p.frames, MAX_FRAMES),
        held_out=p.test,
        n_steps=p.recipe.ode_steps,
    )


_BUILDERS: dict[str, Callable[[_Parts], Any]] = {
    "liouville": _liouville,
    "flow-matching": _flow_matching,
    "nll": _likelihood,
    "reverse-kl": _reverse_kl,
    "path-forward": _path_forward,
    "path-reverse": _path_reverse,
}
