"""The molecule in two dimensions: atom numbers and the names of its torsions."""

from __future__ import annotations

from itertools import combinations, product

import networkx as nx
import numpy as np
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from openmm_eqflow.report.data import Shown
from openmm_eqflow.report.theme import COLOURS, INK, Panel, new_figure, to_svg

__all__ = ["drawing_panel"]

FloatArray = NDArray[np.float64]
_SMALL = 9
_PARTS = np.linspace(0.1, 0.9, 9)  # points of a bond that a word must not cover


def drawing_panel(run: Shown) -> Panel:
    """Draw heavy atoms with their numbers (from 1, as in the PDB file), and the torsions."""
    atoms = list(run.chain.topology.atoms)
    numbers = [0 if a.element is None else a.element.number for a in atoms]
    shown = [k for k, n in enumerate(numbers) if n != 1 or len(atoms) <= _SMALL]
    # A hydrogen that a torsion counts is drawn too (the end of a hydroxyl), a methyl's is not.
    ends = {k for t in run.chain.torsions if t.fold == 1 for k in t.atoms}
    shown = sorted({*shown, *ends})
    graph = nx.Graph()
    graph.add_nodes_from(shown)
    graph.add_edges_from(
        (a.index, b.index)
        for a, b in run.chain.topology.bonds
        if a.index in graph and b.index in graph
    )
    place = _upright(_layout(graph, numbers))
    wide, high = np.ptp(list(place.values()), axis=0) + 1e-3
    figure, axes = new_figure(height=float(np.clip(0.4 + 3.7 * high / wide, 2.2, 4.5)))
    for a, b in graph.edges:
        axes.plot(*zip(place[a], place[b], strict=True), color=INK, linewidth=1.2, zorder=1)
    lengths = [float(np.linalg.norm(place[a] - place[b])) for a, b in graph.edges]
    scale = sum(lengths) / len(lengths) if lengths else 1.0
    axes.plot(*np.array([place[k] for k in shown]).T, "o", color=COLOURS["chain"], markersize=4)
    axes.set_aspect("equal")
    axes.margins(0.15)
    axes.axis("off")
    axes.apply_aspect()
    words = []
    for k in shown:
        symbol = atoms[k].element.symbol if numbers[k] else ""
        spot = place[k] + 0.36 * scale * _away(place[k], [place[j] for j in graph[k]])
        label = f"{symbol}{k + 1}"
        words.append(axes.text(spot[0], spot[1], label, ha="center", va="center", fontsize=7.5))
    taken = [word.get_window_extent() for word in words]
    along = [place[a] + t * (place[b] - place[a]) for a, b in graph.edges for t in _PARTS]
    inked = axes.transData.transform([*along, *place.values()])
    for torsion in run.chain.torsions:
        if torsion.ring >= 0:
            continue
        b, c = place[torsion.atoms[1]], place[torsion.atoms[2]]
        axes.plot(*zip(b, c, strict=True), color=COLOURS["flow"], linewidth=2.2, zorder=1.5)
        # Of a methyl's bond the atoms are name enough.
        if any(graph.degree[k] == 1 for k in torsion.atoms[1:3]):
            continue
        word = axes.text(b[0], b[1], torsion.name, va="center", fontsize=7.5)
        word.set_color(COLOURS["flow"])
        taken.append(_place_beside(word, b, c, scale, taken, inked))
    return Panel(
        "drawing",
        "Atoms and torsions",
        to_svg(figure, "drawing", "Drawing of the molecule with atom numbers and torsions"),
        "Numbers are those of topology.pdb, from 1; hydrogens without a part in a torsion are "
        "left out. Orange: the bonds that torsions turn about, named as in the figures "
        "(methyls by their atoms). Bond orders are not shown.",
    )


