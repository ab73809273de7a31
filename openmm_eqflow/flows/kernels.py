r"""Reversible kernels: Hamiltonian trajectories, in positions and on the levels of a path.

A trajectory of L leapfrog steps with fresh Gaussian velocities v,

.. math:: H = -l(y) + \tfrac12 |v|^2, \qquad \dot y_i = s_i v_i, \quad
          \dot v_i = s_i\, \partial_i l(y),

accepted with :math:`\min(1, e^{-\Delta H})` (Duane et al. 1987), is reversible with respect to
:math:`e^{l}`: Langevin dynamics with its time-step error removed. Masses do not matter for
configurations; scales :math:`s_i` make one step size suit stiff coordinates and soft ones.

Between a prior and a target in its chart lie the levels

.. math:: l_t(y) = \log p_0(y) + t\,\log w(y), \qquad w = p_1 / p_0, \quad 0 \le t \le 1

(Neal 2001). Where there is no density, off the chart or for the wrong hand of a stereocentre, the
trajectory is rejected; from such a point it does not start: the kernel is the identity there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.recorded import Recorded
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.geometry import align_rotations, remove_mean, rotate
from openmm_eqflow.priors.base import Prior, check_space
from openmm_eqflow.priors.compiled_chart import (
    covers,
    prior_value_and_score,
    target_value_and_score,
)

__all__ = [
    "Bridge",
    "DifferentiablePotential",
    "HamiltonianInfo",
    "LevelState",
    "Trajectory",
    "chart_step",
    "hamiltonian_step",
    "latent_target",
    "prior_score",
    "rows_where",
    "tune_step_size",
    "tuned",
]

_MEDIAN_OF_CHI_SQUARE = 0.455
_LONGEST = 2.0  # scale of a coordinate that feels no force, such as a free rotor


class DifferentiablePotential(Protocol):
    """What a trajectory needs of a target."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        ...


class _Point(Protocol):
    """A point whose densities are known on every level; ``t`` is a number or (n,)."""

    @property
    def y(self) -> Tensor: ...

    def log_prob(self, t: Any) -> Tensor: ...

    def score(self, t: Any) -> Tensor: ...

    def where(self, mask: Tensor, other: Self) -> Self: ...


P = TypeVar("P", bound=_Point)


def trajectory(
    evaluate: Callable[[Tensor], P],
    start: P,
    t: Any,
    *,
    step: Tensor | float,
    n_steps: int,
    velocity: Tensor,
    uniform: Tensor,
) -> tuple[P, Tensor, Tensor]:
    r"""One Metropolised trajectory of every row, each on its own level.

    Parameters
    ----------
    evaluate
        Points (n, ...) to points with densities.
    start
        Where the rows are.
    t
        Levels.
    step
        Leapfrog steps :math:`\epsilon s_i`, broadcast to y.
    n_steps
        Leapfrog steps.
    velocity, uniform
        Standard normals, shape of y, and uniform numbers (n,).

    Returns
    -------
    tuple
        New points, rejected rows unchanged bit for bit; acceptance probabilities and whether the
        rows were accepted, (n,).
    """
    half = 0.5 * step
    energy = 0.5 * velocity.square().flatten(1).sum(1) - start.log_prob(t)
    new = start
    for _ in range(n_steps):
        velocity = velocity + half * new.score(t)
        new = evaluate(new.y + step * velocity)
        velocity = velocity + half * new.score(t)
    log_ratio = energy + new.log_prob(t) - 0.5 * velocity.square().flatten(1).sum(1)
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    accepted = torch.log(uniform) < log_ratio
    return new.where(accepted, start), log_ratio.clamp(max=0).exp(), accepted


