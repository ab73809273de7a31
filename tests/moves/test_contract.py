"""One body for every move: batched steps on a skewed target, and the same steps in openmmtools.

A step is exact whatever the flow; with a flow that lies about log q the same assertion fails. A
move of openmmtools is a step of one chain: bit for bit, at the temperature of the given state.
New ones join ``STEPS`` and ``MOVES``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools.states import SamplerState, ThermodynamicState
from openmmtools.utils import deserialize, serialize
from stand_ins.flows import uniform_grid
from stand_ins.lies import LIES, LyingFlow
from stand_ins.moves import BendField, TwoBasins, harmonic_flow
from torch import Tensor

from openmm_eqflow.analysis.chains import autocorrelation_ess, mean_with_error
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.moves import registry
from openmm_eqflow.moves.flow_moves import AnnealedMove, FlowMove, LatentMove
from openmm_eqflow.moves.steps import (
    LatentKernel,
    ProposalBuffer,
    StateMemory,
    annealed_step,
    flow_step,
    latent_step,
)
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.targets.library import MolecularSystem, load_system
from openmm_eqflow.units import positions_in_nm

N_CHAINS = 200
Advance = Callable[[Tensor], tuple[Tensor, Tensor]]

# -- batched steps ------------------------------------------------------------------------------


def flow_steps(n_proposals: int) -> Callable[[Any, TwoBasins, torch.Generator], Advance]:
    def begin(flow: Any, target: TwoBasins, generator: torch.Generator) -> Advance:
        buffer = ProposalBuffer(
            flow, target, n_proposals=n_proposals, n_predraw=4096, generator=generator
        )
        memory = StateMemory()

        def advance(x: Tensor) -> tuple[Tensor, Tensor]:
            new, info = flow_step(flow, target, x, buffer, generator, memory=memory)
            return new, info.accepted

        return advance

    return begin


def latent_steps(kind: Any, *, annealed: bool) -> Callable[..., Advance]:
    def begin(flow: Any, target: TwoBasins, generator: torch.Generator) -> Advance:
        kernel = LatentKernel(flow, target, 0.7, kind)

        def advance(x: Tensor) -> tuple[Tensor, Tensor]:
            if annealed:
                new, info = annealed_step(kernel, x, 2, 2, generator)
                return new, info.accepted
            new, latent = latent_step(kernel, x, 3, generator)
            return new, latent.n_accepted > 0

        return advance

    return begin


class Step(NamedTuple):
    begin: Callable[..., Advance]
    n_steps: int


STEPS = {
    "independence": Step(flow_steps(1), 150),
    "multiple-try": Step(flow_steps(8), 60),
    "latent-pcn": Step(latent_steps("pcn", annealed=False), 150),
    "latent-langevin": Step(latent_steps("langevin", annealed=False), 120),
    "annealed-pcn": Step(latent_steps("pcn", annealed=True), 100),
    "annealed-langevin": Step(latent_steps("langevin", annealed=True), 70),
}


def bend() -> EquivariantFlow:
    return EquivariantFlow(MeanFreeGaussian(2, 1, 1.0), BendField(0.8, 0.4), grid=uniform_grid(6))


def start(generator: torch.Generator) -> Tensor:
    centroid = torch.randn(N_CHAINS, 1, 1, generator=generator, dtype=torch.float64)
    return torch.tensor([[0.5], [-0.5]], dtype=torch.float64) + centroid


def agrees(flow: Any, step: Step) -> bool:
    """Mean and right-hand population of the target within five standard errors."""
    target, generator = TwoBasins(), torch.Generator().manual_seed(5)
    x = start(generator)
    advance, trace = step.begin(flow, target, generator), []
    for _ in range(step.n_steps):
        x, _ = advance(x)
        trace.append(target.coordinate(x))
    y = torch.stack(trace, dim=1)[:, step.n_steps // 10 :].numpy()
    assert min(autocorrelation_ess(y), autocorrelation_ess(y > 0.45)) > 500
    mean, right = mean_with_error(y), mean_with_error(y > 0.45)
    return (
        abs(mean.value - target.mean) < 5 * mean.error
        and abs(right.value - target.right_population) < 5 * right.error
    )


@pytest.mark.statistical
@pytest.mark.parametrize("lie", [None, *LIES])
@pytest.mark.parametrize("name", STEPS)
def test_steps_sample_a_skewed_target(name: str, lie: str | None) -> None:
    flow = bend() if lie is None else LyingFlow(bend(), lie, tilt=0.7)
    assert agrees(flow, STEPS[name]) == (lie is None)


class Itself:
    """The flow's own density as a target: whatever a flow step offers has weight one."""

    kT = 2.5

    def __init__(self, flow: EquivariantFlow) -> None:
        self.flow = flow

    def reduced_potential(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)