def _place_beside(
    word: Text, b: FloatArray, c: FloatArray, scale: float, taken: list[Bbox], inked: FloatArray
) -> Bbox:
    """Put a word beside the bond from b to c where it covers least; returns its box in pixels."""
    across = np.array([b[1] - c[1], c[0] - b[0]]) / np.linalg.norm(c - b)

    def put(far: float, along: float, sign: float) -> tuple[Bbox, float]:
        spot = b + along * (c - b) + sign * far * scale * across
        side = sign * across[0]
        word.set_position((float(spot[0]), float(spot[1])))
        # Text is wider than high: beside a steep bond it starts at its end.
        if abs(side) > 0.5:
            word.set_horizontalalignment("left" if side > 0.0 else "right")
        else:
            word.set_horizontalalignment("center")
        box = word.get_window_extent()
        pairs = [Bbox.intersection(box.padded(2.0), other) for other in taken]
        covered = sum(pair.width * pair.height for pair in pairs if pair is not None)
        letters = box.padded(1.0)
        return box, covered + 10.0 * sum(letters.contains(*point) for point in inked)

    ways = product((0.25, 0.45), (0.5, 0.3, 0.7), (1.0, -1.0))
    best = min(ways, key=lambda way: put(*way)[1])
    return put(*best)[0]


def _upright(place: dict[int, FloatArray]) -> dict[int, FloatArray]:
    """Turn the longest extent to the horizontal."""
    x = np.array(list(place.values()))
    x = x - x.mean(axis=0)
    x = x @ np.linalg.svd(x, full_matrices=False)[2].T if len(x) > 2 else x
    return dict(zip(place, x, strict=True))


def _away(here: FloatArray, others: list[FloatArray]) -> FloatArray:
    """Direction with the most room between bonds: the middle of their widest gap."""
    if not others:
        return np.array([0.0, 1.0])
    angles = np.sort([np.arctan2(*(other - here)[::-1]) for other in others])
    gaps = np.diff(np.append(angles, angles[0] + 2.0 * np.pi))
    middle = angles[gaps.argmax()] + 0.5 * gaps.max()
    return np.array([np.cos(middle), np.sin(middle)])


def _springs(graph: nx.Graph) -> dict[int, FloatArray]:
    """Springs along the bonds (Kamada and Kawai, 1989), from the start that crosses fewest."""
    if len(graph) < 3:
        return {k: np.array([float(i), 0.0]) for i, k in enumerate(graph)}
    starts = [None, nx.planar_layout(graph)] if nx.is_planar(graph) else [None]
    starts += [nx.spring_layout(graph, seed=seed) for seed in range(4)]
    layouts = [nx.kamada_kawai_layout(graph, pos=start) for start in starts]
    best = min(layouts, key=lambda place: _crossings(graph, place))
    return {k: np.asarray(v) for k, v in best.items()}


def _crossings(graph: nx.Graph, place: dict[int, FloatArray]) -> int:
    """How many pairs of bonds without a common atom cross."""

    def side(a: int, b: int, c: int) -> bool:
        (x, y), (u, v) = place[b] - place[a], place[c] - place[a]
        return bool(x * v > y * u)

    return sum(
        side(a, b, c) != side(a, b, d) and side(c, d, a) != side(c, d, b)
        for (a, b), (c, d) in combinations(graph.edges, 2)
        if len({a, b, c, d}) == 4
    )


def _layout(graph: nx.Graph, numbers: list[int]) -> dict[int, FloatArray]:
    """Places in the plane: RDKit's where it is installed, springs along the bonds otherwise."""
    try:
        from rdkit import Chem
        from rdkit.Chem import rdDepictor
    except ImportError:
        return _springs(graph)
    molecule, index = Chem.RWMol(), {}
    for k in graph:
        atom = Chem.Atom(numbers[k])
        atom.SetNoImplicit(True)
        index[k] = molecule.AddAtom(atom)
    for a, b in graph.edges:
        molecule.AddBond(index[a], index[b], Chem.BondType.SINGLE)
    molecule.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(molecule)
    rdDepictor.Compute2DCoords(molecule)
    conformer = molecule.GetConformer()
    return {k: np.asarray(conformer.GetAtomPosition(index[k]))[:2] for k in graph}
