from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from stand_ins.energies import empty_system

from openmm_eqflow import geometry
from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.model_systems import build_model, model_topology
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import kt_in_kj_mol


def make(name, **options):
    m = load_system(name)
    return BoltzmannTarget(
        m.system, m.topology, m.temperature, m.positions, m.n_dims, **{"n_workers": 1, **options}
    )


@pytest.fixture(scope="module")
def target():
    with make("alanine-dipeptide") as target:
        yield target


@pytest.fixture
def x(target):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 22, 3, generator=generator, dtype=torch.float64)
    return torch.from_numpy(target.positions) + 0.005 * noise


def test_agrees_with_openmmtools(target, x):
    from openmmtools import cache, states

    thermodynamic = states.ThermodynamicState(target.system, target.temperature)
    platform = openmm.Platform.getPlatformByName("Reference")
    contexts = cache.ContextCache(platform=platform, capacity=1)
    context, _ = contexts.get_context(thermodynamic, openmm.VerletIntegrator(0.001))
    expected = []
    for positions in x.numpy():
        states.SamplerState(positions * unit.nanometer).apply_to_context(context)
        expected.append(thermodynamic.reduced_potential(context))
    u = target.reduced_potential(x)
    assert u.dtype == torch.float64
    np.testing.assert_allclose(u.numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(target.log_prob(x), -u)


def test_gradient(target, x):
    u, gradient = target.reduced_potential_and_gradient(x)
    torch.testing.assert_close(u, target.reduced_potential(x), rtol=1e-12, atol=0)
    leaf = x.clone().requires_grad_()
    (2 * target.reduced_potential(leaf)).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * gradient)
    h = 1e-6 * torch.randn(22, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up, down = target.reduced_potential(torch.stack([x[0] + h, x[0] - h]))
    torch.testing.assert_close(up - down, 2 * (gradient[0] * h).sum(), rtol=1e-5, atol=1e-7)
    single = target.reduced_potential(x.float())
    assert single.dtype == torch.float64


def test_counts_go_on_after_inference_mode(x):
    with make("alanine-dipeptide") as target:
        with torch.inference_mode():
            target.reduced_potential(x)
        target.reduced_potential(x)
        assert target.n_evaluated == 2 * len(x)


def test_wrong_hand_and_failures_are_infinite_and_counted(x):
    with make("alanine-dipeptide") as target:
        batch = torch.stack([x[0], -x[1], x[2], x[3]])
        batch[3, 0, 0] = torch.nan
        u, gradient = target.reduced_potential_and_gradient(batch)
        assert torch.isinf(u).tolist() == [False, True, False, True]
        assert gradient[[1, 3]].abs().max() == 0
        assert (target.n_evaluated, target.n_invalid) == (4, 2)
        assert target.in_sector(batch)[:3].tolist() == [True, False, True]
    with make("alanine-dipeptide", check_chirality=False) as either:
        u = either.reduced_potential(torch.stack([x[1], -x[1]]))
        torch.testing.assert_close(u[0], u[1])
        assert either.in_sector(-x).all()


def test_threads_ask_side_by_side_and_are_counted(x):
    batch = torch.cat([x, -x[:3]])  # three of the wrong hand
    with make("alanine-dipeptide") as target:
        assert target.concurrent
        alone = target.reduced_potential_and_gradient(batch)
        with ThreadPoolExecutor(4) as threads:
            calls = [batch] * 40
            found = list(threads.map(target.reduced_potential_and_gradient, calls))
        for pair in found:
            assert all(torch.equal(a, b) for a, b in zip(pair, alone, strict=True))
        assert (target.n_evaluated, target.n_invalid) == (41 * 15, 41 * 3)
    system = load_system("alanine-dipeptide").system
    with make("alanine-dipeptide", evaluator=ContextPool(system, n_workers=1)) as pool:
        assert not pool.concurrent  # contexts are asked one after the other


def test_rigid_motions(target, x):
    rotation = geometry.random_rotations(12, generator=torch.Generator().manual_seed(3))
    moved = geometry.rotate(x, rotation) + 0.7
    torch.testing.assert_close(target.reduced_potential(moved), target.reduced_potential(x))


def test_at_temperature_shares_the_evaluator(target, x):
    hot = target.at_temperature(600 * unit.kelvin)
    assert hot.evaluator is target.evaluator
    torch.testing.assert_close(2 * hot.reduced_potential(x), target.reduced_potential(x))
    assert hot.kT == pytest.approx(2 * target.kT)
    assert hot.n_evaluated == 12


def test_save_and_load(target, x, tmp_path):
    target.save(tmp_path / "target.json")
    again = BoltzmannTarget.load(tmp_path / "target.json", evaluator=target.evaluator)
    assert again.system_hash == target.system_hash
    torch.testing.assert_close(again.reduced_potential(x), target.reduced_potential(x))
    assert [a.name for a in again.topology.atoms()] == [a.name for a in target.topology.atoms()]
    assert again.topology.getNumBonds() == target.topology.getNumBonds()
    assert not again.in_sector(-x).any()


def test_planar_system():
    with make("dw4") as target:
        assert target.n_dims == 2
        x = 2.0 * torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0)).double()
        d = torch.pdist(x[0])
        u, gradient = target.reduced_potential_and_gradient(x)
        expected = (0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2).sum()
        torch.testing.assert_close(u[0], expected)
        assert gradient.shape == (5, 4, 2)


