from __future__ import annotations

import itertools
import math
import warnings

import networkx as nx
import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from stand_ins import small_molecules
from stand_ins.energies import empty_system, phe_system, reference

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.symmetry import (
    bond_graph,
    bond_symmetry,
    chirality_signs,
    find_symmetry,
)

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
    assert len(without.prochiral_centres) == 3
    assert find_symmetry(load_system("harmonic").system).bonds == ()


def test_ring_side_chain():
    system, topology, _ = phe_system("amber14-all.xml")
    symmetry = find_symmetry(system, topology)
    atoms = list(topology.atoms())
    assert [atoms[s.centre].name for s in symmetry.stereocentres] == ["CA"]
    torsions = find_isomers(system, topology).torsions
    names = {tuple(atoms[p].name for p in t.atoms[1:3]): t.fold for t in torsions}
    assert names["CB", "CG"] == 2  # a phenyl turned by half is the same
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


def test_the_search_ends_on_many_equal_molecules():
    """Three hundred waters: no end in sight without a bound on the work."""
    system = empty_system(900)
    bonds = openmm.HarmonicBondForce()
    for k in range(300):
        bonds.addBond(3 * k, 3 * k + 1, 0.1, 1e5)
        bonds.addBond(3 * k, 3 * k + 2, 0.1, 1e5)
    system.addForce(bonds)
    with pytest.raises(UnsupportedSystemError, match=r"search for symmetries of 900 .* given up"):
        find_symmetry(system)


def brute_force(topology, system, x, double=()):
    """Number of sectors and order, by all permutations of like atoms that keep the bond graph.

    Every relabelled embedding has a hand at each four-coordinate centre and a side at each end of
    a double bond; proper rotations, methyl rotors and motions alike leave all of them alone.
    """
    graph = nx.Graph((a.index, b.index) for a, b in topology.bonds())
    elements = {a.index: a.element.symbol for a in topology.atoms()}
    nx.set_node_attributes(graph, elements, "element")
    centres = [sorted(graph[c]) for c in graph if graph.degree[c] == 4]
    quads = [
        (a, b, c, d) for b, c in double for a in set(graph[b]) - {c} for d in set(graph[c]) - {b}
    ]
    same = nx.algorithms.isomorphism.categorical_node_match("element", "")
    matcher = nx.algorithms.isomorphism.GraphMatcher(graph, graph, node_match=same)
    seen, order = set(), 0
    for image in matcher.isomorphisms_iter():
        y = x[[image[k] for k in range(len(x))]]
        hands = [np.linalg.det(y[c[:3]] - y[c[3]]) > 0 for c in centres]
        sides = [np.dot(y[a] - y[b], y[d] - y[c]) > 0 for a, b, c, d in quads]
        seen.add((*hands, *sides))
        order += 1
    return len(seen), order


@pytest.mark.parametrize(
    ("name", "n_sectors", "order"),
    [
        ("ISOBUTANE", 16, 1296),
        ("ISOPROPANOL", 8, 72),
        ("TERT_BUTANOL", 16, 1296),
        ("BUTANE", 16, 288),
        ("VALINE", 32, 2592),
        ("LEUCINE", 64, 5184),
        ("NEOPENTANE", 32, 31104),
        ("CYCLOHEXANE", 64, 768),
        ("ETHENE", 2, 8),
        ("BUTENE", 4, 72),
        ("ISOBUTENE", 8, 144),
    ],
)
def test_sectors_by_brute_force(name, n_sectors, order):
    topology, system = getattr(small_molecules, name)
    x = small_molecules.embed(system)
    double = {"ETHENE": [(0, 1)], "BUTENE": [(1, 2)], "ISOBUTENE": [(0, 1)]}.get(name, [])
    assert brute_force(topology, system, x, double) == (n_sectors, order)
    symmetry = find_symmetry(system, topology, x)
    assert (symmetry.n_sectors, symmetry.order) == (n_sectors, order)
    if not double:
        assert n_sectors == 2 ** len(symmetry.prochiral_centres)
    # Every generator of a sector leaves all hands alone, some other one of the group does not.
    centres = [sorted(n) for n in bond_graph(system, topology).adj.values() if len(n) == 4]

    def hands(y):
        return [np.linalg.det(y[c[:3]] - y[c[3]]) > 0 for c in centres]

    assert all(hands(x[list(g)]) == hands(x) for g in symmetry.sector_generators)
    assert any(hands(x[list(g)]) != hands(x) for g in symmetry.generators) or not centres


def test_a_meso_compound_has_twice_the_sectors_of_its_sibling():
    topology, system = small_molecules.DIFLUOROBUTANE
    found = set()
    for seed in range(8):
        x = small_molecules.embed(system, seed)
        n = find_symmetry(system, topology, x).n_sectors
        assert n == brute_force(topology, system, x)[0]
        found.add(n)
    assert found == {4, 8}


def test_chemical_equivalence_survives_charges_fitted_one_by_one():
    topology, system = small_molecules.ISOBUTANE
    system = openmm.XmlSerializer.clone(system)
    force = openmm.NonbondedForce()
    for k in range(system.getNumParticles()):
        force.addParticle(0.01 * k, 0.3, 0.1)
    system.addForce(force)
    x = small_molecules.embed(small_molecules.ISOBUTANE[1])
    assert find_symmetry(system, topology, x).order == 1
    assert bond_symmetry(system, topology, x).order == 1296
