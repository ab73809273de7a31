"""Files of other programs: the System that OpenMM's readers give, and parts of structures."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import openmm
import openmmtools
import pytest
from openmm import app, unit
from stand_ins.program_files import write_methanol

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.forcefield import fullest_locations, load_pdb
from openmm_eqflow.targets.inputs import cut_system, force_energies
from openmm_eqflow.targets.library import load_system, systems_directory
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.units import positions_in_nm

TOLUENE = systems_directory() / "toluene" / "toluene.pdb"
DIPEPTIDE = systems_directory() / "alanine-dipeptide" / "alanine-dipeptide.pdb"
TOOLS = Path(openmmtools.__file__).parent / "data"
VACUUM = TOOLS / "alanine-dipeptide-gbsa" / "alanine-dipeptide.prmtop"
WET = TOOLS / "alanine-dipeptide-explicit" / "alanine-dipeptide.prmtop"


def energy(system, positions):
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy()._value


def files(kind, folder):
    """Arguments of init_system, and System and positions by OpenMM's readers themselves."""
    write_methanol(folder)
    if kind == "amber":
        given = {"topology": VACUUM, "pdb": VACUUM.with_suffix(".crd")}
        system = app.AmberPrmtopFile(str(VACUUM)).createSystem()
        return given, system, app.AmberInpcrdFile(str(given["pdb"])).positions
    if kind == "gromacs":
        given = {"topology": folder / "topol.top", "pdb": folder / "conf.gro"}
        with warnings.catch_warnings():  # it leaves its file for Python to close
            warnings.simplefilter("ignore", ResourceWarning)
            system = app.GromacsTopFile(str(given["topology"])).createSystem()
        return given, system, app.GromacsGroFile(str(given["pdb"])).positions
    if kind in ("charmm", "charmm-pdb"):
        parameters = [folder / "mol.rtf", folder / "mol.prm"]
        given = {"topology": folder / "mol.psf", "parameters": parameters}
        given["pdb"] = folder / ("mol.crd" if kind == "charmm" else "mol.pdb")
        read = app.CharmmParameterSet(*map(str, parameters))
        system = app.CharmmPsfFile(str(given["topology"])).createSystem(read)
        reader = app.CharmmCrdFile if kind == "charmm" else app.PDBFile
        return given, system, reader(str(given["pdb"])).positions
    pdb = app.PDBFile(str(DIPEPTIDE))
    with (folder / "mol.cif").open("w") as handle:
        app.PDBxFile.writeFile(pdb.topology, pdb.positions, handle)
    positions = app.PDBxFile(str(folder / "mol.cif")).positions
    system = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
    if kind == "cif-xml":
        (folder / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
        return {"pdb": folder / "mol.cif", "system_xml": folder / "in.xml"}, system, positions
    return {"pdb": folder / "mol.cif", "forcefield": ["amber14-all.xml"]}, system, positions


KINDS = ["amber", "gromacs", "charmm", "charmm-pdb", "cif", "cif-xml"]


@pytest.mark.parametrize("kind", KINDS)
def test_energies_are_those_of_openmm(tmp_path, kind):
    given, system, positions = files(kind, tmp_path)
    told = []
    made = init_system(tmp_path / "new", tell=told.append, **given)
    again = load_system(tmp_path / "new")
    # The printed total is that of the files; the folder has the same potential, elsewhere too.
    assert float(told[-1].split()[-2]) == pytest.approx(energy(system, positions), rel=1e-6)
    rng = np.random.default_rng(1)
    for _ in range(3):
        x = positions_in_nm(positions)
        x = (x + 0.01 * rng.normal(size=x.shape)) * unit.nanometer
        expected = energy(system, x)
        assert energy(made.system, x) == pytest.approx(expected, rel=1e-6)
        assert energy(again.system, x) == pytest.approx(expected, rel=1e-6)
    assert {p.name for p in (tmp_path / "new").iterdir()} >= {"system.yaml"}
    if "forcefield" not in given:
        names = {"system.xml", "topology.pdb", "system.yaml"}
        assert {p.name for p in (tmp_path / "new").iterdir()} == names
    moved = np.abs(positions_in_nm(again.positions) - positions_in_nm(positions))
    assert moved.max() < 6e-5  # the digits of a PDB file
    assert again.topology.getNumBonds() == {"amber": 21, "cif": 21, "cif-xml": 21}.get(kind, 5)


def test_every_force_is_told_with_its_own_energy(tmp_path):
    given, system, positions = files("amber", tmp_path)
    groups = [force.getForceGroup() for force in system.getForces()]
    found = force_energies(system, positions)
    assert [force.getForceGroup() for force in system.getForces()] == groups
    for k, (name, value) in enumerate(found):
        alone = openmm.XmlSerializer.clone(system)
        for other in reversed(range(alone.getNumForces())):
            if other != k:
                alone.removeForce(other)
        assert name == system.getForce(k).getName()
        assert value == pytest.approx(energy(alone, positions), rel=1e-9, abs=1e-9)
    told = []
    init_system(tmp_path / "new", tell=told.append, **given)
    assert [line.split()[0] for line in told] == [*(name for name, _ in found), "total"]


def test_forces_beyond_the_groups_of_openmm_are_told_apart():
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    for k in range(40):
        force = openmm.CustomBondForce("r")
        force.addBond(0, 1)
        force.setName(f"f{k}")
        for _ in range(k):
            force.addBond(0, 1)
        system.addForce(force)
    found = force_energies(system, [[0.0, 0, 0], [2.0, 0, 0]] * unit.nanometer)
    assert found == [(f"f{k}", pytest.approx(2.0 * (k + 1))) for k in range(40)]


def test_solvent_is_stripped_from_structure_and_system(tmp_path, caplog):
    """What is left is the vacuum System of the same program."""
    given = {"topology": WET, "pdb": WET.with_suffix(".crd")}
    with pytest.raises(UnsupportedSystemError, match=r"749 water.*--strip-solvent"):
        init_system(tmp_path / "mol", **given)
    made = init_system(tmp_path / "mol", strip_solvent=True, **given)
    assert made.n_particles == 22
    assert "2247 atoms of solvent" in caplog.text
    dry = app.AmberPrmtopFile(str(VACUUM)).createSystem()
    x = app.AmberInpcrdFile(str(VACUUM.with_suffix(".crd"))).positions
    assert energy(made.system, x) == pytest.approx(energy(dry, x), rel=1e-6)
    # A periodic System of the same: no box, no cutoff is left.
    prmtop = app.AmberPrmtopFile(str(WET))
    boxed = prmtop.createSystem(nonbondedMethod=app.PME, rigidWater=False)
    boxed.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(boxed))
    again = init_system(
        tmp_path / "boxed", system_xml=tmp_path / "in.xml", strip_solvent=True, **given
    )
    assert energy(again.system, x) == pytest.approx(energy(dry, x), rel=1e-6)
    assert not again.system.usesPeriodicBoundaryConditions()


