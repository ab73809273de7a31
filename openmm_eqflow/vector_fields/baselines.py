r"""Baselines to compare with: an E(n)-equivariant graph network and a plain perceptron.

E(n)-equivariant graph network as a vector field: the baseline of the published flows.

Fully connected layers of Satorras, Hoogeboom, Welling 2021 (arXiv:2102.09844),

.. math::
    m_{ij} = \phi_e(h_i, h_j, d_{ij}, d^0_{ij}), \quad
    x_i \leftarrow x_i + \sum_j \frac{x_i - x_j}{d_{ij} + 1} \phi_x(m_{ij}), \quad
    h_i \leftarrow h_i + \phi_h\Bigl(h_i, \sum_j m_{ij}\Bigr),

with the velocity the mean-free displacement of the coordinates (Garcia Satorras et al. 2021,
arXiv:2105.09016). Atom classes enter through h, bond-graph distances through the distance
normalisation and an embedding on pairs. The exact divergence takes (N-1)D tangents.

A plain multilayer perceptron over coordinates: the non-equivariant control.

Köhler, Klein, Noé 2020 compare equivariant flows with such a field, with and without data
augmentation. It is neither rotation nor permutation equivariant; positions are made mean-free
first and so is the velocity, so it is translation invariant and its density lives on the same
subspace as every other's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import pair_vectors, remove_mean
from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.divergence import exact_divergence, mean_free_directions
from openmm_eqflow.vector_fields.features import (
    PairBasis,
    PairField,
    TimeFeatures,
    expand_time,
    pair_classes,
)

__all__ = [
    "EGNNField",
    "MLPField",
    "StillField",
]

TIME_WIDTH = 32


class _Layer(nn.Module):
    """One message-passing layer with coordinate update."""

    def __init__(self, width: int, n_features: int) -> None:
        super().__init__()
        # the first edge layer acts on (h_i, h_j, radial features); h_i and h_j are projected
        # before they are paired, the same product at a fraction of the cost
        self.from_center = nn.Linear(width, width)
        self.from_other = nn.Linear(width, width, bias=False)
        self.from_radial = nn.Linear(2 * n_features, width, bias=False)
        self.edge = nn.Linear(width, width)
        self.gate = nn.Linear(width, 1)
        self.pull = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        )
        self.node = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        with torch.no_grad():
            # a small start: the field begins as almost no flow at all
            for weight in self.pull[-1].parameters():
                weight.normal_(std=1e-3)

    def forward(
        self, x: Tensor, h: Tensor, radial0: Tensor, pairs: Tensor, basis: PairBasis
    ) -> tuple[Tensor, Tensor]:
        silu = torch.nn.functional.silu
        n = x.shape[-2]
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        present = (1.0 - eye).unsqueeze(-1)
        r = pair_vectors(x)
        d = torch.sqrt(r.square().sum(-1) + eye)
        radial = torch.cat([basis(d)[0].movedim(-3, -1), radial0], dim=-1)
        m = self.from_center(h).unsqueeze(-2) + self.from_other(h).unsqueeze(-3)
        m = silu(self.edge(silu(m + self.from_radial(radial) + pairs)))
        m = m * torch.sigmoid(self.gate(m)) * present
        x = x + (r * (self.pull(m) * present / (1.0 + d.unsqueeze(-1)))).sum(-2)
        return x, h + self.node(torch.cat([h, m.sum(-2) * n**-0.5], dim=-1))


@register_vector_field
class EGNNField(PairField):
    """E(n) graph network field; O(D), translation and class equivariant.

    Parameters
    ----------
    classes, n_dims, pair_mean, pair_spread, length, bond_distances, n_rbf
        As in :class:`~openmm_eqflow.vector_fields.leave_one_out.LeaveOneOutField`.
    width, n_layers
        Channels and layers.
    tangent_chunk
        Tangents carried at once in the divergence; None for all.
    """

    exact_divergence = True
    table: Tensor
    atom_types: Tensor

    def __init__(
        self,
        *,
        classes: Sequence[int],
        n_dims: int,
        pair_mean: Sequence[float],
        pair_spread: Sequence[float],
        length: float,
        bond_distances: Sequence[Sequence[int]] | None = None,
        width: int = 64,
        n_layers: int = 4,
        n_rbf: int = 16,
        tangent_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            **self.pair_config(
                classes, n_dims, pair_mean, pair_spread, length, bond_distances
            ),
            "width": width,
            "n_layers": n_layers,
            "n_rbf": n_rbf,
            "tangent_chunk": tangent_chunk,
        }
        self.event_shape = (len(classes), n_dims)
        self.length = length
        self.tangent_chunk = tangent_chunk
        table = pair_classes(classes, bond_distances)
        _, atom_types = torch.unique(torch.tensor(list(classes)), return_inverse=True)
        self.register_buffer("table", table)
        self.register_buffer("atom_types", atom_types)
        scaled = [[v / length for v in values] for values in (pair_mean, pair_spread)]
        self.basis = PairBasis(table, scaled[0], scaled[1], n_rbf)
        self.time = TimeFeatures(TIME_WIDTH)
        self.node = nn.Embedding(int(atom_types.max()) + 1, width)
        self.node_time = nn.Linear(TIME_WIDTH, width)
        self.pair = nn.Embedding(len(pair_mean), width)
        self.layers = nn.ModuleList(_Layer(width, self.basis.n_features) for _ in range(n_layers))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity (nm per unit of flow time), mean-free, ``(batch, N, D)``."""
        te = self.time(expand_time(t, y))
        x0 = y / self.length
        n = x0.shape[-2]
        eye = torch.eye(n, dtype=x0.dtype, device=x0.device)
        d = torch.sqrt(pair_vectors(x0).square().sum(-1) + eye)
        radial0 = self.basis(d)[0].movedim(-3, -1)
        pairs = self.pair(self.table)
        h = (self.node(self.atom_types) + self.node_time(te)[:, None]).expand(y.shape[0], -1, -1)
        x = x0
        for layer in self.layers:
            x, h = layer(x, h, radial0, pairs, self.basis)
        return remove_mean(x - x0) * self.length

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence ``(batch,)`` by (N-1)D batched tangents."""
        directions = mean_free_directions(*self.event_shape, like=y)
        return exact_divergence(lambda x: self(t, x), y, directions, chunk_size=self.tangent_chunk)


@register_vector_field
class MLPField(nn.Module):
    """Fully connected field; exact divergence by (N-1)D batched tangents.

    Parameters
    ----------
    n_particles, n_dims
        Shape of one configuration.
    length
        Standard deviation of a coordinate in nm, to scale inputs and outputs.
    width, n_layers
        Hidden layers.
    tangent_chunk
        Tangents carried at once; None for all.
    """

    exact_divergence = True
    equivariant = False

    def __init__(
        self,
        *,
        n_particles: int,
        n_dims: int,
        length: float,
        width: int = 256,
        n_layers: int = 3,
        tangent_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ConfigurationError(f"n_layers must be at least 1, got {n_layers}")
        self.config: dict[str, Any] = {
            "n_particles": n_particles,
            "n_dims": n_dims,
            "length": length,
            "width": width,
            "n_layers": n_layers,
            "tangent_chunk": tangent_chunk,
        }
        self.event_shape = (n_particles, n_dims)
        self.length = length
        self.tangent_chunk = tangent_chunk
        self.time = TimeFeatures(TIME_WIDTH)
        sizes = [n_particles * n_dims + TIME_WIDTH, *[width] * n_layers]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, n_particles * n_dims))

    @classmethod
    def fit(cls, x: Tensor, **sizes: int) -> MLPField:
        """Build an untrained field scaled to data ``x`` (n_samples, N, D)."""
        length = float(remove_mean(x.double()).std())
        return cls(n_particles=x.shape[1], n_dims=x.shape[2], length=length, **sizes)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Mean-free velocity, ``(batch, N, D)``."""
        te = self.time(expand_time(t, y)).expand(y.shape[0], -1)
        inputs = torch.cat([(remove_mean(y) / self.length).flatten(1), te], dim=-1)
        return remove_mean(self.network(inputs).view_as(y)) * self.length

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence ``(batch,)``."""
        directions = mean_free_directions(*self.event_shape, like=y)
        return exact_divergence(lambda x: self(t, x), y, directions, chunk_size=self.tangent_chunk)


@register_vector_field
class StillField(nn.Module):
    """No velocity: the map of a path of Monte Carlo levels alone is the identity.

    Parameters
    ----------
    n_coordinates
        Of the chart.
    """

    exact_divergence = True

    def __init__(self, *, n_coordinates: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"n_coordinates": n_coordinates}
        self.event_shape = (n_coordinates,)
        # Precision and device of a flow are those of its field's weights.
        self.nothing = nn.Parameter(torch.zeros(0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Zero, shape of y."""
        return torch.zeros_like(y)

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Zero, and its divergence (batch,)."""
        return torch.zeros_like(y), torch.zeros_like(y[:, 0])
