r"""Bond graph to internal coordinates and back: an exact chart of molecular conformations.

Each atom i beyond the third is placed by a bond length b to its parent p, an angle :math:`\theta`
at p towards the grandparent g and a dihedral about p-g (Parsons et al. 2005, NeRF). Siblings, that
is atoms that share (p, g), share one free torsion: the first sibling carries it, the others are
written as its difference to the first. So there is one soft torsion per rotatable bond and every
other coordinate is stiff.

The volume element (derived from spherical coordinates about each parent) is

.. math:: dx = N^{-3/2}\, dR\; \prod_{bonds} b^2 \prod_{angles} \sin\theta \; db\,d\theta\,d\tau

for positions x on the mean-free subspace, with dR of total volume :math:`8\pi^2`; two atoms have
directions only, :math:`4\pi`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.geometry import remove_mean

__all__ = [
    "InternalCoordinates",
    "ZMatrix",
    "wrap_angle",
]


def wrap_angle(angle: Tensor) -> Tensor:
    r"""Wrap to :math:`[-\pi, \pi)`, differentiable almost everywhere."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


class InternalCoordinates(NamedTuple):
    """Bonds (n, N-1) in nm, angles (n, N-2) and torsions (n, N-3) in radians."""

    bonds: Tensor
    angles: Tensor
    torsions: Tensor


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)


