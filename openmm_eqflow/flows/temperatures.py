r"""Beyond the target: a path goes on to other temperatures.

With s = T_0 / T the levels are, in the chart of the prior,

.. math:: l_s(y) = \mathrm{log\_volume}(y) - s\,u(x(y)), \qquad
          \log w \mathrel{+}= (s_{k-1} - s_k)\,u(x_{k-1}),

u at T_0, and a Hamiltonian trajectory follows on each (annealed importance sampling, Neal 2001):
E[w] = Z(T) for every level, exactly. Weights of the samples at hand alone are exact, too
(:mod:`openmm_eqflow.analysis.temperatures`), but spread over

.. math:: \Lambda \approx \sqrt{d / 2}\, |\log (T / T_0)|

widths, d the degrees of freedom; levels take that in steps. Where they lie depends on d and the
temperatures only, not on the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.kernels import Bridge, latent_target, rows_where, trajectory, tuned
from openmm_eqflow.flows.path import Path, rows_that_fit
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import available_threads, map_chunks
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import kelvin as in_kelvin

__all__ = [
    "AtTemperature",
    "continued",
]

_STRIDE = 0.15  # widths of log w between levels
_CHUNK, _TUNING = 1024, 64
#: Of the steps that are tuned: a trajectory of half a period, about what those make, leaves the
#: energy of a mode as it was, and that of a quarter draws it anew.
_SHORTER = 0.5


class AtTemperature(NamedTuple):
    """Weighted samples at one temperature.

    K; positions (n, N, 3), reduced potentials (n,) *at the target's own temperature*, log weights
    (n,) at this one.
    """

    kelvin: float
    x: Tensor
    u: Tensor
    log_weight: Tensor


class _Hot(NamedTuple):
    """Points with u, log volume and their gradients in the chart, on every level s."""

    y: Tensor
    u: Tensor
    log_volume: Tensor
    by_u: Tensor
    by_volume: Tensor

    def log_prob(self, t: Any) -> Tensor:
        return self.log_volume - t * self.u

    def score(self, t: Any) -> Tensor:
        return self.by_volume - t * self.by_u

    def where(self, mask: Tensor, other: _Hot) -> _Hot:
        return _Hot(*rows_where(mask, self, other))


class _Nothing:
    """No potential: what is left of a target in the chart is its volume element."""

    def __init__(self, constraints: Any) -> None:
        self.constraints = constraints

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x)), torch.zeros_like(x)


def continued(
    flow: Path,
    target: BoltzmannTarget,
    x: Tensor,
    log_weight: Tensor,
    kelvins: Sequence[float],
    *,
    n_leapfrog: int = 5,
    seed: int = 0,
) -> list[AtTemperature]:
    """Carry weighted samples of a target on to other temperatures; see the module docstring.

    Parameters
    ----------
    flow
        Whose prior's chart is the levels', and whose fresh samples tune the trajectories.
    target
        Whose samples there are, at its own temperature. The potential is the same function at
        all.
    x, log_weight
        Positions (n, N, 3) in nm and log weights (n,).
    kelvins
        Temperatures asked for, K.
    n_leapfrog
        Leapfrog steps of a trajectory.
    seed
        Of all random streams, children of it by name.

    Returns
    -------
    list of AtTemperature
        In the order of ``kelvins``. Those above the target's temperature, and those below, are
        stations of one path each: they share their samples.

    Raises
    ------
    ConfigurationError
        The flow's prior has no chart of internal coordinates, or a temperature is none.
    ValueError
        A log weight is NaN or +inf.

    Examples
    --------
    >>> continued(flow, target, samples.x, samples.log_weight, [350.0])  # doctest: +SKIP
    """
    prior = flow.prior
    if not isinstance(prior, InternalCoordinatePrior):
        raise ConfigurationError(
            f"levels beyond the target need a prior in internal coordinates, not a "
            f"{type(prior).__name__}: reweight instead"
        )
    if not all(math.isfinite(k) and k > 0 for k in kelvins):
        raise ConfigurationError(f"temperatures are {list(kelvins)}, expected numbers above 0 K")
    if bool((torch.isnan(log_weight) | (log_weight == torch.inf)).any()):
        raise ValueError("a log weight is NaN or +inf: there is no weight to go on with")
    own, bridge = in_kelvin(target.temperature), Bridge(prior, target)
    nothing = _Nothing(target.constraints)

    def at(y: Tensor) -> _Hot:
        seen: list[Tensor] = []

        def keep(u: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(u)
            return u, gradient

        value, score = latent_target(prior, bridge.target, y, bound=keep)
        log_volume, by_volume = latent_target(prior, nothing, y)
        valid = torch.isfinite(value) & torch.isfinite(score).all(1)
        by_u = torch.where(valid[:, None], by_volume - score, 0.0)
        log_volume = torch.where(valid, log_volume, -torch.inf)
        return _Hot(y, torch.where(valid, seen[0], torch.inf), log_volume, by_u, by_volume)

    step = _tuned_step(flow, at, n_leapfrog, seed)
    found: dict[float, AtTemperature] = {}
    degrees = prior.event_shape[0]
    for side in (1, -1):
        stations = sorted(
            {k for k in kelvins if (k - own) * side > 0}, key=lambda k: abs(k - own)
        )
        if stations:
            found |= _carried(
                prior, at, x, log_weight, own, stations, degrees, step, n_leapfrog,
                child(seed, "temperatures", side + 1),
            )  # fmt: skip
    if own in kelvins:
        found[own] = AtTemperature(own, x, target.reduced_potential(x), log_weight)
    return [found[k] for k in kelvins]


def _tuned_step(flow: Path, at: Any, n_leapfrog: int, seed: int) -> Tensor:
    """Leapfrog steps (d,) from samples that are used for nothing else."""
    generator = child(seed, "tuning of temperatures")
    x, _ = flow.sample_and_log_prob(_TUNING, generator=generator)
    state = at(flow.prior.from_cartesian(x)[0])
    scales = Bridge.median_scales(state.score(1.0))
    streams = RowStreams.drawn(_TUNING, generator, x.device)

    def move(size: Tensor) -> Tensor:
        nonlocal state
        state, acceptance, _ = trajectory(
            at,
            state,
            1.0,
            step=float(size) * scales,
            n_steps=n_leapfrog,
            velocity=streams.normal(*state.y.shape[1:]),
            uniform=streams.uniform(),
        )
        return acceptance.mean().cpu()[None]

    with torch.no_grad():
        size = tuned(move, torch.tensor([0.4], dtype=torch.float64), n_rounds=8, gain=1.0)
    return float(size) * scales


def _carried(
    prior: InternalCoordinatePrior,
    at: Any,
    x: Tensor,
    log_weight: Tensor,
    own: float,
    stations: list[float],
    degrees: int,
    step: Tensor,
    n_leapfrog: int,
    generator: torch.Generator,
) -> dict[float, AtTemperature]:
    """One side of the target's temperature, from the nearest station on."""
    keys, device = RowStreams.drawn(len(x), generator).keys, step.device
    size = min(_CHUNK, -(-len(x) // available_threads()))
    if step.is_cuda:
        some = prior.from_cartesian(x[:1].double().to(device))[0]
        size = rows_that_fit(lambda n: at(some.expand(n, -1)), device)

    def run(rows: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        streams = RowStreams(keys[rows].to(device))
        state = at(prior.from_cartesian(x[rows].double().to(device))[0])
        log_w, s, ends = log_weight[rows].to(device, copy=True), 1.0, []
        for kelvin in stations:
            goal = own / kelvin
            n_levels = math.ceil(math.sqrt(degrees / 2) * abs(math.log(goal / s)) / _STRIDE)
            ladder = torch.linspace(math.log(s), math.log(goal), n_levels + 1)[1:].exp()
            for new in ladder.tolist():
                alive = torch.isfinite(log_w) & torch.isfinite(state.u)
                log_w = torch.where(alive, log_w + (s - new) * state.u, -torch.inf)
                s = new
                state, _, _ = trajectory(
                    at,
                    state,
                    s,
                    step=_SHORTER * step / math.sqrt(s),
                    n_steps=n_leapfrog,
                    velocity=streams.normal(*state.y.shape[1:]),
                    uniform=streams.uniform(),
                )
            ends.append((prior.to_cartesian(state.y)[0].cpu(), state.u.cpu(), log_w.cpu()))
        return ends

    chunks = [slice(k, k + size) for k in range(0, len(x), size)]
    parts = map_chunks(run, chunks, threads=1 if step.is_cuda else None)
    return {
        kelvin: AtTemperature(kelvin, *(torch.cat(column) for column in zip(*ends, strict=True)))
        for kelvin, ends in zip(stations, zip(*parts, strict=True), strict=True)
    }
