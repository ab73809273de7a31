"""Internal coordinates: round trip, volume element, chirality, rings, folds."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.geometry import mean_free_basis, random_rotations, remove_mean, rotate
from openmm_eqflow.priors.zmatrix import InternalCoordinates, ZMatrix, wrap_angle
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.units import masses_in_dalton, positions_in_nm

MOLECULES = {
    "water": (3, [(0, 1), (0, 2)], [16, 1, 1]),
    "peroxide": (4, [(0, 1), (1, 2), (2, 3)], [1, 16, 16, 1]),
    "methane": (5, [(0, 1), (0, 2), (0, 3), (0, 4)], [12, 1, 1, 1, 1]),
    "ring": (4, [(0, 1), (1, 2), (2, 3), (3, 0)], [12, 12, 12, 12]),
    "branched": (5, [(0, 1), (1, 2), (1, 3), (3, 4)], [1, 12, 16, 12, 35]),
    "methanol": (6, [(0, 1), (0, 2), (0, 3), (0, 4), (4, 5)], [12, 1, 1, 1, 16, 1]),
}


def make(name: str) -> ZMatrix:
    n, bonds, masses = MOLECULES[name]
    return ZMatrix.from_bonds(n, bonds, masses=masses)


def draw(name: str, n: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, MOLECULES[name][0], 3, generator=generator, dtype=torch.float64)
    return remove_mean(x)


def shipped(name: str) -> tuple[ZMatrix, torch.Tensor, list[str]]:
    system = load_system(name)
    bonds = [(b[0].index, b[1].index) for b in system.topology.bonds()]
    zmatrix = ZMatrix.from_bonds(
        system.n_particles, bonds, masses=list(masses_in_dalton(system.system))
    )
    x = torch.from_numpy(positions_in_nm(system.positions))[None]
    return zmatrix, x, [atom.name for atom in system.topology.atoms()]


def distances(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, None] - x[:, None]).norm(dim=-1)


@pytest.mark.parametrize("name", MOLECULES)
def test_round_trip_and_invariance(name):
    zmatrix, x = make(name), draw(name)
    internal = zmatrix.to_internal(x)
    again, log_volume = zmatrix.from_internal(internal)
    assert float(again.mean(1).abs().max()) < 1e-14
    torch.testing.assert_close(distances(again), distances(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(log_volume, zmatrix.log_volume(internal))
    back = zmatrix.to_internal(again)
    for one, two in zip(internal, back, strict=True):
        assert float(wrap_angle(one - two).abs().max() if one.numel() else 0.0) < 1e-11
    r = random_rotations(len(x), generator=torch.Generator().manual_seed(1))
    moved = zmatrix.to_internal(rotate(x, r) + 3.0)
    for one, two in zip(internal, moved, strict=True):
        assert float(wrap_angle(one - two).abs().max() if one.numel() else 0.0) < 1e-11


@pytest.mark.parametrize("name", [name for name in MOLECULES if name != "water"])
def test_reconstruction_keeps_handedness(name):
    zmatrix, x = make(name), draw(name)
    assert x.shape[1] > 3

    def handedness(points: torch.Tensor) -> torch.Tensor:
        quads = list(itertools.combinations(range(points.shape[1]), 4))
        edges = torch.stack([points[:, q[1:]] - points[:, q[:1]] for q in map(list, quads)], 1)
        return torch.linalg.det(edges)

    again, _ = zmatrix.from_internal(zmatrix.to_internal(x))
    torch.testing.assert_close(handedness(again), handedness(x), atol=1e-11, rtol=0)
    mirrored, _ = zmatrix.from_internal(zmatrix.to_internal(x * torch.tensor([-1.0, 1.0, 1.0])))
    torch.testing.assert_close(handedness(mirrored), -handedness(x), atol=1e-11, rtol=0)


def skew(w: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(w[0])
    rows = [[zero, -w[2], w[1]], [w[2], zero, -w[0]], [-w[1], w[0], zero]]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("name", MOLECULES)
def test_volume_element_is_the_jacobian_determinant(name):
    # Coordinates: internal ones and a rotation vector, whose Lebesgue measure at the identity is
    # the Haar measure of total volume 8 pi^2; image: an orthonormal basis of the subspace.
    zmatrix, x = make(name), draw(name, 3)
    n = zmatrix.n_particles
    basis = mean_free_basis(n)
    sizes = [n - 1, n - 2, n - 3]

    def place(q: torch.Tensor) -> torch.Tensor:
        parts = InternalCoordinates(*(v[None] for v in q[:-3].split(sizes)))
        y, _ = zmatrix.from_internal(parts)
        turned = y[0] @ torch.linalg.matrix_exp(skew(q[-3:])).T
        return (basis.T @ turned).flatten()

    internal = zmatrix.to_internal(x)
    expected = zmatrix.log_volume(internal) - math.log(8 * math.pi**2)
    for row in range(len(x)):
        point = torch.cat([*(v[row] for v in internal), torch.zeros(3, dtype=torch.float64)])
        jacobian = torch.autograd.functional.jacobian(place, point)
        assert jacobian.shape == (3 * n - 3, 3 * n - 3)
        found = torch.linalg.slogdet(jacobian)[1]
        assert float(found) == pytest.approx(float(expected[row]), abs=1e-9)


def test_normalisation_of_a_gaussian_in_internal_coordinates():
    # A unit Gaussian on the mean-free subspace of three particles integrates to one.
    zmatrix = make("water")
    b = torch.linspace(0, 9, 91, dtype=torch.float64)[1:]
    nodes = torch.from_numpy(np.polynomial.legendre.leggauss(40)[0])
    weights = torch.from_numpy(np.polynomial.legendre.leggauss(40)[1])
    theta = 0.5 * math.pi * (nodes + 1)
    b1, b2, angle = torch.meshgrid(b, b, theta, indexing="ij")
    bonds = torch.stack([b1.flatten(), b2.flatten()], 1)
    empty = torch.zeros(len(bonds), 0, dtype=torch.float64)
    x, log_volume = zmatrix.from_internal(InternalCoordinates(bonds, angle.reshape(-1, 1), empty))
    log_p = -0.5 * x.square().sum((1, 2)) - 3 * math.log(2 * math.pi)
    cell = float(b[1] - b[0]) ** 2 * 0.5 * math.pi
    values = torch.exp(log_p + log_volume).reshape(-1, 40) @ weights
    assert float(values.sum() * cell) == pytest.approx(1.0, abs=2e-5)


def test_one_soft_torsion_per_rotatable_bond_and_methyl_folds():
    zmatrix, _, names = shipped("alanine-dipeptide")
    leaders = [k for k, lead in enumerate(zmatrix.lead) if lead == k]
    # One leader for every bond between two atoms that have other neighbours too; no ring here.
    axes = {frozenset(zmatrix.rows[k + 3][1:3]) for k in leaders}
    assert len(axes) == len(leaders)
    topology = load_system("alanine-dipeptide").topology
    bonds = [frozenset((a.index, b.index)) for a, b in topology.bonds()]
    ends = [atom for bond in bonds for atom in bond]
    assert axes == {bond for bond in bonds if min(map(ends.count, bond)) > 1}
    methyls = {names[zmatrix.rows[k + 3][1]] for k in leaders if zmatrix.fold[k] == 3}
    assert len(methyls) == sum(f == 3 for f in zmatrix.fold) == 3
    assert all(f == 1 for k, f in enumerate(zmatrix.fold) if zmatrix.lead[k] != k)


def test_fold_needs_three_alike_terminal_atoms():
    ethane = [(0, 1), *((0, k) for k in (2, 3, 4)), *((1, k) for k in (5, 6, 7))]
    folds = ZMatrix.from_bonds(8, ethane, masses=[12, 12, 1, 1, 1, 1, 1, 1]).fold
    assert sorted(folds) == [1, 1, 1, 1, 3]
    mixed = ZMatrix.from_bonds(8, ethane, masses=[12, 12, 1, 1, 1, 1, 1, 35]).fold
    other = ZMatrix.from_bonds(8, ethane, masses=[12, 12, 1, 1, 35, 1, 1, 35]).fold
    assert 3 not in other
    assert mixed.count(3) <= 1
    # Rotating a methyl by a third of a turn and relabelling it shifts its leading torsion only.
    zmatrix = ZMatrix.from_bonds(8, ethane, masses=[12, 12, 1, 1, 1, 1, 1, 1])
    (leader,) = (k for k, f in enumerate(zmatrix.fold) if f == 3)
    members = [zmatrix.rows[k + 3][0] for k, lead in enumerate(zmatrix.lead) if lead == leader]
    tau = torch.zeros(1, 5, dtype=torch.float64)
    follower = [k for k, lead in enumerate(zmatrix.lead) if lead == leader and k != leader]
    rest = [k for k in range(5) if k not in follower and k != leader]
    third = 2 * math.pi / 3
    tau[0, leader] = 0.4
    tau[0, follower] = torch.tensor([third, -third], dtype=torch.float64)
    tau[0, rest] = torch.tensor([third, -third], dtype=torch.float64)
    ones = InternalCoordinates(
        torch.full((1, 7), 0.1, dtype=torch.float64),
        torch.full((1, 6), 1.9, dtype=torch.float64),
        tau,
    )
    x, _ = zmatrix.from_internal(ones)
    permuted = x.clone()
    permuted[:, members] = x[:, [members[1], members[2], members[0]]]
    found = zmatrix.to_internal(permuted).torsions
    assert float(wrap_angle(3 * (found - tau))[0, leader].abs()) < 1e-10
    assert float(wrap_angle(found - tau)[0, follower + rest].abs().max()) < 1e-10
    assert float(wrap_angle(found - tau)[0, leader].abs()) > 1.0


def test_rings_are_opened():
    zmatrix, x, _ = shipped("toluene")
    again, log_volume = zmatrix.from_internal(zmatrix.to_internal(x))
    assert bool(torch.isfinite(log_volume).all())
    torch.testing.assert_close(distances(again), distances(x), atol=1e-10, rtol=0)
    assert zmatrix.n_particles == 15
    assert zmatrix.fold.count(3) == 1


@pytest.mark.parametrize("name", ["alanine-dipeptide", "ala3"])
def test_shipped_molecules_round_trip(name):
    zmatrix, x, _ = shipped(name)
    again, _ = zmatrix.from_internal(zmatrix.to_internal(x))
    torch.testing.assert_close(distances(again), distances(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("n", "bonds", "pieces"),
    [(4, [(0, 1), (2, 3)], 2), (1, [], 1), (5, [(0, 1), (1, 2), (2, 3)], 2)],
)
def test_disconnected_or_tiny_is_refused_with_the_next_action(n, bonds, pieces):
    with pytest.raises(UnsupportedSystemError, match=rf"{pieces} pieces.*gaussian"):
        ZMatrix.from_bonds(n, bonds, masses=[12.0] * n)


def test_config_round_trip():
    zmatrix = make("methanol")
    assert ZMatrix.from_config(json.loads(json.dumps(zmatrix.config()))) == zmatrix
    assert zmatrix == make("methanol")


def test_gradients_flow_through_both_maps():
    zmatrix, x = make("methanol"), draw("methanol", 2)

    def there_and_back(points: torch.Tensor) -> torch.Tensor:
        return distances(zmatrix.from_internal(zmatrix.to_internal(points))[0])[:, 0, 1:]

    assert torch.autograd.gradcheck(there_and_back, (x.requires_grad_(),))
