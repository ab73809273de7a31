"""The molecule in two dimensions: atom numbers and the names of its torsions."""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.theme import COLOURS, INK, Panel, new_figure, to_svg

__all__ = ["drawing_panel"]

FloatArray = NDArray[np.float64]
_SMALL = 9


def drawing_panel(run: RunData) -> Panel:
    """Draw heavy atoms with their numbers (from 1, as in the PDB file), and the torsions."""
    atoms = list(run.chain.topology.atoms)
    numbers = [0 if a.element is None else a.element.number for a in atoms]
    shown = [k for k, n in enumerate(numbers) if n != 1 or len(atoms) <= _SMALL]
    # A hydrogen that a torsion counts is drawn too (the end of a hydroxyl).
    shown = sorted({*shown, *(k for t in run.chain.torsions for k in t.atoms)})
    graph = nx.Graph()
    graph.add_nodes_from(shown)
    graph.add_edges_from(
        (a.index, b.index)
        for a, b in run.chain.topology.bonds
        if a.index in graph and b.index in graph
    )
    place = _layout(graph, numbers)
    figure, axes = new_figure(height=3.0)
    for a, b in graph.edges:
        axes.plot(*zip(place[a], place[b], strict=True), color=INK, linewidth=1.2, zorder=1)
    for k in shown:
        # White under the label in every theme would be wrong: the bond is shortened by a disc.
        axes.plot(*place[k], "o", color=COLOURS["chain"], markersize=4, zorder=2)
        symbol = atoms[k].element.symbol if numbers[k] else ""
        axes.annotate(
            f"{symbol}{k + 1}", place[k], (3, 3), textcoords="offset points", fontsize=7.5
        )
    for torsion in run.chain.torsions:
        if torsion.ring >= 0:
            continue
        b, c = place[torsion.atoms[1]], place[torsion.atoms[2]]
        axes.plot(*zip(b, c, strict=True), color=COLOURS["flow"], linewidth=2.2, zorder=1.5)
        axes.annotate(
            torsion.name,
            (b + c) / 2.0,
            (0, -10),
            textcoords="offset points",
            ha="center",
            color=COLOURS["flow"],
            fontsize=8,
        )
    axes.set_aspect("equal")
    axes.margins(0.12)
    axes.axis("off")
    return Panel(
        "drawing",
        "Atoms and torsions",
        to_svg(figure, "drawing", "Drawing of the molecule with atom numbers and torsions"),
        "Numbers are those of topology.pdb, from 1; hydrogens without a part in a torsion are "
        "left out. Orange: the bonds that torsions turn about. Bond orders are not shown.",
    )


def _layout(graph: nx.Graph, numbers: list[int]) -> dict[int, FloatArray]:
    """Places in the plane: RDKit's where it is installed, springs along the bonds otherwise."""
    try:
        from rdkit import Chem
        from rdkit.Chem import rdDepictor
    except ImportError:
        return {k: np.asarray(v) for k, v in nx.kamada_kawai_layout(graph).items()}
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
