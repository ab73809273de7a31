r"""Leave-one-out vector field: an exact divergence from D tangents, whatever the particle number.

The divergence :math:`\sum_i \mathrm{tr}\,\partial v_i/\partial x_i` needs each velocity's
derivative with respect to its own particle only. If everything :math:`v_i` depends on, except a
last *readout*, is blind to :math:`x_i`, forward-mode differentiation of the readout along D
directions, moved by all particles at once, gives it exactly (the construction of Chen and
Duvenaud 2019, arXiv:1912.03579, for E(n)-equivariant interacting particles).

Trunk (no tangents): states :math:`h_j^{\setminus i}` and a denoised position
:math:`\hat x_j^{\setminus i}` of every particle j as seen without i,

.. math::
    m_j^{\setminus i} = \sum_{k \ne i, j} W(d_{jk}, t) \odot A h_k^{\setminus i},

with filters W shared by all i, so one layer is one batched product, :math:`O(N^3 C + N^2 C^2)`.

Readout (D tangents on the centre :math:`c_i = x_i`): relaxation steps of the centre against
:math:`x_j`, :math:`\hat x_j^{\setminus i}` and :math:`h_j^{\setminus i}` in the manner of E(n)
layers (Satorras et al. 2021, arXiv:2102.09844); the velocity is the centre's displacement.
Primal values are computed once and shared by the D tangents. Both parts are written out in
:mod:`~openmm_eqflow.vector_fields.leave_one_out_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.features import (
    PairBasis,
    PairField,
    TimeFeatures,
    expand_time,
    pair_classes,
)
from openmm_eqflow.vector_fields.leave_one_out_layers import TIME_WIDTH, Readout, Trunk, mix

__all__ = ["LeaveOneOutField"]

_BLOCK_PAIRS = 25_000


@register_vector_field
class LeaveOneOutField(PairField):
    r"""Leave-one-out field in Cartesian coordinates; O(D), translation and class equivariant.

    Parameters
    ----------
    classes
        Class of each atom; the field is equivariant under permutations within classes that keep
        ``bond_distances``.
    n_dims
        2 or 3.
    pair_mean, pair_spread, length
        From :func:`~openmm_eqflow.vector_fields.features.fit_pair_statistics`, nm.
    bond_distances
        Bonds between each two atoms; None for clusters.
    width, n_layers, n_vectors
        Trunk: channels, message layers, vector channels.
    readout_width, n_steps, n_nodes
        Readout: channels, relaxation steps, channels of the centre's own state.
    n_rbf
        Radial Gaussians.

    Notes
    -----
    The divergence of the mean-free projected velocity equals the unprojected one: the field is
    translation invariant, so its Jacobian J has :math:`J 1 = 0` and
    :math:`\mathrm{tr}(PJ) = \mathrm{tr}\,J`.
    """

    exact_divergence = True
    table: Tensor

    def __init__(
        self,
        *,
        classes: Sequence[int],
        n_dims: int,
        pair_mean: Sequence[float],
        pair_spread: Sequence[float],
        length: float,
        bond_distances: Sequence[Sequence[int]] | None = None,
        width: int = 48,
        n_layers: int = 2,
        n_vectors: int = 16,
        readout_width: int = 48,
        n_steps: int = 3,
        n_nodes: int = 48,
        n_rbf: int = 20,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            **self.pair_config(classes, n_dims, pair_mean, pair_spread, length, bond_distances),
            "width": width,
            "n_layers": n_layers,
            "n_vectors": n_vectors,
            "readout_width": readout_width,
            "n_steps": n_steps,
            "n_nodes": n_nodes,
            "n_rbf": n_rbf,
        }
        self.event_shape = (len(classes), n_dims)
        self.length = length
        table = pair_classes(classes, bond_distances)
        _, atom_types = torch.unique(torch.tensor(list(classes)), return_inverse=True)
        scaled = [[v / length for v in values] for values in (pair_mean, pair_spread)]
        self.basis = PairBasis(table, scaled[0], scaled[1], n_rbf)
        self.time = TimeFeatures(TIME_WIDTH)
        self.trunk = Trunk(atom_types, width, n_layers, n_vectors)
        self.readout = Readout(atom_types, width, readout_width, n_steps, n_nodes)
        self.n_filters = (self.trunk.n_filters, n_steps * readout_width, n_steps * readout_width)
        self.kernels = nn.Linear(TIME_WIDTH, sum(self.n_filters) * self.basis.n_features)
        n_pair_classes = len(pair_mean)
        self.register_buffer("table", table)
        self.pair_gain = (
            nn.Embedding(n_pair_classes, 2 * sum(self.n_filters[:2]))
            if n_pair_classes > 1
            else None
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity (nm per unit of flow time), mean-free, ``(batch, N, D)``."""
        return self._evaluate(t, y, with_divergence=False)[0]

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence ``(batch,)``."""
        velocity, divergence = self._evaluate(t, y, with_divergence=True)
        if divergence is None:
            raise RuntimeError("the readout returned no divergence although asked to")
        return velocity, divergence

    def _evaluate(
        self, t: Tensor, y: Tensor, *, with_divergence: bool
    ) -> tuple[Tensor, Tensor | None]:
        times = expand_time(t, y)
        # Blocks that stay in a core's cache: at N = 55 a third faster than 32 at once.
        block = max(1, _BLOCK_PAIRS // y.shape[-2] ** 2)
        if y.device.type != "cpu" or len(y) <= block:
            return self._evaluate_block(times, y, with_divergence)
        parts = [
            self._evaluate_block(
                times if len(times) == 1 else times[k : k + block], part, with_divergence
            )
            for k, part in zip(range(0, len(y), block), y.split(block), strict=True)
        ]
        velocities, divergences = zip(*parts, strict=True)
        return torch.cat(velocities), torch.cat(divergences) if with_divergence else None

    def _evaluate_block(
        self, times: Tensor, y: Tensor, with_divergence: bool
    ) -> tuple[Tensor, Tensor | None]:
        te = self.time(times)
        x = (y / self.length).mT
        n = x.shape[-1]
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        r = x.unsqueeze(-1) - x.unsqueeze(-2)
        d = torch.sqrt(r.square().sum(1) + eye)
        kernels = self.kernels(te).unflatten(-1, (-1, self.basis.n_features))
        pair_kernels, relaxing = torch.split(
            kernels, [sum(self.n_filters[:2]), self.n_filters[2]], dim=1
        )
        features, z, slope = self.basis(d)
        filters = mix(pair_kernels, features)
        gain = None
        if self.pair_gain is not None:
            gain, shift = self.pair_gain(self.table).permute(2, 0, 1).chunk(2, dim=0)
            filters = filters * (1.0 + gain) + shift
        trunk_filters, static = torch.split(filters, list(self.n_filters[:2]), dim=1)
        states, displacement = self.trunk(x, r, trunk_filters * (1.0 - eye), te)
        denoised = x.unsqueeze(-2) + displacement
        static_slope = None
        if with_divergence:
            static_slope = mix(
                pair_kernels[:, self.n_filters[0] :], self.basis.derivative(features, z, slope)
            )
            if gain is not None:
                static_slope = static_slope * (1.0 + gain[self.n_filters[0] :])
        velocity, divergence = self.readout(
            x, static, static_slope, relaxing, self.basis, states, denoised, te
        )
        return remove_mean(velocity.mT * self.length), divergence
