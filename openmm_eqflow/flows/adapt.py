r"""From a molecule's bonds to a path with the efficiency asked for, without reference data.

A round carries a population of points from the prior to the target once, by sequential Monte Carlo
(Del Moral, Doucet, Jasra 2006): the next level is where the conditional effective sample size

.. math:: \frac{(\sum_i W_i e^{\delta_i})^2}{\sum_i W_i e^{2\delta_i}}, \qquad
          \delta_i = (t' - t) \log w(y_i),

has fallen to a given share (Zhou, Johansen, Aston 2016), points are resampled systematically when
few carry the weight, and a Hamiltonian trajectory follows. Where levels came to lie measures the
path: with :math:`\sigma_k^2 = -\log` of that share, :math:`\Lambda = \sum_k \sigma_k` is its
thermodynamic length, and the variance of log w over K evenly spread levels about
:math:`\Lambda^2 / K`. The weighted points at the end teach a better prior
(:func:`~openmm_eqflow.priors.fit.refit`), in which the torsion density from chemistry keeps a
share for good; from there the path is shorter. A round that makes the path longer, or loses weight
(log Z falls), is dropped.

At last the number of levels is raised, by what its last trials say, until fresh points have the
ESS asked for within two of its standard errors, or twice in a row more levels have gained little.
Resampling serves the rounds only: the path that is returned is plain annealed importance sampling,
exact for any prior, with frozen levels and steps.

A mode that the refits lost, only the floor still proposes. :func:`floor_weight` is the share of
the target's weight that comes from there; where it is much more than the floor's own share, a mode
is missing and log Z is not to be believed until the path has more levels or points.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.weights import (
    log_z,
    relative_ess,
    relative_ess_with_error,
    systematic,
)
from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.kernels import Bridge, LevelState
from openmm_eqflow.flows.path import rows_that_fit
from openmm_eqflow.flows.relaxed import AnnealedPath, Levels
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import available_threads, map_chunks
from openmm_eqflow.priors.chemistry import chemical_prior
from openmm_eqflow.priors.fit import coupled_pairs, fourier_modes, refit
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "Adaptation",
    "Pilot",
    "Round",
    "adapt",
    "carry",
    "floor_weight",
    "path_from_chemistry",
    "spread_levels",
]

logger = logging.getLogger(__name__)
Progress = Callable[[float, str], None]
#: Acceptance. Chains take less; a point that is refused goes through the levels as it is.
_AIM = 0.9
_CHUNK = 1024  # points carried at once
_FALL = 0.3  # of log Z, in kT, below the highest seen: more than chance
_MOST_FLOOR = 0.02
_LEAST_POWER = 0.6  # of levels by which a spread falls; what trials measure is noisy
_CHANCE = 0.25  # of what the ESS asked for lets go: that much may be missing by chance
_LITTLE = 0.25  # of what more levels should gain
_ORDER = 4
_RICHER = 4  # times the points of the first round, at most
_SAME = 1.1  # lengths of paths that differ less are the same
_TRIED = 2000  # points of a trial of a number of levels, at most
_SHORT = 1.2  # length of a path that a dozen levels make efficient


class Pilot(NamedTuple):
    """A population carried from a prior to a target.

    Final points (n, d) with both log densities, log weights (n,) since the last resampling, log Z;
    levels (K,), the spread of log w between them (K,), and leapfrog steps (K, d).
    """

    state: LevelState
    log_weight: Tensor
    log_z: float
    times: tuple[float, ...]
    spreads: tuple[float, ...]
    steps: Tensor

    @property
    def length(self) -> float:
        r"""Thermodynamic length :math:`\Lambda`."""
        return sum(self.spreads)

    @property
    def weights(self) -> Tensor:
        """Normalised weights (n,)."""
        return torch.softmax(self.log_weight, 0)


class Round(NamedTuple):
    """What a round found: points, levels, length, relative ESS of the prior alone, log Z.

    ``kept`` says whether its prior is better than the one before; ``seconds`` is the time since
    the start.
    """

    n: int
    n_levels: int
    length: float
    prior_ess: float
    log_z: float
    kept: bool
    seconds: float


class Adaptation(NamedTuple):
    """A path, the rounds that led to it, and what its last fresh points say.

    ``trials`` are (levels, points, relative ESS, log Z); ``floor`` is the weight
    that only the floor of the prior proposes (:func:`floor_weight`), ``floor_share`` its share.
    ``second_log_z`` is that of another population from the first prior: independent of the rounds.
    """

    path: AnnealedPath
    rounds: tuple[Round, ...]
    trials: tuple[tuple[int, int, float, float], ...]
    floor: dict[str, float]
    floor_share: float
    second_log_z: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """JSON-able words, such as for the metadata of :func:`~.storage.save_flow`."""
        return {
            "rounds": [r._asdict() for r in self.rounds],
            "trials": [
                dict(zip(("n_levels", "n", "ess", "log_z"), t, strict=True)) for t in self.trials
            ],
            "floor": self.floor,
            "floor_share": self.floor_share,
            "second_log_z": self.second_log_z,
            "seconds": self.seconds,
        }


def carry(
    prior: InternalCoordinatePrior,
    target: BoltzmannTarget,
    n: int,
    *,
    share: float = 0.9,
    n_leapfrog: int = 5,
    generator: torch.Generator,
    max_levels: int = 400,
    device: torch.device | str = "cpu",
) -> Pilot:
    """Carry ``n`` points of the prior to the target; see the module docstring.

    Parameters
    ----------
    prior, target
        Both ends.
    n
        Points.
    share
        Conditional ESS at which the next level is.
    n_leapfrog
        Leapfrog steps of the trajectory on every level.
    generator
        Random stream.
    max_levels
        After so many the rest of the way is one step.
    device
        Where the points are carried; drawn where ``generator`` lives, and returned on the CPU.

    Raises
    ------
    TrainingError
        No point of the prior has an energy.
    """
    bridge = Bridge(prior.to(device), target)
    starts = prior.sample_latent(n, generator=generator).to(device)
    size = min(_CHUNK, -(-n // available_threads()))
    if starts.is_cuda:
        size = rows_that_fit(lambda few: bridge.at(starts[:1].expand(few, -1)), starts.device)
    threads = 1 if starts.is_cuda else None
    state = _joined(map_chunks(bridge.at, starts.split(size), threads=threads))
    if not bool(torch.isfinite(state.log_target).any()):
        raise TrainingError(
            f"none of {n} points of the prior has a finite energy: check the structure, or take "
            "more points"
        )
    t, log_size, total = 0.0, math.log(0.4), 0.0
    log_weight = torch.zeros(n, dtype=torch.float64, device=device)
    times: list[float] = []
    spreads: list[float] = []
    steps: list[Tensor] = []
    while t < 1.0:
        log_ratio = state.log_target - state.log_prior
        step = _next(log_ratio, log_weight, 1.0 - t, share)
        step = 1.0 - t if len(times) + 1 >= max_levels else step
        spreads.append(math.sqrt(max(-math.log(_conditional(log_ratio, log_weight, step)), 1e-12)))
        t = 1.0 if step == 1.0 - t else t + step
        log_weight = log_weight + step * log_ratio
        if _ess(log_weight) < 0.5 * n:
            total += float(torch.logsumexp(log_weight, 0)) - math.log(n)
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
            chosen = torch.from_numpy(systematic(log_weight.cpu().numpy(), u, n))
            state = _rows(state, chosen.to(device))
            log_weight = torch.zeros_like(log_weight)
        scores = state.score(t)[torch.isfinite(log_weight)]
        step_sizes = math.exp(log_size) * bridge.median_scales(scores)
        times.append(t)
        steps.append(step_sizes)
        keys = RowStreams.drawn(n, generator, device).keys
        parts = [
            (_rows(state, rows), RowStreams(keys[rows]))
            for rows in torch.arange(n, device=device).split(size)
        ]
        move = partial(_moved, bridge, t, step_sizes, n_leapfrog)
        moved, accepted = zip(*map_chunks(move, parts, threads=threads), strict=True)
        state = _joined(moved)
        log_size += 0.5 * (float(torch.cat(accepted).mean()) - _AIM)
    total += float(torch.logsumexp(log_weight, 0)) - math.log(n)
    state, all_steps = LevelState(*(v.cpu() for v in state)), torch.stack(steps).cpu()
    return Pilot(state, log_weight.cpu(), total, tuple(times), tuple(spreads), all_steps)


def _moved(
    bridge: Bridge, t: float, step: Tensor, n_steps: int, part: tuple[LevelState, RowStreams]
) -> tuple[LevelState, Tensor]:
    """One trajectory of some points; new states and acceptance probabilities."""
    return bridge.move(part[0], t, step=step, n_steps=n_steps, streams=part[1])


def _joined(states: Sequence[LevelState]) -> LevelState:
    return LevelState(*(torch.cat(column) for column in zip(*states, strict=True)))


def _rows(state: LevelState, index: Tensor) -> LevelState:
    return LevelState(*(v[index] for v in state))


def _ess(log_weight: Tensor) -> float:
    return 1 / float(torch.softmax(log_weight, 0).square().sum())


def _conditional(log_ratio: Tensor, log_weight: Tensor, step: float) -> float:
    """Conditional ESS, as a share, of a step between levels."""
    log_w = torch.log_softmax(log_weight, 0)
    one, two = (torch.logsumexp(log_w + m * step * log_ratio, 0) for m in (1, 2))
    return float(torch.exp(2 * one - two))


def _next(log_ratio: Tensor, log_weight: Tensor, rest: float, share: float) -> float:
    """Largest step, up to ``rest``, whose conditional ESS is at least ``share``."""
    # Points without density are lost whatever the step: the others decide.
    alive = torch.isfinite(log_ratio) & torch.isfinite(log_weight)
    log_ratio, log_weight = log_ratio[alive], log_weight[alive]
    if not len(log_ratio) or _conditional(log_ratio, log_weight, rest) >= share:
        return rest
    low, high = -40.0, math.log(rest)
    for _ in range(50):
        middle = 0.5 * (low + high)
        if _conditional(log_ratio, log_weight, math.exp(middle)) >= share:
            low = middle
        else:
            high = middle
    return math.exp(low)


def spread_levels(pilot: Pilot, n_levels: int) -> tuple[tuple[float, ...], Tensor]:
    """Levels (K,) evenly spread over a pilot's thermodynamic length, and steps (K, d) on them."""
    known = np.concatenate([[0.0], np.cumsum(pilot.spreads)])
    at = np.concatenate([[0.0], pilot.times])
    # Between the pilot's levels log t is closer to linear than t, but for the first.
    place = np.linspace(0.0, known[-1], n_levels + 1)[1:]
    log_t = np.log(np.maximum(at, at[1] * 1e-2))
    times = np.exp(np.interp(place, known, log_t))
    times[-1] = 1.0
    log_steps = pilot.steps.log().numpy()
    steps = np.stack(
        [np.interp(place, known[1:], log_steps[:, k]) for k in range(log_steps.shape[1])], 1
    )
    return tuple(float(t) for t in times), torch.from_numpy(np.exp(steps))


