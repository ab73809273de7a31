r"""Reversible kernels: Hamiltonian trajectories in positions and on the levels of a path.

Local moves of many chains at once: Hamiltonian Monte Carlo on batched energies.

A trajectory of L leapfrog steps with fresh Gaussian velocities, accepted with
:math:`\min(1, e^{-\Delta H})` (Duane et al. 1987): Langevin dynamics with its time-step error
removed. All masses are equal: configurations do not depend on masses, and equal ones resolve light
atoms with the longest steps. The centroid does not move (the density lives on the mean-free
subspace).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.priors.base import Prior

__all__ = [
    "HamiltonianInfo",
    "PathState",
    "Target",
    "hamiltonian_step",
    "latent_target",
    "path_trajectory",
    "prior_score",
    "tune_step_size",
]


class DifferentiablePotential(Protocol):
    """What a trajectory needs of a target."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        ...


class HamiltonianInfo(NamedTuple):
    """Reduced potential after the step, acceptance probability and flags, each (n,)."""

    reduced_potential: Tensor
    acceptance: Tensor
    accepted: Tensor


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
    """
    velocity = remove_mean(torch.randn(x.shape, generator=generator, dtype=x.dtype))
    u, gradient = target.reduced_potential_and_gradient(x)
    energy = u + 0.5 * (velocity**2).sum((1, 2))
    new, new_u = x, u
    for _ in range(n_steps):
        velocity = velocity - 0.5 * step_size * remove_mean(gradient)
        new = new + step_size * velocity
        new_u, gradient = target.reduced_potential_and_gradient(new)
        velocity = velocity - 0.5 * step_size * remove_mean(gradient)
    log_ratio = energy - new_u - 0.5 * (velocity**2).sum((1, 2))
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    level = torch.rand(x.shape[0], generator=generator, dtype=x.dtype).log()
    accepted = level < log_ratio
    moved = torch.where(accepted[:, None, None], new, x)
    info = HamiltonianInfo(
        torch.where(accepted, new_u, u), log_ratio.clamp(max=0).exp(), accepted
    )
    return moved, info


def tune_step_size(
    target: DifferentiablePotential,
    x: Tensor,
    *,
    n_steps: int,
    generator: torch.Generator,
    aim: float = 0.8,
    start: float = 1e-3,
    n_rounds: int = 30,
) -> tuple[float, Tensor]:
    """Find a step size whose mean acceptance is ``aim``; the chains move meanwhile (burn-in).

    The size is then frozen: adaptation during production would break detailed balance.
    """
    size = start
    gain = 4.0  # finds the scale, whatever it is, in a few rounds; then settle
    history = []
    for k in range(n_rounds):
        x, info = hamiltonian_step(
            target, x, step_size=size, n_steps=n_steps, generator=generator
        )
        history.append(size)
        size *= float(torch.exp(gain * (info.acceptance.mean() - aim)))
        gain = 4.0 if k < n_rounds // 2 else 0.5
    tail = torch.tensor(history[-8:], dtype=torch.float64)
    return float(tail.log().mean().exp()), x


class Target(Protocol):
    """What the loss needs of a Boltzmann target."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        ...


def latent_target(
    prior: Prior,
    target: Target,
    y: Tensor,
    *,
    bound: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log density of the target in the chart and its gradient.

    .. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y)

    ``bound`` may replace u (n,) and du/dx (n, N, D) before they are used.
    """
    point = y.detach().requires_grad_(True)
    with torch.enable_grad():
        x, log_volume = prior.to_cartesian(point)
        finite = torch.isfinite(log_volume.detach())
        u, du = target.reduced_potential_and_gradient(x.detach())
        if bound is not None:
            u, du = bound(u, du)
        inner = (x * du).sum((1, 2))
        log_p = torch.where(finite, log_volume - inner, torch.zeros_like(inner)).sum()
        gradient = torch.autograd.grad(log_p, point)[0]
    value = torch.where(finite, log_volume.detach() - u, torch.full_like(u, -torch.inf))
    return value, gradient


def prior_score(prior: Prior, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of the prior (n,) and its gradient in the chart, without a graph."""
    with torch.enable_grad():
        point = y.detach().requires_grad_(True)
        log_p = prior.latent_log_prob(point)
        (gradient,) = torch.autograd.grad(log_p.sum(), point)
    return log_p.detach(), gradient


class PathState(NamedTuple):
    """Points (n, d) float64 with log p0 and log p1 (n,) and the gradients of both (n, d)."""

    y: Tensor
    log_prior: Tensor
    log_target: Tensor
    score_prior: Tensor
    score_target: Tensor

    @classmethod
    def at(cls, prior: Prior, target: Target, y: Tensor) -> PathState:
        """Evaluate both densities; where there is no energy, log p1 is -inf and its score 0."""
        log_target, score_target = latent_target(prior, target, y)
        log_prior, score_prior = prior_score(prior, y)
        valid = torch.isfinite(log_target) & torch.isfinite(score_target).all(1)
        return cls(
            y,
            log_prior,
            torch.where(valid, log_target, -torch.inf),
            score_prior,
            torch.where(valid[:, None], score_target, 0.0),
        )

    def where(self, mask: Tensor, other: PathState) -> PathState:
        """Rows of ``self`` where ``mask``, else of ``other``."""
        wide = mask[:, None]
        return PathState(
            *(
                torch.where(wide if a.ndim == 2 else mask, a, b)
                for a, b in zip(self, other, strict=True)
            )
        )

    def log_prob(self, t: Tensor) -> Tensor:
        """Unnormalised log p_t (n,) for times (n,)."""
        return self.log_prior + t * (self.log_target - self.log_prior)

    def score(self, t: Tensor) -> Tensor:
        """Gradient of log p_t (n, d) for times (n,)."""
        return torch.lerp(self.score_prior, self.score_target, t[:, None])


def path_trajectory(
    prior: Prior,
    target: Target,
    state: PathState,
    t: Tensor,
    *,
    step: Tensor,
    n_steps: int,
    generator: torch.Generator,
) -> tuple[PathState, Tensor]:
    r"""One Metropolised trajectory of every point on its own level.

    Parameters
    ----------
    prior, target
        Both ends of the path.
    state
        Where the points are.
    t
        Levels, (n,), more than 0.
    step
        Leapfrog steps :math:`\epsilon s_i`, (n, d) in units of y.
    n_steps
        Leapfrog steps of the trajectory.
    generator
        Random stream.

    Returns
    -------
    tuple
        New states, rejected rows unchanged bit for bit, and acceptance probabilities (n,).
    """
    velocity = torch.randn(state.y.shape, generator=generator, dtype=state.y.dtype)
    start = state.log_prob(t) - 0.5 * velocity.square().sum(1)
    new = state
    for _ in range(n_steps):
        velocity = velocity + 0.5 * step * new.score(t)
        new = PathState.at(prior, target, new.y + step * velocity)
        velocity = velocity + 0.5 * step * new.score(t)
    log_ratio = new.log_prob(t) - 0.5 * velocity.square().sum(1) - start
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    level = torch.rand(len(t), generator=generator, dtype=state.y.dtype).log()
    return new.where(level < log_ratio, state), log_ratio.clamp(max=0).exp()