@dataclass(frozen=True)
class ZMatrix:
    """Placement order of a bonded molecule.

    Attributes
    ----------
    rows
        One ``(atom, parent, grandparent, reference)`` per atom in placement order; entries that
        do not exist for the first three atoms are -1.
    lead
        For every torsion (rows 3 onwards) the index of the torsion that its sibling group shares:
        itself for the first of a group, -1 where the group's torsion is the fixed plane of the
        three root atoms.
    fold
        Rotational symmetry of every leading torsion (3 for methyls), 1 elsewhere.

    Example
    -------
    >>> import torch
    >>> zm = ZMatrix.from_bonds(5, [(0, 1), (0, 2), (0, 3), (0, 4)], masses=[12, 1, 1, 1, 1])
    >>> x = torch.randn(3, 5, 3, dtype=torch.float64)
    >>> y, log_volume = zm.from_internal(zm.to_internal(x))
    >>> bool((zm.to_internal(y).bonds - zm.to_internal(x).bonds).abs().max() < 1e-12)
    True
    """

    rows: tuple[tuple[int, int, int, int], ...]
    lead: tuple[int, ...]
    fold: tuple[int, ...]

    @property
    def n_particles(self) -> int:
        """Number of atoms."""
        return len(self.rows)

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        return {"rows": self.rows, "lead": self.lead, "fold": self.fold}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ZMatrix:
        """Rebuild from :meth:`config`."""
        return cls(
            tuple(tuple(int(v) for v in row) for row in config["rows"]),  # type: ignore[misc]
            tuple(int(v) for v in config["lead"]),
            tuple(int(v) for v in config["fold"]),
        )

    @classmethod
    def from_bonds(
        cls, n_particles: int, bonds: Sequence[tuple[int, int]], *, masses: Sequence[float]
    ) -> ZMatrix:
        """Choose root and placement order from the bond graph (rings are opened by the tree).

        Raises
        ------
        UnsupportedSystemError
            If the molecule is not one bonded piece of at least two atoms.
        """
        graph = nx.Graph()
        graph.add_nodes_from(range(n_particles))
        graph.add_edges_from(bonds)
        if n_particles < 2 or not nx.is_connected(graph):
            raise UnsupportedSystemError(
                f"internal coordinates need one bonded molecule of at least 2 atoms, got "
                f"{n_particles} atoms in {nx.number_connected_components(graph)} pieces; "
                "use the Gaussian prior (prior: gaussian) or split the system"
            )
        if n_particles == 2:
            return cls(((0, -1, -1, -1), (1, 0, -1, -1)), (), ())
        weight = [-float(m) for m in masses]
        roots = _choose_roots(graph, weight)
        order: list[tuple[int, int, int, int]] = [
            (roots[0], -1, -1, -1),
            (roots[1], roots[0], -1, -1),
            (roots[2], roots[0], roots[1], -1),
        ]
        parent = {roots[1]: roots[0], roots[2]: roots[0], roots[0]: roots[1]}
        placed = set(roots)
        lead: list[int] = []
        fold: list[int] = []
        # The root plane is the reference of atoms bonded to the root: no free torsion there.
        group_lead: dict[tuple[int, int], tuple[int, int]] = {(roots[0], roots[1]): (-1, roots[2])}
        queue = deque(roots)
        while queue:
            p = queue.popleft()
            free = [k for k in graph[p] if k not in placed]
            children = sorted(free, key=lambda k: (weight[k], k))
            g = parent[p]
            for i in children:
                if (p, g) in group_lead:
                    leader, reference = group_lead[(p, g)]
                else:
                    candidates = [k for k in graph[g] if k != p and k in placed]
                    reference = min(candidates, key=lambda k: (weight[k], k))
                    leader = len(lead)
                    group_lead[(p, g)] = (leader, reference)
                ends = [k for k in graph[p] if k != g]
                alike = len(ends) == 3 and all(
                    graph.degree[k] == 1 and weight[k] == weight[ends[0]] for k in ends
                )
                fold.append(3 if alike and leader == len(lead) else 1)
                lead.append(leader)
                order.append((i, p, g, reference))
                placed.add(i)
                parent[i] = p
                queue.append(i)
        return cls(tuple(order), tuple(lead), tuple(fold))

    def fixed_bonds(self, constraints: Mapping[tuple[int, int], float]) -> dict[int, float]:
        """Lengths of constrained bonds by the index of the bond.

        Raises
        ------
        UnsupportedSystemError
            A constraint is no bond of the tree.
        """
        places = {frozenset(row[:2]): k for k, row in enumerate(self.rows[1:])}
        for a, b in constraints:
            if frozenset((a, b)) not in places:
                raise UnsupportedSystemError(
                    f"the constraint between atoms {a + 1} and {b + 1} is no bond of the tree "
                    "that internal coordinates follow: constrain bonds to hydrogen only (HBonds)"
                )
        return {places[frozenset(pair)]: length for pair, length in constraints.items()}

    # -- differentiable maps ------------------------------------------------------------------

    def _plan(self, device: torch.device) -> _Plan:
        """Index tensors on a device, made once for each."""
        plans: dict[str, _Plan] = self.__dict__.setdefault("_plans", {})
        if str(device) not in plans:
            plans[str(device)] = _Plan.of(self, device)
        return plans[str(device)]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (N, 4) and leading torsions (N - 3,) on a device, int64."""
        plan = self._plan(device)
        return plan.rows, plan.lead

    def to_internal(self, x: Tensor) -> InternalCoordinates:
        """Compute the internal coordinates, invariant under rigid motions, of ``(n, N, 3)``."""
        atom, par, grand, ref = self._plan(x.device).rows.unbind(1)
        to_parent = x[:, atom[1:]] - x[:, par[1:]]
        bonds = torch.linalg.vector_norm(to_parent, dim=-1)
        to_grand = x[:, grand[2:]] - x[:, par[2:]]
        v = to_parent[:, 1:]
        cross = torch.linalg.cross(v, to_grand, dim=-1)
        angles = torch.atan2(torch.linalg.vector_norm(cross, dim=-1), (v * to_grand).sum(-1))
        axis = _unit(to_grand[:, 1:])
        a = v[:, 1:]
        c = x[:, ref[3:]] - x[:, grand[3:]]
        a = a - (a * axis).sum(-1, keepdim=True) * axis
        c = c - (c * axis).sum(-1, keepdim=True) * axis
        absolute = torch.atan2(
            (torch.linalg.cross(axis, a, dim=-1) * c).sum(-1), (a * c).sum(-1)
        )
        return InternalCoordinates(bonds, angles, self.relative(absolute, -1.0))

    def relative(self, torsions: Tensor, sign: float) -> Tensor:
        """Subtract (sign -1) or add (+1) each group's leading torsion to its other members."""
        plan = self._plan(torsions.device)
        if not len(plan.follower):
            return torsions
        mixed = torsions[:, plan.follower] + sign * torsions[:, plan.leader]
        return wrap_angle(torsions.index_copy(1, plan.follower, mixed))

    def log_volume(self, internal: InternalCoordinates) -> Tensor:
        r""":math:`\log |dx/d(b,\theta,\tau)|` with the orientation integrated out, ``(n,)``."""
        return (
            2 * torch.log(internal.bonds).sum(1)
            + torch.log(torch.sin(internal.angles)).sum(1)
            + self.constant
        )

    @property
    def constant(self) -> float:
        """Log volume of orientations and of the mean-free subspace's scale."""
        turns = 4 * math.pi if self.n_particles == 2 else 8 * math.pi**2
        return math.log(turns) - 1.5 * math.log(self.n_particles)

    def levels(self) -> list[list[int]]:
        """Torsions (indices) whose atoms can be placed together, level by level."""
        depth = {row[0]: 0 for row in self.rows[:3]}
        levels: dict[int, list[int]] = {}
        for k, (atom, par, grand, ref) in enumerate(self.rows[3:]):
            depth[atom] = 1 + max(depth[par], depth[grand], depth[ref])
            levels.setdefault(depth[atom], []).append(k)
        return [levels[d] for d in sorted(levels)]

    def from_internal(self, internal: InternalCoordinates) -> tuple[Tensor, Tensor]:
        """Mean-free positions ``(n, N, 3)`` in the root frame and ``log_volume`` (n,).

        Atoms at the same depth of the tree are placed together.
        """
        bonds, angles, torsions = internal
        absolute = self.relative(torsions, +1.0)
        zero = torch.zeros_like(bonds[:, 0])
        first = torch.stack([bonds[:, 0], zero, zero], -1)
        root = [torch.zeros_like(first), first]
        if self.n_particles > 2:
            turned = [torch.cos(angles[:, 0]), torch.sin(angles[:, 0]), zero]
            root.append(bonds[:, 1, None] * torch.stack(turned, -1))
        placed = torch.stack(root, 1)
        plan = self._plan(bonds.device)
        for par, grand, ref, level in plan.levels:
            p, g, r = placed[:, par], placed[:, grand], placed[:, ref]
            b = bonds[:, level + 2, None]
            th = angles[:, level + 1, None]
            tau = absolute[:, level, None]
            e1 = _unit(g - p)
            normal = _unit(torch.linalg.cross(e1, r - g, dim=-1))
            e2 = torch.linalg.cross(normal, e1, dim=-1)
            direction = torch.cos(th) * e1 + torch.sin(th) * (
                torch.cos(tau) * e2 - torch.sin(tau) * normal
            )
            placed = torch.cat([placed, p + b * direction], 1)
        return remove_mean(placed[:, plan.order]), self.log_volume(internal)