def spread(flow: EquivariantFlow, x: Tensor) -> float:
    """Variance of the latent coordinate, which is 1, in standard errors."""
    with torch.no_grad():
        z = TwoBasins.coordinate(flow.inverse(x)[0])
    return float((z.var() - 1.0).abs() * (len(z) / 2) ** 0.5)


@pytest.mark.statistical
@pytest.mark.parametrize("name", STEPS)
def test_steps_leave_the_flow_itself_as_it_is(name: str) -> None:
    """From exact samples, many of them: sharp about the kernels of the latent coordinate."""
    flow, generator = bend(), torch.Generator().manual_seed(8)
    x = flow.sample(10_000, generator=generator)
    advance = STEPS[name].begin(flow, Itself(flow), generator)
    for _ in range(3):
        x, moved = advance(x)
    assert spread(flow, x) < 4
    assert float(moved.double().mean()) > (0.5 if "langevin" in name else 0.85)
    # Power: a spread that is off by a tenth.
    assert spread(flow, 1.1**0.5 * flow.sample(10_000, generator=generator)) > 4


@pytest.mark.parametrize("name", STEPS)
def test_steps_keep_the_centroid_and_what_is_refused(name: str) -> None:
    target, generator = TwoBasins(), torch.Generator().manual_seed(6)
    x = start(generator)
    advance, centroid, n_moved = STEPS[name].begin(bend(), target, generator), x.mean(1), 0
    for _ in range(5):
        new, moved = advance(x)
        assert torch.equal(new[~moved], x[~moved])  # bit for bit
        assert bool((new[moved] != x[moved]).any(dim=(1, 2)).all())
        torch.testing.assert_close(new.mean(1), centroid, atol=1e-12, rtol=0)
        assert bool(torch.isfinite(target.reduced_potential(new)).all())
        x, n_moved = new, n_moved + int(moved.sum())
    assert 0 < n_moved < 5 * N_CHAINS


# -- moves of openmmtools -----------------------------------------------------------------------

MOVES: dict[str, Callable[..., FlowMove | LatentMove | AnnealedMove]] = {
    "independence": lambda f, s: FlowMove(f, n_proposals=1, n_predraw=16, seed=s),
    "multiple-try": lambda f, s: FlowMove(f, n_proposals=4, n_predraw=16, seed=s),
    "latent-pcn": lambda f, s: LatentMove(f, step=0.6, n_repeats=2, seed=s),
    "latent-langevin": lambda f, s: LatentMove(
        f, step=0.6, n_repeats=2, kernel="langevin", seed=s
    ),
    "annealed-pcn": lambda f, s: AnnealedMove(f, n_proposals=2, n_bridge=2, step=0.5, seed=s),
    "annealed-langevin": lambda f, s: AnnealedMove(
        f, n_proposals=1, n_bridge=1, step=0.5, kernel="langevin", seed=s
    ),
}


@pytest.fixture(scope="module")
def system() -> MolecularSystem:
    return load_system("harmonic")


@pytest.fixture
def flow(tmp_path: Path) -> EquivariantFlow:
    return load_flow(save_flow(harmonic_flow(), tmp_path / "flow"))


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_STREAMS", {})


def walk(system: MolecularSystem, move: Any, n: int, kelvin: float = 330.0) -> list[np.ndarray]:
    """Positions (N, 3) nm after each of n moves from the starting structure."""
    state = ThermodynamicState(system.system, kelvin * unit.kelvin)
    sampler_state, seen = SamplerState(system.positions), []
    for _ in range(n):
        move.apply(state, sampler_state)
        seen.append(positions_in_nm(sampler_state.positions).copy())
    return seen


