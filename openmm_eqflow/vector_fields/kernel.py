r"""The kernel field of Köhler, Klein, Noé 2020, with its closed-form divergence.

.. math::
    v_i = \sum_{j \ne i} r_{ij}\, \phi(d_{ij}, t), \qquad
    \phi(d, t) = \sum_m K_m(t) \Bigl[\sum_l (R_l(d) + a_l^2) W_{lm} + b_m\Bigr],

R and K Gaussians in d and t, normalised to sum to one, W and b one set per pair class. Then

.. math::
    \nabla \cdot v = \sum_{i \ne j} \bigl[D\,\phi(d_{ij}, t) + d_{ij}\,\phi'(d_{ij}, t)\bigr].

The normalisation is a softmax of the log kernels, in value and derivative alike, with no epsilon:
where every Gaussian underflows the nearest one keeps weight one and the divergence stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.features import expand_time, pair_classes

__all__ = [
    "KernelField",
]


@register_vector_field
class KernelField(nn.Module):
    """Radial kernel field; O(D), translation and class equivariant.

    Parameters
    ----------
    classes, bond_distances
        As in :func:`~openmm_eqflow.vector_fields.features.pair_classes`.
    n_dims
        2 or 3.
    reach
        Distance in nm up to which the radial centres are spread.
    n_rbf, n_times
        Radial and time kernels.
    """

    exact_divergence = True
    row: Tensor
    column: Tensor
    labels: Tensor

    def __init__(
        self,
        *,
        classes: Sequence[int],
        n_dims: int,
        reach: float,
        bond_distances: Sequence[Sequence[int]] | None = None,
        n_rbf: int = 50,
        n_times: int = 10,
    ) -> None:
        super().__init__()
        if n_rbf < 2 or n_times < 2 or not reach > 0.0:
            raise ConfigurationError(
                "a kernel field needs n_rbf >= 2, n_times >= 2 and reach > 0, got "
                f"{n_rbf}, {n_times} and {reach}"
            )
        self.config: dict[str, Any] = {
            "classes": list(classes),
            "n_dims": n_dims,
            "reach": reach,
            "bond_distances": bond_distances and [list(row) for row in bond_distances],
            "n_rbf": n_rbf,
            "n_times": n_times,
        }
        self.event_shape = (len(classes), n_dims)
        row, column = torch.tril_indices(len(classes), len(classes), offset=-1)
        table = pair_classes(classes, bond_distances)
        self.register_buffer("row", row)
        self.register_buffer("column", column)
        self.register_buffer("labels", table[row, column])
        n_classes = int(table.max()) + 1
        self.centers = nn.Parameter(torch.linspace(0.0, reach, n_rbf))
        self.log_width = nn.Parameter(torch.full((n_rbf,), 2.0 * reach / n_rbf).log())
        self.time_centers = nn.Parameter(torch.linspace(0.0, 1.0, n_times))
        self.log_time_width = nn.Parameter(torch.full((n_times,), 1.0 / n_times).log())
        self.importance = nn.Parameter(torch.zeros(n_rbf))
        self.weight = nn.Parameter(1e-3 * torch.randn(n_times, n_classes, n_rbf))
        self.bias = nn.Parameter(torch.zeros(n_times, n_classes))

    @classmethod
    def fit(
        cls,
        x: Tensor,
        *,
        classes: Sequence[int],
        bond_distances: Sequence[Sequence[int]] | None = None,
        **sizes: int,
    ) -> KernelField:
        """Build an untrained field whose centres cover 1.5 times the distances of data ``x``."""
        row, column = torch.tril_indices(x.shape[1], x.shape[1], offset=-1)
        distances = (x[:1000, row] - x[:1000, column]).norm(dim=-1)
        return cls(
            classes=classes,
            n_dims=x.shape[-1],
            reach=1.5 * float(distances.max()),
            bond_distances=bond_distances,
            **sizes,
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity (nm per unit of flow time), mean-free, ``(batch, N, D)``."""
        return self._evaluate(t, y, with_divergence=False)[0]

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its closed-form divergence ``(batch,)``."""
        return self._evaluate(t, y, with_divergence=True)

    def _evaluate(self, t: Tensor, y: Tensor, *, with_divergence: bool) -> tuple[Tensor, Tensor]:
        time = expand_time(t, y)
        z = (time[:, None] - self.time_centers) * torch.exp(-self.log_time_width)
        kernels = torch.softmax(-0.5 * z * z, dim=-1)  # (batch or 1, n_times)
        weight = torch.einsum("bm,mpl->bpl", kernels, self.weight)
        offset = kernels @ self.bias + weight @ self.importance.square()
        if weight.shape[1] > 1:
            weight, offset = weight[:, self.labels], offset[:, self.labels]
        r = y[:, self.row] - y[:, self.column]  # (batch, n_pairs, D)
        d = r.norm(dim=-1)
        scaled = (d.unsqueeze(-1) - self.centers) * torch.exp(-self.log_width)
        radial = torch.softmax(-0.5 * scaled * scaled, dim=-1)
        phi = (radial * weight).sum(-1) + offset
        pull = r * phi.unsqueeze(-1)
        velocity = torch.zeros_like(y).index_add(1, self.row, pull)
        velocity = velocity.index_add(1, self.column, -pull)
        if not with_divergence:
            return velocity, velocity
        # R_l' = R_l (s_l - sum_k R_k s_k), s_l the slope of the log kernel
        slope = -scaled * torch.exp(-self.log_width)
        slope = slope - (radial * slope).sum(-1, keepdim=True)
        phi_slope = (radial * slope * weight).sum(-1)
        return velocity, 2.0 * (self.event_shape[1] * phi + d * phi_slope).sum(-1)