class _Plan(NamedTuple):
    """Index tensors of a :class:`ZMatrix` on one device."""

    rows: Tensor
    """Atom, parent, grandparent, reference, (N, 4)."""
    lead: Tensor
    follower: Tensor
    """Torsions written relative to another of their group, and that one."""
    leader: Tensor
    levels: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """Slots of the parents, grandparents, references, and the torsions, level by level."""
    order: Tensor
    """Slot of every atom."""

    @classmethod
    def of(cls, zmatrix: ZMatrix, device: torch.device) -> _Plan:
        def on(numbers: Sequence[Any]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        follower = [k for k, lead in enumerate(zmatrix.lead) if lead not in (-1, k)]
        slot = {row[0]: k for k, row in enumerate(zmatrix.rows[:3])}
        levels = []
        for level in zmatrix.levels():
            rows = [zmatrix.rows[k + 3] for k in level]
            par, grand, ref = (on([slot[row[c]] for row in rows]) for c in (1, 2, 3))
            levels.append((par, grand, ref, on(level)))
            for row in rows:
                slot[row[0]] = len(slot)
        return cls(
            on(zmatrix.rows),
            on(zmatrix.lead),
            on(follower),
            on([zmatrix.lead[k] for k in follower]),
            levels,
            on([slot[i] for i in range(zmatrix.n_particles)]),
        )


def _choose_roots(graph: nx.Graph, weight: list[float]) -> tuple[int, int, int]:
    """Three bonded atoms near the middle of the molecule, as heavy as possible."""
    eccentricity = nx.eccentricity(graph)

    def rank(atom: int) -> tuple[int, int, float, int]:
        heavy = sum(weight[k] < -1.5 for k in graph[atom])
        return (-min(heavy, 2), eccentricity[atom], weight[atom], atom)

    centre = min((a for a in graph if graph.degree[a] >= 2), key=rank)
    ends = sorted(graph[centre], key=lambda k: (weight[k], eccentricity[k], k))
    return centre, ends[0], ends[1]
