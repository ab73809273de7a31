"""Rotatable bonds, amides, double bonds, rings and centres of a molecule, from its bonds alone.

What isomers and conformers there are must not depend on what a simulation happened to visit: the
torsions of all bonds that can turn, slowly (amides, double bonds) or not, and those of every ring
that can pucker. Bond orders are the topology's, else the force field's
(:func:`~openmm_eqflow.targets.symmetry.double_bonds`).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import mdtraj
import networkx as nx
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app

from openmm_eqflow.analysis.observables import Torsion, torsion_angles
from openmm_eqflow.targets.symmetry import (
    Symmetry,
    bond_graph,
    bond_symmetry,
    double_bonds,
    elements,
)

__all__ = [
    "Isomers",
    "find_isomers",
]

FloatArray = NDArray[np.float64]
_SATURATED = {(6, 4), (7, 3), (7, 4), (8, 2), (14, 4), (16, 2)}  # element, neighbours


@dataclass(frozen=True)
class Isomers:
    """What tells the isomers and conformers of a molecule apart.

    Attributes
    ----------
    torsions
        One per bond outside rings that has further atoms on both ends, the softest first, then
        those of the rings. Ends whose atoms or groups are interchangeable (methyls, carboxylates,
        phenyls, tert-butyls) give a torsion its ``fold``.
    rings
        Names of the flexible rings; ``Torsion.ring`` is an index into them.
    centres
        Atoms whose hand distinguishes isomers: stereocentres, and substituted ring atoms that can
        be cis or trans to each other.
    sides
        One per substituent of a saturated six-membered ring: ring, ring, ring atom, substituent.
        It is equatorial where the torsion is anti, else axial.
    """

    torsions: tuple[Torsion, ...]
    rings: tuple[str, ...]
    centres: tuple[int, ...]
    sides: tuple[Torsion, ...] = ()

    @property
    def tabled(self) -> tuple[Torsion, ...]:
        """Torsions whose states have populations: those of bonds and rings, then the sides."""
        return self.torsions + self.sides

    def label(self, members: list[Torsion]) -> str:
        """Name of a torsion, or of the ring that several make up."""
        first = members[0]
        return first.name if first.ring < 0 else self.rings[first.ring]

    def lines(self, topology: app.Topology, x: FloatArray, *, annealed: bool) -> list[str]:
        """Say what there is, and what is as in the structure ``x`` (n_particles, 3) nm.

        ``annealed``: frames come from paths, which sample amides and conformers of rings.
        """
        atoms = list(topology.atoms())
        states: dict[str, list[str]] = {"single": [], "amide": [], "double": []}
        for torsion, angle in zip(
            self.torsions, torsion_angles(x[None], self.torsions)[0], strict=True
        ):
            if torsion.kind in ("single", "ester"):
                states["single"] += [torsion.name] if torsion.fold == 1 else []
            elif torsion.kind != "ring" and torsion.fold == 1:
                side = "cis" if math.cos(angle) > 0.0 else "trans"
                states[torsion.kind].append(f"{torsion.name} {side}")
        kept = [] if annealed else [f"amide {text}" for text in states["amide"]]
        kept += [f"double bond {text}" for text in states["double"]]
        kept += [f"centre {atoms[k].name} ({k + 1})" for k in self.centres]
        rings = [
            name
            for k, name in enumerate(self.rings)
            if not all(t.even for t in self.torsions if t.ring == k)
        ]
        lines = []
        if kept:
            lines.append(
                f"Kept as in the structure: {', '.join(kept)}. Other isomers are not sampled: "
                "each takes a structure and a run of its own."
            )
        if annealed and states["amide"]:
            lines.append(f"Sampled on both sides: amide {', '.join(states['amide'])} here.")
        if rings:
            lines.append(
                f"Conformers of rings that quenches of hot dynamics find: {', '.join(rings)}."
                if annealed
                else "Conformers of rings that dynamics may not interconvert: "
                f"{', '.join(rings)}; compare runs from several."
            )
        if not annealed and (states["amide"] or rings):
            lines.append(
                "--method annealing samples both sides of amides, whatever the barrier, and the "
                "conformers of rings that quenches of hot dynamics find."
            )
        if states["single"]:
            lines.append(f"Torsions that turn: {', '.join(states['single'])}.")
        return lines


def find_isomers(
    system: openmm.System, topology: app.Topology, positions: FloatArray | None = None
) -> Isomers:
    """Find torsions, flexible rings and centres of a molecule.

    Parameters
    ----------
    system, topology
        Bonds are the topology's, else the System's.
    positions
        ``(n_particles, 3)`` nm: the isomer (hands of centres, sides of double bonds).
    """
    graph = bond_graph(system, topology)
    if not graph.number_of_edges():
        return Isomers((), (), ())
    symmetry = bond_symmetry(system, topology, positions)
    kinds = elements(system, topology)
    names = [atom.name for atom in topology.atoms()]
    rings = [_in_order(graph, ring) for ring in nx.minimum_cycle_basis(graph)]
    torsions = _bond_torsions(graph, kinds, names, _backbone(topology), system, topology)
    flexible = [ring for ring in rings if _puckers(graph, ring)]
    for k, ring in enumerate(flexible):
        even = _chairs_alike(ring, symmetry)
        for i in range(len(ring)):
            a, b, c, d = (ring[(i + j) % len(ring)] for j in range(4))
            name = f"ring {names[b]}-{names[c]}"
            torsions.append(Torsion(name, (a, b, c, d), 1, "ring", k, even))
    sides = [side for ring in flexible for side in _sides(graph, kinds, names, ring, symmetry)]
    labels = tuple(
        f"ring {'-'.join(names[k] for k in ring)} ({'-'.join(str(k + 1) for k in ring)})"
        for ring in flexible
    )
    centres = _centres(graph, rings, symmetry)
    return Isomers(_numbered(torsions, (1, 2)), labels, centres, _numbered(sides, (3, 2)))


def _numbered(torsions: list[Torsion], about: tuple[int, int]) -> tuple[Torsion, ...]:
    """Give those of like names the numbers of two of their atoms."""
    count = Counter(t.name for t in torsions)
    a, b = about
    return tuple(
        t
        if count[t.name] == 1
        else t._replace(name=f"{t.name} ({t.atoms[a] + 1}-{t.atoms[b] + 1})")
        for t in torsions
    )


def _bond_torsions(
    graph: nx.Graph,
    kinds: list[int],
    names: list[str],
    backbone: dict[tuple[int, int], tuple[str, tuple[int, ...]]],
    system: openmm.System,
    topology: app.Topology,
) -> list[Torsion]:
    double = set(double_bonds(system, topology, graph))
    found = []
    for pair in nx.bridges(graph):
        b, c = sorted(pair)
        # About a triple bond, or beside one, there is nothing to turn.
        if any(graph.degree[k] < 2 or (kinds[k], graph.degree[k]) == (6, 2) for k in (b, c)):
            continue
        amide, ester = (_joins(graph, kinds, b, c, hetero) for hetero in (7, 8))
        if (b, c) in backbone:
            name, quad = backbone[b, c]
        else:
            # Caps (ACE, NME) have no alpha carbon, so mdtraj does not call their amide bond omega.
            omega = bool(backbone) and amide

            # IUPAC's omega runs from alpha carbon to alpha carbon: not over the carbonyl oxygen,
            # nor over proline's delta carbon, which would show a trans amide at 0 degrees.
            # Z of an ester is told from what is not the carbonyl oxygen, be it a hydrogen.
            def rank(
                k: int, amide: bool = amide, ester: bool = ester
            ) -> tuple[bool, bool, bool, bool, int]:
                carbonyl = ester and (kinds[k], graph.degree[k]) == (8, 1)
                other = amide and kinds[k] != 6
                return carbonyl, kinds[k] == 1, other, amide and names[k] != "CA", k

            first = min((k for k in graph[b] if k != c), key=rank)
            last = min((k for k in graph[c] if k != b), key=rank)
            name, quad = "ω" if omega else f"{names[b]}-{names[c]}", (first, b, c, last)
        stiff = "double" if (b, c) in double else "ester" if ester else "single"
        kind = "amide" if amide else stiff
        fold = math.lcm(_end_fold(graph, kinds, b, c), _end_fold(graph, kinds, c, b))
        found.append(Torsion(name, (quad[0], quad[1], quad[2], quad[3]), fold, kind))
    order = {"φ": 0, "ψ": 1}
    slow = {"single": 0, "ester": 0, "amide": 1, "double": 2}
    return sorted(found, key=lambda t: (t.fold, slow[t.kind], order.get(t.name[0], 2)))


def _backbone(topology: app.Topology) -> dict[tuple[int, int], tuple[str, tuple[int, ...]]]:
    """Central bond -> (name, atoms) of phi, psi, omega and chi 1 to 4."""
    table = mdtraj.Topology.from_openmm(topology)
    frame = mdtraj.Trajectory(np.zeros((1, table.n_atoms, 3), dtype=np.float32), table)
    named: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
    for letter, owner, quads in (
        ("φ", 1, mdtraj.geometry.dihedral.indices_phi(frame.topology)),
        ("ψ", 1, mdtraj.geometry.dihedral.indices_psi(frame.topology)),
        ("ω", 2, mdtraj.geometry.dihedral.indices_omega(frame.topology)),
        ("χ1", 1, mdtraj.geometry.dihedral.indices_chi1(frame.topology)),
        ("χ2", 1, mdtraj.geometry.dihedral.indices_chi2(frame.topology)),
        ("χ3", 1, mdtraj.geometry.dihedral.indices_chi3(frame.topology)),
        ("χ4", 1, mdtraj.geometry.dihedral.indices_chi4(frame.topology)),
    ):
        several = len(quads) > 1
        for quad in np.asarray(quads, dtype=np.int64).reshape(-1, 4):
            residue = table.atom(int(quad[owner])).residue
            label = f"{letter} {residue.name.capitalize()}{residue.resSeq}" if several else letter
            key = (int(min(quad[1:3])), int(max(quad[1:3])))
            named[key] = (label, tuple(int(k) for k in quad))
    return named


def _joins(graph: nx.Graph, kinds: list[int], b: int, c: int, hetero: int) -> bool:
    """Whether one end is a carbonyl carbon and the other a nitrogen (7) or an oxygen (8)."""
    return any(
        (kinds[carbon], kinds[other]) == (6, hetero)
        and any(kinds[k] == 8 and graph.degree[k] == 1 for k in graph[carbon] if k != other)
        for carbon, other in ((b, c), (c, b))
    )


def _end_fold(graph: nx.Graph, kinds: list[int], centre: int, across: int) -> int:
    """3 for an end with three like groups, 2 for a planar end with two, else 1."""
    ends = [k for k in graph[centre] if k != across]
    if len(ends) not in (2, 3) or (len(ends) == 2 and kinds[centre] not in (6, 7)):
        return 1
    terminal = all(graph.degree[k] == 1 for k in ends)
    if len(ends) == 2 and kinds[centre] == 7 and not terminal and graph.degree[across] != 3:
        return 1  # a pyramid: its two groups are a third of a turn apart
    side = graph.copy()
    side.remove_edge(centre, across)
    side = side.subgraph(nx.node_connected_component(side, centre))
    # Groups are alike if what surrounds them, seen from the centre, is, however far away.
    colour = {k: hash((kinds[k], k == centre)) for k in side}
    for _ in range(len(side)):
        finer = {k: hash((colour[k], *sorted(colour[n] for n in side[k]))) for k in side}
        if len(set(finer.values())) == len(set(colour.values())):
            break
        colour = finer
    return len(ends) if len({colour[k] for k in ends}) == 1 else 1


def _in_order(graph: nx.Graph, ring: list[int]) -> tuple[int, ...]:
    """Atoms of a ring one after the other, from the lowest to its lower neighbour."""
    inside = graph.subgraph(ring)
    walk = [min(ring)]
    while len(walk) < len(ring):
        walk.append(min(k for k in inside[walk[-1]] if k not in walk))
    return tuple(walk)


def _puckers(graph: nx.Graph, ring: tuple[int, ...]) -> bool:
    """Whether a ring has conformers: four atoms or more, two of them tetrahedral."""
    return len(ring) > 3 and sum(graph.degree[k] == 4 for k in ring) >= 2


def _chairs_alike(ring: tuple[int, ...], symmetry: Symmetry) -> bool:
    """Whether a relabelling within the sector turns a chair into the other chair."""
    if len(ring) not in (4, 6):
        return False
    where = {frozenset((a, ring[k - 1])): k for k, a in enumerate(ring)}
    bonds = [(a, ring[k - 1]) for k, a in enumerate(ring)]
    for g in symmetry.sector_generators:
        images = [where.get(frozenset((g[a], g[b]))) for a, b in bonds]
        if all(j is not None and (j - k) % 2 for k, j in enumerate(images)):
            return True
    return False


def _sides(
    graph: nx.Graph,
    kinds: list[int],
    names: list[str],
    ring: tuple[int, ...],
    symmetry: Symmetry,
) -> list[Torsion]:
    """Substituents of a saturated six-membered ring that are axial or equatorial.

    Not those of carbon where the chairs differ in labels only: its sides do, too (cis-1,4). A
    nitrogen turns inside out, so its side is a state in any case.
    """
    saturated = all((kinds[k], graph.degree[k]) in _SATURATED for k in ring)
    if len(ring) != 6 or not saturated:
        return []
    alike = _chairs_alike(ring, symmetry)
    bridges = {frozenset(pair) for pair in nx.bridges(graph)}
    found = []
    for i, a in enumerate(ring):
        outside = [k for k in graph[a] if k not in ring]
        heavy = [k for k in outside if kinds[k] != 1]
        # A nitrogen beside a planar atom is planar itself; of its own two sides one may be an H.
        one = heavy or (outside if len(outside) == 1 else [])
        if len(one) != 1 or frozenset((a, one[0])) not in bridges:
            continue
        (s,) = one
        inverts = graph.degree[a] == 3
        if (alike and not inverts) or (inverts and kinds[s] == 6 and graph.degree[s] < 4):
            continue
        atoms = (ring[i - 2], ring[i - 1], a, s)
        found.append(Torsion(f"{names[s]} on {names[a]}", atoms, 1, "side"))
    return found


def _centres(graph: nx.Graph, rings: list[tuple[int, ...]], symmetry: Symmetry) -> tuple[int, ...]:
    found = {s.centre for s in symmetry.stereocentres}
    for ring in rings:
        members = []
        for k in ring:
            outside = [n for n in graph[k] if n not in ring]
            if len(outside) == 2 and len({symmetry.classes[n] for n in outside}) == 2:
                members.append(k)
        if len(members) > 1:
            found.update(members)
    return tuple(sorted(found))
