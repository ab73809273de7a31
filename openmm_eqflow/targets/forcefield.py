"""PDB files, force-field files and serialised Systems, with errors that name the next action."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import openmm
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "build_from_forcefield",
    "load_pdb",
    "load_system_xml",
]


def load_pdb(path: Path) -> tuple[app.Topology, unit.Quantity]:
    """Topology and positions of the first model of a PDB file."""
    try:
        pdb = app.PDBFile(str(path))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a PDB file: {' '.join(str(error).split())}"
        ) from error
    if pdb.topology.getNumAtoms() == 0:
        raise ConfigurationError(f"{path} holds no ATOM or HETATM record")
    return pdb.topology, pdb.getPositions(asNumpy=True)


def build_from_forcefield(topology: app.Topology, files: list[str]) -> openmm.System:
    """Apply OpenMM force-field files without cutoff and without constraints.

    Raises
    ------
    ConfigurationError
        A file is not found, or a residue has no template (OpenMM's message and what to do).
    """
    try:
        forcefield = app.ForceField(*files)
    except (ValueError, ElementTree.ParseError, OSError, KeyError) as error:
        raise ConfigurationError(
            f"force field {files} cannot be read: {' '.join(str(error).split())}; "
            "expected files shipped with OpenMM (amber14-all.xml, implicit/obc2.xml) or paths"
        ) from error
    try:
        return forcefield.createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
        )
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{' '.join(str(error).split())} -> {_template_advice(topology, files)}"
        ) from error


def _template_advice(topology: app.Topology, files: list[str]) -> str:
    elements = [atom.element for atom in topology.atoms()]
    if app.element.hydrogen not in elements:
        return "the PDB has no hydrogens: add them (--add-hydrogens, app.Modeller.addHydrogens)"
    if any(residue.name == "HOH" for residue in topology.residues()):
        return "the PDB has water: remove it and use an implicit solvent such as implicit/obc2.xml"
    return (
        f"use force-field files that know this residue (now {', '.join(files)}), complete missing "
        "atoms or caps in the PDB (--add-hydrogens for hydrogens), or give a System made by your "
        "own parametrisation: --system system.xml"
    )


def load_system_xml(path: Path) -> openmm.System:
    """Read a System written by ``openmm.XmlSerializer``."""
    try:
        system = openmm.XmlSerializer.deserialize(path.read_text(encoding="utf-8"))
    except (openmm.OpenMMException, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} is not a serialised OpenMM System: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(system, openmm.System):
        raise ConfigurationError(
            f"{path} holds a {type(system).__name__}, expected a System "
            "(openmm.XmlSerializer.serialize(system))"
        )
    return system
