"""FlowMove inside openmmtools: samplers, storage, resume in a fresh process, what is kept."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
import yaml
from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove, WeightedMove
from openmmtools.multistate import MultiStateReporter
from openmmtools.states import SamplerState, ThermodynamicState
from openmmtools.utils import deserialize, serialize
from stand_ins import TESTS
from stand_ins.lies import LyingFlow
from stand_ins.moves import RadialField, harmonic_flow

from openmm_eqflow.analysis.chains import mean_with_error
from openmm_eqflow.errors import (
    AuditError,
    CheckpointError,
    ConfigurationError,
)
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.moves import registry as flow_registry
from openmm_eqflow.moves.flow_moves import AnnealedMove, FlowMove, LatentMove
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.targets.library import MolecularSystem, load_system
from openmm_eqflow.targets.model_systems import harmonic_log_z, harmonic_stiffness
from openmm_eqflow.units import kt_in_kj_mol, positions_in_nm
from openmm_eqflow.vector_fields.chart import ChartField

DOF = 15  # (6 - 1) * 3: u is half a chi-squared variable, mean and variance 7.5


@pytest.fixture(scope="module")
def system() -> MolecularSystem:
    return load_system("harmonic")


@pytest.fixture
def flow_path(tmp_path: Path) -> Path:
    return save_flow(harmonic_flow(), tmp_path / "flow")


def states(system: MolecularSystem, kelvin: float = 300.0):
    return (
        ThermodynamicState(system.system, kelvin * unit.kelvin),
        SamplerState(system.positions),
    )


def langevin(n_steps: int = 10) -> LangevinDynamicsMove:
    return LangevinDynamicsMove(
        timestep=10 * unit.femtosecond, collision_rate=10 / unit.picosecond, n_steps=n_steps
    )


def reduced_energies(system: MolecularSystem, move: object, kelvin: float, n: int) -> np.ndarray:
    """Reduced potentials along an MCMCSampler, evaluated by an independent formula."""
    stiffness = np.triu(harmonic_stiffness(6)) * kt_in_kj_mol(300 * unit.kelvin)
    sampler = MCMCSampler(*states(system, kelvin), move)
    u = np.empty(n)
    for i in range(n):
        sampler.run(1)
        x = positions_in_nm(sampler.sampler_state.positions)
        square = np.square(x[:, None] - x[None]).sum(axis=-1)
        u[i] = 0.5 * (stiffness * square).sum() / kt_in_kj_mol(kelvin * unit.kelvin)
    return u


def has_analytic_moments(u: np.ndarray, largest_error: float, n_sigma: float = 3.0) -> bool:
    """Mean and variance of u against the exact ones.

    The variance's error is the mean's scaled by the target's own ratio of the two spreads, since
    the mean of so few rare excursions squared says little about its error.
    """
    u = u[20:]
    mean, variance = mean_with_error(u), np.square(u - DOF / 2).mean()
    assert mean.error < largest_error
    fourth_moment = 3 * (DOF / 2) ** 2 + 6 * (DOF / 2)
    variance_error = mean.error / u.std() * math.sqrt(fourth_moment - (DOF / 2) ** 2)
    return (
        abs(mean.value - DOF / 2) < n_sigma * mean.error
        and abs(variance - DOF / 2) < n_sigma * variance_error
    )


# -- statistics -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.statistical
def test_harmonic_moments_to_three_hundredths(system: MolecularSystem, flow_path: Path) -> None:
    """Mean and variance of u against the exact 7.5, standard error at most 0.03."""
    move = FlowMove(load_flow(flow_path), n_proposals=32, seed=1)
    u = reduced_energies(system, move, 300.0, 11_500)
    assert has_analytic_moments(u, 0.03)
    assert move.statistics["n_proposed"] == 11_500
    log_z = move.log_z()
    assert log_z.error < 0.005
    assert abs(log_z.value - harmonic_log_z(6)) < 4 * log_z.error


def move_of_kind(kind: str, flow: EquivariantFlow) -> FlowMove | LatentMove | AnnealedMove:
    return {
        "independence": lambda: FlowMove(flow, n_proposals=1, seed=11),
        "multiple-try": lambda: FlowMove(flow, n_proposals=4, seed=12),
        "latent": lambda: LatentMove(flow, step=0.7, n_repeats=3, seed=13),
        "annealed": lambda: AnnealedMove(flow, n_proposals=2, n_bridge=2, step=0.5, seed=14),
    }[kind]()


@pytest.mark.statistical
@pytest.mark.parametrize(
    "kind",
    [
        "independence",
        "multiple-try",
        pytest.param("latent", marks=pytest.mark.slow),
        pytest.param("annealed", marks=pytest.mark.slow),
    ],
)
def test_moves_with_langevin_sample_the_harmonic_target(
    system: MolecularSystem, flow_path: Path, kind: str
) -> None:
    move = move_of_kind(kind, load_flow(flow_path))
    # openmmtools' dynamics has no seed: long enough for a small error in any run (of 12 with 600
    # steps of an independence chain one had .42, of 12 with 1,500 none more than .19).
    n_steps = 1800 if kind in ("independence", "multiple-try") else 600
    u = reduced_energies(system, SequenceMove([langevin(), move]), 330.0, n_steps)
    assert has_analytic_moments(u, 0.4, 5.0)
    assert 0.2 < move.statistics["n_accepted"] / move.statistics["n_proposed"] < 1.0


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("lie", ["dropped", "turned"])
@pytest.mark.parametrize("kind", ["independence", "multiple-try", "latent", "annealed"])
def test_power_with_langevin(
    system: MolecularSystem, flow_path: Path, kind: str, lie: str
) -> None:
    move = move_of_kind(kind, load_flow(flow_path))
    move._flow = LyingFlow(move.flow, lie)  # type: ignore[assignment]
    # Langevin repairs part of what the move breaks: with 600 steps of an independence chain the
    # mean is off by 4 to 7 standard errors, with 1,800 by 10 and more; the others by 14 and more.
    n_steps = 1800 if kind in ("independence", "multiple-try") else 600
    u = reduced_energies(system, SequenceMove([langevin(), move]), 330.0, n_steps)
    assert not has_analytic_moments(u, 1.5, 5.0)


@pytest.mark.statistical
@pytest.mark.parametrize("lie", ["dropped", "turned"])
def test_power_without_log_q_or_with_its_sign_wrong(
    system: MolecularSystem, flow_path: Path, lie: str
) -> None:
    move = FlowMove(load_flow(flow_path), seed=20 + (lie == "turned"))
    move._flow = LyingFlow(move.flow, lie)  # type: ignore[assignment]
    assert not has_analytic_moments(reduced_energies(system, move, 300.0, 1500), 1.0, 5.0)


# -- what a move keeps ----------------------------------------------------------------------------


def test_out_of_plane_coordinates_of_a_planar_flow_stay(tmp_path: Path) -> None:
    planar = load_system("dw4")
    flow = EquivariantFlow(MeanFreeGaussian(4, 2, 1.8), RadialField(4, 2, 0.0, 0.1, 10.0))
    audit(flow)
    save_flow(flow, tmp_path / "dw4")
    move = FlowMove(flow, n_proposals=256, seed=31)
    thermodynamic_state = ThermodynamicState(planar.system, planar.temperature)
    positions = positions_in_nm(planar.positions)
    positions[:, 2] = [0.1, -0.2, 0.3, 0.4]
    sampler_state = SamplerState(positions * unit.nanometer)
    for _ in range(20):
        move.apply(thermodynamic_state, sampler_state)
    assert move.statistics["n_accepted"] > 0
    after = positions_in_nm(sampler_state.positions)
    assert (after[:, 2] == positions[:, 2]).all()
    assert (after[:, :2] != positions[:, :2]).any()


def test_chirality_follows_the_current_state() -> None:
    molecule = load_system("alanine-dipeptide-vacuum")
    state = ThermodynamicState(molecule.system, molecule.temperature)
    x = torch.from_numpy(positions_in_nm(molecule.positions))
    left, left_id = flow_registry.target_for(state, x)
    mirror = x * torch.tensor([1.0, 1.0, -1.0])
    right, right_id = flow_registry.target_for(state, mirror)
    both = torch.stack([x, mirror])
    assert left.in_sector(both).tolist() == [True, False]
    assert right.in_sector(both).tolist() == [False, True]
    assert left_id != right_id
    assert left.evaluator is right.evaluator
    assert flow_registry.target_for(state, x)[1] == left_id
    warm = ThermodynamicState(molecule.system, 400 * unit.kelvin)
    target, identity = flow_registry.target_for(warm, x)
    assert identity == left_id
    ratio = left.reduced_potential(x[None]) / target.reduced_potential(x[None])
    assert float(ratio) == pytest.approx(400 / 300)


# -- refusals -------------------------------------------------------------------------------------


def test_flows_that_may_not_decide_acceptance_are_refused(flow_path: Path) -> None:
    flow = load_flow(flow_path)
    for report in (None, {**flow.audit_report, "passed": False}):
        flow.audit_report = report
        with pytest.raises(AuditError):
            FlowMove(flow)
    flow = load_flow(flow_path)
    flow.vector_field.exact_divergence = False
    with pytest.raises(AuditError, match="estimates its divergence"):
        FlowMove(flow)
    with pytest.raises(ConfigurationError, match="save_flow"):
        FlowMove(harmonic_flow())


def test_systems_and_sizes_are_checked(system: MolecularSystem, flow_path: Path) -> None:
    move = FlowMove(flow_path, seed=40)
    other = load_system("lj13")
    with pytest.raises(ConfigurationError, match="13 particles"):
        move.apply(
            ThermodynamicState(other.system, other.temperature), SamplerState(other.positions)
        )
    constrained = copy.deepcopy(system.system)
    constrained.addConstraint(0, 1, 0.1)
    with pytest.raises(ConfigurationError, match=r"atoms 1 and 2 is free in the flow and 0\.1000"):
        move.apply(
            ThermodynamicState(constrained, 300 * unit.kelvin), SamplerState(system.positions)
        )
    for arguments in ({"n_proposals": 0}, {"n_predraw": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            FlowMove(flow_path, **arguments)


# -- copies, storage, resume ----------------------------------------------------------------------


def test_large_flows_cost_nothing_to_copy_and_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is copied."""
    copied_tensors: list[torch.Size] = []
    for kind in (torch.Tensor, torch.nn.Parameter):

        def counted(self, memo, honest=kind.__deepcopy__):
            copied_tensors.append(self.shape)
            return honest(self, memo)

        monkeypatch.setattr(kind, "__deepcopy__", counted)
    copy.deepcopy(torch.nn.Linear(2, 2))
    assert len(copied_tensors) >= 2  # what is copied is counted
    copied_tensors.clear()
    field = ChartField(n_stiff=15, n_soft=3, fold=[1, 1, 1], width=2200, conditioner_width=512)
    assert sum(p.numel() for p in field.parameters()) > 9_500_000

    flow = harmonic_flow()
    flow.vector_field = field  # type: ignore[assignment]
    flow.source = (str(tmp_path / "big.safetensors"), "0" * 64)
    move = FlowMove(flow, seed=50)
    for candidate in (move, SequenceMove([langevin(), move]), WeightedMove([(move, 1.0)])):
        copied = copy.deepcopy(candidate)
        assert not copied_tensors
    assert copy.deepcopy(move).flow is flow
    assert copied.move_set[0][0].flow is flow
    move.statistics = {**move.statistics, "n_draws": 10**9, "mean_log_weight": -1.234567890123e3}
    stored = serialize(move)
    assert len(yaml.safe_dump(stored)) < 2048
    assert len(json.dumps(stored)) < 2048


