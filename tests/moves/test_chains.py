"""Many chains: exact, resumable bit for bit, and refused for flows that failed their audit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from stand_ins.flows import stream, uniform_grid
from stand_ins.lies import LIES, LyingFlow
from stand_ins.moves import Springs
from torch import Tensor

from openmm_eqflow.errors import AuditError, CheckpointError, EnergyError
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.moves.chains import ChainSamples, load_chains, run_chains
from openmm_eqflow.moves.steps import Proposals, StateMemory
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.vector_fields.kernel import KernelField

FIELDS = (
    "positions",
    "reduced_potential",
    "log_q",
    "log_weight",
    "accepted",
    "local_acceptance",
    "proposal_log_weight",
)


def make_flow(scale: float = 0.6) -> EquivariantFlow:
    prior = MeanFreeGaussian(3, 2, scale)
    torch.manual_seed(0)
    field = KernelField.fit(prior.sample(200, generator=stream(0)), classes=[0, 0, 0])
    with torch.no_grad():
        field.weight += 0.03 * torch.randn(field.weight.shape, generator=stream(1))
    flow = EquivariantFlow(
        prior, field.requires_grad_(False), grid=uniform_grid(10), chunk_size=64
    )
    audit(flow, n=32, generator=stream(2))
    return flow


def run(folder, *, n_steps=24, chains=6, flow=None, target=None, **options) -> ChainSamples:
    flow = flow or make_flow()
    start = flow.prior.sample(chains, generator=stream(3)) + 5.0
    settings = {"n_proposals": 3, "n_local_steps": 3, "seed": 4, "chunk_steps": 8} | options
    return run_chains(flow, target or Springs(), start, folder, n_steps=n_steps, **settings)


def same(one: ChainSamples, two: ChainSamples) -> bool:
    return all(np.array_equal(getattr(one, f), getattr(two, f), equal_nan=True) for f in FIELDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    return folder, run(folder)


def test_shapes_and_bookkeeping(whole):
    folder, chains = whole
    assert chains.positions.shape == (24, 6, 3, 2)
    assert chains.positions.dtype == np.float32
    assert chains.proposal_log_weight.shape == (24, 6, 3)
    assert chains.n_samples == 144
    assert np.abs(chains.positions.mean(2)).max() < 1e-6
    np.testing.assert_allclose(
        chains.log_weight, -chains.reduced_potential - chains.log_q, atol=1e-9
    )
    x = torch.from_numpy(chains.positions.reshape(-1, 3, 2)).double()
    u = Springs().reduced_potential(x).numpy()
    np.testing.assert_allclose(u, chains.reduced_potential.ravel(), atol=1e-5)
    # log q belongs to the state that is stored.
    log_q = make_flow().log_prob(x).numpy()
    np.testing.assert_allclose(log_q, chains.log_q.ravel(), atol=1e-3)
    assert 0.1 < chains.accepted.mean() < 1
    assert same(load_chains(folder), chains)


def test_resumes_bit_for_bit(whole, tmp_path):
    folder, chains = whole
    for n_lost in (1, 2, 3):
        again = tmp_path / str(n_lost)
        shutil.copytree(folder, again)
        for path in sorted(again.glob("chunk-*.npz"))[-n_lost:]:
            path.unlink()
        assert same(run(again), chains)
    assert not same(run(tmp_path / "other", seed=5), chains)
    # No part of the run repeats the draws of another.
    assert len(np.unique(chains.proposal_log_weight)) == chains.proposal_log_weight.size


def test_interrupted_anywhere_gives_the_same_chains(whole, tmp_path):
    _, chains = whole

    class Killed(Exception):
        pass

    for fraction in (0.0, 0.4, 0.9):

        def stop(done: float, text: str, fraction: float = fraction) -> None:
            if done > fraction:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path, progress=stop)
    assert same(run(tmp_path), chains)
    # Finished chains are not run again.
    assert same(run(tmp_path, progress=stop), chains)


def test_a_gap_or_damage_never_mixes_chunks(whole, tmp_path):
    folder, chains = whole
    shutil.copytree(folder, tmp_path / "gap")
    (tmp_path / "gap" / "chunk-00001.npz").unlink()
    assert load_chains(tmp_path / "gap").n_samples == 48
    assert same(run(tmp_path / "gap"), chains)
    shutil.copytree(folder, tmp_path / "cut")
    last = tmp_path / "cut" / "chunk-00002.npz"
    last.write_bytes(last.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"chunk-00002\.npz is damaged.*delete it") as info:
        run(tmp_path / "cut")
    assert "\n" not in str(info.value)
    last.unlink()
    assert same(run(tmp_path / "cut"), chains)
    with pytest.raises(CheckpointError, match="6 chains with 3 proposals, expected 5 with 3"):
        run(tmp_path / "cut", chains=5)
    with pytest.raises(CheckpointError, match="no finished chunk"):
        load_chains(tmp_path / "nothing")


def test_stored_proposals_are_used_once_and_resume_bit_for_bit(tmp_path):
    flow = make_flow()
    x, log_q = flow.sample_and_log_prob(300, generator=stream(20))
    energy = Springs().reduced_potential(x) * Springs.kT
    stored = Proposals(x, log_q, energy)
    chains = run(tmp_path / "a", stored=stored)
    # 18 draws a step: burn-in and six steps come from the store, in order; then fresh ones.
    log_w = (-energy / Springs.kT - log_q).numpy()
    np.testing.assert_allclose(chains.proposal_log_weight[:6].ravel(), log_w[180:288], atol=1e-12)
    assert not np.isin(chains.proposal_log_weight[6:], log_w).any()
    for n_lost in (1, 3):
        for path in sorted((tmp_path / "a").glob("chunk-*.npz"))[-n_lost:]:
            path.unlink()
        assert same(run(tmp_path / "a", stored=stored), chains)


@pytest.mark.statistical
def test_chains_are_exact_whatever_the_flow(tmp_path):
    # Wider prior than target, so that weights matter; independent chains give the error.
    flow = make_flow(0.9)
    chains = run(tmp_path / "a", flow=flow, n_steps=60, chains=60, chunk_steps=60)
    means = chains.reduced_potential.mean(0)
    error = means.std(ddof=1) / len(means) ** 0.5
    assert 2.0 / error**2 > 1000  # Var u = 2: that many effective samples
    assert abs(means.mean() - 2.0) < 5 * error
    # Every proposal taken for granted gives the flow's own mean energy.
    raw = Springs().reduced_potential(flow.sample(2_000, generator=stream(9)))
    assert abs(float(raw.mean()) - 2.0) > 10 * error


@pytest.mark.statistical
@pytest.mark.parametrize("lie", LIES)
def test_power_of_chains_of_a_flow_that_lies(tmp_path, lie):
    flow = LyingFlow(make_flow(0.9), lie)
    chains = run(tmp_path / "a", flow=flow, n_steps=60, chains=60, chunk_steps=60)
    means = chains.reduced_potential.mean(0)
    assert abs(means.mean() - 2.0) > 5 * means.std(ddof=1) / len(means) ** 0.5


def test_only_audited_flows(tmp_path):
    flow = make_flow()
    flow.audit_report = None
    with pytest.raises(AuditError, match="never audited"):
        run(tmp_path, flow=flow)
    flow.audit_report = {"passed": False, "log_q_error_p99": 0.3, "tolerance": 0.01}
    with pytest.raises(AuditError, match=r"off by 0\.3 kT"):
        run(tmp_path, flow=flow)
    assert not list(tmp_path.iterdir())


def test_start_without_energy_is_reported(tmp_path):
    class Nowhere(Springs):
        def reduced_potential(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), torch.inf, dtype=torch.float64)

    with pytest.raises(EnergyError, match="infinite energy"):
        run(tmp_path, target=Nowhere())


def test_what_is_known_of_states_is_kept(tmp_path, monkeypatch):
    """Where log q is that of a path, another path of the same state has another."""
    flow = make_flow()
    start, log_q = flow.sample_and_log_prob(6, generator=stream(3))

    def asked(x: Tensor) -> Tensor:
        raise AssertionError("log q is known")

    monkeypatch.setattr(flow, "log_prob", asked)
    options = {"n_proposals": 3, "n_local_steps": 0, "seed": 4, "chunk_steps": 4}
    known = options | {"start_log_q": log_q}
    long = run_chains(flow, Springs(), start, tmp_path / "a", n_steps=12, **known)
    run_chains(flow, Springs(), start, tmp_path / "b", n_steps=8, **known)
    resumed = run_chains(flow, Springs(), start, tmp_path / "b", n_steps=12, **known)
    assert same(long, resumed)
    drawn = resumed.proposal_log_weight
    assert len(np.unique(drawn)) == drawn.size  # no draw is offered twice
    with pytest.raises(AssertionError, match="log q is known"):  # power
        run_chains(flow, Springs(), start, tmp_path / "c", n_steps=12, **options)


def test_a_state_that_stays_is_remembered():
    memory, x = StateMemory(capacity=4), torch.arange(40.0).reshape(10, 2, 2)
    for k in range(1, 10):
        memory.put(x[0], 1.0, 2.0)
        memory.put(x[k], float(k), 0.0)
    assert memory.get(x[0]) == (1.0, 2.0)
    assert memory.get(x[9]) == (9.0, 0.0)
    assert memory.get(x[5]) is None
