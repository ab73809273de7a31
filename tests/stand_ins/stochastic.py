"""What tests of stochastic flows share: a pair whose density is known by quadrature, a gas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

from openmm_eqflow.flows.softcore import SoftCorePath
from openmm_eqflow.flows.softcore_fit import fit_path
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.flows.streams import RowStreams

PATH = SoftCorePath()
END = PATH.levels(np.array([1.0]))[0]


def gas(n: int, n_particles: int, seed: int = 0) -> NDArray[np.float64]:
    x = np.random.default_rng(seed).standard_normal((n, n_particles, 3))
    return x - x.mean(1, keepdims=True)


def streams_of(n: int, seed: int = 1) -> RowStreams:
    return RowStreams.drawn(n, torch.Generator().manual_seed(seed))


def batch_of(x: NDArray[np.float64], seed: int = 1) -> tuple[Tensor, RowStreams]:
    return torch.from_numpy(x), streams_of(len(x), seed)


class Pair:
    """Two particles at the end of the path: u = 2 (d^-12 - 2 d^-6) + d^2 / 4, kT = 1."""

    kT = 1.0

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self.of_distance((x[:, 0] - x[:, 1]).norm(dim=-1))

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            u = self.reduced_potential(y)
            (gradient,) = torch.autograd.grad(u.sum(), y)
        return u.detach(), gradient

    @staticmethod
    def of_distance(d: Tensor) -> Tensor:
        return 2 * (d**-12 - 2 * d**-6) + 0.25 * d**2

    def weight(self, d: float) -> float:
        """Unnormalised density of the distance; mean-free subspace: d^3y = d^3r / 8^(1/2)."""
        u = float(self.of_distance(torch.tensor(d, dtype=torch.float64)))
        return 4 * math.pi * d**2 * math.exp(-u) / 8**0.5

    def log_z(self) -> float:
        return math.log(quad(self.weight, 0.3, 15, limit=200)[0])

    def mean(self, function: Callable[[float], float]) -> float:
        top = quad(lambda d: function(d) * self.weight(d), 0.3, 15, limit=200)[0]
        return float(top / quad(self.weight, 0.3, 15, limit=200)[0])

    def draw(self, n: int, seed: int) -> Tensor:
        """Exact samples by inversion of the distance's cumulative density."""
        grid = np.linspace(0.3, 15, 20_001)
        density = np.array([self.weight(d) for d in grid])
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        rng = np.random.default_rng(seed)
        d = np.interp(rng.random(n) * cumulative[-1], cumulative, grid)
        direction = rng.standard_normal((n, 3))
        half = 0.5 * d[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        return torch.from_numpy(np.stack([half, -half], 1))


PAIR = Pair()


def make_pair_flow() -> StochasticFlow:
    """Timesteps short enough for a pair at its hard core, levels enough for the determinants."""
    batches = [batch_of(gas(256, 2, k), k) for k in range(3)]
    fit = fit_path(PATH, batches, spacing=0.2, n_splines=30, stride=0.1, n_leapfrog=4)
    fit = fit._replace(timesteps=0.3 * fit.timesteps)
    return StochasticFlow.from_fit(
        PATH, fit, n_particles=2, reach=6.0, n_levels=60, n_leapfrog=6, chunk_size=256
    )