def test_copies_share_one_stream_and_restored_moves_get_a_new_one(
    system: MolecularSystem, flow_path: Path
) -> None:
    move = FlowMove(load_flow(flow_path), n_proposals=1, n_predraw=16, seed=51)
    clones = [copy.deepcopy(SequenceMove([move])).move_list[0] for _ in range(2)]
    assert all(clone._stream is move._stream for clone in clones)
    thermodynamic_state, _ = states(system)
    for clone in (move, *clones):
        clone.apply(thermodynamic_state, SamplerState(system.positions))
    (buffer,) = move._stream.buffers.values()
    assert (buffer.n_drawn, buffer.n_used) == (16, 3)
    assert [clone.statistics["n_proposed"] for clone in clones] == [1, 1]
    stored = serialize(move)
    first = torch.rand(4, generator=flow_registry.FlowStream(51, 0).generator)
    resumed = flow_registry.FlowStream(51, stored["n_consumed"])
    assert stored["n_consumed"] == 3
    assert not torch.isin(torch.rand(4, generator=resumed.generator), first).any()


def test_state_survives_storage_and_missing_keys(flow_path: Path) -> None:
    move = LatentMove(load_flow(flow_path), step=0.21, n_repeats=7, seed=52)
    move.statistics = {"n_proposed": 5, "n_accepted": 3}
    restored = deserialize(serialize(move))
    assert restored._settings == move._settings
    assert restored.statistics == {"n_proposed": 5, "n_accepted": 3, "n_invalid": 0}
    stored = serialize(move)
    for key in ("settings", "statistics", "seed", "n_consumed"):
        del stored[key]
    assert deserialize(stored)._settings["step"] == 0.3
    stored = serialize(move)
    del stored["flow_sha256"]
    with pytest.raises(CheckpointError, match="names no flow"):
        deserialize(stored)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("weights", "altered"),
        ("grid", "altered"),
        ("missing", "is missing; put it back"),
    ],
)
def test_altered_flows_are_refused(flow_path: Path, change: str, complaint: str) -> None:
    move = FlowMove(load_flow(flow_path), seed=53)
    stored = serialize(move)
    json_path = flow_path.with_suffix(".json")
    if change == "weights":
        content = bytearray(flow_path.read_bytes())
        content[-1] ^= 1
        flow_path.write_bytes(bytes(content))
    elif change == "grid":
        record = json.loads(json_path.read_text())
        record["grid"][1] = 0.3
        json_path.write_text(json.dumps(record))
    else:
        flow_path.unlink()
        json_path.unlink()
        flow_registry._FLOWS.pop(move._sha256)
    with pytest.raises(CheckpointError, match=complaint):
        deserialize(stored)


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that can import the test modules."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", dedent(code), *arguments],
        capture_output=True,
        text=True,
        cwd=TESTS,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CREATE = """
import sys
from openmm import unit
from openmmtools import cache, multistate
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove, WeightedMove
from openmmtools.states import SamplerState, ThermodynamicState
from stand_ins.moves import RadialField
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.moves.flow_moves import AnnealedMove, FlowMove, LatentMove

kind, flow_path, storage, n_iterations = sys.argv[1:]
system = load_system("harmonic")
flow = load_flow(flow_path)
local = LangevinDynamicsMove(timestep=10 * unit.femtosecond, n_steps=10)
flow_move = FlowMove(flow, n_proposals=16, seed=7)
moves = {
    "ReplicaExchangeSampler": SequenceMove([local, flow_move]),
    "MultiStateSampler": WeightedMove([(local, 0.3), (flow_move, 0.4),
                                       (LatentMove(flow, seed=8), 0.3)]),
    "SAMSSampler": SequenceMove([flow_move, AnnealedMove(flow, n_proposals=2, seed=9)]),
    "flow only": SequenceMove([flow_move]),
}[kind]
kind = "ReplicaExchangeSampler" if kind == "flow only" else kind
temperatures = [300, 350, 400]
states = [ThermodynamicState(system.system, t * unit.kelvin) for t in temperatures]
sampler = getattr(multistate, kind)(mcmc_moves=moves, number_of_iterations=int(n_iterations))
reporter = multistate.MultiStateReporter(storage, checkpoint_interval=10)
sampler.create(states, [SamplerState(system.positions)], reporter)
sampler.run()
"""

