"""Representative structures of every basin: what the 3D view shows and the PDB file holds."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from numpy.typing import NDArray

from openmm_eqflow.analysis.chains import population
from openmm_eqflow.analysis.weights import Estimate
from openmm_eqflow.geometry import superposed
from openmm_eqflow.report.data import Ensemble, Shown
from openmm_eqflow.report.populations import States

__all__ = [
    "Basin",
    "basin_grid",
    "find_basins",
    "model_atoms",
    "pdb_text",
]

FloatArray = NDArray[np.float64]
_MAX_BASINS = 12
_LIGHT = 0.05  # of the mean weight


@dataclass(frozen=True, eq=False)
class Basin:
    """One combination of torsion states, and the frame that stands for it.

    Attributes
    ----------
    name
        What a person reads: "φ < 0, ψ 95°".
    code
        Which states its torsions are in; :func:`basin_grid` compares it.
    share
        Population in the chain, with its standard error.
    x
        ``(N, 3)`` nm, superposed on the first basin.
    angles
        Torsions of the frame ``(n_torsions,)``, radians.
    frame
        Index of the frame among the chain's.
    """

    name: str
    code: int
    share: Estimate
    x: NDArray[np.float32]
    angles: FloatArray
    frame: int


def _codes(ensemble: Ensemble, states: States) -> NDArray[np.int64]:
    """One bit for every torsion that has two states, ``(n,)``."""
    code = np.zeros(len(ensemble.x), dtype=np.int64)
    bit = 0
    for column, torsion in enumerate(ensemble.torsions):
        arc = states.arcs.get(torsion.name)
        if arc is not None:
            inside = arc.contains(torsion.fold * ensemble.angles[:, column])
            code |= inside.astype(np.int64) << bit
            bit += 1
    return code


def _medoid(ensemble: Ensemble, rows: NDArray[np.int64], used: list[int]) -> int:
    """Frame nearest to the mean direction of the torsions; of equals the one of lowest energy."""
    if not used:
        return int(rows[np.argmin(ensemble.u[rows])])
    folds = np.array([ensemble.torsions[k].fold for k in used])
    turns = np.exp(1j * folds * ensemble.angles[rows][:, used])
    middle = np.angle((ensemble.weights[rows][:, None] * turns).sum(axis=0))
    distance = (1.0 - np.cos(np.angle(turns) - middle)).sum(axis=1)
    return int(rows[np.argmin(distance)])


def find_basins(run: Shown, states: States) -> list[Basin]:
    """Return the most populated basins of the chain, the fullest first, at most twelve.

    A basin is a combination of the states that :func:`~.populations.define_states` cuts. Its
    structure is the frame of the chain whose torsions are nearest to their mean direction in the
    basin; where no torsion has two states, that of all frames. A system without torsions has one
    basin, shown by its frame of lowest energy.

    Parameters
    ----------
    run
        A run in memory.
    states
        The cuts.

    Returns
    -------
    list of Basin
        Never empty; structures superposed by heavy atoms.

    Examples
    --------
    >>> basins = find_basins(run, define_states(run))  # doctest: +SKIP
    >>> basins[0].share.value  # doctest: +SKIP
    0.61
    """
    chain = run.chain
    codes = _codes(chain, states)
    # What has hardly any weight is nobody's structure.
    rows = np.flatnonzero(chain.weights * len(codes) > _LIGHT)
    found, index = np.unique(codes[rows], return_inverse=True)
    shares = np.bincount(index, weights=chain.weights[rows])
    order = np.argsort(-shares.round(12), kind="stable")[:_MAX_BASINS]
    cut = [k for k, t in enumerate(chain.torsions) if t.name in states.arcs]
    used = cut or [k for k, t in enumerate(chain.torsions) if not t.even]
    frames = [_medoid(chain, rows[codes[rows] == found[k]], used) for k in order]
    shown = chain.trajectory[frames].xyz
    heavy = [a.index for a in chain.topology.atoms if a.element is None or a.element.number > 1]
    if chain.x.shape[2] == 3 and run.kind == "molecule":
        by = heavy if len(heavy) > 2 else None
        shown = superposed(torch.from_numpy(shown).double(), by).float().numpy()
    basins = []
    for k, frame, x in zip(order, frames, shown, strict=True):
        inside = codes == found[k]
        share = population(inside, log_weights=chain.log_weight, chain=chain.chain)[0]
        angles = chain.angles[frame] if chain.torsions else np.zeros(0)
        words = [f"{chain.torsions[c].name} {np.degrees(angles[c]):.0f}°" for c in cut]
        name = ", ".join(words) or ("one basin" if chain.torsions else "lowest energy")
        basins.append(Basin(name, int(found[k]), share, x, angles, int(frame)))
    return basins


def basin_grid(
    run: Shown, states: States, basins: list[Basin], columns: tuple[int, ...], bins: int = 36
) -> list[Any]:
    """Tell which basin most frames of every bin of a torsion map are in; -1 where there are none.

    Parameters
    ----------
    columns
        Torsions of the horizontal and, for a map, of the vertical axis.
    bins
        Per turn (by its fold: per part that looks alike), from the left and from below.

    Returns
    -------
    list
        ``[horizontal]`` or ``[horizontal][vertical]``, indices into ``basins``.
    """
    codes, chain = _codes(run.chain, states), run.chain
    turns = [chain.angles[:, c] * chain.torsions[c].fold / (2.0 * np.pi) + 0.5 for c in columns]
    cells = [np.clip((turn * bins).astype(int), 0, bins - 1) for turn in turns]
    counts = np.zeros((len(basins), *(bins for _ in columns)), dtype=np.int64)
    for index, basin in enumerate(basins):
        inside = codes == basin.code
        np.add.at(counts[index], tuple(cell[inside] for cell in cells), 1)
    grid = np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), -1)
    rows: list[Any] = grid.tolist()
    return rows


def model_atoms(run: Shown) -> list[dict[str, Any]]:
    """Elements, names and bonds as 3Dmol.js reads them; positions are given for each basin."""
    topology = run.chain.topology
    bonds: list[list[int]] = [[] for _ in range(topology.n_atoms)]
    for first, second in topology.bonds:
        bonds[first.index].append(second.index)
        bonds[second.index].append(first.index)
    return [
        {
            "elem": _element(atom),
            "atom": atom.name,
            "bonds": bonds[atom.index],
            "bondOrder": [1] * len(bonds[atom.index]),
        }
        for atom in topology.atoms
    ]


def _element(atom: mdtraj.core.topology.Atom) -> str:
    """Symbol; particles without an element are drawn as argon."""
    symbol = None if atom.element is None else atom.element.symbol
    return symbol if symbol and symbol != "VS" else "Ar"


def pdb_text(run: Shown, basins: list[Basin]) -> str:
    """All basins as the models of one PDB file, in Å, with what each is in its remarks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basins.pdb"
        with mdtraj.formats.PDBTrajectoryFile(str(path), "w", standard_names=False) as handle:
            for index, basin in enumerate(basins):
                handle.write(10.0 * basin.x, run.chain.topology, modelIndex=index + 1)
        text = path.read_text(encoding="utf-8")
    remarks = [f"REMARK   1 {run.system.name}, {run.temperature:g} K"]
    for index, basin in enumerate(basins):
        line = f"model {index + 1}: population {float(basin.share.value):.4f}, frame {basin.frame}"
        remarks.append(f"REMARK   1 {line}")
    return "\n".join(remarks) + "\n" + text
