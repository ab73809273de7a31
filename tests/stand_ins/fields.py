"""Vector fields of every kind with random weights, and points to look at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.vector_fields.baselines import EGNNField, MLPField
from openmm_eqflow.vector_fields.contact import ContactField
from openmm_eqflow.vector_fields.kernel import KernelField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField
from openmm_eqflow.vector_fields.radial import RadialSplineField
from stand_ins.flows import randomised, stream

# a chain 0-1-2-3-4 whose end groups (0, 4) and (1, 3) differ, and a free pair (2, 5)
CLASSES = [0, 1, 2, 2, 1, 0]
BONDS = [[0 if i == j else 1 + (i % 2) * (j % 2) for j in range(6)] for i in range(6)]
SIZES = {"width": 24, "conditioner_width": 16, "torsion_width": 12, "contacts": 6, "n_rbf": 4}


def data(n: int, n_dims: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = 0.3 * grid[:6, -n_dims:]
    sites = sites + 0.05 * torch.arange(6.0)[:, None]
    noise = 0.03 * torch.randn(n, 6, n_dims, generator=generator)
    return remove_mean((sites + noise).double())


def cartesian_field(name: str, n_dims: int, bonded: bool = False) -> nn.Module:
    """A field of six particles with random weights, float64."""
    x = data(200, n_dims)
    classes = CLASSES if bonded else [0] * 6
    bonds = BONDS if bonded else None
    torch.manual_seed(0)
    if name == "kernel":
        field: nn.Module = KernelField.fit(x, classes=classes, bond_distances=bonds)
    elif name == "egnn":
        field = EGNNField.fit(x, classes=classes, bond_distances=bonds, width=12, n_layers=2)
    elif name == "leave_one_out":
        field = LeaveOneOutField.fit(
            x, classes=classes, bond_distances=bonds, width=12, readout_width=10, n_vectors=5
        )
    elif name == "radial":  # far reach, so that the tails of the tests are not all zero
        field = RadialSplineField(
            n_particles=6, n_dims=n_dims, reach=30.0, n_splines=150, times=[0.0, 0.3, 1.0]
        )
    else:
        field = MLPField.fit(x, width=24, n_layers=2)
    with torch.no_grad():
        for name_, parameter in field.named_parameters():
            if "log_" not in name_ and "centers" not in name_:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return field.double().requires_grad_(False)


def chart_points(prior: InternalCoordinatePrior, kind: str, n: int = 5) -> Tensor:
    """Latent points as the prior draws them, as frames look, or far off the chart."""
    if kind == "prior":
        return prior.sample_latent(n, generator=stream(2))
    y = torch.randn(n, *prior.event_shape, generator=stream(3), dtype=torch.float64)
    if kind == "data":
        y[:, : prior.n_stiff] = 0.6 * y[:, : prior.n_stiff] + 0.8 * y[:, :1] + 0.3
        return y
    y[:, : prior.n_stiff] *= 30.0  # bonds below zero, angles beyond pi: off the chart, smooth
    return y


def contact_field(prior: InternalCoordinatePrior, size: float = 0.3) -> ContactField:
    torch.manual_seed(0)
    field = ContactField.fit(prior, n_samples=200, **SIZES)
    return randomised(field, size)  # type: ignore[return-value]
