"""Constrained bonds: the metric against its definition, the chart's density, what is refused."""

from __future__ import annotations

import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from stand_ins import DATA
from stand_ins.rods import (
    LENGTH,
    LOG_Z,
    MASSES,
    MEAN_SQUARE,
    START,
    bent,
    cosine,
    metric,
    rods,
    rods_prior,
    rods_target,
)

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.flows.relaxed import anneal
from openmm_eqflow.priors.base import check_space
from openmm_eqflow.priors.fit import fit_internal_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.targets.constraints import Constraints, constrained
from openmm_eqflow.targets.forcefield import load_pdb
from openmm_eqflow.targets.symmetry import find_symmetry
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import positions_in_nm


def peptide(constraints=app.HBonds, hydrogen_mass=None):
    topology, positions = load_pdb(DATA / "pro-dipeptide.pdb")
    field = app.ForceField("amber14-all.xml")
    system = field.createSystem(topology, constraints=constraints, hydrogenMass=hydrogen_mass)
    return system, topology, constrained(system, positions)


def by_definition(system: openmm.System, x: np.ndarray) -> float:
    """Half log det of C M^-1 C^T over its diagonal, C by differences of the bond lengths."""
    pairs = [system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())]

    def lengths(flat):
        y = flat.reshape(-1, 3)
        return np.array([np.linalg.norm(y[a] - y[b]) for a, b in pairs])

    c = np.array(
        [
            (lengths(x.ravel() + e) - lengths(x.ravel() - e)) / 2e-6
            for e in 1e-6 * np.eye(x.size)
        ]
    ).T
    masses = [system.getParticleMass(k)._value for k in range(len(x))]
    h = (c / np.repeat(masses, 3)) @ c.T
    return 0.5 * (np.linalg.slogdet(h)[1] - np.log(np.diag(h)).sum())