def floor_weight(
    prior: InternalCoordinatePrior,
    ground: TorsionDensity,
    share: float,
    y: Tensor,
    log_weight: Tensor,
) -> dict[str, float]:
    r"""Share of the target's weight that only the floor of the prior proposes.

    Of every group of soft torsions, the weighted mean of
    :math:`\eta\, p_{\text{floor}}(\tau) / p(\tau)`, by "torsions 0-1"; of every component of the
    stiff density "component 2": its share of the weight over that of the prior.

    Parameters
    ----------
    prior
        A refit one.
    ground, share
        The floor and its share.
    y, log_weight
        End points of paths (n, d), and their log weights (n,).
    """
    weights = torch.softmax(log_weight, 0)
    tau = prior.split(y)[1]
    found: dict[str, float] = {}
    if prior.torsions is not None:
        floor, fitted = ground.log_groups(tau), prior.torsions.log_groups(tau)
        for g, group in enumerate(prior.torsions.groups):
            own = [
                floor[:, k] for k, one in enumerate(ground.groups)
                if set(one.members) <= set(group.members)
            ]  # fmt: skip
            ratio = share * torch.exp(torch.stack(own).sum(0) - fitted[:, g])
            name = "torsions " + "-".join(str(k) for k in group.members)
            found[name] = float(weights @ ratio.clamp(max=1.0))
    if prior.mixture is not None:
        component = prior.components(y)
        for c, expected in enumerate(prior.mixture.weights):
            found[f"component {c}"] = float(weights[component == c].sum() / expected)
    return found


