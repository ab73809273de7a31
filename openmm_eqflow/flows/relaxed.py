r"""A flow with Hamiltonian Monte Carlo between its steps: exact weights of paths, far less spread.

A field trained by the Liouville residual follows :math:`p_t \propto p_0^{1-t} p_1^t` from prior
to target, so every time of the flow's grid has a density its samples should have there. On each
a trajectory of Hamiltonian Monte Carlo takes off what the field left wrong, and the next step of
the field starts from better points. That makes the flow a *stochastic normalizing flow* (Wu,
Köhler, Noé 2020, arXiv:2002.06707):

.. math:: \log\hat q = \log p_0(z) - \mathrm{ladj} - \mathrm{log\_volume}
          + \sum_k \bigl[ \log p_{t_k}(b_k) - \log p_{t_k}(a_k) \bigr]

with a_k and b_k before and after the trajectory on level k: each is reversible with respect to
its level, so that the ratio of the probabilities of a path and of its reversal is that of the
ends. :math:`\log w = -u - \log\hat q` is an exact weight on the space of paths, E[w] = Z however
poor the field, and :math:`E[\hat q(x)] = q(x)` over the paths backwards from x: all that accepts
by it is exact, as with :class:`~openmm_eqflow.flows.stochastic.StochasticFlow`. Densities are with
respect to Lebesgue measure on the mean-free subspace, in nm.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow, rk4, rk4_inverse
from openmm_eqflow.flows.kernels import PathState, Target, path_trajectory
from openmm_eqflow.geometry import random_rotations, rotate
from openmm_eqflow.parallel import map_chunks

__all__ = [
    "Relaxation",
    "RelaxedFlow",
    "relax",
]

_AIM = 0.85  # acceptance
_FIRST_STEP = 0.4
_LONGEST = 2.0  # scale of a coordinate that feels no force, such as a free rotor
_TUNING_ROUNDS = 8
_TUNING_POINTS = 64
_MEDIAN_OF_CHI_SQUARE = 0.455
_TUNING_STREAM = (0x72656C61,)  # names the child of a seed that tunes


class Relaxation(NamedTuple):
    """Trajectories on the inner times of a grid.

    Leapfrog steps of one trajectory; step sizes, one for each inner time; scale of every chart
    coordinate, (d,): a step is their product, in units of the chart.
    """

    n_leapfrog: int
    step_sizes: tuple[float, ...]
    scales: Tensor


class RelaxedFlow(EquivariantFlow):
    """See the module docstring. Made by :func:`relax`.

    ``sample_and_log_prob`` and ``log_prob`` are those of any flow, of paths. There is no latent
    point and no gradient of log q: what needs them is refused.
    """

    def __init__(self, flow: EquivariantFlow, target: Target, relaxation: Relaxation) -> None:
        super().__init__(
            flow.prior,
            flow.vector_field,
            grid=flow.grid,
            inverse_corrections=flow.inverse_corrections,
            chunk_size=min(flow.chunk_size, 256),
        )
        self.audit_report, self.metadata = flow.audit_report, flow.metadata
        self.target, self.relaxation = _OneAtATime(target), relaxation

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draw samples (n, N, 3), Haar-oriented, and :math:`\log\hat q` of their paths, (n,)."""
        draws = []
        for start in range(0, n, self.chunk_size):
            m = min(self.chunk_size, n - start)
            z = self.prior.sample_latent(m, generator=generator)
            turn = random_rotations(m, self.n_dims, generator=generator)
            seed = int(torch.randint(0, 2**62, (1,), generator=generator))
            draws.append((z, turn, torch.Generator().manual_seed(seed)))

        def run(draw: tuple[Tensor, Tensor, torch.Generator]) -> tuple[Tensor, Tensor]:
            z, turn, stream = draw
            y, log_q = z, self.prior.latent_log_prob(z)
            for k in range(self.n_ode_steps):
                y, ladj = rk4(self._field, y.to(self.device), self.grid[k : k + 2])
                y, log_q = y.cpu(), log_q - ladj.cpu()
                if k + 1 < self.n_ode_steps:
                    y, heat = self._trajectory(k + 1, y, stream)
                    log_q = log_q + heat
            x, log_volume = self.prior.to_cartesian(y)
            return rotate(x, turn), _valid(log_q - log_volume)

        xs, log_qs = zip(*map_chunks(run, draws), strict=True)
        return torch.cat(xs), torch.cat(log_qs)

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Estimate :math:`\log\hat q` of positions (n, N, 3) by one path backwards each, (n,).

        Unbiased for q, not for log q. A path that fails gives -inf: the weight of the state is
        then infinite, and a chain stays there until another path is drawn. The random stream
        follows from the positions: the same call gives the same numbers.
        """

        def run(part: Tensor) -> Tensor:
            digest = hashlib.sha256(np.ascontiguousarray(part.numpy()).tobytes()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            y, log_volume = self.prior.from_cartesian(part)
            log_q = -log_volume
            for k in reversed(range(self.n_ode_steps)):
                y, ladj = rk4_inverse(
                    self._field,
                    self._velocity,
                    y.to(self.device),
                    self.grid[k : k + 2],
                    corrections=self.inverse_corrections,
                )
                y, log_q = y.cpu(), log_q - ladj.cpu()
                if k > 0:
                    y, heat = self._trajectory(k, y, stream)
                    log_q = log_q - heat
            return _of_a_state(log_q + self.prior.latent_log_prob(y))

        parts = x.detach().to("cpu", torch.float64).split(self.chunk_size)
        return torch.cat(map_chunks(run, parts))

    def _trajectory(self, k: int, y: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points after a trajectory on level k, and by how much log p_t rose, (n,)."""
        start = PathState.at(self.prior, self.target, y)
        t = torch.full((len(y),), self.grid[k], dtype=torch.float64)
        step = self.relaxation.step_sizes[k - 1] * self.relaxation.scales
        end, _ = path_trajectory(
            self.prior,
            self.target,
            start,
            t,
            step=step,
            n_steps=self.relaxation.n_leapfrog,
            generator=stream,
        )
        # Where there is no density, the layer is the identity: nothing rises.
        rise = end.log_prob(t) - start.log_prob(t)
        return end.y, torch.where(torch.isfinite(rise), rise, 0.0)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(
            "a relaxed flow has no latent point and no gradient of log q; take the flow it was "
            "made from"
        )

    transform = latent_and_log_prob = rsample_and_log_prob = rsample = inverse = _refuse
    calibrate = _refuse


