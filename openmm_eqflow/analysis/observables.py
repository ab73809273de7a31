r"""What to look at in a trajectory: named torsions, basins, pair distances, slow coordinates.

Everything is a function of an ``mdtraj`` trajectory or of positions in nm; nothing depends on how
the frames were made. Angles are in radians.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mdtraj
import networkx as nx
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Ramachandran",
    "Torsion",
    "TwoStates",
    "find_torsions",
    "pair_distances",
    "ramachandran_pairs",
    "slow_coordinates",
    "squared_radius_of_gyration",
    "torsion_angles",
    "two_states",
]

FloatArray = NDArray[np.float64]


class Torsion(NamedTuple):
    """A rotatable bond: its name, four atoms, and how many of its turns look alike (methyl: 3)."""

    name: str
    atoms: tuple[int, int, int, int]
    fold: int = 1


class Ramachandran(NamedTuple):
    """The two backbone torsions of one residue."""

    residue: str
    phi: Torsion
    psi: Torsion


class TwoStates(NamedTuple):
    """The arc from ``start`` up to ``stop`` (radians) against the rest of the circle."""

    start: float
    stop: float

    def contains(self, angle: FloatArray) -> NDArray[np.bool_]:
        """Whether angles lie on the arc."""
        width = np.mod(self.stop - self.start, 2 * np.pi)
        inside: NDArray[np.bool_] = np.mod(angle - self.start, 2 * np.pi) < width
        return inside


def _backbone(topology: mdtraj.Topology) -> dict[tuple[int, int], tuple[str, tuple[int, ...]]]:
    """Central bond -> (name, atoms) of phi, psi and omega."""
    frame = mdtraj.Trajectory(np.zeros((1, topology.n_atoms, 3), dtype=np.float32), topology)
    named: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
    tables = [
        ("φ", 1, mdtraj.geometry.dihedral.indices_phi(frame.topology)),
        ("ψ", 1, mdtraj.geometry.dihedral.indices_psi(frame.topology)),
        ("ω", 2, mdtraj.geometry.dihedral.indices_omega(frame.topology)),
    ]
    for letter, owner, table in tables:
        several = len(table) > 1
        for quad in np.asarray(table, dtype=np.int64).reshape(-1, 4):
            residue = topology.atom(int(quad[owner])).residue
            label = f"{letter} {residue.name.capitalize()}{residue.resSeq}" if several else letter
            key = (int(min(quad[1:3])), int(max(quad[1:3])))
            named[key] = (label, tuple(int(k) for k in quad))
    return named


def _symbol(topology: mdtraj.Topology, index: int) -> str:
    element = topology.atom(index).element
    return "?" if element is None else str(element.symbol)


def _end_fold(topology: mdtraj.Topology, graph: nx.Graph, centre: int, across: int) -> int:
    """3 for a methyl-like end, 2 for a planar end with two equal terminal atoms, else 1."""
    ends = [k for k in graph[centre] if k != across]
    elements = {_symbol(topology, k) for k in ends}
    alike = len(elements) == 1 and all(graph.degree[k] == 1 for k in ends)
    return len(ends) if alike and len(ends) in (2, 3) else 1


def _is_amide(topology: mdtraj.Topology, graph: nx.Graph, b: int, c: int) -> bool:
    """Whether one end is a carbonyl carbon and the other a nitrogen."""
    for carbon, nitrogen in ((b, c), (c, b)):
        if _symbol(topology, carbon) == "C" and _symbol(topology, nitrogen) == "N":
            ends = [k for k in graph[carbon] if _symbol(topology, k) == "O"]
            return any(graph.degree[k] == 1 for k in ends)
    return False


def find_torsions(topology: mdtraj.Topology) -> list[Torsion]:
    """One torsion per rotatable bond, backbone torsions by their usual names, the softest first.

    A bond is rotatable if it is in no ring and has further atoms on both ends. Ends with
    interchangeable terminal atoms (methyls, carboxylates) give the torsion a ``fold``: labels of
    such atoms mean nothing, so angles are taken modulo 360 degrees / fold.
    """
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(range(topology.n_atoms))
    graph.add_edges_from((a.index, b.index) for a, b in topology.bonds)
    if not graph.number_of_edges():
        return []
    backbone = _backbone(topology)
    found = []
    for pair in nx.bridges(graph):
        b, c = sorted(pair)
        if graph.degree[b] < 2 or graph.degree[c] < 2:
            continue
        folds = [_end_fold(topology, graph, b, c), _end_fold(topology, graph, c, b)]
        if (b, c) in backbone:
            name, quad = backbone[(b, c)]
        else:
            # Caps (ACE, NME) have no alpha carbon, so mdtraj does not call their amide bond omega.
            amide = bool(backbone) and _is_amide(topology, graph, b, c)

            # IUPAC's omega runs from alpha carbon to alpha carbon: not over the carbonyl oxygen,
            # nor over proline's delta carbon, which would show a trans amide at 0 degrees.
            def rank(k: int, amide: bool = amide) -> tuple[bool, bool, bool, int]:
                symbol = _symbol(topology, k)
                other = amide and topology.atom(k).name != "CA"
                return (symbol == "H", amide and symbol != "C", other, k)

            quad = (
                min((k for k in graph[b] if k != c), key=rank),
                b,
                c,
                min((k for k in graph[c] if k != b), key=rank),
            )
            name = "ω" if amide else f"{topology.atom(b).name}-{topology.atom(c).name}"
        found.append(Torsion(name, (quad[0], quad[1], quad[2], quad[3]), max(folds)))
    names = [torsion.name for torsion in found]
    found = [
        t if names.count(t.name) == 1 else t._replace(name=f"{t.name} ({t.atoms[1]}-{t.atoms[2]})")
        for t in found
    ]
    order = {"φ": 0, "ψ": 1, "ω": 3}
    return sorted(found, key=lambda torsion: (torsion.fold, order.get(torsion.name[0], 2)))


def ramachandran_pairs(torsions: Sequence[Torsion]) -> list[Ramachandran]:
    """Pair the phi and psi that share a residue (phi's third atom is psi's second)."""
    pairs = []
    for phi in (t for t in torsions if t.name.startswith("φ")):
        for psi in (t for t in torsions if t.name.startswith("ψ")):
            if phi.atoms[2] == psi.atoms[1]:
                pairs.append(Ramachandran(phi.name[1:].strip(), phi, psi))
    return pairs


def torsion_angles(trajectory: mdtraj.Trajectory, torsions: Sequence[Torsion]) -> FloatArray:
    """Angles ``(n_frames, n_torsions)`` in radians, wrapped to [-pi, pi) / fold."""
    if not torsions:
        return np.zeros((trajectory.n_frames, 0))
    raw = mdtraj.compute_dihedrals(
        trajectory, np.array([t.atoms for t in torsions]), periodic=False
    )
    fold = np.array([t.fold for t in torsions])
    angles: FloatArray = (np.mod(raw * fold + np.pi, 2 * np.pi) - np.pi) / fold
    return angles.astype(np.float64)


def two_states(
    angle: FloatArray, weights: FloatArray | None = None, *, least: float = 0.002
) -> TwoStates | None:
    """Cut a circle at the two barriers that separate its two best-separated states.

    Parameters
    ----------
    angle
        ``(n,)`` radians.
    weights
        ``(n,)``, not negative; equal by default.
    least
        Smallest population of a state.

    Returns
    -------
    TwoStates or None
        The arc with the smaller population; None if the density has no two peaks with a barrier
        of less than half the lower one between them.
    """
    n_bins = 72
    counts, edges = np.histogram(angle, bins=n_bins, range=(-np.pi, np.pi), weights=weights)
    total = counts.sum()
    if not total > 0.0:
        return None
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    padded = np.concatenate([counts[-6:], counts, counts[:6]])
    density = np.convolve(padded, kernel / kernel.sum(), mode="valid") / total
    minima = np.flatnonzero(
        (density <= np.roll(density, 1)) & (density <= np.roll(density, -1))
    )
    best: tuple[float, TwoStates] | None = None
    for i, first in enumerate(minima):
        for second in minima[i + 1 :]:
            inner, outer = density[first:second], np.roll(density, -second)
            outer = outer[: n_bins - (second - first)]
            minority = min(inner.sum(), outer.sum())
            barrier = max(density[first], density[second])
            lower = min(inner.max(), outer.max())
            if minority < least or barrier > 0.5 * lower:
                continue
            a, b = (float(0.5 * (edges[k] + edges[k + 1])) for k in (first, second))
            arc = TwoStates(a, b) if inner.sum() <= outer.sum() else TwoStates(b, a)
            score = float((density[first] + density[second]) / np.sqrt(minority))
            if best is None or score < best[0]:
                best = (score, arc)
    return None if best is None else best[1]


def pair_distances(x: NDArray[np.floating[Any]]) -> FloatArray:
    """Distances of all pairs, ``(n_frames, N (N - 1) / 2)`` in nm, of ``(n_frames, N, D)``."""
    i, j = np.triu_indices(x.shape[1], k=1)
    distances = np.empty((len(x), len(i)))
    # The differences of many frames of a large cluster would fill the memory.
    step = max(1, 2_000_000 // max(1, len(i)))
    for start in range(0, len(x), step):
        y = x[start : start + step].astype(np.float64)
        distances[start : start + step] = np.linalg.norm(y[:, i] - y[:, j], axis=-1)
    return distances


def squared_radius_of_gyration(x: NDArray[np.floating[Any]]) -> FloatArray:
    r""":math:`\frac1N \sum_i |x_i - \bar x|^2` in nm^2, geometric (no masses), ``(n_frames,)``."""
    y = x.astype(np.float64)
    y = y - y.mean(axis=1, keepdims=True)
    result: FloatArray = np.square(y).sum(axis=(1, 2)) / y.shape[1]
    return result


def slow_coordinates(
    x: NDArray[np.floating[Any]], angles: FloatArray, torsions: Sequence[Torsion]
) -> dict[str, FloatArray]:
    """Coordinates that tell slow modes: size, and cosine and sine of every torsion.

    Invariant under exchange of identical atoms, whose labels need not mix.
    """
    named = {"squared radius of gyration": squared_radius_of_gyration(x)}
    for column, torsion in enumerate(torsions):
        times = "" if torsion.fold == 1 else f"{torsion.fold} "
        for word, function in (("cos", np.cos), ("sin", np.sin)):
            named[f"{word} {times}{torsion.name}"] = function(torsion.fold * angles[:, column])
    return named
