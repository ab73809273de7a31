"""PDB files, force-field files and serialised Systems, with errors that name the next action."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import openmm
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "build_from_forcefield",
    "load_pdb",
    "load_system_xml",
    "write_pdb",
]


_ANOTHER_STRUCTURE = "write the structure as a PDB file and give that with --pdb"
_ANOTHER_FORCE_FIELD = (
    "load it with openmm.app (GromacsTopFile, AmberPrmtopFile, CharmmPsfFile), write its System "
    "by openmm.XmlSerializer and give that with --system"
)
#: What a file is by its ending, and what to do with it.
_FORMATS = {
    ".gro": ("a GROMACS structure", _ANOTHER_STRUCTURE),
    ".cif": ("an mmCIF structure", _ANOTHER_STRUCTURE),
    ".mol2": ("a MOL2 structure", _ANOTHER_STRUCTURE),
    ".sdf": ("an SD file", _ANOTHER_STRUCTURE),
    ".xyz": ("an XYZ structure", _ANOTHER_STRUCTURE),
    ".inpcrd": ("Amber coordinates", _ANOTHER_STRUCTURE),
    ".rst7": ("Amber coordinates", _ANOTHER_STRUCTURE),
    ".top": ("a topology of GROMACS or Amber", _ANOTHER_FORCE_FIELD),
    ".itp": ("a GROMACS topology", _ANOTHER_FORCE_FIELD),
    ".prmtop": ("an Amber topology", _ANOTHER_FORCE_FIELD),
    ".parm7": ("an Amber topology", _ANOTHER_FORCE_FIELD),
    ".psf": ("a CHARMM topology", _ANOTHER_FORCE_FIELD),
    ".offxml": ("an OpenFF force field", _ANOTHER_FORCE_FIELD),
    ".pdb": ("a PDB file", "give it with --pdb"),
}
_ROOTS = {
    "System": ("a serialised System", "give it with --system"),
    "ForceField": ("an OpenMM force field", "give it with --forcefield"),
}


def _refuse_other(path: Path, expected: str) -> None:
    """Say what a file is that was given to the wrong option; nothing if it may be right.

    ``expected`` is ``.pdb``, or the name of the root of an XML file.
    """
    what, advice = _FORMATS.get(path.suffix.lower(), ("", ""))
    if path.suffix.lower() == expected:
        return
    if not what:
        with path.open("rb") as handle:
            root = re.search(rb"<([A-Za-z]\w*)", handle.read(4096))
        name = "" if root is None else root[1].decode()
        if name == expected or name not in _ROOTS:
            return
        what, advice = _ROOTS[name]
    raise ConfigurationError(f"{path} is {what}: {advice}")


def load_pdb(path: Path) -> tuple[app.Topology, unit.Quantity]:
    """Topology and positions of the first model of a PDB file."""
    _refuse_other(path, ".pdb")
    try:
        with path.open(encoding="utf-8") as handle:
            empty = not any(line.startswith(("ATOM", "HETATM")) for line in handle)
        pdb = None if empty else app.PDBFile(str(path))
    except (AttributeError, ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a PDB file ({_told(error)}): check it, or write it anew "
            "with openmm.app.PDBFile.writeFile"
        ) from error
    if pdb is None or pdb.topology.getNumAtoms() == 0:
        raise ConfigurationError(
            f"{path} holds no ATOM or HETATM record: give a PDB file with all atoms"
        )
    return pdb.topology, pdb.getPositions(asNumpy=True)


def write_pdb(path: Path, topology: app.Topology, positions: unit.Quantity) -> None:
    """Write a PDB file with CONECT records for every bond.

    OpenMM leaves out those of standard residues, which few other programs can make up for.
    """
    plain = io.StringIO()
    app.PDBFile.writeFile(topology, positions, plain, keepIds=True)
    lines = plain.getvalue().splitlines()
    serial = [line[6:11] for line in lines if line.startswith(("ATOM  ", "HETATM"))]
    partners: dict[int, list[int]] = {}
    for first, second in topology.bonds():
        partners.setdefault(first.index, []).append(second.index)
        partners.setdefault(second.index, []).append(first.index)
    kept = [line for line in lines if not line.startswith(("CONECT", "END"))]
    for atom, others in sorted(partners.items()):
        for start in range(0, len(others), 4):  # four to a record
            bonded = [serial[k] for k in sorted(others)[start : start + 4]]
            kept.append("CONECT" + serial[atom] + "".join(bonded))
    path.write_text("\n".join([*kept, "END", ""]), encoding="utf-8")


def _told(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def build_from_forcefield(topology: app.Topology, files: list[str]) -> openmm.System:
    """Apply OpenMM force-field files without cutoff and without constraints.

    Raises
    ------
    ConfigurationError
        A file is not found, or a residue has no template or several (OpenMM's message and what
        to do).
    """
    for path in map(Path, files):
        if path.is_file():
            _refuse_other(path, "ForceField")
    # OpenMM raises plain Exceptions, here for a file that is no XML, there for several templates.
    try:
        forcefield = app.ForceField(*files)
    except Exception as error:
        raise ConfigurationError(
            f"force field {', '.join(files)} cannot be read: {_told(error)}; "
            "expected files shipped with OpenMM (amber14-all.xml, implicit/obc2.xml) or paths"
        ) from error
    try:
        return forcefield.createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
        )
    except Exception as error:
        raise ConfigurationError(
            f"{_told(error)} -> {_template_advice(str(error), topology, files)}"
        ) from error


def _template_advice(told: str, topology: app.Topology, files: list[str]) -> str:
    if "matching templates" in told:
        return (
            "several residues of the force field fit: make the System yourself, with "
            "residueTemplates of app.ForceField.createSystem, and give it with --system"
        )
    if "extra site" in told:
        return (
            "the model has massless sites, whose positions are not free coordinates: take one "
            "without, such as amber14/tip3p.xml for water"
        )
    elements = [atom.element for atom in topology.atoms()]
    if app.element.hydrogen not in elements:
        return "the PDB has no hydrogens: add them (--add-hydrogens, app.Modeller.addHydrogens)"
    if all(residue.name == "HOH" for residue in topology.residues()):
        return "water has its own file: add --forcefield amber14/tip3p.xml"
    return (
        f"use force-field files that know this residue (now {', '.join(files)}), complete missing "
        "atoms, caps or CONECT records in the PDB (--add-hydrogens for hydrogens), or give a "
        "System made by your own parametrisation: --system system.xml"
    )


def load_system_xml(path: Path) -> openmm.System:
    """Read a System written by ``openmm.XmlSerializer``."""
    _refuse_other(path, "System")
    try:
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ConfigurationError(
            f"{path} is no complete XML file ({error}): write it again with "
            "openmm.XmlSerializer.serialize(system)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {_told(error)}") from error
    try:
        system = openmm.XmlSerializer.deserialize(text)
    except (openmm.OpenMMException, ValueError) as error:
        raise ConfigurationError(
            f"{path} is not a serialised OpenMM System: {_told(error)} (this is OpenMM "
            f"{openmm.__version__}); write it again with openmm.XmlSerializer.serialize(system)"
        ) from error
    if not isinstance(system, openmm.System):
        raise ConfigurationError(
            f"{path} holds a {type(system).__name__}, expected a System "
            "(openmm.XmlSerializer.serialize(system))"
        )
    return system
