"""A relaxed flow on disk: the same in a fresh process, and a move that stores it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from openmmtools import cache, states
from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

from openmm_eqflow import FlowMove, load_flow, load_system, save_flow
from openmm_eqflow.errors import CheckpointError
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.relaxed import RelaxedFlow, relax
from openmm_eqflow.moves.registry import register_flow
from openmm_eqflow.runs.stages import build_target

READ = """
import sys, numpy as np, torch
from openmm_eqflow import load_flow
flow = load_flow(sys.argv[1])
x, log_q = flow.sample_and_log_prob(16, generator=torch.Generator().manual_seed(7))
given = torch.from_numpy(np.load(sys.argv[2]))
np.savez(sys.argv[3], x=x, log_q=log_q, of_given=flow.log_prob(given))
"""

GO_ON = """
import sys
from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler
reporter = MultiStateReporter(sys.argv[1], open_mode="r+", checkpoint_interval=1)
ReplicaExchangeSampler.from_storage(reporter).extend(3)
reporter.close()
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relaxed") / "flow"
    with build_target(load_system("toluene")) as target:
        flow = relax(load_flow("toluene"), target, n_leapfrog=2, seed=1)
        report = audit(flow, n=32, generator=torch.Generator().manual_seed(0))
        assert report["passed"]
        save_flow(flow, path, {"system": "toluene"})
    return path


def test_a_fresh_process_reads_the_same_path(stored: Path, tmp_path: Path) -> None:
    flow = load_flow(stored)
    assert isinstance(flow, RelaxedFlow)
    assert flow.audit_report["passed"]
    x, log_q = flow.sample_and_log_prob(16, generator=torch.Generator().manual_seed(7))
    np.save(tmp_path / "x.npy", x.numpy())
    files = [str(stored), str(tmp_path / "x.npy"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", READ, *files], check=True, timeout=200)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        # Sums of another process may round in another order; a path would differ by far more.
        np.testing.assert_allclose(found["x"], x.numpy(), atol=1e-9)
        np.testing.assert_allclose(found["log_q"], log_q.numpy(), atol=1e-6)
        np.testing.assert_allclose(found["of_given"], flow.log_prob(x).numpy(), atol=1e-6)
    plain = load_flow("toluene").log_prob(x).numpy()  # power: without the trajectories, another
    assert np.abs(plain - log_q.numpy()).max() > 0.05


def test_step_sizes_are_part_of_the_identity(stored: Path, tmp_path: Path) -> None:
    flow = load_flow(stored)
    sizes = tuple(1.01 * size for size in flow.relaxation.step_sizes)
    other = RelaxedFlow(flow.flow, flow.target, flow.relaxation._replace(step_sizes=sizes))
    save_flow(other, tmp_path / "other", {})
    assert register_flow(flow)[2] != register_flow(other)[2]
    words = (tmp_path / "other.json").read_text().replace('"n_leapfrog": 2', '"n_leapfrog": 3')
    (tmp_path / "other.json").write_text(words)
    with pytest.raises(CheckpointError, match="was altered"):
        load_flow(tmp_path / "other")


def test_a_chain_with_a_relaxed_flow_is_stopped_and_resumed(stored: Path, tmp_path: Path) -> None:
    system = load_system("toluene")
    state = states.ThermodynamicState(system.system, system.temperature)
    start = states.SamplerState(system.positions)
    storage = tmp_path / "chain.nc"
    move = FlowMove(load_flow(stored), n_proposals=4, seed=5)
    sampler = ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=3)
    reporter = MultiStateReporter(str(storage), checkpoint_interval=1)
    sampler.create([state, state], [start, start], reporter)
    sampler.run()
    reporter.close()
    cache.global_context_cache.empty()
    subprocess.run([sys.executable, "-c", GO_ON, str(storage)], check=True, timeout=250)
    reporter = MultiStateReporter(str(storage), open_mode="r")
    positions = [
        [np.asarray(s.positions._value) for s in reporter.read_sampler_states(k)]
        for k in range(7)
    ]
    moves = reporter.read_mcmc_moves()
    reporter.close()
    assert sum(m.statistics["n_proposed"] for m in moves) == 2 * 6  # replicas, iterations
    # No configuration of the second half was there in the first, but for states that stayed.
    first = {p.tobytes() for row in positions[:4] for p in row}
    second = {p.tobytes() for row in positions[4:] for p in row}
    fresh = second - first
    assert len(fresh) >= 3
    last = {p.tobytes() for p in positions[3]}
    assert second & first <= last