def test_metric_is_that_of_its_definition_and_its_gradient_that_of_autograd() -> None:
    system, _, positions = peptide()
    held = Constraints.of(system)
    assert held is not None
    x = positions_in_nm(positions)[None] + 0.003 * np.random.default_rng(0).normal(size=(4, 26, 3))
    x = torch.from_numpy(x).requires_grad_()
    value, gradient = held.half_log_det_and_gradient(x)
    ours = held.half_log_det(x)
    expected = [by_definition(system, y) for y in x.detach().numpy()]
    np.testing.assert_allclose(value, expected, atol=1e-7)
    torch.testing.assert_close(ours.detach(), value)
    (theirs,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(gradient, theirs, atol=1e-11, rtol=1e-9)
    # Masses enter: heavy hydrogens couple more.
    heavy = Constraints.of(peptide(hydrogen_mass=4 * unit.dalton)[0])
    assert heavy is not None
    assert (heavy.half_log_det(x) < ours).all()


def test_density_of_the_chart_is_normalised_on_the_constrained_space() -> None:
    prior = rods_prior(rods_target())
    assert prior.event_shape == (1,)
    c = torch.linspace(-1, 1, 20_003, dtype=torch.float64)[1:-1]
    x = bent(c)
    volume = 8 * math.pi**2 * 3**-1.5 * LENGTH**4  # of rotations, and of the bonds' squares
    weight = torch.tensor([metric(float(v)) for v in c])
    inside = float((prior.log_prob(x).exp() * weight).mean() * 2 * volume)
    y = prior.sample_latent(20_000, generator=torch.Generator().manual_seed(0))
    share = float(torch.isfinite(prior.to_cartesian(y)[1]).double().mean())
    assert inside == pytest.approx(share, abs=0.01)
    # power: without the metric it is not
    assert abs(float(prior.log_prob(x).exp().mean() * 2 * volume) - share) > 0.03


def test_samples_keep_the_bonds_and_the_chart_comes_back() -> None:
    system, topology, positions = peptide()
    x = positions_in_nm(positions)
    frames = torch.from_numpy(x + 0.004 * np.random.default_rng(1).normal(size=(400, *x.shape)))
    bonds = [(b[0].index, b[1].index) for b in topology.bonds()]
    masses = [system.getParticleMass(k)._value for k in range(len(x))]
    held = Constraints.of(system)
    assert held is not None
    prior = fit_internal_prior(frames, bonds, masses, constraints=held)
    n = len(x)
    assert prior.event_shape == (3 * n - 6 - len(held.lengths),)
    y = prior.sample_latent(50, generator=torch.Generator().manual_seed(2))
    z, log_volume = prior.to_cartesian(y)
    z, y, log_volume = (v[torch.isfinite(log_volume)] for v in (z, y, log_volume))
    assert len(z) > 20
    for (a, b), length in held.lengths.items():
        assert ((z[:, a] - z[:, b]).norm(dim=-1) - length).abs().max() < 1e-12
    again, volume = prior.from_cartesian(z)
    torch.testing.assert_close(again, y, atol=1e-8, rtol=0)
    torch.testing.assert_close(volume, log_volume)
    # Off by what an integrator tolerates: the same point as the configuration that is exact.
    off = z.clone()
    (a, b), length = next(iter(held.lengths.items()))
    hydrogen = b if masses[b] < 2 else a
    other = a + b - hydrogen
    off[:, hydrogen] += 1e-5 * (z[:, hydrogen] - z[:, other])
    near, volume = prior.from_cartesian(off - off.mean(1, keepdim=True))
    torch.testing.assert_close(near, y, atol=1e-8, rtol=0)
    torch.testing.assert_close(volume, log_volume, atol=1e-8, rtol=0)
    stored = InternalCoordinatePrior.from_state(*prior.state())
    torch.testing.assert_close(stored.log_prob(z), prior.log_prob(z), atol=0, rtol=0)


@pytest.mark.statistical
def test_paths_give_the_angle_of_constrained_dynamics(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate() -> tuple[float, float, float, float]:
        target = rods_target()
        path = anneal(rods_prior(target), target, n_levels=8, seed=1)
        x, log_q = path.sample_and_log_prob(20_000, generator=torch.Generator().manual_seed(4))
        log_w = -target.reduced_potential(x) - log_q
        w = (log_w - log_w.max()).exp()
        square = cosine(x).square()
        mean = float((w * square).sum() / w.sum())
        error = float((w * (square - mean)).square().sum().sqrt() / w.sum())
        found = log_z(log_w.numpy())
        return mean, error, found.value, found.error

    mean, error, z, z_error = estimate()
    assert error < 0.003
    assert abs(mean - MEAN_SQUARE) < 3 * error
    assert abs(z - LOG_Z) < 3 * z_error
    # power: without the determinant it is the flat measure's 1/3
    monkeypatch.setattr(Constraints, "half_log_det", lambda self, x: 0 * x[:, 0, 0])
    mean, error, z, z_error = estimate()
    assert abs(mean - MEAN_SQUARE) > 5 * error
    assert abs(mean - 1 / 3) < 3 * error
    assert abs(z - LOG_Z) > 5 * z_error


@pytest.mark.statistical
def test_velocities_keep_the_bonds_and_have_the_temperature() -> None:
    system, _, positions = peptide()
    held, x = Constraints.of(system), positions_in_nm(positions)
    assert held is not None
    masses, kt = np.array(held.masses), 2.494
    generator = torch.Generator().manual_seed(0)
    draws = np.array([held.velocities(x, kt, generator) for _ in range(400)])
    for a, b in held.lengths:
        rate = ((x[a] - x[b]) * (draws[:, a] - draws[:, b])).sum(-1)
        assert np.abs(rate).max() < 1e-12
    degrees = 3 * len(x) - len(held.lengths)
    kinetic = 0.5 * (masses[:, None] * draws**2).sum((1, 2)) / kt
    assert abs(kinetic.mean() - degrees / 2) < 4 * math.sqrt(degrees / 2 / 400)
    # OpenMM's own draws have the same spread of every component.
    context = openmm.Context(system, openmm.VerletIntegrator(1e-3))
    context.setPositions(x)
    theirs = []
    for seed in range(400):
        context.setVelocitiesToTemperature(kt / 8.314462618e-3, seed + 1)
        v = context.getState(velocities=True).getVelocities(asNumpy=True)
        theirs.append(v._value)
    ratio = draws.var(0) / np.array(theirs).var(0)
    assert abs(np.log(ratio).mean()) < 4 * math.sqrt(4 / 400 / ratio.size)
    assert np.abs(np.log(ratio)).max() < 5 * math.sqrt(4 / 400)


def refused(change, message: str) -> None:
    system, topology = rods()
    change(system)
    with pytest.raises((UnsupportedSystemError, ConfigurationError), match=message):
        BoltzmannTarget(system, topology, 300 * unit.kelvin, START)


def test_what_cannot_be_held_is_refused() -> None:
    refused(lambda s: s.addConstraint(0, 2, 0.14), r"constraints of atoms .* close a ring")
    with pytest.raises(UnsupportedSystemError, match="nothing that moves"):
        Constraints({(0, 1): 0.1}, [1.0, 1.0])
    target = rods_target()
    with pytest.raises(ConfigurationError, match=r"miss the System's constraints by up to 5\.0%"):
        target.reduced_potential(torch.from_numpy(1.05 * START)[None])
    x = torch.from_numpy(START)[None].expand(20, 3, 3)
    noisy = x + 0.003 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    free = fit_internal_prior(noisy, [(0, 1), (1, 2)], MASSES)
    with pytest.raises(ConfigurationError, match=r"atoms 1 and 2 is free in the flow and 0\.1000"):
        check_space(free, target)
    with pytest.raises(ConfigurationError, match=r"atoms 1 and 2 is free in the flow"):
        anneal(free, target)
    held = rods_prior(target)
    system, topology = rods()
    system.setParticleMass(1, 3.0)
    heavier = BoltzmannTarget(system, topology, 300 * unit.kelvin, START)
    with pytest.raises(ConfigurationError, match=r"atom 2 has a mass of 2\.000 u in the flow"):
        check_space(held, heavier)
    with pytest.raises(UnsupportedSystemError, match="no bond of the tree"):
        held.zmatrix.fixed_bonds({(0, 2): 0.1})


def test_masses_and_lengths_tell_atoms_apart() -> None:
    """What is equivalent without constraints need not be with them."""
    system, topology = rods()
    assert find_symmetry(system, topology).order == 2
    system.setParticleMass(0, 6.0)
    assert find_symmetry(system, topology).order == 1
