"""Dynamics and quenches of many walkers: the temperature, bonds that are held, the minimum."""

from __future__ import annotations

import copy
import math

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from stand_ins import DATA
from stand_ins.flows import stream
from stand_ins.rods import LENGTH, MASSES, MEAN_SQUARE, bent, cosine, rods_target
from stand_ins.small_molecules import METHYLCYCLOHEXANE, embed

from openmm_eqflow.targets import dynamics
from openmm_eqflow.targets.constraints import Constraints, constrained
from openmm_eqflow.targets.dynamics import find_minima, langevin, quench
from openmm_eqflow.targets.forcefield import load_pdb
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import positions_in_nm


@pytest.mark.statistical
def test_dynamics_of_two_rods_has_the_angle_that_their_masses_give() -> None:
    target, masses = rods_target(), torch.tensor(MASSES)
    x = bent(2 * torch.rand(500, generator=stream(1), dtype=torch.float64) - 1)
    seen = []
    for k in range(12):
        x = langevin(target, x, masses, n_steps=75, generator=stream(k), timestep=0.004)
        seen.append(cosine(x).square())
    for a, b in ((0, 1), (1, 2)):
        assert ((x[:, a] - x[:, b]).norm(dim=-1) - LENGTH).abs().max() < 1e-8
    each = torch.stack(seen[4:]).mean(0)
    error = float(each.std()) / math.sqrt(len(each))
    assert error < 0.006
    assert abs(float(each.mean()) - MEAN_SQUARE) < 4 * error
    assert abs(float(each.mean()) - 1 / 3) > 4 * error  # power: what a flat measure would give


def test_a_drift_is_that_of_openmm_and_turns_too_far_are_told() -> None:
    """Velocity Verlet without forces, from velocities along the bonds too."""
    target, x = rods_target(), bent(torch.tensor([0.3], dtype=torch.float64))
    held = target.constraints
    assert held is not None
    v = torch.randn(1, 3, 3, generator=stream(2), dtype=torch.float64)
    v = held.tangent(x, v)
    torch.testing.assert_close(held.tangent(x, v), v, atol=1e-12, rtol=0)
    ours, speed = held.drift(x, v, 0.002)
    integrator = openmm.VerletIntegrator(0.002)
    integrator.setConstraintTolerance(1e-10)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(target.system, integrator, platform)
    context.setPositions(x[0].numpy())
    context.setVelocities(v[0].numpy())
    integrator.step(1)
    state = context.getState(positions=True, velocities=True)
    theirs = torch.from_numpy(state.getPositions(asNumpy=True)._value)[None]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    free = (x + 0.002 * v)[0]
    assert (theirs[0] - free).abs().max() > 1e-6  # power: bonds bend the way
    again = torch.from_numpy(state.getVelocities(asNumpy=True)._value)[None]
    torch.testing.assert_close(speed, again, atol=1e-6, rtol=0)
    assert torch.isnan(held.drift(x, v, 1.0)[0]).all()


def test_a_quench_finds_the_minimum_that_openmm_finds() -> None:
    topology, positions = load_pdb(DATA / "pro-dipeptide.pdb")
    system = app.ForceField("amber14-all.xml").createSystem(topology, constraints=app.HBonds)
    positions = constrained(system, positions)
    with BoltzmannTarget(system, topology, 300 * unit.kelvin, positions, n_workers=1) as target:
        x, u = quench(target, torch.from_numpy(positions_in_nm(positions))[None])
        held = Constraints.of(system)
        assert held is not None
        for (a, b), length in held.lengths.items():
            assert abs(float((x[0, a] - x[0, b]).norm()) - length) < 1e-8
        context = openmm.Context(
            system,
            openmm.VerletIntegrator(1e-3),
            openmm.Platform.getPlatformByName("Reference"),
        )
        context.setPositions(positions)
        start = context.getState(energy=True).getPotentialEnergy()._value / target.kT
        openmm.LocalEnergyMinimizer.minimize(context, tolerance=0.01)
        theirs = context.getState(energy=True).getPotentialEnergy()._value / target.kT
    assert abs(float(u[0]) - theirs) < 0.05
    assert start - theirs > 5  # power


@pytest.mark.slow
def test_a_ring_that_does_not_turn_over_at_a_thousand_kelvin_has_both_chairs(monkeypatch) -> None:
    topology, soft = METHYLCYCLOHEXANE
    system, stiff = copy.deepcopy(soft), openmm.PeriodicTorsionForce()
    quads = [(k, (k + 1) % 6, (k + 2) % 6, (k + 3) % 6) for k in range(6)]
    for quad in quads:
        stiff.addTorsion(*quad, 3, 0.0, 20.0)
    system.addForce(stiff)
    masses = torch.tensor([a.element.mass._value for a in topology.atoms()])
    x = embed(system) * unit.nanometer

    def chairs() -> set[bool]:
        found = find_minima(
            target, torch.from_numpy(target.positions), masses, quads, generator=stream(0)
        )
        signs = [np.sign(m.torsions) for m in found]
        return {bool(s[0] > 0) for s in signs if (s[1:] == -s[:-1]).all()}

    with BoltzmannTarget(system, topology, 300 * unit.kelvin, positions=x) as target:
        assert chairs() == {True, False}
        monkeypatch.setattr(dynamics, "_HOT", (8.31, 8.31))
        assert len(chairs()) == 1  # power: no walker hotter than 1,000 K
