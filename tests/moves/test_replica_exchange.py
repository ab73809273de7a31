"""A flow as reservoir: openmmtools' move lists and OpenMM's own replica exchange."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove
from stand_ins import TESTS
from stand_ins.lies import LyingFlow
from stand_ins.moves import harmonic_flow

from openmm_eqflow.analysis.chains import mean_with_error
from openmm_eqflow.errors import AuditError, ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.moves.flow_moves import FlowMove
from openmm_eqflow.moves.replica_exchange import FlowReplicaExchangeSampler, reservoir_moves
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.model_systems import harmonic_log_z
from openmm_eqflow.units import kt_in_kj_mol, positions_in_nm

TEMPERATURES = (300.0, 350.0, 400.0)
MEAN_U = 7.5


@pytest.fixture
def flow(tmp_path: Path) -> EquivariantFlow:
    return load_flow(save_flow(harmonic_flow(), tmp_path / "flow"))


def simulation(*, placed: bool = True) -> app.Simulation:
    system = load_system("harmonic")
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 10 / unit.picosecond, 20 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(3)
    platform = openmm.Platform.getPlatformByName("Reference")
    result = app.Simulation(system.topology, system.system, integrator, platform)
    if placed:
        result.context.setPositions(system.positions)
        result.context.setVelocitiesToTemperature(300 * unit.kelvin, 4)
    return result


def sampler(flow: EquivariantFlow, **options: object) -> FlowReplicaExchangeSampler:
    states = [{"temperature": t * unit.kelvin} for t in TEMPERATURES]
    return FlowReplicaExchangeSampler(states, simulation(), 5, flow, seed=5, **options)


def energies_by_state(run: FlowReplicaExchangeSampler, n: int) -> np.ndarray:
    """Reduced energies (n_states, n), each at its own temperature, before every exchange."""
    kept: list[list[float]] = []

    def report(current: FlowReplicaExchangeSampler) -> None:
        row = [0.0] * len(TEMPERATURES)
        for replica, state in enumerate(current.replicaStateIndex):
            energy = current.replicaStateEnergy[replica][state]
            kt = kt_in_kj_mol(TEMPERATURES[state] * unit.kelvin)
            row[state] = energy.value_in_unit(unit.kilojoule_per_mole) / kt
        kept.append(row)

    run.reporters.append(report)
    run.simulate(n)
    return np.array(kept).T


@pytest.mark.statistical
def test_openmm_sampler_with_a_flow_has_the_right_energies(flow: EquivariantFlow) -> None:
    random.seed(6)  # OpenMM's sampler uses Python's global generator
    run = sampler(flow, flow_states=(0, 2), n_proposals=32)
    u = energies_by_state(run, 1200)[:, 20:]
    for row in u:
        mean = mean_with_error(row)
        assert mean.error < 0.3
        assert abs(mean.value - MEAN_U) < 5 * mean.error
    assert run.flow_statistics[0]["n_accepted"] > 100
    assert set(run.flow_statistics) == {0, 2}
    log_z = run.log_z(0)
    assert log_z.error < 0.05
    assert abs(log_z.value - harmonic_log_z(6)) < 4 * log_z.error


@pytest.mark.statistical
@pytest.mark.parametrize("lie", ["dropped", "turned"])
def test_power_without_log_q_or_with_its_sign_wrong(flow: EquivariantFlow, lie: str) -> None:
    run = sampler(flow, flow_states=(0, 1, 2))
    wrong = LyingFlow(flow, lie)
    run.flow = wrong  # type: ignore[assignment]
    for buffer in run._buffers.values():
        buffer.flow = wrong
    u = energies_by_state(run, 300)[0, 20:]
    mean = mean_with_error(u)
    assert mean.error < 0.3
    assert abs(mean.value - MEAN_U) > 5 * mean.error


def test_conformations_keep_centroid_and_velocities(flow: EquivariantFlow) -> None:
    run = sampler(flow, n_proposals=64)
    before = run.replicaConformation[0]
    run.simulateReplica(0, 0)
    after = run.replicaConformation[0]
    assert run.flow_statistics[0]["n_accepted"] == 1
    old, new = (positions_in_nm(s.getPositions(asNumpy=True)) for s in (before, after))
    assert np.abs(new - old).max() > 1e-3
    np.testing.assert_allclose(new.mean(axis=0), old.mean(axis=0), atol=1e-7)
    assert (before.getVelocities(asNumpy=True) == after.getVelocities(asNumpy=True)).all()
    in_context = run.simulation.context.getState(positions=True).getPositions(asNumpy=True)
    np.testing.assert_allclose(positions_in_nm(in_context), new, atol=1e-12)


def test_states_without_the_flow_are_left_to_openmm(flow: EquivariantFlow) -> None:
    """Bit for bit what OpenMM's own sampler does there; a state with the flow goes elsewhere."""
    states = [{"temperature": t * unit.kelvin} for t in TEMPERATURES]

    def after_dynamics(one: app.ReplicaExchangeSampler) -> list[np.ndarray]:
        for replica in (0, 1):
            one.simulateReplica(replica)
        return [positions_in_nm(c.getPositions(asNumpy=True)) for c in one.replicaConformation]

    # One after the other: the platform has one stream of random numbers for all contexts.
    plain = after_dynamics(app.ReplicaExchangeSampler(states, simulation(), 5))
    run = sampler(flow, flow_states=(1,), n_proposals=64)
    found = after_dynamics(run)
    same = [np.array_equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert same == [True, False, True]
    assert not np.array_equal(found[0], found[2])  # which did not run
    assert run.flow_statistics == {1: {"n_proposed": 1, "n_accepted": 1, "n_invalid": 0}}


def test_states_may_differ_in_parameters(flow: EquivariantFlow) -> None:
    """A scaled potential: the flow state's energies are those of its own parameters."""
    base = simulation()
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(base.system))
    scaled = openmm.CustomBondForce("0.5*extra*r^2")
    scaled.addGlobalParameter("extra", 0.0)
    scaled.addBond(0, 1, [])
    system.addForce(scaled)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.02)
    reference = openmm.Platform.getPlatformByName("Reference")
    other = app.Simulation(base.topology, system, integrator, reference)
    other.context.setPositions(load_system("harmonic").positions)
    states = [{"temperature": 300.0, "extra": 0.0}, {"temperature": 300.0, "extra": 50.0}]
    run = FlowReplicaExchangeSampler(states, other, 5, flow, flow_states=(0, 1), seed=1)
    x, _ = flow.sample_and_log_prob(5)
    u = [run._targets[i].reduced_potential(x) for i in (0, 1)]
    square = (x[:, 0] - x[:, 1]).square().sum(dim=1)
    expected = 25.0 * square / kt_in_kj_mol(300 * unit.kelvin)
    np.testing.assert_allclose(u[1] - u[0], expected, rtol=1e-6, atol=1e-6)
    run.simulate(3)
    assert [run.flow_statistics[i]["n_proposed"] for i in (0, 1)] == [3, 3]


