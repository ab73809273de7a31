r"""Leave-one-out vector field: an exact divergence from D tangents, whatever its size.

The two halves of the leave-one-out field: trunk (no tangents) and readout (D tangents).

Pair tensors are channel-first, ``(batch, channels, i, j)``: i the particle left out (later the
centre), j the other. Linear layers are batched products over contiguous memory, and the readout
differentiates itself in forward mode by hand, so that primal values, nonlinearities included, are
computed once for all tangents.

Leave-one-out vector field: an exact divergence from D tangents, whatever the particle number.

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
:mod:`~openmm_eqflow.vector_fields.leave_one_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

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

__all__ = [
    "TIME_WIDTH",
    "LeaveOneOutField",
    "Readout",
    "Trunk",
    "mix",
]

TIME_WIDTH = 32


def mix(weight: Tensor, x: Tensor) -> Tensor:
    """Contract channels: ``weight`` (C', C) or (batch, C', C) with ``x`` (..., batch, C, N, N).

    Batched products keep every tensor contiguous; torch.matmul would fold and copy.
    """
    flat = x.flatten(-2)
    if flat.ndim == 4:
        weight = weight.expand(*flat.shape[:2], *weight.shape[-2:]).flatten(0, 1)
        flat = flat.flatten(0, 1)
    out = torch.bmm(weight.expand(flat.shape[0], -1, -1), flat)
    return out.view(*x.shape[:-3], -1, *x.shape[-2:])


def linear(modules: nn.ModuleList, index: int) -> nn.Linear:
    """Member of a list of linear layers, typed."""
    return cast(nn.Linear, modules[index])


def _silu_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    value = x * gate
    return value, gate + value * (1.0 - gate)


class Trunk(nn.Module):
    """States and denoised positions of every particle as seen without another."""

    atom_types: Tensor

    def __init__(self, atom_types: Tensor, width: int, n_layers: int, n_vectors: int) -> None:
        super().__init__()
        n_types = int(atom_types.max()) + 1
        self.register_buffer("atom_types", atom_types)
        self.width, self.n_layers, self.n_vectors = width, n_layers, n_vectors
        self.n_filters = n_layers * width + 2 * n_vectors
        self.other = nn.Embedding(n_types, width)
        self.absent = nn.Embedding(n_types, width)
        self.time = nn.Linear(TIME_WIDTH, width)
        self.source = nn.Linear(width, width + n_vectors, bias=False)
        self.first = nn.Linear(width + n_vectors, width)
        self.inner = nn.ModuleList(
            nn.Linear(width, 2 * width, bias=False) for _ in range(n_layers - 1)
        )
        self.update = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers - 1))
        self.vector_source = nn.Linear(width, n_vectors, bias=False)
        self.vector_out = nn.Linear(width, 2 * n_vectors)
        nn.init.normal_(self.vector_out.weight, std=1e-2)
        nn.init.zeros_(self.vector_out.bias)

    def forward(self, x: Tensor, r: Tensor, filters: Tensor, te: Tensor) -> tuple[Tensor, Tensor]:
        """States ``(batch, width, i, j)`` and displacements ``(batch, D, i, j)`` of j without i.

        ``x`` is (batch, D, N); ``r[..., i, j]`` = x_i - x_j; ``filters`` carry a zero diagonal.
        """
        n, width, n_vectors = x.shape[-1], self.width, self.n_vectors
        norm = n**-0.5
        blocks = [width] * self.n_layers + [n_vectors, n_vectors]
        *radial, vector_first, vector_last = torch.split(filters, blocks, dim=1)
        h0 = (self.other(self.atom_types) + self.time(te)[:, None]).mT  # (batch or 1, C, N)
        source, vector = torch.split(self.source(h0.mT).mT * norm, [width, n_vectors], dim=1)
        # the first layer's sources do not depend on who is absent: full sum minus i's share
        each = radial[0] * source.unsqueeze(-1)
        message = each.sum(-2, keepdim=True) - each
        each_vector = (vector_first * vector.unsqueeze(-1)).unsqueeze(2) * r.unsqueeze(1)
        first_vector = each_vector.sum(-2, keepdim=True) - each_vector  # (batch, Cv, D, i, j)
        strength = torch.sqrt(1.0 + first_vector.square().sum(2)) - 1.0
        constant = self.first.bias[:, None] + h0
        a = mix(self.first.weight, torch.cat([message, strength], dim=1))
        a = torch.nn.functional.silu(a + constant.unsqueeze(-2))
        base = h0.unsqueeze(-2) + self.absent(self.atom_types).T[:, :, None]
        update = linear(self.update, 0)
        h = base + mix(update.weight, a) + update.bias[:, None, None]
        present = 1.0 - torch.eye(n, dtype=x.dtype, device=x.device)
        for layer in range(self.n_layers - 1):
            source, skip = mix(linear(self.inner, layer).weight, h).chunk(2, dim=1)
            message = torch.matmul(source * (present * norm), radial[layer + 1])
            middle = linear(self.middle, layer)
            a = mix(middle.weight, message) + skip
            a = torch.nn.functional.silu(a + middle.bias[:, None, None])
            update = linear(self.update, layer + 1)
            h = h + mix(update.weight, a) + update.bias[:, None, None]
        source = mix(self.vector_source.weight, h) * (present * norm)
        # sum_k g_ik W_kj (x_j - x_k), positions and unity in one batched product
        ones = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)  # (batch, 1 + D, N)
        rows = source.unsqueeze(2) * ones[:, None, :, None]  # (batch, Cv, 1 + D, i, k)
        sums = torch.matmul(rows.flatten(2, 3), vector_last)
        sums = sums.view(*rows.shape[:-1], n)
        last_vector = sums[:, :, :1] * x[:, None, :, None] - sums[:, :, 1:]
        out = mix(self.vector_out.weight, h) + self.vector_out.bias[:, None, None]
        first_out, last_out = out.chunk(2, dim=1)
        shift = (first_out.unsqueeze(2) * first_vector).sum(1)
        return h, shift + (last_out.unsqueeze(2) * last_vector).sum(1)


class Readout(nn.Module):
    """Relax every centre against the others; optionally carry D forward-mode tangents."""

    atom_types: Tensor

    def __init__(
        self, atom_types: Tensor, trunk_width: int, width: int, n_steps: int, n_nodes: int
    ) -> None:
        super().__init__()
        n_types = int(atom_types.max()) + 1
        self.register_buffer("atom_types", atom_types)
        self.width, self.n_steps = width, n_steps
        self.node = nn.Embedding(n_types, n_nodes)
        self.node_time = nn.Linear(TIME_WIDTH, n_nodes)
        self.environment = nn.Linear(trunk_width, n_steps * width)
        self.from_node = nn.ModuleList(
            nn.Linear(n_nodes, width, bias=False) for _ in range(n_steps)
        )
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(n_steps))
        self.head = nn.ModuleList(nn.Linear(width, 2, bias=False) for _ in range(n_steps))
        self.gather = nn.ModuleList(
            nn.Linear(n_nodes + width, n_nodes) for _ in range(n_steps - 1)
        )
        self.scatter = nn.ModuleList(nn.Linear(n_nodes, n_nodes) for _ in range(n_steps - 1))
        for step in range(n_steps):
            nn.init.normal_(linear(self.head, step).weight, std=1e-2)
        self.skip = nn.Linear(TIME_WIDTH, 1)
        nn.init.zeros_(self.skip.weight)
        nn.init.zeros_(self.skip.bias)

    def forward(
        self,
        x: Tensor,
        radial_static: Tensor,
        static_slope: Tensor | None,
        relaxing: Tensor,
        basis: PairBasis,
        states: Tensor,
        denoised: Tensor,
        te: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        r"""Displacement ``(batch, D, N)`` of every centre and, if asked, its divergence.

        Parameters
        ----------
        radial_static
            Filters ``(batch, n_steps * width, N, N)`` of the distances to :math:`x_j`.
        static_slope
            Their derivatives with respect to the distance; None skips the divergence.
        relaxing
            Radial kernels ``(batch or 1, n_steps * width, n_features)`` for the distances to
            :math:`\hat x_j`.
        states, denoised
            The trunk's :math:`h_j^{\setminus i}` and :math:`\hat x_j^{\setminus i}`,
            ``[..., i, j]``.
        """
        silu = torch.nn.functional.silu
        n_dims, n = x.shape[-2:]
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        present = 1.0 - eye
        norm = n**-0.5
        kernels = torch.split(relaxing, self.width, dim=1)
        environment = mix(self.environment.weight, states) + radial_static
        fixed = torch.split(environment, self.width, dim=1)
        node = (self.node(self.atom_types) + self.node_time(te)[:, None]).mT.expand(
            x.shape[0], -1, -1
        )
        center = x
        r0 = x.unsqueeze(-1) - x.unsqueeze(-2)
        d0 = torch.sqrt(r0.square().sum(1) + eye)
        unit0 = r0 * (present / (1.0 + d0)).unsqueeze(1)
        center_dot = node_dot = None
        if static_slope is not None:
            # tangent a moves every centre along axis a: shape (D, batch, D, N)
            center_dot = torch.eye(n_dims, dtype=x.dtype, device=x.device)[:, None, :, None]
            center_dot = center_dot.expand(-1, x.shape[0], -1, n)
            d0_dot = self._distance_dot(r0, d0, center_dot)
            unit0_dot = self._unit_dot(r0, d0, center_dot, d0_dot, present)
            slopes = torch.split(static_slope, self.width, dim=1)
        for step in range(self.n_steps):
            r = center.unsqueeze(-1) - denoised
            d = torch.sqrt(r.square().sum(1) + eye)
            features, z, slope = basis(d)
            from_node = linear(self.from_node, step)
            a = mix(kernels[step], features) + fixed[step]
            a = a + (from_node(node.mT).mT).unsqueeze(-1)
            unit = r * (present / (1.0 + d)).unsqueeze(1)
            hidden, head = linear(self.hidden, step), linear(self.head, step)
            bias = hidden.bias[:, None, None]
            last = step == self.n_steps - 1
            if center_dot is None:
                a = silu(mix(hidden.weight, silu(a)) + bias)
            else:
                d_dot = self._distance_dot(r, d, center_dot)
                kernel_slope = mix(kernels[step], basis.derivative(features, z, slope))
                a_dot = kernel_slope * d_dot.unsqueeze(2) + slopes[step] * d0_dot.unsqueeze(2)
                if node_dot is not None:
                    a_dot = a_dot + (from_node(node_dot.mT).mT).unsqueeze(-1)
                a, gain = _silu_with_slope(a)
                a, outer = _silu_with_slope(mix(hidden.weight, a) + bias)
                a_dot = mix(hidden.weight, a_dot * gain) * outer
                weight_dot = mix(head.weight, a_dot)
                unit_dot = self._unit_dot(r, d, center_dot, d_dot, present)
            weight = mix(head.weight, a)
            pull = weight[:, :1] * unit + weight[:, 1:] * unit0
            if center_dot is not None:
                pull_dot = weight_dot[:, :, :1] * unit + weight_dot[:, :, 1:] * unit0
                pull_dot = pull_dot + weight[:, :1] * unit_dot + weight[:, 1:] * unit0_dot
                center_dot = center_dot + pull_dot.sum(-1)
            center = center + pull.sum(-1)
            if last:
                break
            total = (a * present).sum(-1) * norm
            gather, scatter = linear(self.gather, step), linear(self.scatter, step)
            g = gather(torch.cat([node, total], dim=1).mT)
            if center_dot is None:
                node = node + scatter(silu(g)).mT
            else:
                total_dot = (a_dot * present).sum(-1) * norm
                g, gain = _silu_with_slope(g)
                if node_dot is None:
                    node_dot = torch.zeros_like(node).expand(n_dims, *node.shape)
                g_dot = torch.matmul(torch.cat([node_dot, total_dot], dim=2).mT, gather.weight.T)
                node_dot = node_dot + torch.matmul(g_dot * gain, scatter.weight.T).mT
                node = node + scatter(g).mT
        stretch = self.skip(te).unsqueeze(-1)
        velocity = center - x + stretch * (x - x.mean(-1, keepdim=True))
        if center_dot is None:
            return velocity, None
        moved = torch.diagonal(center_dot.sum(-1), dim1=0, dim2=2).sum(-1)
        return velocity, moved - n * n_dims + (n - 1) * n_dims * stretch[:, 0, 0]

    @staticmethod
    def _distance_dot(r: Tensor, d: Tensor, center_dot: Tensor) -> Tensor:
        return (r * center_dot.unsqueeze(-1)).sum(2) / d

    @staticmethod
    def _unit_dot(r: Tensor, d: Tensor, center_dot: Tensor, d_dot: Tensor, mask: Tensor) -> Tensor:
        inverse = (mask / (1.0 + d)).unsqueeze(1)
        return (center_dot.unsqueeze(-1) - r * (inverse * d_dot.unsqueeze(2))) * inverse

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
