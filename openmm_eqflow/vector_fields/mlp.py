r"""A plain multilayer perceptron over coordinates: the non-equivariant control.

Köhler, Klein, Noé 2020 compare equivariant flows with such a field, with and without data
augmentation. It is neither rotation nor permutation equivariant; positions are made mean-free
first and so is the velocity, so it is translation invariant and its density lives on the same
subspace as every other's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.divergence import exact_divergence, mean_free_directions
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.features import TimeFeatures, expand_time

__all__ = ["MLPField"]

TIME_WIDTH = 32


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
