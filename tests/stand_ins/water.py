"""A molecule of three atoms with a known density, and a flow that falls short of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_eqflow.flows.flow import EquivariantFlow
from stand_ins.flows import stream, uniform_grid, water_prior

WIDER = 1.5  # the target's bonds against the prior's
VARIANCE = WIDER**2 * (0.8 + 0.2 * 1.5**2)  # a fifth of the density has tails 1.5 times as wide


class Stretch(nn.Module):
    """v = rate * y: less than the target asks for, and blind to its correlations."""

    exact_divergence = True
    event_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.25, 0.25, 0.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, y), self.rate.sum().expand(len(y))


class WaterTarget:
    """A normalised density with exact samples: log Z = 0 on the mean-free subspace."""

    kT = 1.0
    density = water_prior(WIDER * 0.003)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return -self.density.log_prob(x)

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            u = self.reduced_potential(point)
            (gradient,) = torch.autograd.grad(u.sum(), point)
        return u.detach(), gradient

    def draw(self, n: int, seed: int) -> Tensor:
        return self.density.sample(n, generator=stream(seed))


TARGET = WaterTarget()


def water_flow() -> EquivariantFlow:
    return EquivariantFlow(water_prior(0.003), Stretch(), grid=uniform_grid(6), chunk_size=512)


def bond(x: Tensor) -> Tensor:
    """Square deviation of the first bond, in the prior's variances."""
    return (((x[:, 0] - x[:, 1]).norm(dim=-1) - 0.1) / 0.003).square()