def test_reservoir_moves_put_the_flow_where_asked(flow: EquivariantFlow) -> None:
    flow_move = FlowMove(flow, seed=6)
    moves = reservoir_moves(LangevinDynamicsMove(n_steps=5), flow_move, 3, flow_states=(0, 2))
    assert [type(m) is SequenceMove for m in moves] == [True, False, True]
    assert moves[0].move_list[1]._stream is moves[2].move_list[1]._stream is flow_move._stream
    assert len({id(m) for m in moves}) == 3
    with pytest.raises(ValueError, match="0 to 2"):
        reservoir_moves(LangevinDynamicsMove(), flow_move, 3, flow_states=(3,))


def test_arguments_are_checked(flow: EquivariantFlow) -> None:
    with pytest.raises(ValueError, match="do not exist"):
        sampler(flow, flow_states=(7,))
    flow.audit_report = None
    with pytest.raises(AuditError):
        sampler(flow)
    flow.audit_report = {"passed": True}
    flow.prior.n_particles = 5
    with pytest.raises(ConfigurationError, match="6 particles"):
        sampler(flow)


def test_a_resumed_run_draws_anew(flow: EquivariantFlow) -> None:
    """One seed, another iteration to start from: no draw of the first part comes again."""

    def draws(iteration: int) -> set[bytes]:
        run = sampler(flow, n_proposals=2, n_predraw=64)
        run.currentIteration = iteration  # as a reporter restores it, after construction
        run.simulate(2)
        pending = run._buffers[0]._pending
        assert pending is not None
        return {row.numpy().tobytes() for row in pending.positions}

    first, second, again = draws(0), draws(25), draws(0)
    assert first
    assert not first & second
    assert first == again  # power control: the same stream is recognised


