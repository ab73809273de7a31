"""Molecules from the files of other programs, through OpenMM's own readers.

Coordinates come as PDB, mmCIF, GROMACS, Amber or CHARMM files; the potential of a topology of
Amber, GROMACS or CHARMM is built without cutoff and without constraints. A part of a structure
(one chain, what is not solvent) takes its part of the System along.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openmm
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.forcefield import load_pdb, one_line
from openmm_eqflow.units import energy_in_kj_mol, positions_in_nm

__all__ = [
    "COORDINATES",
    "TOPOLOGIES",
    "Structure",
    "check_scale",
    "cut_system",
    "force_energies",
    "read_structure",
    "read_topology",
    "select",
    "subset",
]

_AMBER, _CHARMM, _GROMACS = "Amber", "CHARMM", "GROMACS"
#: What holds coordinates, by ending (.crd is CHARMM's unless an Amber topology comes with it).
COORDINATES = {
    ".pdb": "PDB",
    ".ent": "PDB",
    ".cif": "mmCIF",
    ".mmcif": "mmCIF",
    ".pdbx": "mmCIF",
    ".gro": _GROMACS,
    ".inpcrd": _AMBER,
    ".rst7": _AMBER,
    ".ncrst": _AMBER,
    ".crd": _CHARMM,
    ".cor": _CHARMM,
}
#: What holds atoms, bonds and parameters.
TOPOLOGIES = {
    ".prmtop": _AMBER,
    ".parm7": _AMBER,
    ".top": _GROMACS,
    ".psf": _CHARMM,
}
_OPTIONS: dict[str, Any] = {
    "nonbondedMethod": app.NoCutoff,
    "constraints": None,
    "rigidWater": False,
}
_BONDED = (
    "HarmonicBondForce",
    "HarmonicAngleForce",
    "PeriodicTorsionForce",
    "RBTorsionForce",
    "CMAPTorsionForce",
    "CustomBondForce",
    "CustomAngleForce",
    "CustomTorsionForce",
)
_PAIRS = ("NonbondedForce", "CustomNonbondedForce", "GBSAOBCForce", "CustomGBForce")
_PAIRS_OF = ("Exceptions", "Exclusions")
_INDEX_LISTS = ("InteractionGroups", "ParticleOffsets", "ExceptionOffsets")


@dataclass
class Structure:
    """Atoms and where they are; the System only where the files define one."""

    topology: app.Topology
    positions: unit.Quantity
    system: openmm.System | None = None


def _reading(path: Path, what: str, advice: str, read: Callable[[], Any]) -> Any:
    # OpenMM's readers raise whatever comes: ValueError, KeyError, their own, plain Exception.
    try:
        with warnings.catch_warnings():
            # Some of them leave files for Python to close.
            warnings.simplefilter("ignore", ResourceWarning)
            return read()
    except Exception as error:
        raise ConfigurationError(
            f"{path} cannot be read as {what} ({one_line(error)}): {advice}"
        ) from error


def read_structure(path: Path, topology_file: Path | None = None) -> Structure:
    """Read atoms and coordinates of any file that has both, or coordinates for a topology file.

    Raises
    ------
    ConfigurationError
        The file cannot be read, or it has no atoms of its own and no topology comes with it.
    """
    kind = COORDINATES.get(path.suffix.lower(), "PDB")
    if topology_file is not None and TOPOLOGIES.get(_ending(topology_file)) == _AMBER:
        kind = _AMBER if kind == _CHARMM else kind
    if kind == "PDB":
        return Structure(*load_pdb(path))
    if kind == "mmCIF":
        advice = "check it, or give the structure as a PDB file"
        cif = _reading(path, "an mmCIF file", advice, lambda: app.PDBxFile(str(path)))
        return Structure(cif.topology, cif.positions)
    if kind == _GROMACS:
        advice = "give a complete .gro file (gmx editconf), or the structure as a PDB file"
        gro = _reading(path, "a GROMACS structure", advice, lambda: app.GromacsGroFile(str(path)))
        return Structure(_topology_of_gro(gro), gro.getPositions())
    if topology_file is None:
        raise ConfigurationError(
            f"{path} has coordinates but no atoms: give the topology it belongs to (--prmtop, "
            "--psf), or the structure as a PDB file"
        )
    if kind == _AMBER:
        advice = "give the coordinates that tleap wrote with the prmtop, or a restart file"
        read = _reading(path, "Amber coordinates", advice, lambda: app.AmberInpcrdFile(str(path)))
    else:
        advice = "write it as a CHARMM card file (write coor card), or give a PDB file"
        read = _reading(path, "CHARMM coordinates", advice, lambda: app.CharmmCrdFile(str(path)))
    return Structure(app.Topology(), read.positions)


def _ending(path: Path) -> str:
    """Tell GROMACS's topologies from Amber's, which are called .top as well."""
    if path.suffix.lower() == ".top" and path.is_file():
        with path.open("rb") as handle:
            if handle.read(8) == b"%VERSION":
                return ".prmtop"
    return path.suffix.lower()


def _topology_of_gro(gro: app.GromacsGroFile) -> app.Topology:
    topology = app.Topology()
    chain, residue, last = topology.addChain(), None, None
    names = zip(gro.residueNames, gro.atomNames, gro.elements, strict=True)
    seen: set[str] = set()
    for residue_name, name, element in names:
        if residue is None or residue_name != last or name in seen:
            residue, last, seen = topology.addResidue(residue_name, chain), residue_name, set()
        seen.add(name)
        topology.addAtom(name, element, residue)
    topology.createStandardBonds()
    return topology


def read_topology(path: Path, structure: Structure, parameters: Sequence[Path] = ()) -> Structure:
    """Build the System of a prmtop, top or psf file for the coordinates of a structure.

    Parameters
    ----------
    path
        The topology file.
    structure
        Of :func:`read_structure`; its own atoms, where it has any, are compared.
    parameters
        Parameter files of CHARMM; for GROMACS a folder with the force fields it includes.

    Raises
    ------
    ConfigurationError
        A file cannot be read, parameters are missing, or the atoms are not the same.
    """
    kind = TOPOLOGIES.get(_ending(path))
    for file in (path, *parameters):
        if not file.exists():
            raise ConfigurationError(f"{file} is not a file")
    if kind == _AMBER:
        advice = "give the prmtop that tleap wrote"
        amber = _reading(path, "an Amber topology", advice, lambda: app.AmberPrmtopFile(str(path)))
        topology = amber.topology
        system = _reading(
            path, "a complete Amber topology", advice, lambda: amber.createSystem(**_OPTIONS)
        )
    elif kind == _GROMACS:
        folders = [p for p in parameters if p.is_dir()]
        where = {"includeDir": str(folders[0])} if folders else {}
        advice = "give the folder of the force fields it includes with --params"
        gromacs = _reading(
            path, "a GROMACS topology", advice, lambda: app.GromacsTopFile(str(path), **where)
        )
        topology = gromacs.topology
        system = _reading(
            path, "a complete GROMACS topology", advice, lambda: gromacs.createSystem(**_OPTIONS)
        )
    elif kind == _CHARMM:
        if not parameters:
            raise ConfigurationError(
                f"{path} has no parameters: add the .rtf, .prm and .str files of its force field, "
                "each with --params"
            )
        advice = "give a psf file of CHARMM, NAMD or CHARMM-GUI"
        charmm = _reading(path, "a CHARMM topology", advice, lambda: app.CharmmPsfFile(str(path)))
        topology = charmm.topology
        names = ", ".join(p.name for p in parameters)
        read = _reading(
            parameters[0],
            f"CHARMM parameters ({names})",
            "endings must be .rtf, .prm, .par or .str; give each with --params",
            lambda: app.CharmmParameterSet(*map(str, parameters)),
        )
        system = _reading(
            path,
            f"a topology of these parameters ({names})",
            "add the files that have what is missing with --params",
            lambda: charmm.createSystem(read, **_OPTIONS),
        )
    else:
        raise ConfigurationError(
            f"{path} is no topology file by its ending: expected {', '.join(TOPOLOGIES)}"
        )
    n_atoms, n_positions = topology.getNumAtoms(), len(structure.positions)
    if n_atoms != n_positions:
        raise ConfigurationError(
            f"{path} has {n_atoms} atoms, the coordinates are of {n_positions}: give the files "
            "that were made together"
        )
    for atom, other in zip(topology.atoms(), structure.topology.atoms(), strict=False):
        if None not in (atom.element, other.element) and atom.element is not other.element:
            raise ConfigurationError(
                f"{path}: atom {atom.index + 1} ({atom.name}) is {atom.element.symbol}, in the "
                f"coordinates {other.element.symbol} ({other.name}): both files must list the "
                "same atoms in one order"
            )
    return Structure(topology, structure.positions, system)


def select(topology: app.Topology, chain: str | None, residue: str | None) -> list[int]:
    """Atoms of a chain (by its letter) and of residues (by name or number).

    Raises
    ------
    ConfigurationError
        There is none; the message lists what there is.
    """
    chains = list(topology.chains())
    if chain is not None:
        kept = [c for c in chains if c.id == chain]
        if not kept:
            listed = ", ".join(sorted({c.id for c in chains}))
            raise ConfigurationError(f"there is no chain {chain!r}: choose --chain from {listed}")
        chains = kept
    residues = [r for c in chains for r in c.residues()]
    if residue is not None:
        kept_residues = [
            r for r in residues if residue in (r.name, r.id, f"{r.id}{r.insertionCode.strip()}")
        ]
        if any(residue == f"{r.id}{r.insertionCode.strip()}" for r in kept_residues):
            kept_residues = [
                r for r in kept_residues if f"{r.id}{r.insertionCode.strip()}" == residue
            ]
        if not kept_residues:
            names = [f"{r.name} {r.id}{r.insertionCode.strip()}" for r in residues]
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ConfigurationError(
                f"there is no residue {residue!r}: choose --residue by name or number from "
                f"{listed}"
            )
        residues = kept_residues
    return sorted(atom.index for r in residues for atom in r.atoms())


def subset(structure: Structure, keep: Sequence[int]) -> Structure:
    """Take some of the atoms, in their order, with their part of the System.

    Raises
    ------
    UnsupportedSystemError
        Of :func:`cut_system`.
    """
    if len(keep) == structure.topology.getNumAtoms():
        return structure
    kept = set(keep)
    modeller = app.Modeller(structure.topology, structure.positions)
    modeller.delete([a for a in structure.topology.atoms() if a.index not in kept])
    system = None if structure.system is None else cut_system(structure.system, sorted(kept))
    return Structure(modeller.topology, modeller.positions, system)


def cut_system(system: openmm.System, keep: Sequence[int]) -> openmm.System:
    """Return the terms of a System among some particles, without box, cutoff and barostat.

    Raises
    ------
    UnsupportedSystemError
        A bond, angle or torsion leads from a particle that is kept to one that is not, or a force
        is of a class whose terms cannot be told apart.
    """
    place = {old: new for new, old in enumerate(keep)}
    tree = ElementTree.fromstring(openmm.XmlSerializer.serialize(system))

    def refuse(what: str) -> None:
        raise UnsupportedSystemError(
            f"{what}: take the molecule out with the program the files come from"
        )

    def only(parent: ElementTree.Element) -> None:
        for k, item in enumerate(list(parent)):
            if k not in place:
                parent.remove(item)

    def among(parent: ElementTree.Element, cross: bool) -> None:
        for item in list(parent):
            ends = [k for k in item.attrib if k[0] in "pab" and k[1:] in tuple("12345678")]
            inside = [int(item.attrib[k]) in place for k in ends]
            if not all(inside):
                if any(inside) and not cross:
                    refuse(f"a {item.tag.lower()} leads out of the atoms that are chosen")
                parent.remove(item)
                continue
            for k in ends:
                item.attrib[k] = str(place[int(item.attrib[k])])

    def child(parent: ElementTree.Element, name: str) -> ElementTree.Element:
        found = parent.find(name)
        return ElementTree.Element(name) if found is None else found

    particles = child(tree, "Particles")
    only(particles)
    if any(len(item) for item in particles):
        refuse("a virtual site is among the atoms that are chosen")
    among(child(tree, "Constraints"), cross=False)
    forces = child(tree, "Forces")
    for force in list(forces):
        kind = force.get("type", "")
        if "Barostat" in kind:
            forces.remove(force)
        elif kind in _BONDED:
            for name in ("Bonds", "Angles", "Torsions"):
                among(child(force, name), cross=False)
            force.set("usesPeriodic", "0")
        elif kind in _PAIRS:
            if any(len(child(force, name)) for name in _INDEX_LISTS):
                refuse(f"{kind} has terms of its own for groups of particles")
            only(child(force, "Particles"))
            for name in _PAIRS_OF:
                among(child(force, name), cross=True)
            if "method" in force.attrib:
                force.set("method", "0")
        elif kind != "CMMotionRemover":
            refuse(f"{kind} cannot be cut")
    made: openmm.System = openmm.XmlSerializer.deserialize(ElementTree.tostring(tree, "unicode"))
    return made


def check_scale(positions: FloatArray, name: str) -> None:
    """Refuse coordinates ten times too small or large: nm for angstrom, or the reverse.

    ``positions`` ``(n, 3)`` in nm.

    Raises
    ------
    UnsupportedSystemError
        With the distance of neighbours and what to do.
    """
    if len(positions) < 2 or not np.isfinite(positions).all():
        return
    gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    near = float(np.median(gaps.min(axis=1)))
    for low, high, word, advice in (
        (0.004, 0.04, "small", "multiply them by ten"),
        (0.6, 3.0, "large", "divide them by ten"),
    ):
        if low < near < high:
            raise UnsupportedSystemError(
                f"{name}: neighbouring atoms are {near:.4f} nm apart, ten times too {word}: the "
                "unit is wrong (PDB, mmCIF, Amber and CHARMM files are in angstrom, GROMACS files "
                f"in nm), {advice}"
            )


def force_energies(system: openmm.System, positions: unit.Quantity) -> list[tuple[str, float]]:
    """Name and energy (kJ/mol) of every force on the Reference platform, in the System's order.

    The System itself is used, not a copy, because a force in Python cannot always be copied; its
    force groups are put back.
    """
    forces = list(system.getForces())
    before = [force.getForceGroup() for force in forces]
    x = positions_in_nm(positions)
    found: list[tuple[str, float]] = []
    try:
        for start in range(0, len(forces), 31):
            for k, force in enumerate(forces):
                force.setForceGroup(k - start if start <= k < start + 31 else 31)
            context = openmm.Context(
                system,
                openmm.VerletIntegrator(1e-3),
                openmm.Platform.getPlatformByName("Reference"),
            )
            context.setPositions(x)
            for k, force in enumerate(forces[start : start + 31]):
                energy = context.getState(getEnergy=True, groups={k}).getPotentialEnergy()
                found.append((force.getName(), energy_in_kj_mol(energy)))
    finally:
        for force, group in zip(forces, before, strict=True):
            force.setForceGroup(group)
    return found
