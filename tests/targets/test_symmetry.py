from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from stand_ins.energies import empty_system, phe_system, reference

from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.symmetry import bond_graph, chirality_signs, find_symmetry

EXPECTED = {
    "alanine-dipeptide": (6**3, 1),
    "alanine-dipeptide-vacuum": (6**3, 1),
    "ala3": (6**5, 3),
    "toluene": (6, 0),
    "lj13": (math.factorial(13), 0),
    "lj55": (math.factorial(55), 0),
    "dw4": (24, 0),
    "harmonic": (1, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_orders_and_stereocentres(name):
    molecule = load_system(name)
    symmetry = find_symmetry(molecule.system, molecule.topology)
    order, n_stereocentres = EXPECTED[name]
    assert symmetry.order == order
    assert len(symmetry.stereocentres) == n_stereocentres
    atoms = list(molecule.topology.atoms())
    assert {atoms[s.centre].name for s in symmetry.stereocentres} <= {"CA"}
    if name.startswith("lj"):
        assert symmetry.n_classes == 1
    if name == "harmonic":
        assert symmetry.generators == ()


@pytest.mark.parametrize("name", ["alanine-dipeptide", "ala3", "toluene", "dw4", "lj13"])
def test_generators_leave_the_energy_alone(name):
    molecule = load_system(name)
    symmetry = find_symmetry(molecule.system, molecule.topology)
    rng = np.random.default_rng(0)
    x = np.array(molecule.positions.value_in_unit(unit.nanometer))
    x = x + 0.02 * rng.normal(size=x.shape)
    images = np.array([x, *(x[list(g)] for g in symmetry.generators)])
    energies = reference(molecule.system, images)[0]
    np.testing.assert_allclose(energies, energies[0], rtol=1e-11)
    for g in symmetry.generators:
        assert all(symmetry.classes[p] == symmetry.classes[q] for p, q in enumerate(g))


def test_flip_of_the_toluene_ring_is_no_symmetry():
    from openmmtools import testsystems

    toluene = testsystems.TolueneVacuum(constraints=None)
    assert find_symmetry(toluene.system, toluene.topology).order == 6
    # ... but the flip is one as soon as the improper torsions are gone.
    system = openmm.XmlSerializer.clone(toluene.system)
    bonded = {frozenset(b) for b in bond_graph(system, toluene.topology).edges}
    torsions = next(f for f in system.getForces() if isinstance(f, openmm.PeriodicTorsionForce))
    for i in range(torsions.getNumTorsions()):
        *particles, n, phase, k = torsions.getTorsionParameters(i)
        proper = all(frozenset(p) in bonded for p in itertools.pairwise(particles))
        torsions.setTorsionParameters(i, *particles, n, phase, k if proper else 0 * k)
    assert find_symmetry(system, toluene.topology).order == 12


def test_group_that_is_no_product_of_class_permutations():
    # A square of springs: one class of four, but the group is dihedral (8), not S_4 (24).
    system = empty_system(4)
    bonds = openmm.HarmonicBondForce()
    for i in range(4):
        bonds.addBond(i, (i + 1) % 4, 0.1, 1000.0)
    system.addForce(bonds)
    symmetry = find_symmetry(system)
    assert symmetry.order == 8
    assert symmetry.n_classes == 1
    group = {tuple(range(4))}
    while True:
        larger = group | {tuple(p[q] for q in g) for p in group for g in symmetry.generators}
        if larger == group:
            break
        group = larger
    assert len(group) == 8


def test_unknown_force_means_no_symmetry():
    system = load_system("lj13").system
    force = openmm.CustomCentroidBondForce(1, "0*x1")
    force.addGroup([0])
    force.addBond([0])
    system = openmm.XmlSerializer.clone(system)
    system.addForce(force)
    assert find_symmetry(system).order == 1


def test_bonds_without_a_topology():
    molecule = load_system("alanine-dipeptide")
    with_topology = find_symmetry(molecule.system, molecule.topology)
    without = find_symmetry(molecule.system)
    assert without.bonds == with_topology.bonds
    assert without.stereocentres == with_topology.stereocentres
    assert len(without.rotatable_bonds) == 7
    assert len(without.prochiral_centres) == 3
    distances = without.bond_distances
    assert distances[0, 21] == 8  # H-C-C-N-C-C-N-C-H
    np.testing.assert_array_equal(distances, distances.T)
    assert find_symmetry(load_system("harmonic").system).bonds == ()


def test_ring_side_chain():
    system, topology, _ = phe_system("amber14-all.xml")
    symmetry = find_symmetry(system, topology)
    atoms = list(topology.atoms())
    assert [atoms[s.centre].name for s in symmetry.stereocentres] == ["CA"]
    names = {tuple(atoms[p].name for p in b) for b in symmetry.rotatable_bonds}
    assert ("CB", "CG") in names
    assert ("CG", "CD1") not in names
    assert [atoms[p].name for p in symmetry.prochiral_centres].count("CB") == 1


def test_chirality_signs():
    molecule = load_system("ala3")
    symmetry = find_symmetry(molecule.system, molecule.topology)
    x = torch.tensor(np.array(molecule.positions.value_in_unit(unit.nanometer)))[None]
    signs = chirality_signs(x, symmetry.stereocentres)
    assert signs.shape == (1, 3)
    assert signs.abs().min() == 1
    assert len(set(signs[0].tolist())) == 1  # all L
    torch.testing.assert_close(chirality_signs(-x, symmetry.stereocentres), -signs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad = torch.full_like(x, torch.nan)
        assert chirality_signs(bad, symmetry.stereocentres).abs().max() == 0
