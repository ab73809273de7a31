from __future__ import annotations

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.constraints import Constraints, constraint_lengths
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.forcefield import write_pdb
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import load_system, systems_directory
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.targets.target import system_sha256
from openmm_eqflow.units import masses_in_dalton, positions_in_nm

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


def test_constrained_bonds_are_taken_and_the_structure_is_moved_to_them(tmp_path):
    write_system(tmp_path / "in.xml", constraints=app.HBonds)
    made = init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")
    held = Constraints.of(made.system)
    assert len(held.lengths) == 12
    held.check(torch.from_numpy(positions_in_nm(made.positions))[None])
    rigid = write_system(tmp_path / "rigid.xml", constraints=app.HAngles)
    assert rigid.getNumConstraints() > 12
    with pytest.raises(UnsupportedSystemError, match="constraints=HBonds"):
        init_system(tmp_path / "stiff", pdb=DIPEPTIDE, system_xml=tmp_path / "rigid.xml")
    assert not (tmp_path / "stiff").exists()


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
    with pytest.raises(ConfigurationError, match="holds no ATOM"):
        init_system(tmp_path / "new", pdb=tmp_path / "text.pdb", forcefield=AMBER)
    (tmp_path / "integrator.xml").write_text(
        openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001))
    )
    with pytest.raises(ConfigurationError, match="expected a System"):
        init_system(tmp_path / "new", pdb=DIPEPTIDE, system_xml=tmp_path / "integrator.xml")
    assert not (tmp_path / "new").exists()


def lines_of_dipeptide():
    return [x for x in DIPEPTIDE.read_text().splitlines() if x.startswith(("ATOM", "HETATM"))]


def pdb_of_lines(path, lines):
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def test_explicit_solvent_is_named_whatever_else_there_is(tmp_path):
    """No force field for water, virtual sites, a System with a box: the solvent comes first."""
    water = app.Topology()
    chain = water.addChain()
    positions = []
    for k in range(2):
        residue = water.addResidue("HOH", chain)
        made = [
            water.addAtom(name, app.Element.getBySymbol(name[0]), residue)
            for name in ("O", "H1", "H2")
        ]
        water.addBond(made[0], made[1])
        water.addBond(made[0], made[2])
        positions += [
            openmm.Vec3(k, 3.0, 0),
            openmm.Vec3(k + 0.0957, 3.0, 0),
            openmm.Vec3(k, 3.0957, 0),
        ]
    pdb = app.PDBFile(str(DIPEPTIDE))
    both = app.Modeller(pdb.topology, pdb.positions)
    both.add(water, positions * unit.nanometer)
    both.topology.setUnitCellDimensions(openmm.Vec3(3, 3, 3) * unit.nanometer)
    with (tmp_path / "wet.pdb").open("w") as handle:
        app.PDBFile.writeFile(both.topology, both.positions, handle)
    boxed = app.ForceField(*AMBER[:1], "amber14/tip3p.xml").createSystem(
        both.topology, nonbondedMethod=app.PME, nonbondedCutoff=1 * unit.nanometer
    )
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(boxed))
    for given in (
        {"forcefield": AMBER},
        {"forcefield": [AMBER[0], "amber14/tip3p.xml"]},
        {"forcefield": [AMBER[0], "amber14/tip4pew.xml"]},
        {"system_xml": tmp_path / "in.xml"},
    ):
        with pytest.raises(UnsupportedSystemError, match=r"explicit solvent \(2 water molecules"):
            init_system(tmp_path / "mol", pdb=tmp_path / "wet.pdb", **given)
    assert nothing_left(tmp_path)


def test_two_molecules(tmp_path):
    second = []
    for line in lines_of_dipeptide():
        moved = float(line[30:38]) + 20.0
        second.append(f"{line[:21]}B{line[22:30]}{moved:8.3f}{line[38:]}")
    pdb = pdb_of_lines(tmp_path / "two.pdb", [*lines_of_dipeptide(), "TER", *second])
    with pytest.raises(UnsupportedSystemError, match=r"2 molecules \(22 \+ 22 atoms\)"):
        init_system(tmp_path / "mol", pdb=pdb, forcefield=AMBER[:1])
    assert nothing_left(tmp_path)