def relax(
    flow: EquivariantFlow, target: Target, *, n_leapfrog: int = 5, seed: int = 0
) -> RelaxedFlow:
    """Put a trajectory of Hamiltonian Monte Carlo on every inner time of a flow's grid.

    Step sizes are tuned on the way, level by level, to an acceptance of 0.85, and then frozen. The
    ESS of the weights becomes that of paths. A sample costs ``n_leapfrog`` + 1 energies with
    forces for each inner time more.

    Parameters
    ----------
    flow
        In internal coordinates. Weights are exact with any; they are better than before with one
        that was trained by the Liouville residual, whose intermediate densities these are.
    target
        Boltzmann target of the System the flow was trained for; not to be closed before the
        relaxed flow is done.
    n_leapfrog
        Leapfrog steps of a trajectory.
    seed
        Of the points the step sizes are tuned on.

    Raises
    ------
    ConfigurationError
        A flow in Cartesian coordinates, without inner times, or ``n_leapfrog`` below 1.

    Examples
    --------
    >>> from openmm_eqflow import load_flow, load_system
    >>> from openmm_eqflow.runs.stages import build_target
    >>> with build_target(load_system("toluene")) as target:  # doctest: +SKIP
    ...     x, log_q = relax(load_flow("toluene"), target).sample_and_log_prob(1000)
    """
    if len(flow.prior.event_shape) != 1:
        raise ConfigurationError(
            "relaxation needs a flow in internal coordinates (prior: internal), whose densities "
            f"between prior and target are known; this one has a {type(flow.prior).__name__}"
        )
    if n_leapfrog < 1 or flow.n_ode_steps < 2:
        raise ConfigurationError(
            f"relaxation needs at least 1 leapfrog step and a grid of 2 steps; got {n_leapfrog} "
            f"and {flow.n_ode_steps}"
        )
    # A stream of its own: manual_seed(seed) would tune on the very latents that an evaluation with
    # the same seed draws.
    entropy = np.random.SeedSequence(seed, spawn_key=_TUNING_STREAM)
    stream = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
    with torch.no_grad():
        z = flow.prior.sample_latent(_TUNING_POINTS, generator=stream)
        scales = _scales(flow, target, z)
        sizes = _tuned(flow, target, z, scales, n_leapfrog, stream)
    return RelaxedFlow(flow, target, Relaxation(n_leapfrog, sizes, scales))


def _scales(flow: EquivariantFlow, target: Target, z: Tensor) -> Tensor:
    """Scales of the coordinates from the scores at both ends, (d,); medians bear clashes."""
    y = rk4(flow._field, z.to(flow.device), flow.grid)[0].cpu()
    scores = (
        PathState.at(flow.prior, target, z).score_prior,
        PathState.at(flow.prior, target, y).score_target,
    )
    squares = torch.stack([s.square().median(0).values for s in scores]).amax(0)
    return (squares / _MEDIAN_OF_CHI_SQUARE).rsqrt().clamp(max=_LONGEST)


def _tuned(
    flow: EquivariantFlow,
    target: Target,
    y: Tensor,
    scales: Tensor,
    n_leapfrog: int,
    stream: torch.Generator,
) -> tuple[float, ...]:
    """Step size of every inner time, from several trajectories of a few points on each."""
    sizes, log_size = [], float(np.log(_FIRST_STEP))
    for k in range(1, flow.n_ode_steps):
        y = rk4(flow._field, y.to(flow.device), flow.grid[k - 1 : k + 1])[0].cpu()
        state = PathState.at(flow.prior, target, y)
        t = torch.full((len(y),), flow.grid[k], dtype=torch.float64)
        tried = []
        for _ in range(_TUNING_ROUNDS):
            tried.append(log_size)
            step = float(np.exp(log_size)) * scales
            state, acceptance = path_trajectory(
                flow.prior, target, state, t, step=step, n_steps=n_leapfrog, generator=stream
            )
            log_size += float(acceptance.mean()) - _AIM
        log_size = float(np.mean(tried[_TUNING_ROUNDS // 2 :]))
        sizes.append(float(np.exp(log_size)))
        y = state.y
    return tuple(sizes)


def _valid(log_q: Tensor) -> Tensor:
    # Outside the chart there is no configuration: log q = +inf makes the weight zero.
    return torch.where(torch.isfinite(log_q), log_q, torch.inf)


def _of_a_state(log_q: Tensor) -> Tensor:
    # A state whose path fails has no density that is known: -inf makes its weight infinite, so
    # that it is never left. +inf would give it the weight zero, and it would be left at once.
    return torch.where(torch.isfinite(log_q), log_q, -torch.inf)


class _OneAtATime:
    """A target for several threads: an evaluator need not bear callers side by side."""

    def __init__(self, target: Target) -> None:
        self.target, self.lock = target, threading.Lock()

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        with self.lock:
            return self.target.reduced_potential_and_gradient(x)
