"""Small priors, fields and flows with random weights, shared by the tests of the core."""

from __future__ import annotations

import math

import torch
from torch import nn

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.priors.fit import whitened_mixture
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import Conformers, TorsionDensity, TorsionGroup, find_basins
from openmm_eqflow.priors.zmatrix import ZMatrix
from openmm_eqflow.vector_fields import ChartField, LeaveOneOutField

CHAIN = ([(0, 1), (1, 2), (2, 3), (3, 4)], [12.0, 12.0, 14.0, 12.0, 16.0])
METHANOL = ([(0, 1), (0, 2), (0, 3), (0, 4), (4, 5)], [12.0, 1.0, 1.0, 1.0, 16.0, 1.0])
WATER = ([(0, 1), (0, 2)], [16.0, 1.0, 1.0])


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(*peaks: float, n: int = 72) -> torch.Tensor:
    """Grid weights of a torsion density with the given maxima."""
    grid = -math.pi + (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * math.pi / n
    weights = sum(torch.exp(4 * torch.cos(grid - p)) for p in peaks)
    return weights / weights.sum()


def coupled_torsions(independent: float = 0.05) -> TorsionDensity:
    """Two torsions with two basins each that prefer (0, 0) and (1, 1)."""
    groups = [TorsionGroup((k,), (1,), 0.15, 0.01) for k in (0, 1)]
    tables = [table(-1.6, 1.4), table(0.1, 2.9)]
    basins = tuple(torch.from_numpy(find_basins(t.numpy())) for t in tables)
    members = torch.tensor([[0, 0], [1, 1], [0, 1]])
    weights = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    return TorsionDensity(
        groups, tables, Conformers((0, 1), basins, members, weights, independent)
    )


def chain_prior(
    *, tail_share: float = 0.0, coupling: float = 1.0, torsions: TorsionDensity | None = None
) -> InternalCoordinatePrior:
    """Five atoms in a row: two coupled soft torsions, means that follow them, correlations."""
    zmatrix = ZMatrix.from_bonds(5, CHAIN[0], masses=CHAIN[1])
    joint = torch.outer(table(1.0, -2.0), table(0.5)) + torch.outer(table(2.5), table(-1.5))
    pair = TorsionDensity([TorsionGroup((0, 1), (1, 1), 0.15, 0.01)], [joint / joint.sum()])
    modes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    generator = stream(3)
    spread = torch.tensor([0.003] * 4 + [0.06] * 3, dtype=torch.float64)
    coefficients = 0.7 * coupling * torch.randn(7, 7, generator=generator).double() * spread
    coefficients[0] = torch.tensor([0.15, 0.14, 0.15, 0.12, 1.9, 2.0, 1.8])
    mixing = torch.eye(7).double() + 0.4 * torch.randn(7, 7, generator=generator).double().tril(-1)
    return InternalCoordinatePrior(
        zmatrix,
        soft=[0, 1],
        centre=torch.zeros(0),
        modes=modes,
        coefficients=coefficients,
        cholesky=spread[:, None] * mixing,
        torsions=torsions or pair,
        tail_share=tail_share,
    )


class EstimatedField(nn.Module):
    """A field that says its divergence is an estimate."""

    exact_divergence = False

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.event_shape, self.config = field, field.event_shape, field.config


def water_prior(spread: float = 0.003) -> InternalCoordinatePrior:
    """Three atoms: no torsion at all."""
    zmatrix = ZMatrix.from_bonds(3, WATER[0], masses=WATER[1])
    scale = torch.tensor([[spread, 0, 0], [0.3 * spread, spread, 0], [0.1, -0.1, 0.15]])
    return InternalCoordinatePrior(
        zmatrix,
        soft=[],
        centre=torch.zeros(0),
        modes=torch.zeros(0, 0),
        coefficients=torch.tensor([[0.1, 0.11, 1.82]]),
        cholesky=scale,
        torsions=None,
        tail_share=0.2,
        tail_scale=1.5,
    )


def mixed_water() -> InternalCoordinatePrior:
    """Water of two components of the stiff density, apart in the angle."""
    prior = water_prior()
    means = torch.tensor([[0.0, 0.0, -0.1], [0.001, 0.0, 0.15]], dtype=torch.float64)
    wide = prior.cholesky @ prior.cholesky.T
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    covariances = torch.stack([0.2 * wide, 0.1 * wide])
    prior.mixture = whitened_mixture(prior.cholesky, weights, means, covariances)
    return prior


def methanol_prior() -> InternalCoordinatePrior:
    """A methyl: two torsions relative to the leading one, which is soft and threefold."""
    zmatrix = ZMatrix.from_bonds(6, METHANOL[0], masses=METHANOL[1])
    soft = [k for k, fold in enumerate(zmatrix.fold) if fold == 3]
    assert soft, "the stand-in should have a methyl"
    n_stiff = 9 + len(zmatrix.lead) - len(soft)
    mean = torch.zeros(3, n_stiff, dtype=torch.float64)
    mean[0] = torch.tensor([0.14] * 5 + [1.9] * 4 + [0.0] * (n_stiff - 9))
    mean[1:] = 0.02 * torch.randn(2, n_stiff, generator=stream(1), dtype=torch.float64)
    spread = torch.tensor([0.003] * 5 + [0.06] * (n_stiff - 5), dtype=torch.float64)
    return InternalCoordinatePrior(
        zmatrix,
        soft=soft,
        centre=torch.tensor([2.1, -2.1][: n_stiff - 9]),
        modes=torch.tensor([[3.0] * len(soft)]),
        coefficients=mean,
        cholesky=torch.diag(spread),
        torsions=TorsionDensity([TorsionGroup((0,), (3,), 0.2, 0.01)], [table(0.4)]),
    )


def randomised(field: nn.Module, size: float = 0.2, seed: int = 0) -> nn.Module:
    """Add noise to every weight: an untrained field is often exactly zero."""
    generator = stream(seed)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return field.eval().requires_grad_(False)


def chart_field(size: float = 0.2, **sizes: int) -> ChartField:
    """Field on the chart of :func:`chain_prior`."""
    torch.manual_seed(0)
    sizes = {"width": 24, "conditioner_width": 16, "torsion_width": 12} | sizes
    field = randomised(ChartField(7, 2, [1, 1], **sizes), size)
    assert isinstance(field, ChartField)
    return field


def molecule_flow(size: float = 0.1, n_steps: int = 16) -> EquivariantFlow:
    """Chart flow of a five-atom chain, float32 network."""
    return EquivariantFlow(
        chain_prior(tail_share=0.1), chart_field(size), grid=uniform_grid(n_steps), chunk_size=128
    )


def planar_flow(n_particles: int = 4, n_steps: int = 12, size: float = 0.05) -> EquivariantFlow:
    """Cartesian flow of particles in the plane with an exact leave-one-out divergence."""
    torch.manual_seed(0)
    prior = MeanFreeGaussian(n_particles, 2, 1.5)
    data = remove_mean(prior.sample(400, generator=stream(1)))
    field = LeaveOneOutField.fit(
        data, classes=[0] * n_particles, width=6, readout_width=6, n_vectors=3
    )
    grid = uniform_grid(n_steps)
    return EquivariantFlow(prior, randomised(field, size), grid=grid, chunk_size=128)  # type: ignore[arg-type]


def uniform_grid(n_steps: int) -> tuple[float, ...]:
    return tuple(k / n_steps for k in range(n_steps + 1))
