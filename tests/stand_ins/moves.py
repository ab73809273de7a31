"""Flows and targets with closed-form densities, for tests of moves without OpenMM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.vector_fields.base import register_vector_field


class GaussianFlow:
    """Isotropic Gaussian of the given width on the mean-free subspace."""

    def __init__(self, width: float, n_particles: int, n_dims: int) -> None:
        self.width, self.shape = width, (n_particles, n_dims)
        self.n_calls: list[int] = []

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        self.n_calls.append(n)
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        x = remove_mean(self.width * x)
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        dim = (self.shape[0] - 1) * self.shape[1]
        square = remove_mean(x).square().sum(dim=(1, 2)) / self.width**2
        return -0.5 * (square + dim * math.log(2 * math.pi * self.width**2))


class Springs:
    """u = 2 |x|^2 on the mean-free subspace: a variance of 1/4 each way, <u> = (N - 1) D / 2."""

    kT = 2.5

    def reduced_potential(self, x: Tensor) -> Tensor:
        return 2.0 * remove_mean(x).square().sum((1, 2))

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.reduced_potential(x), 4.0 * remove_mean(x)


class TwoBasins:
    r"""Two particles on a line, y = (x_1 - x_2) / sqrt 2: a skewed mixture of two Gaussians.

    u is shifted by a constant, so log Z is not 0; left of y = -3 the target has no mass.
    """

    weights, means, sds = (0.8, 0.2), (-0.7, 1.6), (0.35, 0.5)
    log_z = 1.7

    def __init__(self, kT: float = 2.5) -> None:
        self.kT = kT
        self.n_evaluated = 0

    def reduced_potential(self, x: Tensor) -> Tensor:
        self.n_evaluated += x.shape[0]
        y = self.coordinate(x)
        terms = [
            math.log(w / s) - 0.5 * ((y - m) / s) ** 2
            for w, m, s in zip(self.weights, self.means, self.sds, strict=True)
        ]
        log_p = torch.logsumexp(torch.stack(terms), dim=0) - 0.5 * math.log(2 * math.pi)
        return torch.where(y > -3.0, -log_p - self.log_z, torch.inf)

    @staticmethod
    def coordinate(x: Tensor) -> Tensor:
        return (x[:, 0, 0] - x[:, 1, 0]) / math.sqrt(2.0)

    @property
    def mean(self) -> float:
        return sum(w * m for w, m in zip(self.weights, self.means, strict=True))

    @property
    def right_population(self) -> float:
        """P(y > 0.45), by the normal distribution function."""
        return sum(
            w * 0.5 * math.erfc((0.45 - m) / (s * math.sqrt(2.0)))
            for w, m, s in zip(self.weights, self.means, self.sds, strict=True)
        )


@register_vector_field
class BendField(nn.Module):
    """Two particles on a line: dy/dt = a sin(y) + b for y = (x_1 - x_2) / sqrt 2."""

    exact_divergence = True
    event_shape = (2, 1)

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"a": a, "b": b}
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r = TwoBasins.coordinate(y)
        speed = (self.a * torch.sin(r) + self.b) / math.sqrt(2.0)
        return torch.stack([speed, -speed], dim=1)[:, :, None], self.a * torch.cos(r)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.with_divergence(t, y)[0]


@register_vector_field
class RadialField(nn.Module):
    r"""v = (a + b exp(-|y|^2 / c)) y on the mean-free subspace: its divergence varies with y."""

    exact_divergence = True

    def __init__(self, n_particles: int, n_dims: int, a: float, b: float, c: float) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_particles": n_particles,
            "n_dims": n_dims,
            "a": a,
            "b": b,
            "c": c,
        }
        self.event_shape = (n_particles, n_dims)
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))
        self.c = c

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = remove_mean(y)
        s = y.square().sum(dim=(1, 2))
        bump = self.b * torch.exp(-s / self.c)
        dim = (self.event_shape[0] - 1) * self.event_shape[1]
        return (self.a + bump)[:, None, None] * y, dim * (self.a + bump) - 2 * s / self.c * bump

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.with_divergence(t, y)[0]


@register_vector_field
class HeavyField(RadialField):
    """The same field with weights that do nothing but take room on disk."""

    def __init__(
        self, n_particles: int, n_dims: int, a: float, b: float, c: float, n_idle: int
    ) -> None:
        super().__init__(n_particles, n_dims, a, b, c)
        self.config["n_idle"] = n_idle
        self.idle = nn.Parameter(torch.ones(n_idle, dtype=torch.float64))


def harmonic_flow(n_idle: int = 0) -> EquivariantFlow:
    """A flow that covers the shipped ``harmonic`` system (six particles) at 300 to 400 K."""
    sizes = (6, 3, -0.1, 0.25, 0.8)
    field = HeavyField(*sizes, n_idle) if n_idle else RadialField(*sizes)
    flow = EquivariantFlow(MeanFreeGaussian(6, 3, 0.235), field, grid=(0.0, 0.25, 0.5, 0.75, 1.0))
    audit(flow)
    return flow
