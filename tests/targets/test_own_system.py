from __future__ import annotations

import openmm
import pytest
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.library import load_system, systems_directory
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.targets.target import system_sha256
from openmm_eqflow.units import masses_in_dalton

DIPEPTIDE = systems_directory() / "alanine-dipeptide" / "alanine-dipeptide.pdb"
AMBER = ["amber14-all.xml", "implicit/obc2.xml"]


def write_system(path, **options):
    pdb = app.PDBFile(str(DIPEPTIDE))
    system = app.ForceField(*AMBER).createSystem(pdb.topology, **options)
    path.write_text(openmm.XmlSerializer.serialize(system))
    return system


def nothing_left(folder):
    return not any("mol" in path.name and path.suffix != ".pdb" for path in folder.iterdir())


def test_forcefield_folder_is_complete_and_loads(tmp_path):
    made = init_system(
        tmp_path / "mol", pdb=DIPEPTIDE, forcefield=AMBER, temperature=310.0 * unit.kelvin
    )
    again = load_system(tmp_path / "mol")
    assert again.temperature == 310.0 * unit.kelvin
    assert again.kind == "molecule"
    assert openmm.XmlSerializer.serialize(again.system) == openmm.XmlSerializer.serialize(
        made.system
    )
    assert sorted(path.name for path in (tmp_path / "mol").iterdir()) == [
        "alanine-dipeptide.pdb",
        "system.yaml",
    ]


def test_own_forcefield_file_is_copied(tmp_path):
    own = tmp_path / "own.xml"
    own.write_text("<ForceField></ForceField>")
    init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=[*AMBER, str(own)])
    own.unlink()
    assert load_system(tmp_path / "mol").n_particles == 22


@pytest.mark.parametrize("mass", [None, 3.0 * unit.dalton])
def test_serialised_system(tmp_path, mass):
    write_system(tmp_path / "in.xml", hydrogenMass=mass)
    made = init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")
    assert made.n_particles == 22
    given = openmm.XmlSerializer.deserialize((tmp_path / "in.xml").read_text())
    again = load_system(tmp_path / "mol").system
    assert system_sha256(again) == system_sha256(made.system)
    assert masses_in_dalton(again).tolist() == masses_in_dalton(given).tolist()
    assert min(masses_in_dalton(again)) == pytest.approx(1.008 if mass is None else 3.0, abs=0.01)
    assert again.getNumForces() == given.getNumForces()


def test_missing_hydrogens_say_what_to_do_and_can_be_added(tmp_path):
    heavy = tmp_path / "heavy.pdb"
    lines = DIPEPTIDE.read_text().splitlines(keepends=True)
    heavy.write_text("".join(line for line in lines if line[76:78].strip() != "H"))
    with pytest.raises(ConfigurationError, match=r"No template found.*--add-hydrogens") as info:
        init_system(tmp_path / "mol", pdb=heavy, forcefield=AMBER)
    assert "\n" not in str(info.value)
    assert nothing_left(tmp_path)
    made = init_system(tmp_path / "mol", pdb=heavy, forcefield=AMBER, add_hydrogens=True)
    assert made.n_particles == 22


def test_residue_without_template(tmp_path):
    with pytest.raises(ConfigurationError, match=r"No template found for residue.*--system"):
        init_system(
            tmp_path / "mol",
            pdb=systems_directory() / "toluene" / "toluene.pdb",
            forcefield=AMBER,
        )


def test_atoms_in_pdb_and_system_differ(tmp_path):
    write_system(tmp_path / "in.xml")
    with pytest.raises(ConfigurationError, match="15 atoms but the System has 22"):
        init_system(
            tmp_path / "mol",
            pdb=systems_directory() / "toluene" / "toluene.pdb",
            system_xml=tmp_path / "in.xml",
        )
    lines = DIPEPTIDE.read_text().splitlines(keepends=True)
    atoms = [index for index, line in enumerate(lines) if line.startswith(("ATOM", "HETATM"))]
    # Exchange H1 and CH3: another order of the same atoms.
    lines[atoms[0]], lines[atoms[1]] = lines[atoms[1]], lines[atoms[0]]
    shuffled = tmp_path / "shuffled.pdb"
    shuffled.write_text("".join(lines))
    with pytest.raises(ConfigurationError, match=r"atom 1 \(CH3, C\) has mass 1\.0"):
        init_system(tmp_path / "mol", pdb=shuffled, system_xml=tmp_path / "in.xml")
    assert not (tmp_path / "mol").exists()


def test_constraints_are_refused_with_the_remedy(tmp_path):
    write_system(tmp_path / "in.xml", constraints=app.HBonds)
    with pytest.raises(UnsupportedSystemError, match="constraints=None"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")
    assert not (tmp_path / "mol").exists()


def test_external_force_is_refused_by_name(tmp_path):
    system = write_system(tmp_path / "in.xml")
    restraint = openmm.CustomExternalForce("x^2")
    restraint.addParticle(0)
    system.addForce(restraint)
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
    with pytest.raises(UnsupportedSystemError, match="CustomExternalForce"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")


def test_argument_errors(tmp_path):
    (tmp_path / "mol").mkdir()
    with pytest.raises(ConfigurationError, match="exists"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=AMBER)
    with pytest.raises(ConfigurationError, match="either"):
        init_system(tmp_path / "new", pdb=DIPEPTIDE)
    with pytest.raises(ConfigurationError, match="is not a file"):
        init_system(tmp_path / "new", pdb=tmp_path / "no.pdb", forcefield=AMBER)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        init_system(tmp_path / "new", pdb=DIPEPTIDE, forcefield=["no-such.xml"])
    with pytest.raises(ConfigurationError, match="temperature"):
        init_system(
            tmp_path / "new", pdb=DIPEPTIDE, forcefield=AMBER, temperature=-1.0 * unit.kelvin
        )
    (tmp_path / "text.pdb").write_text("not a pdb\n")
    with pytest.raises(ConfigurationError, match="cannot be read as a PDB"):
        init_system(tmp_path / "new", pdb=tmp_path / "text.pdb", forcefield=AMBER)
    (tmp_path / "integrator.xml").write_text(
        openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001))
    )
    with pytest.raises(ConfigurationError, match="expected a System"):
        init_system(tmp_path / "new", pdb=DIPEPTIDE, system_xml=tmp_path / "integrator.xml")
    assert not (tmp_path / "new").exists()