def test_bonds_come_from_the_system_where_the_pdb_has_none(tmp_path):
    """Toluene without CONECT records; Urey-Bradley terms of its System are no bonds."""
    toluene = load_system("toluene")
    bare = [
        line
        for line in (toluene.directory / "toluene.pdb").read_text().splitlines()
        if line.startswith(("ATOM", "HETATM"))
    ]
    pdb = pdb_of_lines(tmp_path / "bare.pdb", bare)
    assert app.PDBFile(str(pdb)).topology.getNumBonds() == 0
    system = openmm.XmlSerializer.clone(toluene.system)
    angles = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicAngleForce))
    spans = openmm.HarmonicBondForce()
    for k in range(angles.getNumAngles()):
        a, _, c, *_ = angles.getAngleParameters(k)
        spans.addBond(a, c, 0.25, 0.1)
    system.addForce(spans)
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
    made = init_system(tmp_path / "mol", pdb=pdb, system_xml=tmp_path / "in.xml")

    def bonds(topology):
        return {frozenset((a.index, b.index)) for a, b in topology.bonds()}

    assert bonds(made.topology) == bonds(toluene.topology)
    assert bonds(load_system(tmp_path / "mol").topology) == bonds(toluene.topology)
    # Without bonds in either there is nothing to take: the PDB has to say.
    bonded = [i for i, f in enumerate(system.getForces()) if "BondForce" in type(f).__name__]
    for index in reversed(bonded):
        system.removeForce(index)
    (tmp_path / "none.xml").write_text(openmm.XmlSerializer.serialize(system))
    with pytest.raises(UnsupportedSystemError, match="add CONECT records"):
        init_system(tmp_path / "other", pdb=pdb, system_xml=tmp_path / "none.xml")


def test_an_atom_at_the_origin(tmp_path):
    lines = lines_of_dipeptide()
    lines[5] = f"{lines[5][:30]}{0.0:8.3f}{0.0:8.3f}{0.0:8.3f}{lines[5][54:]}"
    pdb = pdb_of_lines(tmp_path / "zero.pdb", lines)
    with pytest.raises(UnsupportedSystemError, match=r"bonded and .* atom 6 lies at the origin"):
        init_system(tmp_path / "mol", pdb=pdb, forcefield=AMBER)
    assert nothing_left(tmp_path)


