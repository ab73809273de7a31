"""A flow and a target whose KL divergences and gradients are known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openmm import unit
from torch import Tensor, nn

from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs.reference.data import ReferenceData
from openmm_eqflow.targets.model_systems import build_model, model_topology
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.divergences import ChartTarget
from openmm_eqflow.training.recipes import Recipe
from openmm_eqflow.units import kt_in_kj_mol
from stand_ins.flows import stream

SIGMA = torch.tensor([0.7, 1.6], dtype=torch.float64)
N = 3


class Scaling(nn.Module):
    """v = rate * x per axis: q is a mean-free Gaussian with standard deviations exp(rate)."""

    exact_divergence = True
    event_shape = (N, 2)

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.rate = nn.Parameter(rate.clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, y), (N - 1) * self.rate.sum().expand(len(y))


class Anisotropic:
    """u = sum_d |x_d|^2 / 2 SIGMA_d^2, one energy and force at a time, blind to autograd."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        return 0.5 * (x / SIGMA).square().sum((1, 2)), x / SIGMA**2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return prior().sample(n, generator=generator) * SIGMA


def prior() -> MeanFreeGaussian:
    return MeanFreeGaussian(N, 2, 1.0)


def scaling_target(energy_high: float = 1e6) -> ChartTarget:
    return ChartTarget(prior(), Anisotropic(), energy_high=energy_high)


def reverse_gradient(rate: Tensor) -> Tensor:
    """d KL(q | p) / d rate."""
    return (N - 1) * ((2 * rate).exp() / SIGMA**2 - 1)


def forward_gradient(rate: Tensor) -> Tensor:
    """d KL(p | q) / d rate."""
    return (N - 1) * (1 - SIGMA**2 / (2 * rate).exp())


def four_particles() -> BoltzmannTarget:
    """Double wells in the plane (dw4), energies and forces from OpenMM."""
    temperature = 300 * unit.kelvin
    system = build_model("double-well", 4, kt_in_kj_mol(temperature))
    return BoltzmannTarget(system, model_topology(4, "DW4"), temperature, n_dims=2)


def gradient_of(loss: Tensor, module: nn.Module) -> Tensor:
    """All gradients of ``loss`` in one vector."""
    weights = list(module.parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]
    return torch.cat([p.flatten() for p in parts])


def dw4_frames(n: int) -> ReferenceData:
    """Frames near the four minima, standing in for reference data of dw4."""
    x = torch.tensor([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]).double()
    x = x + 0.4 * torch.randn(n, 4, 2, generator=stream(4), dtype=torch.float64)
    positions = (x - x.mean(1, keepdim=True)).float().numpy()

    class Frames:
        pass

    frames: Any = Frames()
    frames.positions = positions
    frames.walker = np.zeros(n, dtype=np.int64)
    frames.temperatures = np.array([300.0])
    return frames


SMALL = Recipe(
    1.0,
    1e6,
    prior="gaussian",
    max_steps=12,
    batch_size=16,
    ode_steps=3,
    n_shards=2,
    grid_tolerance=0.1,
    field={
        "width": 6,
        "readout_width": 6,
        "n_vectors": 3,
        "n_rbf": 4,
        "n_layers": 1,
        "n_steps": 1,
        "n_nodes": 6,
    },
)
