"""PDB files, force-field files and serialised Systems, with errors that name the next action."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import openmm
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "CODE_ALLOWED",
    "build_from_forcefield",
    "fullest_locations",
    "load_pdb",
    "load_system_xml",
    "one_line",
    "pdb_lines",
    "refuse_code",
    "write_pdb",
]


#: Environment variable, set by --allow-code, under which files that hold code may be loaded.
CODE_ALLOWED = "OPENMM_EQFLOW_ALLOW_CODE"
#: What a file is by its ending, and what to do with it.
_FORMATS = {
    ".gro": ("a GROMACS structure", "give it with --gro and its topology with --top"),
    ".cif": ("an mmCIF structure", "give it with --cif"),
    ".mol2": ("a MOL2 structure", "write it as a PDB or SD file and give that (--pdb, --sdf)"),
    ".sdf": ("an SD file", "give it with --sdf, alone"),
    ".mol": ("an MDL molecule", "give it with --sdf, alone"),
    ".xyz": ("an XYZ structure", "write it as a PDB file and give that with --pdb"),
    ".inpcrd": ("Amber coordinates", "give it with --inpcrd and its topology with --prmtop"),
    ".rst7": ("Amber coordinates", "give it with --inpcrd and its topology with --prmtop"),
    ".top": ("a topology of GROMACS or Amber", "give it with --top (and --gro) or --prmtop"),
    ".itp": ("a GROMACS topology", "give the .top file that includes it with --top"),
    ".prmtop": ("an Amber topology", "give it with --prmtop and coordinates with --inpcrd"),
    ".parm7": ("an Amber topology", "give it with --prmtop and coordinates with --inpcrd"),
    ".psf": ("a CHARMM topology", "give it with --psf, parameters with --params"),
    ".offxml": (
        "an OpenFF force field",
        "make a System with the OpenFF toolkit and give that with --system",
    ),
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
    """Topology and positions of the first model of a PDB file, of the fullest locations."""
    _refuse_other(path, ".pdb")
    try:
        lines = pdb_lines(path)
        empty = not any(line.startswith(("ATOM", "HETATM")) for line in lines)
        _refuse_equal_names(path, lines)
        pdb = None if empty else app.PDBFile(io.StringIO("".join(fullest_locations(lines))))
    except (AttributeError, ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a PDB file ({one_line(error)}): check it, or write it anew "
            "with openmm.app.PDBFile.writeFile"
        ) from error
    if pdb is None or pdb.topology.getNumAtoms() == 0:
        raise ConfigurationError(
            f"{path} holds no ATOM or HETATM record: give a PDB file with all atoms"
        )
    return pdb.topology, pdb.getPositions(asNumpy=True)


def pdb_lines(path: Path) -> list[str]:
    """Lines of a PDB file, with their ends; remarks need not be UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # as every byte is
    return text.splitlines(keepends=True)


def _refuse_equal_names(path: Path, lines: list[str]) -> None:
    """Name an atom that a residue has twice, of which readers drop one."""
    residue, seen = "", set[str]()
    for line in lines:
        if not line.startswith(("ATOM", "HETATM")):
            residue = ""  # TER and MODEL begin another
            continue
        if line[17:27] != residue:
            residue, seen = line[17:27], set()
        name = line[12:17]  # with the mark of its location
        if name in seen:
            raise ConfigurationError(
                f"{path}: residue {line[17:20].strip()} {line[22:27].strip()} has two atoms "
                f"{name[:4].strip()}: give each atom a name of its own"
            )
        seen.add(name)


def fullest_locations(lines: list[str]) -> list[str]:
    """Lines of a PDB file without the alternate locations of lower occupancy.

    Of every residue one location is kept, that with the largest sum of occupancies (the first of
    equals), so that its atoms belong together; atoms without a mark stay.
    """
    weights: dict[tuple[int, str], dict[str, float]] = {}
    model = 0
    marked: list[tuple[int, str] | None] = []
    for line in lines:
        model += line.startswith("MODEL ")
        place = None
        if line.startswith(("ATOM", "HETATM")) and line[16:17].strip():
            place = (model, line[21:27])
            mass = weights.setdefault(place, {})
            occupancy = line[54:60].strip()
            mass[line[16]] = mass.get(line[16], 0.0) + (float(occupancy) if occupancy else 1.0)
        marked.append(place)
    kept = []
    for line, place in zip(lines, marked, strict=True):
        if place is None:
            kept.append(line)
        elif line[16] == max(weights[place], key=lambda name: weights[place][name]):
            kept.append(f"{line[:16]} {line[17:]}")
    return kept


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


def one_line(error: BaseException) -> str:
    """Return what an exception says on one line, or what it is called."""
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
            refuse_code(path, path.read_bytes())
    # OpenMM raises plain Exceptions, here for a file that is no XML, there for several templates.
    try:
        forcefield = app.ForceField(*files)
    except Exception as error:
        raise ConfigurationError(
            f"force field {', '.join(files)} cannot be read: {one_line(error)}; "
            "expected files shipped with OpenMM (amber14-all.xml, implicit/obc2.xml) or paths"
        ) from error
    try:
        return forcefield.createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
        )
    except Exception as error:
        raise ConfigurationError(
            f"{one_line(error)} -> {_template_advice(str(error), topology, files)}"
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


def refuse_code(path: Path, content: str | bytes) -> None:
    """Refuse an XML file that runs Python when OpenMM reads it, and those it includes.

    A PythonForce is stored as a pickle; force fields hold scripts.
    """
    if os.environ.get(CODE_ALLOWED, "0") == "1":
        return
    try:
        elements = list(ElementTree.fromstring(content).iter())
    except ElementTree.ParseError:
        return  # OpenMM refuses it as well
    found = {e.tag for e in elements if e.tag in ("Script", "InitializationScript")}
    if "PythonForce" in {value for e in elements for value in e.attrib.values()}:
        found.add("PythonForce")
    if found:
        raise ConfigurationError(
            f"{path} holds code that runs when it is loaded ({', '.join(sorted(found))}): if you "
            f"trust it, give --allow-code (in Python: set {CODE_ALLOWED}=1)"
        )
    for element in elements:
        other = path.parent / element.get("file", "")
        if element.tag == "Include" and other.is_file() and other != path:
            refuse_code(other, other.read_bytes())


def load_system_xml(path: Path) -> openmm.System:
    """Read a System written by ``openmm.XmlSerializer``."""
    _refuse_other(path, "System")
    try:
        text = path.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        refuse_code(path, text)
    except ElementTree.ParseError as error:
        raise ConfigurationError(
            f"{path} is no complete XML file ({error}): write it again with "
            "openmm.XmlSerializer.serialize(system)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        system = openmm.XmlSerializer.deserialize(text)
    except (openmm.OpenMMException, ValueError) as error:
        raise ConfigurationError(
            f"{path} is not a serialised OpenMM System: {one_line(error)} (this is OpenMM "
            f"{openmm.__version__}); write it again with openmm.XmlSerializer.serialize(system)"
        ) from error
    if not isinstance(system, openmm.System):
        raise ConfigurationError(
            f"{path} holds a {type(system).__name__}, expected a System "
            "(openmm.XmlSerializer.serialize(system))"
        )
    return system
