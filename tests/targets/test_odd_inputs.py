"""Bad and unusual inputs: each has its answer of one line, and leaves nothing behind."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from functools import cache
from pathlib import Path

import openmm
import openmmtools
import pytest
from openmm import app
from stand_ins.program_files import write_methanol

from openmm_eqflow import cli
from openmm_eqflow.targets.forcefield import CODE_ALLOWED
from openmm_eqflow.targets.library import load_system, systems_directory

SHIPPED = systems_directory()
DIPEPTIDE = SHIPPED / "alanine-dipeptide" / "alanine-dipeptide.pdb"
WET = Path(openmmtools.__file__).parent / "data" / "alanine-dipeptide-explicit"
AMBER = ("--forcefield", "amber14-all.xml")
CHARMM = ("--params", "mol.rtf", "--params", "mol.prm")


@cache
def system_of_the_dipeptide():
    pdb = app.PDBFile(str(DIPEPTIDE))
    system = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
    return openmm.XmlSerializer.serialize(system)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folder with the inputs, and nothing of ``main`` that lasts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv(CODE_ALLOWED, "0")
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setitem(sys.modules, "rdkit", None)  # as without the extra
    write_methanol(tmp_path)
    atoms = [x for x in DIPEPTIDE.read_text().splitlines() if x.startswith(("ATOM", "HETATM"))]
    text = system_of_the_dipeptide()
    moved = [f"{x[:21]}B{x[22:30]}{float(x[30:38]) + 20.0:8.3f}{x[38:]}" for x in atoms]

    def scaled(factor):
        numbers = [[factor * float(x[k : k + 8]) for k in (30, 38, 46)] for x in atoms]
        return [
            x[:30] + "".join(f"{n:8.3f}" for n in ns) + x[54:]
            for x, ns in zip(atoms, numbers, strict=True)
        ]

    bare = (SHIPPED / "toluene" / "toluene.pdb").read_text().splitlines()
    lines = {
        "good.pdb": atoms,
        "heavy.pdb": [x for x in atoms if x[76:78].strip() != "H"],
        "two.pdb": [*atoms, "TER", *moved],
        "nm.pdb": scaled(0.1),
        "large.pdb": scaled(10.0),
        "origin.pdb": [atoms[0], atoms[1][:30] + 3 * "   0.000" + atoms[1][54:], *atoms[2:]],
        "short.pdb": atoms[:10],
        "unconnected.pdb": [x for x in bare if x.startswith(("ATOM", "HETATM"))],
        "one.pdb": ["HETATM    1 NA    NA A   1       0.000   0.000   0.000"],
        "garbled.pdb": [atoms[0][:30] + "  a.bcde" + atoms[0][38:], *atoms[1:]],
        "far.pdb": [atoms[0][:30] + " 500.000" + atoms[0][38:], *atoms[1:]],
        "none.pdb": ["HEADER    NOTHING"],
        "twice.pdb": [*atoms[:3], atoms[3][:12] + atoms[2][12:16] + atoms[3][16:], *atoms[4:]],
    }
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join([*content, "END", ""]))
    gro = (tmp_path / "conf.gro").read_text().splitlines()
    tens = [
        line[:20] + "".join(f"{10.0 * float(w):8.3f}" for w in line[20:].split())
        for line in gro[2:8]
    ]
    top = (tmp_path / "topol.top").read_text()
    psf = (tmp_path / "mol.psf").read_text()
    code = text.replace(
        "<Forces>", '<Forces><Force type="&#80;ythonForce" name="x" function="00" version="2"/>'
    )
    ring = "".join(
        f'<Constraint d=".1" p1="{a}" p2="{b}"/>' for a, b in ((0, 1), (1, 2), (0, 2))
    )
    constrained = text.replace("<Constraints/>", f"<Constraints>{ring}</Constraints>")
    assert code != text != constrained
    texts = {
        "in.xml": text,
        "code.xml": code,
        "constrained.xml": constrained,
        "cut.xml": text[:4000],
        "script.xml": "<ForceField><Script>raise SystemExit(9)</Script></ForceField>",
        "include.xml": '<ForceField><Include file="script.xml"/></ForceField>',
        "empty.pdb": "",
        "mol.sdf": "",
        "angstrom.gro": "\n".join([*gro[:2], *tens, gro[8], ""]),
        "few.gro": "\n".join([gro[0], "    5", *gro[2:7], gro[8], ""]),
        "broken.gro": "x\n 1\n",
        "includes.top": '#include "amber99sb.ff/forcefield.itp"\n' + top,
        "types.top": top.replace("c3 c3 6", "cx cx 6"),
        "mol2.psf": psf.replace(" C3 ", " CX "),
        "swapped.psf": psf.replace("C1   C3 ", "C1   OH ").replace("O1   OH ", "O1   C3 "),
        "broken.prmtop": "%VERSION\n",
        "broken.cif": "data_x\n_cell.length_a 1\n",
        "notes.top": "[ system ]\nx\n[ molecules ]\nMOH 1\n",
        "bad.yaml.xml": "<?xml version='1.0'?><Other/>",
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "exists").mkdir()
    return tmp_path


TABLE = {
    # What is given, and what is answered.
    "no coordinates": (AMBER, r"no coordinates: give them with --pdb"),
    "no potential": (("--pdb", "good.pdb"), r"either force-field files .* or none"),
    "two potentials": (
        ("--pdb", "good.pdb", "--system", "in.xml", *AMBER),
        r"not both or none",
    ),
    "two structures": (("--pdb", "good.pdb", "--gro", "conf.gro", *AMBER), r"say the same"),
    "missing file": (("--pdb", "no.pdb", *AMBER), r"no\.pdb is not a file"),
    "empty PDB": (("--pdb", "empty.pdb", *AMBER), r"holds no ATOM.*give a PDB file"),
    "PDB without atoms": (("--pdb", "none.pdb", *AMBER), r"holds no ATOM.*give a PDB file"),
    "garbled number": (("--pdb", "garbled.pdb", *AMBER), r"cannot be read as a PDB.*anew"),
    "an atom's name twice": (
        ("--pdb", "twice.pdb", *AMBER),
        r"residue ACE 1 has two atoms \w+: give each atom a name of its own",
    ),
    "no hydrogens": (("--pdb", "heavy.pdb", *AMBER), r"no hydrogens: add them \(--add-hydrogens"),
    "two chains": (("--pdb", "two.pdb", *AMBER), r"2 molecules.*--chain or --residue"),
    "no such chain": (
        ("--pdb", "two.pdb", "--chain", "Q", *AMBER),
        r"no chain 'Q': choose --chain from A, B",
    ),
    "no such residue": (
        ("--pdb", "good.pdb", "--residue", "LIG", *AMBER),
        r"no residue 'LIG': choose --residue .* ACE 1, ALA 2, NME 3",
    ),
    "nm in a PDB": (("--pdb", "nm.pdb", *AMBER), r"ten times too small: .*multiply them by ten"),
    "ten times too large": (("--pdb", "large.pdb", *AMBER), r"ten times too large: .*divide"),
    "angstrom in a gro": (
        ("--gro", "angstrom.gro", "--top", "topol.top"),
        r"ten times too large: .*GROMACS files in nm.*divide them by ten",
    ),
    "atom at the origin": (("--pdb", "origin.pdb", *AMBER), r"lies at the origin: .*repair"),
    "an atom far away": (("--pdb", "far.pdb", *AMBER), r"bonded and .* nm apart.*repair"),
    "atoms missing": (("--pdb", "short.pdb", *AMBER), r"No template found.*--system"),
    "no CONECT": (
        ("--pdb", "unconnected.pdb", *AMBER),
        r"No template found.*CONECT records",
    ),
    "a single ion": (
        ("--pdb", "one.pdb", *AMBER, "amber14/tip3p.xml"),
        r"has one atom: a flow needs a molecule of at least two",
    ),
    "explicit solvent": (
        ("--prmtop", WET / "alanine-dipeptide.prmtop", "--inpcrd", WET / "alanine-dipeptide.crd"),
        r"explicit solvent \(749 water molecules\).*not supported yet: --strip-solvent",
    ),
    "nothing but solvent": (
        ("--pdb", "one.pdb", "--strip-solvent", *AMBER),
        r"nothing but solvent: leave --strip-solvent out",
    ),
    "System of other atoms": (
        ("--pdb", "mol.pdb", "--system", "in.xml"),
        r"6 atoms but the System has 22",
    ),
    "System of others, a chain": (
        ("--pdb", "mol.pdb", "--system", "in.xml", "--chain", "A"),
        r"6 atoms but the System has 22",
    ),
    "truncated System": (("--pdb", "good.pdb", "--system", "cut.xml"), r"no complete XML.*again"),
    "another XML": (
        ("--pdb", "good.pdb", "--system", "bad.yaml.xml"),
        r"not a serialised OpenMM System.*write it again",
    ),
    "constraints": (
        ("--pdb", "good.pdb", "--system", "constrained.xml"),
        r"constraints of atoms .* close a ring.*constraints=HBonds",
    ),
    "code in a System": (
        ("--pdb", "good.pdb", "--system", "code.xml"),
        r"code that runs when it is loaded \(PythonForce\): .*--allow-code",
    ),
    "code in a force field": (
        ("--pdb", "good.pdb", "--forcefield", "script.xml"),
        r"code that runs when it is loaded \(Script\): .*--allow-code",
    ),
    "code in an included file": (
        ("--pdb", "good.pdb", "--forcefield", "include.xml"),
        r"script\.xml holds code .*--allow-code",
    ),
    "force field as System": (
        ("--pdb", "good.pdb", "--system", "script.xml"),
        r"OpenMM force field: give it with --forcefield",
    ),
    "no such force field": (
        ("--pdb", "good.pdb", "--forcefield", "amber20.xml"),
        r"amber20\.xml cannot be read.*expected files shipped",
    ),
    "top without its force field": (
        ("--gro", "conf.gro", "--top", "includes.top"),
        r"includes\.top cannot be read .*amber99sb\.ff.*with --params",
    ),
    "top without a type": (("--gro", "conf.gro", "--top", "types.top"), r"types\.top cannot.*c3"),
    "top without a molecule": (("--gro", "conf.gro", "--top", "notes.top"), r"notes\.top cannot"),
    "gro of fewer atoms": (
        ("--gro", "few.gro", "--top", "topol.top"),
        r"6 atoms, the coordinates are of 5: give the files that were made together",
    ),
    "broken gro": (("--gro", "broken.gro", "--top", "topol.top"), r"complete \.gro file"),
    "broken prmtop": (
        ("--prmtop", "broken.prmtop", "--inpcrd", WET / "alanine-dipeptide.crd"),
        r"cannot be read as an Amber topology",
    ),
    "broken mmCIF": (("--cif", "broken.cif", *AMBER), r"cannot be read as an mmCIF.*as a PDB"),
    "coordinates without atoms": (
        ("--crd", "mol.crd", "--system", "in.xml"),
        r"coordinates but no atoms: give the topology",
    ),
    "psf without parameters": (("--psf", "mol.psf", "--crd", "mol.crd"), r"each with --params"),
    "psf of an unknown type": (
        ("--psf", "mol2.psf", "--crd", "mol.crd", *CHARMM),
        r"mol2\.psf cannot be read as a topology of these parameters.*--params",
    ),
    "psf in another order": (
        ("--psf", "mol.psf", "--pdb", "good.pdb", *CHARMM),
        r"6 atoms, the coordinates are of 22",
    ),
    "a parameter file that is not there": (
        ("--psf", "mol.psf", "--crd", "mol.crd", "--params", "no.prm"),
        r"no\.prm is not a file",
    ),
    "parameters without psf": (
        ("--pdb", "good.pdb", *AMBER, "--params", "mol.prm"),
        r"--params belongs to --psf or --top",
    ),
    "an unknown topology": (
        ("--pdb", "mol.pdb", "--top", "mol.prm"),
        r"mol\.prm is no topology file by its ending",
    ),
    "hydrogens for a System": (
        ("--pdb", "good.pdb", "--system", "in.xml", "--add-hydrogens"),
        r"--add-hydrogens needs --forcefield",
    ),
    "SMILES with a PDB": (("--pdb", "good.pdb", "--smiles", "CCO"), r"stand alone: leave the"),
    "SMILES without RDKit": (("--smiles", "CCO"), r'RDKit and .*pip install "openmm-eqflow\[lig'),
    "SD file that is not there": (("--sdf", "no.sdf"), r"no\.sdf is not a file"),
    "SD file as PDB": (("--pdb", "mol.sdf", *AMBER), r"an SD file: give it with --sdf, alone"),
    "unknown charges": (("--smiles", "CCO", "--charges", "x"), r"'x' is not one of.*--help"),
    "a temperature of no molecule": (
        ("--pdb", "good.pdb", "--temperature", "0", *AMBER),
        r"temperature is 0 K, expected",
    ),
    "not a number": (
        ("--pdb", "good.pdb", "--temperature", "warm", *AMBER),
        r"'warm' is not a valid float.*--help",
    ),
}


def answer(monkeypatch, capsys, *arguments):
    """Exit code and lines on stderr of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["openmm-eqflow", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    heard = capsys.readouterr()
    return stop.value.code, heard.out.splitlines(), heard.err.splitlines()


@pytest.mark.parametrize("case", TABLE)
def test_one_line_with_the_next_action(here, case, monkeypatch, capsys):
    given, expected = TABLE[case]
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    code, out, err = answer(monkeypatch, capsys, "init", "mol", *given)
    assert code == 2, (out, err)
    assert out == []
    (line,) = [text for text in err if not text.startswith("warning: ")]
    assert line.startswith("error: ")
    assert re.search(expected, line), line
    # Nothing half-written.
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_there_is_no_second_folder(here, monkeypatch, capsys):
    code, _, err = answer(monkeypatch, capsys, "init", "exists", "--pdb", "good.pdb", *AMBER)
    assert code == 2
    assert err == ["error: exists exists; choose another folder or remove it first"]
    assert list((here / "exists").iterdir()) == []


UNUSUAL = {
    # What works, and how many atoms it has.
    "one chain of two": (("--pdb", "two.pdb", "--chain", "B", *AMBER), 22),
    "hydrogens added": (("--pdb", "heavy.pdb", "--add-hydrogens", *AMBER), 22),
    "psf and pdb": (("--psf", "mol.psf", "--pdb", "mol.pdb", *CHARMM), 6),
    "gro and top": (("--gro", "conf.gro", "--top", "topol.top"), 6),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_inputs_that_work(here, case, monkeypatch, capsys):
    given, n_atoms = UNUSUAL[case]
    code, out, err = answer(monkeypatch, capsys, "init", "mol", *given)
    assert code == 0, err
    assert load_system(here / "mol").n_particles == n_atoms
    assert err == []  # nothing is amiss
    assert any(line.startswith("total ") and line.endswith(" kJ/mol") for line in out)