def test_lj13_energy_and_virial_are_the_pair_sums():
    with make("lj13") as target:
        x = torch.from_numpy(target.positions)[None]
        r = torch.pdist(x[0])
        centred = x - x.mean(dim=1, keepdim=True)
        expected = (2 * (r**-12 - 2 * r**-6)).sum() + 0.5 * centred.square().sum()
        u, gradient = target.reduced_potential_and_gradient(x)
        torch.testing.assert_close(u[0], expected)
        virial = (2 * (-12 * r**-12 + 12 * r**-6)).sum() + centred.square().sum()
        torch.testing.assert_close((centred * gradient).sum(), virial, rtol=1e-9, atol=1e-9)
        wide = target.reduced_potential_and_gradient(1.1 * x)[1]
        r = 1.1 * r
        virial = (2 * (-12 * r**-12 + 12 * r**-6)).sum() + (1.1 * centred).square().sum()
        torch.testing.assert_close((1.1 * centred * wide).sum(), virial)
        assert abs(float(virial)) > 10


def test_any_evaluator(x):
    system = load_system("alanine-dipeptide").system
    pool = ContextPool(system, platform="Reference", n_workers=1)
    with make("alanine-dipeptide", evaluator=pool) as slow, make("alanine-dipeptide") as fast:
        torch.testing.assert_close(slow.reduced_potential(x), fast.reduced_potential(x))


def refuse(system, n_dims=3):
    n = system.getNumParticles()
    topology = model_topology(n, "AR")
    positions = 0.2 * np.random.default_rng(0).normal(size=(n, n_dims))
    with pytest.raises(UnsupportedSystemError) as caught:
        BoltzmannTarget(system, topology, 300 * unit.kelvin, positions, n_dims, n_workers=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spring_system(n=3):
    system = empty_system(n)
    bonds = openmm.HarmonicBondForce()
    for i in range(n - 1):
        bonds.addBond(i, i + 1, 0.1, 1000.0)
    system.addForce(bonds)
    return system


def test_refusals():
    rigid = spring_system()
    for pair in ((0, 1), (1, 2), (0, 2)):
        rigid.addConstraint(*pair, 0.1)
    assert "constraints=HBonds" in refuse(rigid)

    planar = spring_system()
    planar.addConstraint(0, 1, 0.1)
    assert "without" in refuse(planar, n_dims=2)

    barostat = spring_system()
    barostat.addForce(openmm.MonteCarloBarostat(1, 300))
    assert "MonteCarloBarostat" in refuse(barostat)

    periodic = spring_system()
    force = openmm.NonbondedForce()
    for _ in range(3):
        force.addParticle(0, 0.1, 0.1)
    force.setNonbondedMethod(force.CutoffPeriodic)
    periodic.addForce(force)
    message = refuse(periodic)
    assert "NonbondedForce" in message
    assert "NoCutoff" in message

    drude = spring_system()
    drude.addForce(openmm.DrudeForce())
    assert "DrudeForce" in refuse(drude)

    virtual = spring_system()
    virtual.setParticleMass(2, 0)
    virtual.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    assert "atom 3 is a virtual site" in refuse(virtual)

    frozen = spring_system()
    frozen.setParticleMass(1, 0)
    assert "atom 2 has zero mass" in refuse(frozen)


@pytest.mark.parametrize(
    ("expression", "word"),
    [("x^2", "translated"), ("periodicdistance(x,y,z,0,0,0)^2", "CustomExternalForce")],
)
def test_external_forces_are_named(expression, word):
    system = spring_system()
    force = openmm.CustomExternalForce(expression)
    for i in range(3):
        force.addParticle(i, [])
    system.addForce(force)
    message = refuse(system)
    assert "CustomExternalForce" in message
    assert word in message


def test_anisotropy_is_found_by_rotation():
    system = spring_system()
    force = openmm.CustomCompoundBondForce(2, "10*(x1-x2)^2")
    force.addBond([0, 1], [])
    system.addForce(force)
    message = refuse(system)
    assert "CustomCompoundBondForce" in message
    assert "rotated" in message


def test_arguments():
    m = load_system("alanine-dipeptide")
    with pytest.raises(ValueError, match=r"stereocentre.*pass positions"):
        BoltzmannTarget(m.system, m.topology, m.temperature)
    with pytest.raises(ValueError, match="no unit"):
        BoltzmannTarget(m.system, m.topology, 300.0, m.positions)
    with pytest.raises(ValueError, match="positions have shape"):
        BoltzmannTarget(m.system, m.topology, m.temperature, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="topology has 0 atoms"):
        BoltzmannTarget(m.system, app.Topology(), m.temperature, m.positions)
    with pytest.raises(ValueError, match="evaluator"):
        make("lj13", evaluator="fast")
    with make("lj13") as target, pytest.raises(ValueError, match=r"expected \(n, 13, 3\)"):
        target.reduced_potential(torch.zeros(2, 12, 3))


def test_a_plane_that_z_does_not_leave_alone_is_refused():
    """Lennard-Jones pairs feel z: the density at z = 0 is not that of x and y."""
    system = build_model("lennard-jones", 4, kt_in_kj_mol(300 * unit.kelvin))
    square = np.array([[0.0, 0.0], [1.0, 0.1], [0.0, 1.2], [1.1, 1.0]])
    with pytest.raises(UnsupportedSystemError, match="z does not separate"):
        BoltzmannTarget(system, None, 300 * unit.kelvin, square, n_dims=2)
    planar = load_system("dw4")
    BoltzmannTarget(
        planar.system, planar.topology, planar.temperature, planar.positions, n_dims=2
    ).close()