RESUME = """
import json, sys
import numpy as np
from openmmtools import multistate
import stand_ins.moves
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.flow_moves import FlowMove

kind, storage, n_iterations, *flow_path = sys.argv[1:]
kind = "ReplicaExchangeSampler" if kind == "flow only" else kind
for path in flow_path:  # as a script does that builds its moves whether it resumes or not
    FlowMove(load_flow(path), n_proposals=16, seed=7)
reporter = multistate.MultiStateReporter(storage, open_mode="r+", checkpoint_interval=10)
sampler = getattr(multistate, kind).from_storage(reporter)
moves = sampler.mcmc_moves
flat = [m for move in moves for m in (getattr(move, "move_list", None)
        or [pair[0] for pair in move.move_set])]
before = [m.statistics["n_proposed"] for m in flat if hasattr(m, "statistics")]
sampler.extend(int(n_iterations))
flat = [m for move in sampler.mcmc_moves for m in (getattr(move, "move_list", None)
        or [pair[0] for pair in move.move_set])]
after = [m.statistics["n_proposed"] for m in flat if hasattr(m, "statistics")]
energies = np.asarray(reporter.read_energies()[0])
assigned = np.asarray(reporter.read_replica_thermodynamic_states())
print(json.dumps({"before": before, "after": after, "energies": energies.tolist(),
                  "assigned": assigned.tolist(), "iteration": sampler.iteration}))
"""