REPORTED = """
import json, random, sys
from pathlib import Path
import openmm
from openmm import app, unit
import stand_ins.moves
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.replica_exchange import FlowReplicaExchangeSampler
from openmm_eqflow.moves.steps import ProposalBuffer
from openmm_eqflow.targets.library import load_system

flow_path, folder, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
random.seed(1 + resume)
system = load_system("harmonic")
integrator = openmm.LangevinMiddleIntegrator(
    300 * unit.kelvin, 10 / unit.picosecond, 20 * unit.femtosecond)
platform = openmm.Platform.getPlatformByName("Reference")
simulation = app.Simulation(system.topology, system.system, integrator, platform)
if not resume:
    simulation.context.setPositions(system.positions)
states = [{"temperature": t * unit.kelvin} for t in (300, 350)]
run = FlowReplicaExchangeSampler(states, simulation, 5, load_flow(flow_path), seed=5,
                                 flow_states=(0, 1), n_proposals=2, n_predraw=8)
drawn, take = set(), ProposalBuffer.take

def noted(buffer, n):
    taken = take(buffer, n)
    drawn.update(row.numpy().tobytes().hex() for row in taken.positions)
    return taken

ProposalBuffer.take = noted
run.reporters.append(app.ReplicaExchangeReporter(folder, 1, run, checkpoints=True, resume=resume))
started = run.currentIteration
run.simulate(10)
print(json.dumps({"started": started, "drawn": sorted(drawn)}))
"""


def test_a_process_that_resumes_by_the_reporter_draws_anew(
    flow: EquivariantFlow, tmp_path: Path
) -> None:
    path = save_flow(flow, tmp_path / "kept")

    def parts(folder: str, *how: str) -> list[dict[str, Any]]:
        made = [
            subprocess.run(
                [sys.executable, "-c", REPORTED, str(path), str(tmp_path / folder), word],
                capture_output=True, text=True, cwd=TESTS, timeout=240, check=False,
            )
            for word in how
        ]  # fmt: skip
        assert not any(done.returncode for done in made), made[-1].stderr[-2000:]
        return [json.loads(done.stdout.splitlines()[-1]) for done in made]

    first, second = parts("run", "new", "resume")
    (again,) = parts("other", "new")
    assert (first["started"], second["started"]) == (0, 10)
    assert min(len(first["drawn"]), len(second["drawn"])) >= 20
    assert not set(first["drawn"]) & set(second["drawn"])
    assert again["drawn"] == first["drawn"]  # power: the same stream is recognised


def test_positions_may_come_from_the_checkpoints_of_a_reporter(
    flow: EquivariantFlow, tmp_path: Path
) -> None:
    """OpenMM's own way to resume: a new simulation, whose reporter brings everything."""
    states = [{"temperature": t * unit.kelvin} for t in TEMPERATURES]
    folder = str(tmp_path / "run")
    first = sampler(flow)
    first.reporters.append(app.ReplicaExchangeReporter(folder, 1, first, checkpoints=True))
    first.simulate(3)
    kept = [positions_in_nm(c.getPositions(asNumpy=True)) for c in first.replicaConformation]
    del first.reporters[:]

    resumed = FlowReplicaExchangeSampler(states, simulation(placed=False), 5, flow, seed=5)
    with pytest.raises(ConfigurationError, match=r"has no positions: call .*setPos"):
        resumed.simulate(1)
    resumed = FlowReplicaExchangeSampler(states, simulation(placed=False), 5, flow, seed=5)
    reporter = app.ReplicaExchangeReporter(folder, 1, resumed, checkpoints=True, resume=True)
    resumed.reporters.append(reporter)
    np.testing.assert_array_equal(
        positions_in_nm(resumed.replicaConformation[1].getPositions(asNumpy=True)), kept[1]
    )
    resumed.simulate(4)
    assert resumed.currentIteration == 7
    assert resumed.flow_statistics[0]["n_proposed"] == 4
    np.testing.assert_array_equal(resumed._targets[0].positions, kept[0])