def adapt(
    prior: InternalCoordinatePrior,
    target: BoltzmannTarget,
    *,
    n_points: int = 1000,
    n_leapfrog: int = 5,
    share: float = 0.02,
    max_rounds: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[InternalCoordinatePrior, Pilot, tuple[Round, ...]]:
    """Adaptive rounds: carry points, refit, again; returns the best prior and its pilot.

    Parameters
    ----------
    prior
        From chemistry; its torsion density stays in every refit with ``share``, both sides of an
        amide alike.
    target
        Boltzmann target.
    n_points
        Points of the first round; up to four times as many once the path is so much shorter that
        they cost the same, and twice as many after a round that was dropped.
    n_leapfrog
        Leapfrog steps on every level.
    share
        Of the floor.
    max_rounds
        Refits at most.
    seed
        Of all random streams, which are children of it by name.
    device
        Where the points are carried; fits are made on the CPU.
    progress
        Called with a share that grows towards 1 and a line, after every population.
    """
    started, ground, rounds, n = time.monotonic(), _even(prior.torsions), [], n_points

    def run(candidate: InternalCoordinatePrior, k: int) -> Pilot:
        stream = child(seed, "adaptation", k)
        return carry(
            candidate, target, n, n_leapfrog=n_leapfrog, generator=stream, device=device
        )

    def note(candidate: InternalCoordinatePrior, pilot: Pilot, k: int, kept: bool) -> None:
        stream = child(seed, "adapted prior", k)
        rounds.append(_round(candidate, target, pilot, n, kept, started, stream))
        if progress is not None:
            said = f"adapting the prior: {n} points on {len(pilot.times)} levels"
            progress(1 - 0.5 ** len(rounds), said)

    best = run(prior, 0)
    highest = best.log_z  # a state that a population has found counts, whatever later ones find
    first = len(best.times)
    note(prior, best, 0, True)
    for k in range(1, max_rounds + 1):
        new = _refitted(prior, target, best, ground, share, child(seed, "refit", k))
        try:
            pilot = None if new is None else run(new, k)
        except TrainingError:
            pilot = None
        whole = pilot is not None and pilot.log_z > highest - _FALL
        better = pilot is not None and whole and pilot.length < best.length
        if new is not None and pilot is not None:
            note(new, pilot, k, better)
            highest = max(highest, pilot.log_z)
        gain = 0.0
        if new is not None and pilot is not None and better:
            gain, prior, best = best.length / pilot.length, new, pilot
        else:
            logger.info("round %d of adapting the prior was dropped", k)
        more = 1
        if gain < _SAME:
            if best.length < _SHORT or n >= _RICHER * n_points:
                break  # another round would cost more than the levels it saves
            more = 2  # points were too few
        # A short path: as many more points for the next refit cost what the first round did.
        more = max(more, min(_RICHER, first // len(best.times)) * n_points // n)
        if more > 1 and k < max_rounds:
            n = min(n * more, _RICHER * n_points)
            again = run(prior, 100 + k)
            note(prior, again, 100 + k, True)
            best = again if again.log_z > highest - _FALL else best
            highest = max(highest, again.log_z)
    return prior, best, tuple(rounds)


def _even(density: TorsionDensity | None) -> TorsionDensity | None:
    """Return the same with as much on the other side of every torsion.

    Of an amide the rare side would otherwise keep the floor's share of a share, and a few points
    of it carry all its weight.
    """
    if density is None:
        return None
    tables = [
        0.5 * (table + table.roll(len(table) // 2)) if group.fold == (1,) else table
        for group, table in zip(density.groups, density.tables, strict=True)
    ]
    return TorsionDensity(density.groups, tables)


def _round(
    prior: InternalCoordinatePrior,
    target: BoltzmannTarget,
    pilot: Pilot,
    n: int,
    kept: bool,
    started: float,
    generator: torch.Generator,
) -> Round:
    y = prior.sample_latent(n, generator=generator)
    x, log_volume = prior.to_cartesian(y)
    log_w = log_volume - prior.latent_log_prob(y) - target.reduced_potential(x)
    log_w = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
    ess, seconds = relative_ess(log_w.numpy()), time.monotonic() - started
    made = Round(n, len(pilot.times), pilot.length, float(ess), pilot.log_z, kept, seconds)
    logger.info("%s", made)
    return made


def _refitted(
    prior: InternalCoordinatePrior,
    target: BoltzmannTarget,
    pilot: Pilot,
    ground: TorsionDensity | None,
    share: float,
    generator: torch.Generator,
) -> InternalCoordinatePrior | None:
    """Prior fitted to a pilot's points; None where they cannot carry a fit."""
    x = prior.to_cartesian(pilot.state.y)[0]
    u, gradient = target.reduced_potential_and_gradient(x)
    valid = torch.isfinite(u) & torch.isfinite(pilot.log_weight)
    weights = torch.softmax(pilot.log_weight[valid], 0)
    effective = 1 / float(weights.square().sum())
    order, pairs = _ORDER, coupled_pairs(prior.zmatrix, prior.soft)
    while order > 1 and 4 * len(fourier_modes(prior.n_soft, prior.fold, pairs, order)) > effective:
        order -= 1
    try:
        return refit(
            prior,
            x[valid],
            gradient[valid],
            weights,
            order=order,
            ground=ground,
            share=share,
            generator=generator,
        )
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def _settled(trials: list[tuple[int, int, float, float]]) -> bool:
    """Whether two trials in a row gained little by more levels.

    The variance of log w, -log of the ESS, falls as 1 / K until what is left is not the levels' to
    mend: points of the prior in states that the target hardly has.
    """
    if len(trials) < 3:
        return False
    gains = [
        math.log(max(before[2], 1e-3)) / math.log(min(after[2], 1 - 1e-6)) - 1
        for before, after in itertools.pairwise(trials[-3:])
    ]
    due = [after[0] / before[0] - 1 for before, after in itertools.pairwise(trials[-3:])]
    return all(gain < _LITTLE * one for gain, one in zip(gains, due, strict=True))


def _factor(trials: list[tuple[int, int, float, float]], ess: float) -> float:
    r"""How many times the levels of the last trial an ESS should need.

    The variance of log w, -log of the ESS, falls as :math:`K^{-p}`, p = 1 at best; two trials
    measure it.
    """
    known = [(k, -math.log(min(max(found, 1e-3), 1 - 1e-6))) for k, _, found, _ in trials[-2:]]
    p = 1.0
    if len(known) == 2:
        (fewer, more_spread), (more, spread) = known
        p = math.log(max(more_spread / spread, 1.0)) / math.log(more / fewer)
    excess = known[-1][1] / -math.log(ess)
    return min(max(excess ** (1 / min(max(p, _LEAST_POWER), 1.0)), 1.25), 4.0)


def path_from_chemistry(
    target: BoltzmannTarget,
    *,
    ess: float = 0.9,
    seed: int = 0,
    n_points: int = 1000,
    n_leapfrog: int = 5,
    floor: float | None = None,
    max_rounds: int = 4,
    max_levels: int = 640,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Adaptation:
    """Make a path to a molecule's Boltzmann distribution from its bonds alone.

    Parameters
    ----------
    target
        Of a bonded molecule with reference positions, which say which isomer of stereocentres and
        double bonds is meant and nothing else.
    ess
        Relative ESS of path weights asked for.
    seed
        Of all random streams, which are children of it by name: draws with the same seed from the
        path share none.
    n_points
        Points of a round, and of a trial of a number of levels.
    n_leapfrog
        Leapfrog steps on every level.
    floor
        Share of the torsion density from chemistry that stays. Points of it in states that the
        target does not have are lost whatever the levels: by default a tenth of what the ESS asked
        for lets go, at most 0.02.
    max_rounds, max_levels
        Bounds of the work.
    device
        Where points are carried, and where the path computes.
    progress
        Called with a share that grows towards 1 and a line.

    Raises
    ------
    ConfigurationError
        ``ess`` is not between 0 and 1.
    UnsupportedSystemError
        No prior can be made of the molecule.
    TrainingError
        No point of the prior has an energy.

    Examples
    --------
    >>> from openmm_eqflow import load_system
    >>> from openmm_eqflow.runs.stages import build_target
    >>> with build_target(load_system("toluene")) as target:  # doctest: +SKIP
    ...     path = path_from_chemistry(target, ess=0.9).path
    """
    if not 0.0 < ess < 1.0:
        raise ConfigurationError(f"ess is {ess:g}, expected a number above 0 and below 1")
    started = time.monotonic()
    floor = min(_MOST_FLOOR, 0.1 * (1 - ess)) if floor is None else floor
    tell = progress or (lambda share, text: None)
    tell(0.0, "minima and picoseconds around them")
    start = chemical_prior(target, seed=seed)
    prior, pilot, rounds = adapt(
        start,
        target,
        n_points=n_points,
        n_leapfrog=n_leapfrog,
        share=floor,
        max_rounds=max_rounds,
        seed=seed,
        device=device,
        progress=lambda share, text: tell(0.5 * share, text),
    )
    wanted = -math.log(ess)
    n_levels = max(1, min(max_levels, math.ceil(pilot.length**2 / wanted)))
    trials: list[tuple[int, int, float, float]] = []
    while True:
        tell(1 - 0.5 ** (1 + len(trials)), f"trying {n_levels} levels")
        times, steps = spread_levels(pilot, n_levels)
        path = AnnealedPath(prior, target, Levels(n_leapfrog, times, steps), device)
        stream, n = child(seed, "trial of levels", len(trials)), min(n_points, _TRIED)
        x, log_q = path.sample_and_log_prob(n, generator=stream)
        log_w = (-target.reduced_potential(x) - log_q).cpu()
        found, error = (float(v) for v in relative_ess_with_error(log_w.numpy()))
        trials.append((n_levels, n, found, float(log_z(log_w.numpy()).value)))
        logger.info("%d levels: ESS %.3f, log Z %.3f", n_levels, found, trials[-1][3])
        # A heavy tail has a large error, which is no excuse.
        reached = found + min(2.0 * error, _CHANCE * (1 - ess)) >= ess
        if reached or n_levels >= max_levels or _settled(trials):
            break
        n_levels = min(max_levels, math.ceil(n_levels * _factor(trials, ess)))
    if not reached:
        logger.warning(
            "relative ESS is %.2f on %d levels, %.2f was asked for%s: raise n_points, or ask for "
            "less",
            trials[-1][2],
            n_levels,
            ess,
            ", and more levels no longer help" if _settled(trials) else "",
        )
    shares = {}
    if start.torsions is not None or prior.mixture is not None:
        y = prior.from_cartesian(x.cpu())[0]
        keep = torch.isfinite(log_w)
        ground = _even(start.torsions) or TorsionDensity([], [])
        shares = floor_weight(prior, ground, floor, y[keep], log_w[keep])
    # Another population from the first prior: what the rounds have lost, it may find.
    second = carry(
        start,
        target,
        n_points,
        n_leapfrog=n_leapfrog,
        generator=child(seed, "second start"),
        device=device,
    )
    audit(path, n=32, generator=child(seed, "audit"))
    seconds = time.monotonic() - started
    made = Adaptation(path, rounds, tuple(trials), shares, floor, second.log_z, seconds)
    path.metadata["adaptation"] = made.record()
    return made