@pytest.mark.parametrize("rebuilt", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "kind", ["flow only", pytest.param("SAMSSampler", marks=pytest.mark.slow)]
)
def test_a_resumed_sampler_visits_nothing_twice(
    flow_path: Path, tmp_path: Path, kind: str, rebuilt: bool
) -> None:
    """With and without a move of the flow and seed built before the resume.

    Every configuration is the flow's: one energy seen in both parts, but for what was carried
    over, would be a draw used twice.
    """
    storage, n = tmp_path / "run.nc", 30
    run_python(CREATE, kind, str(flow_path), str(storage), str(n))
    output = run_python(RESUME, kind, str(storage), str(n), *[str(flow_path)] * rebuilt)
    energies = np.array(json.loads(output.splitlines()[-1])["energies"])
    assert energies.shape[0] == 2 * n + 1
    first, second = (set(part[..., 0].ravel()) for part in (energies[: n + 1], energies[n + 1 :]))
    second -= set(energies[n, ..., 0])
    assert min(len(first), len(second)) > 10
    assert not first & second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n_iterations"), [("ReplicaExchangeSampler", 200), ("MultiStateSampler", 20)]
)
def test_samplers_resume_in_a_fresh_process(
    flow_path: Path, tmp_path: Path, kind: str, n_iterations: int
) -> None:
    storage, n = tmp_path / "run.nc", n_iterations
    run_python(CREATE, kind, str(flow_path), str(storage), str(n))
    reporter = MultiStateReporter(str(storage), open_mode="r", checkpoint_interval=10)
    before = np.array(reporter.read_energies()[0]).round(9)
    reporter.close()
    output = run_python(RESUME, kind, str(storage), str(n))
    result = json.loads(output.splitlines()[-1])
    assert result["iteration"] == 2 * n
    assert sum(result["before"]) > 0
    if kind == "ReplicaExchangeSampler":  # the other draws its moves by lot
        assert result["before"] == [n] * 3
        assert result["after"] == [2 * n] * 3
    assert sum(result["after"]) > sum(result["before"])
    energies = np.array(result["energies"]).round(9)
    # The first part is kept; but for what was carried over, nothing of it comes again.
    np.testing.assert_array_equal(energies[: n + 1], before)
    first, second = (set(part[..., 0].ravel()) for part in (energies[: n + 1], energies[n + 1 :]))
    second -= set(energies[n, ..., 0])
    assert min(len(first), len(second)) > n // 4
    assert not first & second
    if kind == "ReplicaExchangeSampler":
        assigned = np.array(result["assigned"])
        assert energies.shape == (2 * n + 1, 3, 3)
        for state in range(3):
            iteration, replica = np.nonzero(assigned[20:] == state)
            u = energies[20:][iteration, replica, state]
            mean = mean_with_error(u)
            assert mean.error < 0.6
            assert abs(mean.value - DOF / 2) < 5 * mean.error
        content = flow_path.read_bytes()
        flow_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(AssertionError, match="CheckpointError"):
            run_python(RESUME, kind, str(storage), "1")
        flow_path.write_bytes(content)


