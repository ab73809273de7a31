r"""Positions and their derivative in the chart y = (z, tau), for fields that see distances.

With internal coordinates q(y) = (b, theta, phi) the atoms are placed one after the other,

.. math:: x_i = x_p + b\,[\cos\theta\, e_1 + \sin\theta(\cos\phi\, e_2 - \sin\phi\, n)],

e_1 from the parent p to the grandparent g, n the unit normal of e_1 and c = x_r - x_g (r the
reference), e_2 = n x e_1. If p, g, r move with velocities v, the frame turns with the angular
velocity

.. math:: \omega = \frac{e_1 \times (v_g - v_p)}{L} + e_1 \frac{n\cdot(v_r - v_g)
          - (c\cdot e_1)\, n\cdot(v_g - v_p)/L}{c\cdot e_2}, \qquad L = |x_g - x_p|,

so that :math:`v_i = v_p + \omega\times(x_i - x_p) + \partial_q x_i\, dq`: linear in v_p, v_g, v_r
with a 3 x 9 matrix that all columns of dx/dy share. The rigid-body recursion is that of torsion
angle dynamics (Jain, Vaidehi, Rodriguez 1993, J. Comput. Phys. 106:258); it costs one small
product per level of the tree, not one tangent of the whole molecule per coordinate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.priors.zmatrix import InternalCoordinates, ZMatrix

__all__ = [
    "ChartGeometry",
]


def _cross_matrix(a: Tensor) -> Tensor:
    """Matrix (..., 3, 3) of b -> a x b."""
    x, y, z = a.unbind(-1)
    o = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((o, -z, y), (z, o, -x), (-y, x, o))]
    return torch.stack(rows, -2)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class ChartMotion(NamedTuple):
    """How a point of the chart moves: what a pull-back needs, see :class:`ChartGeometry`."""

    internal: InternalCoordinates
    slope: Tensor
    """Derivative of the internal coordinates along the torsions, (n, 3 N - 6, n_soft)."""
    matrices: Tensor | None
    """(n, N - 3, 12, 3): from what acts on an atom to its three parents and (b, theta, phi)."""


class ChartGeometry(nn.Module):
    r"""The map y -> x of an internal-coordinate chart and dx/dy.

    Stiff coordinates are :math:`s = F(\tau) C + L z` with Fourier features F, as in
    :class:`~openmm_eqflow.priors.internal.InternalCoordinatePrior`; C, L and the centres are
    buffers, so that the geometry is saved with the field that uses it.

    Parameters
    ----------
    zmatrix
        ``ZMatrix.config()``.
    soft
        Indices of the soft torsions.
    n_modes
        Number of Fourier modes of the mean.
    n_fixed
        Number of constrained bonds.

    Example
    -------
    >>> import torch
    >>> from openmm_eqflow.priors.zmatrix import ZMatrix
    >>> zm = ZMatrix.from_bonds(4, [(0, 1), (1, 2), (2, 3)], masses=[12, 12, 12, 12])
    >>> geometry = ChartGeometry(zm.config(), soft=[0], n_modes=0)
    >>> geometry.mean[0] = torch.tensor([0.15, 0.15, 0.15, 1.9, 1.9])
    >>> x, jacobian = geometry(torch.zeros(2, 6))
    >>> x.shape, jacobian.shape
    (torch.Size([2, 4, 3]), torch.Size([2, 4, 3, 6]))
    """

    def __init__(
        self, zmatrix: dict[str, Any], soft: list[int], n_modes: int, n_fixed: int = 0
    ) -> None:
        super().__init__()
        self.zmatrix = ZMatrix.from_config(zmatrix)
        n = self.n_particles = self.zmatrix.n_particles
        torsions = len(self.zmatrix.lead)
        stiff = [k for k in range(torsions) if k not in set(soft)]
        self.n_all = 2 * n - 3 + len(stiff)  # with the bonds that are constrained
        self.n_soft, self.n_stiff = len(soft), self.n_all - n_fixed
        self.register_buffer("modes", torch.zeros(n_modes, self.n_soft))
        self.register_buffer("mean", torch.zeros(1 + 2 * n_modes, self.n_all))
        self.register_buffer("factor", torch.eye(self.n_all, self.n_stiff))
        self.register_buffer("centre", torch.zeros(len(stiff)))
        # Torsions out of (s, tau), as they are stored, and relative to the fixed reference.
        pick = torch.zeros(torsions, self.n_all + self.n_soft)
        for j, k in enumerate(stiff):
            pick[k, 2 * n - 3 + j] = 1
        for j, k in enumerate(soft):
            pick[k, self.n_all + j] = 1
        absolute = pick.clone()
        for k, lead in enumerate(self.zmatrix.lead):
            if lead not in (-1, k):
                absolute[k] += pick[lead]
        lengths = torch.eye(self.n_all + self.n_soft)[: 2 * n - 3]
        self.register_buffer("pick", pick, False)
        self.register_buffer("select", torch.cat([lengths, absolute]), False)
        # Atoms in the order in which they are placed, level by level.
        rows = self.zmatrix.rows
        order = [row[0] for row in rows[:3]]
        self.sizes: list[int] = []  # atoms of every level
        slots: list[int] = []  # level by level, of the parents, grandparents, references
        parents: list[list[int]] = [[], [], []]  # the same of all levels
        placed: list[int] = []  # torsions in that order
        for level in self.zmatrix.levels():
            self.sizes.append(len(level))
            for total, c in zip(parents, (1, 2, 3), strict=True):
                column = [order.index(rows[k + 3][c]) for k in level]
                total += column
                slots += column
            placed += level
            order += [rows[k + 3][0] for k in level]
        # Internal coordinates in the order of the recursion: bond, bond, angle, then by atom.
        listed = [0, 1, n - 1] + [r for k in placed for r in (k + 2, k + n, k + 2 * n - 3)]
        back = [order.index(i) for i in range(n)]
        for name, numbers in (
            ("slots", slots), ("parents", parents), ("placed", placed), ("order", order),
            ("back", back), ("listed", listed),
        ):  # fmt: skip
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.int64), False)

    modes: Tensor
    mean: Tensor
    factor: Tensor
    centre: Tensor
    pick: Tensor
    select: Tensor
    slots: Tensor
    parents: Tensor
    placed: Tensor
    order: Tensor
    back: Tensor
    listed: Tensor

    @classmethod
    def of(cls, prior: Any) -> ChartGeometry:
        """Geometry of an internal-coordinate prior.

        Raises
        ------
        UnsupportedSystemError
            The prior has nearly linear angles, or two atoms.
        """
        if prior.bends or prior.n_particles < 3:
            raise UnsupportedSystemError(
                "distances in the chart are for molecules of three atoms or more without nearly "
                "linear angles: use a ChartField"
            )
        made = cls(prior.zmatrix.config(), prior.soft, len(prior.modes), len(prior.fixed))
        made.modes.copy_(prior.modes)
        mean, factor = prior.affine()
        made.mean.copy_(mean)
        made.factor.copy_(factor)
        made.centre.copy_(prior.centre)
        return made

    def _internal(self, y: Tensor) -> tuple[InternalCoordinates, Tensor, Tensor]:
        """Return internal coordinates, and cosine and sine of the modes."""
        z, tau = y[:, : self.n_stiff], y[:, self.n_stiff :]
        phase = tau @ self.modes.T
        cos, sin = torch.cos(phase), torch.sin(phase)
        s = torch.cat([torch.ones_like(y[:, :1]), cos, sin], 1) @ self.mean + z @ self.factor.T
        n = self.n_particles
        centre = self.pick[:, 2 * n - 3 : self.n_all] @ self.centre
        torsions = torch.cat([s, tau], 1) @ self.pick.T + centre
        return InternalCoordinates(s[:, : n - 1], s[:, n - 1 : 2 * n - 3], torsions), cos, sin

    def positions(self, y: Tensor) -> Tensor:
        """Return x (n, N, 3), mean-free."""
        x, _ = self.zmatrix.from_internal(self._internal(y)[0])
        return x

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (n, N, 3) and its derivative (n, N, 3, d) up to a common motion."""
        internal, cos, sin = self._internal(y)
        x, _ = self.zmatrix.from_internal(internal)
        n, count = len(y), self.n_particles
        # dq/dy: constant in z, through the mean and directly in tau.
        stiff = self.select[:, : self.n_all]
        dq = torch.cat([(stiff @ self.factor).expand(n, -1, -1), self._slope(cos, sin)], 2)
        along, out, up = self._base(internal)
        second = _outer(along, dq[:, 0])
        third = _outer(out, dq[:, 1]) + _outer(up, dq[:, count - 1])
        v = torch.stack([torch.zeros_like(second), second, third], 1)
        if self.sizes:
            transfer, frame = self._motion(x[:, self.order], internal)
            k = self.placed
            own = torch.stack([dq[:, k + 2], dq[:, k + count], dq[:, k + 2 * count - 3]], 2)
            local = frame @ own
        offset = 0
        levels = self.slots.split([3 * m for m in self.sizes])
        for m, slots in zip(self.sizes, levels, strict=True):
            here = slice(offset, offset + m)
            before = v[:, slots].reshape(n, 3, m, 3, -1).transpose(1, 2).flatten(2, 3)
            v = torch.cat([v, transfer[:, here] @ before + local[:, here]], 1)
            offset += m
        return x, v[:, self.back]

    def linearise(self, y: Tensor) -> tuple[Tensor, ChartMotion]:
        """Return x (n, N, 3) and what :meth:`pull_back` needs."""
        internal, cos, sin = self._internal(y)
        x, _ = self.zmatrix.from_internal(internal)
        slope, matrices = self._slope(cos, sin)[:, self.listed], None
        if self.sizes:
            pair = self._motion(x[:, self.order], internal)
            matrices = torch.cat(pair, 3).transpose(2, 3).contiguous()
        return x, ChartMotion(internal, slope, matrices)

    def pull_back(
        self, motion: ChartMotion, gradient: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Return derivatives along the chart of functions of x whose gradients are known.

        The recursion of :meth:`forward` backwards: what acts on an atom is handed on to those that
        carry it, so that the cost is that of N atoms and not of N times d entries of dx/dy.

        Parameters
        ----------
        motion
            From :meth:`linearise`.
        gradient
            :math:`\partial a_j / \partial x`, (n, N, 3, h); no net force, no net torque.
        columns
            A direction in z for every function, (n_stiff, h).

        Returns
        -------
        tuple of Tensor
            :math:`\sum_i \partial a_j / \partial z_i\, C_{ij}` (n, h) and
            :math:`\partial a_j / \partial \tau` (n, n_soft, h).
        """
        acting = gradient[:, self.order]
        own: list[Tensor] = []
        stop = self.n_particles - 3
        levels = self.slots.split([3 * m for m in self.sizes])
        for m, slots in zip(reversed(self.sizes), reversed(levels), strict=True):
            stop -= m
            acting, last = acting.split([3 + stop, m], 1)
            assert motion.matrices is not None
            handed = motion.matrices[:, stop : stop + m] @ last
            parents, inner = handed.split([9, 3], 2)
            own.insert(0, inner.flatten(1, 2))
            parents = parents.unflatten(2, (3, 3)).transpose(1, 2).flatten(1, 2)
            acting = acting.index_add(1, slots, parents)
        along, out, up = self._base(motion.internal)
        first = [
            torch.einsum("nc,nch->nh", unit, acting[:, slot])[:, None]
            for unit, slot in ((along, 1), (out, 2), (up, 2))
        ]
        inner = torch.cat([*first, *own], 1)
        stiff = self.select[self.listed, : self.n_all] @ (self.factor @ columns)
        return (inner * stiff).sum(1), motion.slope.transpose(1, 2) @ inner

    def _slope(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Return dq/dtau of the internal coordinates q, (n, 3 N - 6, n_soft)."""
        half = 1 + len(self.modes)
        slope = torch.einsum("nm,mk,mi->nik", cos, self.modes, self.mean[half:])
        slope = slope - torch.einsum("nm,mk,mi->nik", sin, self.modes, self.mean[1:half])
        return self.select[:, : self.n_all] @ slope + self.select[:, self.n_all :]

    @staticmethod
    def _base(internal: InternalCoordinates) -> tuple[Tensor, Tensor, Tensor]:
        """Motion of the second atom, and of the third with its bond and its angle, (n, 3) each."""
        b, theta = internal.bonds, internal.angles
        c, s = torch.cos(theta[:, 0]), torch.sin(theta[:, 0])
        zero = torch.zeros_like(c)
        along = torch.stack([torch.ones_like(c), zero, zero], 1)
        out, up = torch.stack([c, s, zero], 1), torch.stack([-s, c, zero], 1)
        return along, out, b[:, 1, None] * up

    def _motion(self, x: Tensor, internal: InternalCoordinates) -> tuple[Tensor, Tensor]:
        """Matrices (n, N - 3, 3, 9) of (v_p, v_g, v_r) and (n, N - 3, 3, 3) of (b, theta, phi)."""
        p, g, r = (x[:, column] for column in self.parents.unbind(0))
        length = torch.linalg.vector_norm(g - p, dim=-1, keepdim=True)
        e1 = (g - p) / length
        c = r - g
        normal = torch.linalg.cross(e1, c, dim=-1)
        normal = normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
        e2 = torch.linalg.cross(normal, e1, dim=-1)
        c1, c2 = _dot(c, e1), _dot(c, e2)
        turn = _cross_matrix(e1) / length.unsqueeze(-1)
        twist_r = normal / c2
        twist_p = c1 * normal / (c2 * length)
        arm = -_cross_matrix(x[:, 3:] - p)
        eye = torch.eye(3, dtype=x.dtype, device=x.device)
        transfer = torch.cat(
            [
                eye + arm @ (_outer(e1, twist_p) - turn),
                arm @ (turn - _outer(e1, twist_r + twist_p)),
                arm @ _outer(e1, twist_r),
            ],
            -1,
        )
        b = internal.bonds[:, self.placed + 2, None]
        theta = internal.angles[:, self.placed + 1, None]
        phi = self.zmatrix.relative(internal.torsions, +1.0)[:, self.placed, None]
        radial = torch.cos(phi) * e2 - torch.sin(phi) * normal
        across = -torch.sin(phi) * e2 - torch.cos(phi) * normal
        cos, sin = torch.cos(theta), torch.sin(theta)
        frame = torch.stack(
            [cos * e1 + sin * radial, b * (cos * radial - sin * e1), b * sin * across], -1
        )
        return transfer, frame
