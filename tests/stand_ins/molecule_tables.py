"""A table of twelve molecules of two to six atoms, one of them impossible, with their files."""

from __future__ import annotations

from pathlib import Path

import openmm
from openmm import app

from stand_ins.small_molecules import ETHENE, embed, molecule

MOLECULES = {
    "hydrogen": molecule("HH", [(0, 1)]),
    "fluorine": molecule("FF", [(0, 1)]),
    "fluorane": molecule("F", [], hydrogens=(1,)),
    "water": molecule("O", [], hydrogens=(2,)),
    "fluoroxide": molecule("OFF", [(0, 1), (0, 2)]),
    "ammonia": molecule("N", [], hydrogens=(3,)),
    "methane": molecule("C", [], hydrogens=(4,)),
    "methanal": molecule("CO", [(0, 1)], hydrogens=(2, 0), double=[(0, 1)], flat=(0,)),
    "peroxide": molecule("OO", [(0, 1)], hydrogens=(1, 1)),
    "diazene": molecule("NN", [(0, 1)], hydrogens=(1, 1), double=[(0, 1)]),
    "ethene": ETHENE,
}
IMPOSSIBLE = "impossible"


def write_molecules(folder: Path) -> Path:
    """Write ``molecules.csv`` and its files to a folder."""
    lines = ["name,pdb,system,temperature"]
    for k, (name, (topology, system)) in enumerate(MOLECULES.items()):
        (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(system))
        with (folder / f"{name}.pdb").open("w") as handle:
            app.PDBFile.writeFile(topology, 10.0 * embed(system), handle)
        lines.append(f"{name},{name}.pdb,{name}.xml,{300 + 10 * k}")
    # The structure of one, the System of another.
    lines.insert(4, f"{IMPOSSIBLE},water.pdb,methane.xml,300")
    table = folder / "molecules.csv"
    table.write_text("\n".join(lines) + "\n")
    return table