def test_a_system_without_energy(tmp_path):
    system = write_system(tmp_path / "in.xml")
    while system.getNumForces():
        system.removeForce(0)
    system.addForce(openmm.CMMotionRemover())
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
    with pytest.raises(UnsupportedSystemError, match="none of its forces has a term"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("conf.xyz", "1\nx\nH 0 0 0\n", "is an XYZ structure: .*--pdb"),
        ("topol.top", "[ system ]\n", "is a topology of GROMACS or Amber: .*--top"),
        ("mol.prmtop", "%VERSION\n", "is an Amber topology: .*--prmtop.*--inpcrd"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    for given in (
        {"pdb": tmp_path / name, "forcefield": AMBER},
        {"pdb": DIPEPTIDE, "forcefield": [str(tmp_path / name)]},
        {"pdb": DIPEPTIDE, "system_xml": tmp_path / name},
    ):
        with pytest.raises(ConfigurationError, match=f"{name} {message}"):
            init_system(tmp_path / "new", **given)


def test_files_of_the_wrong_option(tmp_path):
    write_system(tmp_path / "in.xml")
    (tmp_path / "ff.xml").write_text("<ForceField></ForceField>")
    with pytest.raises(ConfigurationError, match=r"in\.xml is a serialised System: .*--system"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=[str(tmp_path / "in.xml")])
    with pytest.raises(ConfigurationError, match=r"ff\.xml is an OpenMM force.*--forcefield"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "ff.xml")
    with pytest.raises(ConfigurationError, match=r"alanine-dipeptide\.pdb is a PDB file.*--pdb"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=DIPEPTIDE)


def test_damaged_files_are_named_with_the_next_action(tmp_path):
    write_system(tmp_path / "in.xml")
    text = (tmp_path / "in.xml").read_text()
    (tmp_path / "cut.xml").write_text(text[:5000])
    with pytest.raises(ConfigurationError, match=r"cut\.xml is no complete XML.*write it again"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "cut.xml")
    newer = text.replace('type="System" version="1"', 'type="System" version="99"')
    assert newer != text
    (tmp_path / "new.xml").write_text(newer)
    with pytest.raises(ConfigurationError, match=r"new\.xml .*Unsupported version.*this is Open"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "new.xml")
    for text in ("", "HEADER    NOTHING\nEND\n"):
        (tmp_path / "empty.pdb").write_text(text)
        with pytest.raises(ConfigurationError, match=r"empty\.pdb holds no ATOM"):
            init_system(tmp_path / "mol", pdb=tmp_path / "empty.pdb", forcefield=AMBER)


def test_several_templates_and_massless_sites(tmp_path):
    with pytest.raises(ConfigurationError, match="several residues of the force field fit"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=["charmm36.xml"])
    water = [
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O",
        "HETATM    2  H1  HOH A   1       0.957   0.000   0.000  1.00  0.00           H",
        "HETATM    3  H2  HOH A   1      -0.240   0.927   0.000  1.00  0.00           H",
    ]
    pdb = pdb_of_lines(tmp_path / "water.pdb", water)
    with pytest.raises(ConfigurationError, match="the model has massless sites"):
        init_system(tmp_path / "mol", pdb=pdb, forcefield=["amber14/tip4pew.xml"])
    with pytest.raises(ConfigurationError, match=r"water has its own file"):
        init_system(tmp_path / "mol", pdb=pdb, forcefield=AMBER)
    assert init_system(tmp_path / "mol", pdb=pdb, forcefield=["amber14/tip3p.xml"]).n_particles


def test_what_is_not_used_is_told(tmp_path, caplog):
    lines = lines_of_dipeptide()
    other = [f"{line[:16]}{place}{line[17:]}" for line in lines[10:12] for place in "AB"]
    alternate = pdb_of_lines(tmp_path / "alt.pdb", [*lines[:10], *other, *lines[12:]])
    models = pdb_of_lines(
        tmp_path / "models.pdb",
        ["MODEL        1", *lines, "ENDMDL", "MODEL        2", *lines, "ENDMDL"],
    )
    box = "CRYST1   30.000   30.000   30.000  90.00  90.00  90.00 P 1           1"
    boxed = pdb_of_lines(tmp_path / "box.pdb", [box, *lines])
    none = box.replace("30.000", " 1.000")
    for k, (pdb, told) in enumerate(
        [
            (alternate, ["alt.pdb has alternate locations A, B: in every residue the one of"]),
            (models, ["models.pdb has 2 models: the first is taken"]),
            (boxed, ["box.pdb has a box (CRYST1): it is not used"]),
            (pdb_of_lines(tmp_path / "unit.pdb", [none, *lines]), []),
            (pdb_of_lines(tmp_path / "plain.pdb", lines), []),
        ]
    ):
        caplog.clear()
        made = init_system(tmp_path / f"mol{k}", pdb=pdb, forcefield=AMBER[:1])
        assert made.n_particles == 22
        heard = [record.getMessage() for record in caplog.records]
        assert len(heard) == len(told)
        assert all(part in line for part, line in zip(told, heard, strict=True))


def test_a_cutoff_without_a_box_is_accepted_and_told(tmp_path):
    write_system(
        tmp_path / "in.xml",
        nonbondedMethod=app.CutoffNonPeriodic,
        nonbondedCutoff=1 * unit.nanometer,
    )
    with pytest.warns(UserWarning, match="falling back to OpenMM Contexts.*with a cutoff"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, system_xml=tmp_path / "in.xml")


@pytest.mark.parametrize("name", ["ala3", "toluene", "harmonic"])
def test_written_pdb_files_say_every_bond(tmp_path, name):
    """Standard residues too, which OpenMM leaves out."""
    molecule = load_system(name)
    write_pdb(tmp_path / "all.pdb", molecule.topology, molecule.positions)
    lines = (tmp_path / "all.pdb").read_text().splitlines()
    serials = [int(line[6:11]) for line in lines if line.startswith(("ATOM", "HETATM"))]
    found = set()
    for line in lines:
        if line.startswith("CONECT"):
            first, *others = (serials.index(int(word)) for word in line.split()[1:])
            found |= {frozenset((first, other)) for other in others}
    bonds = {frozenset((a.index, b.index)) for a, b in molecule.topology.bonds()}
    assert found == bonds
    again = app.PDBFile(str(tmp_path / "all.pdb"))
    assert {frozenset((a.index, b.index)) for a, b in again.topology.bonds()} == bonds
    assert again.topology.getNumBonds() == len(bonds)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("hbonds", None), {"constraints": app.HBonds}),
        (("allbonds", 3.0), {"constraints": app.AllBonds, "hydrogenMass": 3.0 * unit.dalton}),
        (("none", 2.5), {"hydrogenMass": 2.5 * unit.dalton}),
    ],
)
def test_constraints_and_hydrogen_masses_are_those_of_create_system(tmp_path, words, options):
    theirs = write_system(tmp_path / "in.xml", **options)
    constraints, mass = words
    made = init_system(
        tmp_path / "mol",
        pdb=DIPEPTIDE,
        forcefield=AMBER,
        constraints=constraints,
        hydrogen_mass=mass,
    )
    lengths = constraint_lengths(theirs)
    ours = constraint_lengths(made.system)
    assert ours.keys() == lengths.keys()
    np.testing.assert_allclose([ours[p] for p in lengths], list(lengths.values()), rtol=1e-9)
    np.testing.assert_allclose(masses_in_dalton(made.system), masses_in_dalton(theirs), rtol=1e-9)
    x = positions_in_nm(made.positions)[None]
    energies = [ContextPool(s, n_workers=1).energies(x)[0] for s in (made.system, theirs)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-6)


