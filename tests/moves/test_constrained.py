"""Moves on a System with constraints: rods that meet as their masses say, bonds and velocities."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from stand_ins.flows import uniform_grid
from stand_ins.rods import LENGTH, MEAN_SQUARE, START, bent, cosine, rods, rods_prior, rods_target

from openmm_eqflow.analysis.chains import mean_with_error
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import Bridge, chart_step, hamiltonian_step, tune_step_size
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.moves.flow_moves import FlowMove, LatentMove
from openmm_eqflow.moves.steps import flow_step
from openmm_eqflow.targets.constraints import Constraints
from openmm_eqflow.units import positions_in_nm
from openmm_eqflow.vector_fields.chart import ChartField


def rods_flow() -> EquivariantFlow:
    prior = rods_prior(rods_target())
    return EquivariantFlow(prior, ChartField(1, 0, [], width=4), grid=uniform_grid(2))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flow = rods_flow()
    audit(flow)
    stem: Path = tmp_path_factory.mktemp("rods") / "flow"
    save_flow(flow, stem)
    return stem


def agrees(chain: torch.Tensor) -> bool:
    """Mean square cosine of chains (n_steps, n_chains, 3, 3) within four standard errors."""
    square = cosine(chain.flatten(0, 1)).square().reshape(chain.shape[:2])
    mean = mean_with_error(square.T.numpy())
    assert mean.error < 0.004
    return abs(mean.value - MEAN_SQUARE) < 4 * mean.error


@pytest.mark.statistical
def test_chains_of_flow_steps_and_chart_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steps: str) -> torch.Tensor:
        flow, target = rods_flow(), rods_target()
        generator = torch.Generator().manual_seed(1)
        c = 2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1
        x = bent(c) + torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
        scales = torch.ones(1, dtype=torch.float64)
        bridge = Bridge(flow.prior, target)
        local = partial(chart_step, bridge, scales=scales, n_steps=3, generator=generator)
        size, _ = tune_step_size(local, x, start=0.3)
        kept = []
        for _ in range(150):
            before = x
            if steps == "chart":
                x, info = local(x, step_size=size)
                accepted = info.accepted
            else:
                x, flow_info = flow_step(flow, target, x, 2, generator)
                accepted = flow_info.accepted
            assert torch.equal(x[~accepted], before[~accepted])
            torch.testing.assert_close(x.mean(1), before.mean(1), atol=1e-12, rtol=0)
            kept.append(x)
        chain = torch.stack(kept)
        for a, b in ((0, 1), (1, 2)):
            d = (chain[:, :, a] - chain[:, :, b]).norm(dim=-1)
            assert (d - LENGTH).abs().max() < 1e-7
        return chain[10:]

    assert agrees(run("flow"))
    assert agrees(run("chart"))
    monkeypatch.setattr(Constraints, "half_log_det", lambda self, x: 0 * x[:, 0, 0])
    assert not agrees(run("flow"))
    assert not agrees(run("chart"))


def state() -> tuple[ThermodynamicState, SamplerState]:
    system, _ = rods()
    sampler = SamplerState(START * unit.nanometer)
    sampler.velocities = np.zeros((3, 3)) * unit.nanometer / unit.picosecond
    return ThermodynamicState(system, 300 * unit.kelvin), sampler


@pytest.mark.parametrize("kind", [FlowMove, LatentMove])
def test_accepted_moves_redraw_velocities_and_rejected_ones_change_no_bit(
    stored: Path, kind: type[FlowMove] | type[LatentMove]
) -> None:
    thermodynamic, sampler = state()
    # Off by what integrators tolerate: a rejected state keeps that.
    sampler.positions = START * (1 + 1e-6) * unit.nanometer
    settings = {"n_proposals": 1} if kind is FlowMove else {"n_repeats": 1}
    move = kind(load_flow(stored), seed=2, **settings)
    outcomes = set()
    for _ in range(40):
        x, v = (np.array(a._value) for a in (sampler.positions, sampler.velocities))
        n = move.n_accepted
        move.apply(thermodynamic, sampler)
        new, velocities = (np.array(a._value) for a in (sampler.positions, sampler.velocities))
        if move.n_accepted == n:
            np.testing.assert_array_equal(new, x)
            np.testing.assert_array_equal(velocities, v)
        else:
            assert np.abs(velocities).min() > 0
            for a, b in ((0, 1), (1, 2)):
                bond = new[a] - new[b]
                assert abs(np.linalg.norm(bond) - LENGTH) < 1e-7
                assert abs(bond @ (velocities[a] - velocities[b])) < 1e-12
        outcomes.add(move.n_accepted > n)
    assert outcomes == {True, False} or kind is LatentMove


@pytest.mark.statistical
@pytest.mark.slow
def test_openmmtools_chain_of_langevin_dynamics_and_flow_moves(stored: Path) -> None:
    thermodynamic, sampler = state()
    langevin = LangevinDynamicsMove(
        timestep=4 * unit.femtosecond, collision_rate=5 / unit.picosecond, n_steps=20
    )
    flow_move = FlowMove(load_flow(stored), n_proposals=1, seed=5)
    chain = MCMCSampler(thermodynamic, sampler, SequenceMove([langevin, flow_move]))
    kept = []
    for _ in range(4000):
        chain.run(1)
        kept.append(positions_in_nm(chain.sampler_state.positions))
    x = torch.from_numpy(np.array(kept))[:, None]
    for a, b in ((0, 1), (1, 2)):
        assert ((x[:, 0, a] - x[:, 0, b]).norm(dim=-1) - LENGTH).abs().max() < 1e-6
    square = cosine(x[:, 0]).square().numpy()
    mean = mean_with_error(square[None])
    assert mean.error < 0.008
    assert abs(mean.value - MEAN_SQUARE) < 4 * mean.error
    assert abs(mean.value - 1 / 3) > 4 * mean.error


def test_steps_in_positions_are_refused() -> None:
    x = torch.from_numpy(START)[None]
    with pytest.raises(ConfigurationError, match="does not keep constraints"):
        hamiltonian_step(
            rods_target(), x, step_size=0.01, n_steps=2, generator=torch.Generator()
        )
