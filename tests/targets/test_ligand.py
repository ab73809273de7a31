"""Small molecules: geometry, hands and bond orders by RDKit; parameters by AmberTools."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import openmm
import pytest
import yaml

from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.ligand import read_molecule
from openmm_eqflow.targets.own_system import init_ligand
from openmm_eqflow.units import positions_in_nm

Chem = pytest.importorskip(
    "rdkit.Chem", reason='RDKit is not installed: pip install "openmm-eqflow[ligand]"'
)
PROGRAMS = ("antechamber", "parmchk2", "tleap")
needs_ambertools = pytest.mark.skipif(
    not all(shutil.which(p) or (Path(sys.executable).parent / p).is_file() for p in PROGRAMS),
    reason='AmberTools is not installed: pip install "openmm-eqflow[ligand]"',
)


def place(molecule) -> np.ndarray:
    return np.array(molecule.GetConformer().GetPositions())


def torsion(molecule, *atoms: int) -> float:
    return float(torsion_angles(place(molecule)[None], [atoms])[0, 0])


@pytest.mark.parametrize(
    ("smiles", "letter", "cosine"), [("C/C=C/C", "E", -1.0), ("C/C=C\\C", "Z", 1.0)]
)
def test_double_bonds_have_the_side_that_is_said(smiles, letter, cosine):
    molecule, orders, lines = read_molecule(smiles=smiles)
    assert molecule.GetNumAtoms() == 12
    assert lines == [f"Double bond 2-3: {letter}."]
    assert math.cos(torsion(molecule, 0, 1, 2, 3)) == pytest.approx(cosine, abs=0.02)
    assert [row for row in orders if row[2] != 1] == [(1, 2, 2)]
    assert len(orders) == 11
    assert all(i < j for i, j, _ in orders)


def test_centres_have_the_hand_that_is_said():
    volumes = {}
    for smiles, letter in (("C[C@H](N)C(=O)O", "S"), ("C[C@@H](N)C(=O)O", "R")):
        molecule, orders, lines = read_molecule(smiles=smiles)
        assert lines == [f"Centre C (atom 2): {letter}."]
        x = place(molecule)
        volumes[letter] = np.linalg.det(x[[0, 2, 3]] - x[1])
        assert (3, 4, 2) in orders  # C=O
        assert (3, 5, 1) in orders
    # Methyl, nitrogen, carboxyl seen against the hydrogen: the other way round in R.
    assert volumes["S"] * volumes["R"] < 0
    assert min(map(abs, volumes.values())) > 1


def test_geometry_is_that_of_a_molecule():
    molecule, orders, _ = read_molecule(smiles="CC1CCCCC1")
    x, kinds = place(molecule), [a.GetAtomicNum() for a in molecule.GetAtoms()]
    assert kinds.count(6) == 7
    assert kinds.count(1) == 14
    lengths = [np.linalg.norm(x[i] - x[j]) for i, j, _ in orders]
    expected = [1.1 if 1 in (kinds[i], kinds[j]) else 1.53 for i, j, _ in orders]
    assert np.abs(np.array(lengths) - expected).max() < 0.05
    ring = list(molecule.GetRingInfo().AtomRings()[0])
    turns = [torsion(molecule, *(ring[(k + m) % 6] for m in range(4))) for k in range(6)]
    # A chair, as ETKDG knows: turns of alternating sign near 55 degrees.
    assert all(a * b < 0 for a, b in itertools.pairwise(turns))
    assert np.abs(np.abs(np.degrees(turns)) - 55).max() < 12


def test_aromatic_bonds_have_no_order_and_triple_ones_three():
    orders = read_molecule(smiles="C#Cc1ccccc1")[1]
    found = sorted(order for _, _, order in orders)
    assert found == [0] * 6 + [1] * 7 + [3]


def test_an_sd_file_keeps_its_coordinates_and_gets_its_hydrogens(tmp_path):
    path = tmp_path / "mol.sdf"

    def write(molecule) -> None:
        with Chem.SDWriter(str(path)) as writer:
            writer.write(molecule)

    given = read_molecule(smiles="C[C@H](O)C#N")[0]
    write(given)
    molecule, _, lines = read_molecule(sdf=path)
    np.testing.assert_allclose(place(molecule), place(given), atol=1e-3)
    assert lines == read_molecule(smiles="C[C@H](O)C#N")[2] != []
    write(Chem.RemoveHs(given))
    again = read_molecule(sdf=path)[0]
    np.testing.assert_allclose(place(again)[:5], place(given)[:5], atol=1e-3)
    assert again.GetNumAtoms() == given.GetNumAtoms()
    flat = Chem.MolFromSmiles("CCO")
    Chem.rdDepictor.Compute2DCoords(flat)
    write(flat)
    assert np.ptp(place(read_molecule(sdf=path)[0])[:, 2]) > 0.5


@pytest.mark.parametrize(
    ("smiles", "told"),
    [
        ("CC(N)C(=O)O", "leaves stereochemistry open (atom 2)"),
        ("CC=CC", "leaves stereochemistry open (bond 2)"),
        ("C1CC", "is no molecule to RDKit"),
        ("C(C)(C)(C)(C)C", "is no molecule to RDKit"),
        ("", "is no molecule to RDKit"),
        ("CC.O", "holds 2 molecules"),
    ],
)
def test_what_is_not_said_or_no_molecule_is_refused(smiles, told):
    with pytest.raises(ConfigurationError) as caught:
        read_molecule(smiles=smiles)
    assert told in str(caught.value)


def test_without_ambertools_the_line_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"antechamber .*openmm-eqflow\[ligand\]"):
        init_ligand(tmp_path / "mol", smiles="CCO", charges="gas")
    assert not (tmp_path / "mol").exists()


@needs_ambertools
def test_a_system_from_a_smiles_string(tmp_path):
    told: list[str] = []
    made = init_ligand(tmp_path / "mol", smiles="OC/C=C/C", charges="gas", tell=told.append)
    assert made.n_particles == 13
    assert told[-1] == "Double bond 3-4: E."
    content = yaml.safe_load((tmp_path / "mol" / "system.yaml").read_text())
    assert content["description"] == "OC/C=C/C: GAFF2, Gasteiger charges"
    assert [row for row in content["bond_orders"] if row[2] == 2] == [[2, 3, 2]]
    x = positions_in_nm(made.positions)
    (double,) = (
        t for t in find_isomers(made.system, made.topology, x).torsions if t.kind == "double"
    )
    assert set(double.atoms[1:3]) == {2, 3}
    (nonbonded,) = (f for f in made.system.getForces() if isinstance(f, openmm.NonbondedForce))
    charges = [nonbonded.getParticleParameters(k)[0]._value for k in range(13)]
    assert sum(charges) == pytest.approx(0.0, abs=0.02)
    assert min(charges) < -0.3  # oxygen
    energies, forces = ContextPool(made.system, n_workers=1).energies_and_forces(x[None])
    assert np.isfinite(energies[0])
    assert np.abs(forces).max() < 2e4  # kJ/mol/nm: MMFF's geometry is near GAFF2's


@needs_ambertools
def test_the_command_keeps_hands_and_holds_bonds(tmp_path, monkeypatch, shell):
    monkeypatch.chdir(tmp_path)
    words = ("--smiles", "C[C@H](O)C#N", "--charges", "gas", "--constraints", "hbonds")
    outcome = shell("init", "mol", *words)
    assert outcome.code == 0, outcome.err
    assert "Centre C (atom 2): " in outcome.out
    assert "next: openmm-eqflow run mol" in outcome.out
    system = openmm.XmlSerializer.deserialize(Path("mol/system.xml").read_text())
    assert system.getNumConstraints() == 5