def test_hydrogens_too_heavy_are_refused(tmp_path):
    with pytest.raises(UnsupportedSystemError, match=r"leave atom \d+ with .*--hydrogen-mass 3"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=AMBER, hydrogen_mass=9.0)
    assert not (tmp_path / "mol").exists()


@pytest.mark.parametrize("mass", [float("nan"), float("inf"), 0.5, 0.0, -1.0])
def test_masses_that_no_hydrogen_has_are_refused(tmp_path, mass):
    with pytest.raises(ConfigurationError, match="--hydrogen-mass is 1 or more, such as 3"):
        init_system(tmp_path / "mol", pdb=DIPEPTIDE, forcefield=AMBER, hydrogen_mass=mass)
    assert not (tmp_path / "mol").exists()


def test_heavy_atoms_lighter_than_their_hydrogens_are_told(tmp_path, caplog):
    def told(mass):
        caplog.clear()
        folder = tmp_path / f"{mass:g}"
        made = init_system(folder, pdb=DIPEPTIDE, forcefield=AMBER, hydrogen_mass=mass)
        lightest = masses_in_dalton(made.system).min()
        lines = [r.getMessage() for r in caplog.records if "less than theirs" in r.getMessage()]
        return lightest < mass, lines

    assert told(3.0) == (False, [])  # methyls keep 6.03 u
    light, (line,) = told(4.0)
    assert light
    assert line.startswith("hydrogens of 4 u leave atom ")
    assert "with 3.0" in line
    assert line.endswith("take a smaller --hydrogen-mass")


def test_bond_orders_are_kept_and_aromatic_bonds_have_none(tmp_path):
    """What RDKit calls aromatic is written as 0; mdtraj takes 1 to 3 or nothing."""
    made = init_system(
        tmp_path / "mol", pdb=DIPEPTIDE, forcefield=AMBER, bond_orders=[(4, 5, 2), (4, 6, 0)]
    )
    orders = {(b[0].index, b[1].index): b.order for b in made.topology.bonds()}
    orders |= {(j, i): order for (i, j), order in orders.items()}
    assert orders[4, 5] == 2
    assert orders[4, 6] is None
    names = [t.name for t in find_isomers(made.system, made.topology).torsions]
    assert any(name.startswith("ω") for name in names)


def test_springs_at_rest_are_an_energy(tmp_path):
    topology = app.Topology()
    residue = topology.addResidue("H2", topology.addChain())
    atoms = [topology.addAtom(name, app.element.hydrogen, residue) for name in ("H1", "H2")]
    topology.addBond(*atoms)
    x = unit.Quantity(np.array([[0.0, 0.0, 0.0], [0.074, 0.0, 0.0]]), unit.nanometer)
    with (tmp_path / "in.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, x, file)
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.008)
    spring = openmm.HarmonicBondForce()
    system.addForce(spring)

    def made(name):
        (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
        files = {"pdb": tmp_path / "in.pdb", "system_xml": tmp_path / "in.xml"}
        return init_system(tmp_path / name, **files)

    with pytest.raises(UnsupportedSystemError, match="has no energy: none of its forces"):
        made("none")
    spring.addBond(0, 1, 0.074, 3e5)
    assert made("at rest").n_particles == 2