def test_a_system_that_cannot_be_cut_says_so():
    system = app.AmberPrmtopFile(str(VACUUM)).createSystem()
    with pytest.raises(UnsupportedSystemError, match="a bond leads out of the atoms"):
        cut_system(system, range(4))
    system.addForce(openmm.CustomCentroidBondForce(1, "x1"))
    with pytest.raises(UnsupportedSystemError, match="CustomCentroidBondForce cannot be cut"):
        cut_system(system, range(22))


def atom(serial, name, place, residue, chain, number, x, occupancy=1.0, code=" "):
    return (
        f"ATOM  {serial:5d}  {name:<3s}{place}{residue:>3s} {chain}{number:4d}{code}   "
        f"{x:8.3f}{0.0:8.3f}{0.0:8.3f}{occupancy:6.2f}  0.00          {name[0]:>2s}\n"
    )


def test_of_alternate_locations_the_fullest_is_taken_residue_by_residue():
    lines = [
        atom(1, "N", " ", "ALA", "A", 1, 0.0),
        atom(2, "CA", "A", "ALA", "A", 1, 1.0, 0.3),
        atom(3, "CA", "B", "ALA", "A", 1, 2.0, 0.7),
        atom(4, "CB", "A", "ALA", "A", 1, 3.0, 0.3),
        atom(5, "CB", "B", "ALA", "A", 1, 4.0, 0.7),
        atom(6, "CA", "A", "ALA", "A", 2, 5.0, 0.5),
        atom(7, "CA", "B", "ALA", "A", 2, 6.0, 0.5),
        atom(8, "CA", "A", "ALA", "A", 2, 7.0, 0.6, code="A"),
        atom(9, "CA", "B", "ALA", "A", 2, 8.0, 0.4, code="A"),
    ]
    kept = fullest_locations(lines)
    assert [float(line[30:38]) for line in kept] == [0.0, 2.0, 4.0, 5.0, 7.0]
    assert {line[16] for line in kept} == {" "}


