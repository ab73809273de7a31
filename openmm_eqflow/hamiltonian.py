r"""Local moves of many chains at once: Hamiltonian Monte Carlo on batched energies.

A trajectory of L leapfrog steps with fresh Gaussian velocities, accepted with
:math:`\min(1, e^{-\Delta H})` (Duane et al. 1987): Langevin dynamics with its time-step error
removed. All masses are equal: configurations do not depend on masses, and equal ones resolve light
atoms with the longest steps. The centroid does not move (the density lives on the mean-free
subspace).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.geometry import remove_mean

__all__ = ["HamiltonianInfo", "hamiltonian_step", "tune_step_size"]


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