def one_chain(move: Any, target: Any, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The step a move stands for."""
    flow, s = move.flow, move._settings
    kind = type(move)  # openmmtools' isinstance looks at methods only
    if kind is FlowMove:
        buffer = ProposalBuffer(
            flow,
            target,
            n_proposals=s["n_proposals"],
            n_predraw=s["n_predraw"],
            generator=generator,
        )
        memory = StateMemory()
        return lambda x: flow_step(flow, target, x, buffer, generator, memory=memory)[0]
    kernel = LatentKernel(flow, target, s["step"], s["kernel"])
    if kind is LatentMove:
        return lambda x: latent_step(kernel, x, s["n_repeats"], generator)[0]
    return lambda x: annealed_step(kernel, x, s["n_proposals"], s["n_bridge"], generator)[0]


@pytest.mark.parametrize("kind", MOVES)
def test_a_move_is_a_step_at_its_own_temperature(
    system: MolecularSystem, flow: EquivariantFlow, kind: str
) -> None:
    move, x = MOVES[kind](flow, 3), torch.from_numpy(positions_in_nm(system.positions))

    def expected(kelvin: float) -> list[Tensor]:
        state = ThermodynamicState(system.system, kelvin * unit.kelvin)
        target, _ = registry.target_for(state, x)
        assert target.kT == pytest.approx(0.0083144626 * kelvin)
        step = one_chain(move, target, registry.FlowStream(3, 0).generator)
        return list(itertools.accumulate(range(8), lambda now, _: step(now), initial=x[None]))[1:]

    found = walk(system, move, 8)
    assert all(
        np.array_equal(a, b[0].numpy()) for a, b in zip(found, expected(330.0), strict=True)
    )
    # Power: at another temperature the same numbers decide otherwise.
    cold = expected(30.0)
    assert not all(np.array_equal(a, b[0].numpy()) for a, b in zip(found, cold, strict=True))


@pytest.mark.parametrize("kind", MOVES)
def test_a_move_keeps_centroid_velocities_and_refused_states_and_counts(
    system: MolecularSystem, flow: EquivariantFlow, kind: str
) -> None:
    move = MOVES[kind](flow, 30)
    state = ThermodynamicState(system.system, 300 * unit.kelvin)
    rng = np.random.default_rng(0)
    positions = positions_in_nm(system.positions) + 0.3
    velocities = rng.normal(size=(6, 3)) * unit.nanometer / unit.picosecond
    sampler_state = SamplerState(positions * unit.nanometer, velocities=velocities)
    moved, n = 0, 20
    for _ in range(n):
        before = positions_in_nm(sampler_state.positions).copy()
        quantity, n_accepted = sampler_state.positions, move.statistics["n_accepted"]
        move.apply(state, sampler_state)
        after = positions_in_nm(sampler_state.positions)
        if move.statistics["n_accepted"] == n_accepted:
            assert sampler_state.positions is quantity
            assert (after == before).all()
        else:
            moved += 1
            assert (after != before).any()
            assert sampler_state.potential_energy is None
        np.testing.assert_allclose(after.mean(axis=0), positions.mean(axis=0), atol=1e-12)
    assert (sampler_state.velocities == velocities).all()
    repeats = move._settings.get("n_repeats", 1)
    counts = move.statistics
    assert counts["n_proposed"] == n * repeats
    assert 0 < moved <= counts["n_accepted"] < n * repeats
    assert counts["n_invalid"] == 0
    if "n_draws" in counts:
        assert counts["n_draws"] == n * move._settings["n_proposals"]
    assert all(type(value) in (int, float) for value in counts.values())
    move.reset_statistics()
    assert not any(move.statistics.values())
    assert set(move.statistics) == set(counts)


@pytest.mark.parametrize("kind", MOVES)
def test_a_move_is_stored_as_numbers_and_copies_share_its_stream(
    system: MolecularSystem, flow: EquivariantFlow, kind: str
) -> None:
    move = MOVES[kind](flow, 31)
    walk(system, move, 3)
    restored = deserialize(serialize(move))
    assert type(restored) is type(move)
    assert restored._settings == move._settings
    assert restored.statistics == move.statistics
    assert restored.flow is move.flow
    clone = copy.deepcopy(move)
    assert clone._stream is move._stream
    walk(system, clone, 1)
    assert clone.statistics["n_proposed"] > move.statistics["n_proposed"]
    assert move._stream.n_consumed == 4


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("kind", MOVES)
def test_a_resumed_move_repeats_no_draw(
    system: MolecularSystem, flow: EquivariantFlow, kind: str, rebuilt: bool
) -> None:
    """In a new process, with and without a move of that flow and seed built before the resume."""
    here = positions_in_nm(system.positions).tobytes()

    def visited(move: Any) -> set[bytes]:
        return {x.tobytes() for x in walk(system, move, 15)} - {here}

    move = MOVES[kind](flow, 61)
    first, stored = visited(move), serialize(move)
    assert stored["n_consumed"] == 15
    registry._STREAMS.clear()
    if rebuilt:
        MOVES[kind](flow, 61)
    resumed = deserialize(stored)
    second = visited(resumed)
    assert min(len(first), len(second)) > 2
    assert not first & second
    assert serialize(resumed)["n_consumed"] == 30
    assert resumed.statistics["n_proposed"] == 2 * stored["statistics"]["n_proposed"]
    # Power: a stream from its beginning repeats the first part.
    registry._STREAMS.clear()
    assert first == visited(MOVES[kind](flow, 61))