def two_chains(folder):
    lines = [x for x in DIPEPTIDE.read_text().splitlines() if x.startswith(("ATOM", "HETATM"))]
    second = [f"{x[:21]}B{x[22:30]}{float(x[30:38]) + 20.0:8.3f}{x[38:]}" for x in lines]
    (folder / "two.pdb").write_text("\n".join([*lines, "TER", *second, "END", ""]))
    return folder / "two.pdb"


def test_one_chain_of_two_with_its_part_of_the_system(tmp_path):
    pdb = two_chains(tmp_path)
    one = app.ForceField("amber14-all.xml").createSystem(app.PDBFile(str(DIPEPTIDE)).topology)
    both = app.ForceField("amber14-all.xml").createSystem(app.PDBFile(str(pdb)).topology)
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(both))
    with pytest.raises(UnsupportedSystemError, match=r"choose it with --chain or --residue"):
        init_system(tmp_path / "mol", pdb=pdb, system_xml=tmp_path / "in.xml")
    with pytest.raises(ConfigurationError, match=r"no chain 'X': choose --chain from A, B"):
        init_system(tmp_path / "mol", pdb=pdb, system_xml=tmp_path / "in.xml", chain="X")
    for k, potential in enumerate(
        [{"system_xml": tmp_path / "in.xml"}, {"forcefield": ["amber14-all.xml"]}]
    ):
        made = init_system(tmp_path / f"mol{k}", pdb=pdb, chain="B", **potential)
        assert made.n_particles == 22
        again = load_system(tmp_path / f"mol{k}")
        assert again.positions[0][0]._value > 1.5
        x = app.PDBFile(str(DIPEPTIDE)).positions
        assert energy(again.system, x) == pytest.approx(energy(one, x), rel=1e-6)


def test_insertion_codes_stay_apart(tmp_path):
    """Three residues 1, 1A and 2 of the dipeptide: read, kept and chosen by number and code."""
    lines = []
    for line in DIPEPTIDE.read_text().splitlines():
        if line.startswith(("ATOM", "HETATM")):
            number = {1: "   1 ", 2: "   1A", 3: "   2 "}[int(line[22:26])]
            lines.append(f"{line[:22]}{number}{line[27:]}")
    (tmp_path / "codes.pdb").write_text("\n".join([*lines, "END", ""]))
    made = init_system(
        tmp_path / "mol", pdb=tmp_path / "codes.pdb", forcefield=["amber14-all.xml"]
    )
    assert [(r.id, r.insertionCode.strip()) for r in made.topology.residues()] == [
        ("1", ""),
        ("1", "A"),
        ("2", ""),
    ]
    with pytest.raises(ConfigurationError, match=r"no residue '7': .* ACE 1, ALA 1A, NME 2"):
        init_system(
            tmp_path / "no",
            pdb=tmp_path / "codes.pdb",
            forcefield=["amber14-all.xml"],
            residue="7",
        )


def test_remarks_need_not_be_utf_8(tmp_path):
    content = TOLUENE.read_bytes()
    (tmp_path / "latin.pdb").write_bytes("REMARK Köhler\n".encode("latin-1") + content)
    topology, positions = load_pdb(tmp_path / "latin.pdb")
    plain, same = load_pdb(TOLUENE)
    assert topology.getNumAtoms() == plain.getNumAtoms()
    np.testing.assert_array_equal(positions, same)