@pytest.mark.slow
def test_storage_does_not_grow_with_the_flow(tmp_path: Path) -> None:
    sizes = {}
    for n_idle in (0, 1_500_000):
        path = save_flow(harmonic_flow(n_idle), tmp_path / f"flow{n_idle}")
        storage = tmp_path / f"run{n_idle}.nc"
        run_python(CREATE, "MultiStateSampler", str(path), str(storage), "2")
        sizes[path.stat().st_size] = storage.stat().st_size
    small, large = sorted(sizes)
    assert large > small + 10_000_000
    assert abs(sizes[large] - sizes[small]) < 4096


def test_log_z_of_a_move_says_when_it_knows_nothing(
    system: MolecularSystem, flow_path: Path
) -> None:
    move = FlowMove(load_flow(flow_path), seed=54)
    assert move.log_z() == (-math.inf, math.inf)
    move.apply(*states(system))
    assert 0 < move.statistics["effective_proposals"] <= 8
    assert math.isfinite(move.log_z().value)
    assert "n_proposals" in str(move)


def test_steps_of_other_processes_count(flow_path: Path) -> None:
    """Under MPI a rank without steps of its own must not start where an earlier part started."""
    move = FlowMove(load_flow(flow_path), seed=62)
    move.statistics = {"n_proposed": 30}
    assert move.__getstate__()["n_consumed"] == 30


@pytest.mark.parametrize(
    ("kind", "settings", "per_move"),
    [
        (FlowMove, {"n_proposals": 4}, 1),
        (LatentMove, {"n_repeats": 3}, 3),
        (AnnealedMove, {"n_proposals": 2, "n_bridge": 1}, 1),
    ],
)
def test_counts_have_the_names_of_openmmtools_moves(system, flow_path, kind, settings, per_move):
    from openmmtools.mcmc import MCDisplacementMove

    thermodynamic, sampler = states(system)
    move = kind(load_flow(flow_path), seed=1, **settings)
    assert (move.n_proposed, move.n_accepted) == (0, 0)
    for _ in range(5):
        move.apply(thermodynamic, sampler)
    assert move.n_proposed == 5 * per_move
    assert 0 < move.n_accepted == move.statistics["n_accepted"] <= move.n_proposed
    theirs = MCDisplacementMove()
    assert {"n_proposed", "n_accepted"} <= set(vars(theirs)) & set(dir(move))