def tuned(
    move: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    aim: float = 0.85,
    n_rounds: int = 12,
    gain: float = 1.5,
    n_settled: int = 0,
) -> Tensor:
    """Step sizes (k,) at which the mean acceptance is ``aim``: the tuner of every kernel here.

    ``move`` takes step sizes, moves its points and returns the mean acceptance of each. In the
    first half of the rounds ``gain`` finds the scale, then a smaller one settles; the geometric
    mean of the last ``n_settled`` rounds (by default half) is returned. The sizes are then to be
    frozen: adaptation during production would break detailed balance.
    """
    log_size = start.log()
    tried = []
    for k in range(n_rounds):
        tried.append(log_size)
        rate = gain if k <= n_rounds // 2 else min(gain, 0.5)
        log_size = log_size + rate * (move(log_size.exp()) - aim)
    return torch.stack(tried[-(n_settled or n_rounds // 2) :]).mean(0).exp()


# -- in positions ---------------------------------------------------------------------------------


class HamiltonianInfo(NamedTuple):
    """Reduced potential after the step, acceptance probability and flags, each (n,)."""

    reduced_potential: Tensor
    acceptance: Tensor
    accepted: Tensor


class _Positions(NamedTuple):
    """Positions with u and its gradient; the same on every level."""

    y: Tensor
    u: Tensor
    gradient: Tensor

    def log_prob(self, t: Any) -> Tensor:
        return -self.u

    def score(self, t: Any) -> Tensor:
        # The density lives on the mean-free subspace: the centroid stays.
        return -remove_mean(self.gradient)

    def where(self, mask: Tensor, other: _Positions) -> _Positions:
        return _Positions(*rows_where(mask, self, other))


def rows_where(mask: Tensor, one: tuple[Any, ...], other: tuple[Any, ...]) -> list[Tensor]:
    """Rows (n, ...) of each of ``one`` where ``mask`` (n,), else of ``other``."""
    return [
        torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(one, other, strict=True)
    ]


def hamiltonian_step(
    target: DifferentiablePotential,
    x: Tensor,
    *,
    step_size: float,
    n_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, HamiltonianInfo]:
    r"""One Metropolised trajectory for every chain.

    Parameters
    ----------
    target
        Reduced potential with gradient.
    x
        Positions (n_chains, N, D) in nm, float64.
    step_size
        Leapfrog step in nm (unit mass and unit kT).
    n_steps
        Leapfrog steps per trajectory.
    generator
        Random stream.

    Returns
    -------
    (Tensor, HamiltonianInfo)
        New positions, rejected rows unchanged bit for bit.

    Raises
    ------
    ConfigurationError
        The target has constraints, which steps in positions do not keep.
    """
    if getattr(target, "constraints", None) is not None:
        raise ConfigurationError(
            "a trajectory in positions does not keep constraints: take chart_step, or LatentMove"
        )

    def evaluate(y: Tensor) -> _Positions:
        return _Positions(y, *target.reduced_potential_and_gradient(y))

    velocity = remove_mean(torch.randn(x.shape, generator=generator, dtype=x.dtype))
    uniform = torch.rand(x.shape[0], generator=generator, dtype=x.dtype)
    end, acceptance, accepted = trajectory(
        evaluate,
        evaluate(x),
        1.0,
        step=step_size,
        n_steps=n_steps,
        velocity=velocity,
        uniform=uniform,
    )
    return end.y, HamiltonianInfo(end.u, acceptance, accepted)


def tune_step_size(
    step: Callable[..., tuple[Tensor, HamiltonianInfo]],
    x: Tensor,
    *,
    aim: float = 0.8,
    start: float = 1e-3,
    n_rounds: int = 30,
) -> tuple[float, Tensor]:
    """Find a step size whose mean acceptance is ``aim``; the chains move meanwhile (burn-in).

    ``step`` is :func:`hamiltonian_step` or :func:`chart_step` of (x, step_size).
    """

    def move(size: Tensor) -> Tensor:
        nonlocal x
        x, info = step(x, step_size=float(size))
        return info.acceptance.mean().cpu()[None]

    first = torch.tensor([start], dtype=torch.float64)
    # Much gain finds the scale, whatever it is, in a few rounds.
    return float(tuned(move, first, aim=aim, n_rounds=n_rounds, gain=4.0, n_settled=8)), x


# -- on the levels of a path ----------------------------------------------------------------------


def latent_target(
    prior: Prior,
    target: DifferentiablePotential,
    y: Tensor,
    *,
    bound: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    autograd: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Log density of the target in the chart and its gradient.

    .. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y)

    ``bound`` may replace u (n,) and du/dx (n, N, D) before they are used. Compiled
    (:mod:`openmm_eqflow.priors.compiled_chart`) where that covers the prior, unless ``autograd``.
    """

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        pair = target.reduced_potential_and_gradient(x)
        return pair if bound is None else bound(*pair)

    if not autograd and covers(prior, y):
        return target_value_and_score(prior, evaluate, y)  # type: ignore[arg-type]
    point = y.detach().requires_grad_(True)
    with torch.enable_grad():
        x, log_volume = prior.to_cartesian(point)
        finite = torch.isfinite(log_volume.detach())
        u, du = evaluate(x.detach())
        inner = (x * du).sum((1, 2))
        log_p = torch.where(finite, log_volume - inner, torch.zeros_like(inner)).sum()
        gradient = torch.autograd.grad(log_p, point)[0]
    value = torch.where(finite, log_volume.detach() - u, torch.full_like(u, -torch.inf))
    return value, gradient


def prior_score(prior: Prior, y: Tensor, *, autograd: bool = False) -> tuple[Tensor, Tensor]:
    """Log density of the prior (n,) and its gradient in the chart, as :func:`latent_target`."""
    if not autograd and covers(prior, y):
        return prior_value_and_score(prior, y)  # type: ignore[arg-type]
    with torch.enable_grad():
        point = y.detach().requires_grad_(True)
        log_p = prior.latent_log_prob(point)
        (gradient,) = torch.autograd.grad(log_p.sum(), point)
    return log_p.detach(), gradient


class LevelState(NamedTuple):
    """Points (n, d) float64 with both ends of their path.

    log p0 and log p1 (n,), gradients of both (n, d); log p1 is -inf and its gradient 0 where there
    is no energy.
    """

    y: Tensor
    log_prior: Tensor
    log_target: Tensor
    score_prior: Tensor
    score_target: Tensor

    def where(self, mask: Tensor, other: LevelState) -> LevelState:
        """Rows of ``self`` where ``mask``, else of ``other``."""
        return LevelState(*rows_where(mask, self, other))

    def log_prob(self, t: Any) -> Tensor:
        """Unnormalised log p_t (n,) for times (n,) or one time for all."""
        return self.log_prior + t * (self.log_target - self.log_prior)

    def score(self, t: Any) -> Tensor:
        """Gradient of log p_t (n, d) for times (n,) or one time for all."""
        share = t if isinstance(t, float) else t[:, None]
        return torch.lerp(self.score_prior, self.score_target, share)


class _OneAtATime:
    """A target for several threads: an evaluator need not bear callers side by side."""

    def __init__(self, target: DifferentiablePotential) -> None:
        self.target, self.lock = target, threading.Lock()
        self.constraints = getattr(target, "constraints", None)

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        with self.lock:
            return self.target.reduced_potential_and_gradient(x)


class Bridge:
    """The levels between a prior and a target in the prior's chart; see the module docstring.

    Parameters
    ----------
    prior, target
        Both ends.
    """

    def __init__(self, prior: Prior, target: DifferentiablePotential) -> None:
        check_space(prior, target)
        self.prior = prior
        self.target = target if getattr(target, "concurrent", False) else _OneAtATime(target)
        self._last = threading.local()
        self._recorded = Recorded()

    def at(self, y: Tensor) -> LevelState:
        """Evaluate both ends at points (n, d), known where a trajectory has just ended."""
        known: LevelState | None = getattr(self._last, "state", None)
        if known is not None and known.y is y:
            return known
        if y.is_cuda and getattr(self.target, "replayable", False) and covers(self.prior, y):
            return LevelState(y, *self._recorded(self._evaluated, y))
        return LevelState(y, *self._evaluated(y))

    def _evaluated(self, y: Tensor) -> tuple[Tensor, ...]:
        log_target, score_target = latent_target(self.prior, self.target, y)
        log_prior, score_prior = prior_score(self.prior, y)
        valid = torch.isfinite(log_target) & torch.isfinite(score_target).all(1)
        return (
            log_prior,
            torch.where(valid, log_target, -torch.inf),
            score_prior,
            torch.where(valid[:, None], score_target, 0.0),
        )

    def move(
        self, state: LevelState, t: Any, *, step: Tensor, n_steps: int, streams: RowStreams
    ) -> tuple[LevelState, Tensor]:
        """One trajectory of every row on levels ``t``; new states, acceptance probabilities."""
        velocity = streams.normal(*state.y.shape[1:], dtype=state.y.dtype)
        end, acceptance, _ = trajectory(
            self.at,
            state,
            t,
            step=step,
            n_steps=n_steps,
            velocity=velocity,
            uniform=streams.uniform(),
        )
        self._last.state = end
        return end, acceptance

    @staticmethod
    def scales(squares: Tensor) -> Tensor:
        """Scale of every coordinate from its largest mean square score, (d,)."""
        return squares.rsqrt().clamp(max=_LONGEST)

    @classmethod
    def median_scales(cls, *scores: Tensor) -> Tensor:
        """Scales (d,) from the largest median square of scores (n, d): medians bear clashes."""
        squares = torch.stack([s.square().median(0).values for s in scores]).amax(0)
        return cls.scales(squares / _MEDIAN_OF_CHI_SQUARE)


def chart_step(
    bridge: Bridge,
    x: Tensor,
    *,
    scales: Tensor,
    step_size: float,
    n_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, HamiltonianInfo]:
    r"""One Metropolised trajectory of every chain in the chart, where constraints are kept.

    The new configuration is turned to best overlap with the old one at the old centroid, which
    keeps detailed balance: the rotation follows from the two shapes, and backwards is its inverse.

    Parameters
    ----------
    bridge
        Holds chart and target.
    x
        Positions (n_chains, N, 3) in nm, float64, any centroid.
    scales
        Of every coordinate of the chart, (d,).
    step_size
        Leapfrog step in scales.
    n_steps, generator
        As of :func:`hamiltonian_step`.

    Returns
    -------
    (Tensor, HamiltonianInfo)
        New positions, rejected rows unchanged bit for bit.
    """
    y, _ = bridge.prior.from_cartesian(x)
    end, acceptance, accepted = trajectory(
        bridge.at,
        bridge.at(y),
        1.0,
        step=step_size * scales,
        n_steps=n_steps,
        velocity=torch.randn(y.shape, generator=generator, dtype=y.dtype),
        uniform=torch.rand(len(y), generator=generator, dtype=y.dtype),
    )
    shape, log_volume = bridge.prior.to_cartesian(end.y)
    centroid = x.mean(dim=1, keepdim=True)
    turned = rotate(shape, align_rotations(shape, x - centroid)) + centroid
    new = torch.where(accepted[:, None, None], turned, x)
    return new, HamiltonianInfo(log_volume - end.log_target, acceptance, accepted)


class Trajectory:
    """Layer of a path: a Hamiltonian trajectory on one level of a bridge.

    Parameters
    ----------
    bridge
        Whose levels.
    t
        Level, more than 0.
    step
        Leapfrog steps of every coordinate, (d,), in units of the chart.
    n_steps
        Leapfrog steps of one trajectory.
    """

    def __init__(self, bridge: Bridge, t: float, step: Tensor, n_steps: int) -> None:
        self.bridge, self.t, self.step, self.n_steps = bridge, t, step, n_steps
        self.n_energies = n_steps

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        r"""Return new points, and :math:`l_t(y') - l_t(y)`, (n,)."""
        start = self.bridge.at(y)
        end, _ = self.bridge.move(
            start, self.t, step=self.step.to(y), n_steps=self.n_steps, streams=streams
        )
        change = end.log_prob(self.t) - start.log_prob(self.t)
        # Where there is no density the point stays: that is no change.
        return end.y, torch.where(torch.isfinite(start.log_target), change, 0.0)

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Run the kernel, its own reversal; the change is that of the path forwards."""
        before, change = self.forward(y, streams)
        return before, -change
