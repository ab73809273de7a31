"""Points of a whole path: weights against analytic Gaussians, trajectories that keep p_t."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_ins.flows import stream
from stand_ins.liouville import (
    MEAN,
    SPREAD,
    CoupledTarget,
    ExactField,
    FlatPrior,
    GaussianTarget,
    pool,
)
from stand_ins.peroxide import write_system
from torch import Tensor

from openmm_eqflow.analysis.balance import (
    balance_log_weights,
    bennett_log_z,
    path_free_energies,
    path_weights,
)
from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.flows.kernels import Bridge, LevelState
from openmm_eqflow.flows.storage import load_tensors
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.runs import fit as fitting
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.stages import build_target, run_stage
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.pool import PathSampler, Pool, PoolFeeder

SHIFT, WIDTH, HEIGHT = 1.2, 0.5, 0.7  # p_1 = exp(HEIGHT - (y - SHIFT)^2 / (2 WIDTH^2)), one y


def moments(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and free energy of p_t between N(0, 1) and that p_1."""
    precision = (1 - t) + t / WIDTH**2
    mean = t * SHIFT / WIDTH**2 / precision
    constant = t * HEIGHT - 0.5 * t * (SHIFT / WIDTH) ** 2 - 0.5 * (1 - t) * math.log(2 * math.pi)
    free = constant + 0.5 * mean**2 * precision + 0.5 * torch.log(2 * math.pi / precision)
    return mean, 1 / precision, free


def path_samples(levels: list[float], n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Exact samples, their log weight and level; n of the first level, fewer of later ones."""
    generator = stream(seed)
    y, level = [], []
    for k, t in enumerate(levels):
        mean, variance, _ = moments(torch.tensor(t).double())
        m = n // (k + 1)
        y.append(mean + variance.sqrt() * torch.randn(m, generator=generator, dtype=torch.float64))
        level.append(torch.full((m,), t, dtype=torch.float64))
    y_all = torch.cat(y)
    log_p1 = HEIGHT - 0.5 * ((y_all - SHIFT) / WIDTH) ** 2
    log_w = log_p1 + 0.5 * y_all**2 + 0.5 * math.log(2 * math.pi)
    return y_all, log_w, torch.cat(level)


@pytest.mark.parametrize("levels", [[0.0, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.4, 0.8]])
def test_free_energies_of_gaussians(levels):
    def off_by(log_w: Tensor, level: Tensor) -> Tensor:
        found, share, free = path_free_energies(log_w, level)
        assert found.tolist() == levels
        assert float(share.sum()) == pytest.approx(1)
        return (free - moments(found)[2] + moments(torch.zeros(()).double())[2]).abs()

    _, log_w, level = path_samples(levels, 20_000)
    # The error of F is below 0.01 kT by any estimate; five times that.
    assert float(off_by(log_w, level).max()) < 0.05
    # Power: samples of the last level said to be of the first and the other way round. (Only the
    # number of samples of every level enters, not which is which.)
    wrong = torch.where(level == 0, levels[-1], torch.where(level == levels[-1], 0.0, level))
    assert float(off_by(log_w, wrong).max()) > 0.2


def test_two_levels_are_bennett_and_the_balance_heuristic():
    _, log_w, level = path_samples([0.0, 1.0], 5_000)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    log_z = bennett_log_z(log_w, level == 0)
    assert float(path_free_energies(log_w, level)[2][1] - log_z) == pytest.approx(0, abs=1e-8)
    relative, weights = path_weights(log_w, level, times)
    expected = torch.softmax(balance_log_weights(log_w - log_z, level == 0, times), dim=1)
    assert torch.equal(relative, log_w - log_z)
    assert torch.equal(weights, expected)
    # The general sum comes to the same: one sample of a third level hardly matters,
    third = level.clone()
    third[-1] = 1 - 1e-12
    relative, weights = path_weights(log_w, third, times)
    torch.testing.assert_close(relative, log_w - log_z, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=1e-5)
    # and a thousand samples of p_1 said to be of another level do.
    third[-1000:] = 0.5
    assert float((path_weights(log_w, third, times)[1] / expected - 1).abs().max()) > 0.05


def test_prior_samples_alone_are_importance_sampling():
    _, log_w, level = path_samples([0.0], 1_000)
    times = torch.tensor([0.0, 0.5, 1.0]).double()
    _, weights = path_weights(log_w, level, times)
    torch.testing.assert_close(weights, torch.softmax(times[:, None] * log_w, 1))
    assert path_free_energies(log_w, level)[2].tolist() == [0.0]


def test_weights_give_moments_of_every_time():
    y, log_w, level = path_samples([0.0, 0.3, 0.7, 1.0], 30_000)
    times = torch.linspace(0, 1, 9, dtype=torch.float64)  # most are no level
    relative, weights = path_weights(log_w, level, times)
    mean, variance, free = moments(times)
    torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=torch.float64))
    error = (variance * weights.square().sum(1)).sqrt()
    assert float(((weights @ y - mean) / error).abs().max()) < 5
    spread = (weights * (y - mean[:, None]).square()).sum(1)
    assert float((spread / variance - 1).abs().max()) < 0.05
    assert float((log_w - relative)[0] - (free[-1] - free[0])) == pytest.approx(0, abs=0.05)
    # Power: two of the levels exchanged.
    wrong = torch.where(level == 0.3, 1.0, torch.where(level == 1.0, 0.3, level))
    off = (path_weights(log_w, wrong, times)[1] @ y - mean) / error
    assert float(off.abs().max()) > 20


def test_no_level_zero_or_no_weight_is_an_error():
    log_w = torch.zeros(4)
    with pytest.raises(ValueError, match="expected samples of level 0"):
        path_free_energies(log_w, torch.tensor([0.5, 0.5, 1.0, 1.0]))
    log_w[2] = -torch.inf
    with pytest.raises(ValueError, match="not all finite"):
        path_free_energies(log_w, torch.tensor([0.0, 0.5, 1.0, 1.0]))


def level_moments(t: float) -> tuple[Tensor, float]:
    """Mean (3,) and variance of z under p_t between FlatPrior and GaussianTarget."""
    precision = (1 - t) + t / SPREAD**2
    return t * MEAN / SPREAD**2 / precision, 1 / precision


def exact_points(t: float, n: int, seed: int) -> Tensor:
    mean, variance = level_moments(t)
    y = FlatPrior().sample_latent(n, generator=stream(seed))
    y[:, :3] = mean + math.sqrt(variance) * y[:, :3]
    return y


def test_trajectories_leave_the_level_invariant():
    n, t = 20_000, 0.6
    bridge = Bridge(FlatPrior(), GaussianTarget())
    times = torch.full((n,), t, dtype=torch.float64)
    mean, variance = level_moments(t)
    # Steps so long that one in three is refused: without refusal, another density.
    step = torch.full((n, 4), 1.45, dtype=torch.float64)

    def off_by(refuse: bool, level: float = t) -> float:
        state = bridge.at(exact_points(t, n, 1))
        streams = RowStreams.drawn(n, stream(2))
        for _ in range(4):
            before = state
            state, acceptance = bridge.move(
                state, times.fill_(level), step=step, n_steps=3, streams=streams
            )
            assert 0.3 < float(acceptance.mean()) < 0.95
            kept = float((state.y == before.y).all(1).double().mean())
            assert kept == pytest.approx(1 - float(acceptance.mean()), abs=0.02)
            if not refuse:
                state = free_flight(bridge, before, times, step, stream(3))
        z = state.y[:, :3]
        first = (z.mean(0) - mean).abs().max() / math.sqrt(variance / n)
        second = (z.var(0) / variance - 1).abs().max() / math.sqrt(2 / n)
        return float(torch.maximum(first, second))

    assert off_by(refuse=True) < 5
    assert off_by(refuse=False) > 20
    assert off_by(refuse=True, level=0.2) > 20
    # Moved states carry the densities and scores of where they are.
    state = bridge.at(exact_points(t, 50, 4))
    moved, _ = bridge.move(
        state,
        times[:50],
        step=0.3 * step[:50],
        n_steps=3,
        streams=RowStreams.drawn(50, stream(5)),
    )
    assert bridge.at(moved.y) is moved  # known: nothing is evaluated again
    again = bridge.at(moved.y.clone())
    assert not torch.equal(moved.y, state.y)
    for one, two in zip(moved, again, strict=True):
        torch.testing.assert_close(one, two)


def free_flight(bridge, state, t, step, generator) -> LevelState:
    """Follow one trajectory without refusal."""
    velocity = torch.randn(state.y.shape, generator=generator, dtype=torch.float64)
    for _ in range(3):
        velocity = velocity + 0.5 * step * state.score(t)
        state = bridge.at(state.y + step * velocity)
        velocity = velocity + 0.5 * step * state.score(t)
    return state


class HalfTarget(GaussianTarget):
    """No energy where z_0 < 0, as for the wrong hand of a stereocentre."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = super().reduced_potential_and_gradient(x)
        wrong = x.reshape(-1, 4)[:, 0] < 0
        u[wrong], gradient[wrong] = torch.inf, torch.nan
        return u, gradient


def sampler(target: CoupledTarget, **options: float) -> PathSampler:
    base = pool(target, 6_000, n_frames=3_000)
    return PathSampler(FlatPrior(), target, base, generator=stream(6), **options)  # type: ignore[arg-type]


def test_chunks_hold_points_of_every_level():
    made = sampler(GaussianTarget(), levels=4, n_trajectories=3)
    chunk = made.chunk(20_000, stream(7))
    assert chunk.level.unique().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(chunk.y) == pytest.approx(20_000, rel=0.01)
    assert float((chunk.level == 0).double().mean()) == pytest.approx(0.2, abs=0.01)
    for t in chunk.level.unique().tolist():
        z = chunk.y[chunk.level == t, :3].double()
        mean, variance = level_moments(t)
        # States of one trajectory after the other are correlated: a third counts.
        error = math.sqrt(3 / len(z))
        assert float((z.mean(0) - mean).abs().max()) < 5 * error * math.sqrt(variance)
        assert float((z.var(0) / variance - 1).abs().max()) < 5 * error * math.sqrt(2)
        other, _ = level_moments(t - 0.5 if t >= 0.5 else t + 0.5)
        assert float((z.mean(0) - other).abs().max()) > 5 * error * math.sqrt(variance)
    again = pool(GaussianTarget(), 10)
    assert [c.dtype for c in chunk] == [c.dtype for c in again]
    loss = LiouvilleLoss(ExactField(), chunk)
    r = loss.residual(*loss.draw(2_000, stream(1))).detach()
    assert float((r - r.mean()).abs().max()) < 2e-4 + 0.03


def test_points_without_energy_are_never_reached():
    chunk = sampler(HalfTarget(), levels=2).chunk(4_000, stream(8))
    assert bool((chunk.y[:, 0] >= 0).all())
    assert float((chunk.y[:, 0] < 0.1).double().mean()) > 0.02  # though they are next to it
    assert all(bool(torch.isfinite(column).all()) for column in chunk)


def test_step_sizes_are_tuned_and_scales_suit_the_coordinates():
    made = sampler(GaussianTarget(), levels=2)
    torch.testing.assert_close(
        made.scales, torch.tensor([SPREAD] * 3 + [2.0]).double(), rtol=0.05, atol=0
    )
    state, which, streams = made._start(2_000, stream(9))
    _, acceptance = made._move(state, which, made.step_sizes, streams)
    assert 0.7 < float(acceptance.mean()) < 0.97
    assert torch.equal(made.step_sizes, sampler(GaussianTarget(), levels=2).step_sizes)


def test_chunk_depends_on_seed_and_number_only():
    made = sampler(CoupledTarget(), levels=3, n_trajectories=2)

    def feeder() -> PoolFeeder:
        return PoolFeeder(FlatPrior(), CoupledTarget(), chunk=300, n_chunks=6, seed=7, source=made)

    one = feeder()
    chunks = [one.next() for _ in range(6)]
    assert one.next() is None
    one.close()
    assert all(
        torch.equal(a, b)
        for a, b in zip(chunks[3], made.chunk(300, child(7, "pool chunks", 3)), strict=True)  # type: ignore[arg-type]
    )
    assert not torch.equal(chunks[3].y[:50], chunks[4].y[:50])  # type: ignore[union-attr]


def test_a_resumed_pool_is_the_same_and_makes_no_chunk_in_vain():
    made = sampler(CoupledTarget(), levels=3, n_trajectories=2)
    numbers: list[int] = []

    class Counted(PoolFeeder):
        def _make(self, k: int) -> Pool:
            numbers.append(k)
            return super()._make(k)

    def grown(steps: list[int]) -> LiouvilleLoss:
        numbers.clear()
        source = Counted(FlatPrior(), CoupledTarget(), chunk=300, n_chunks=20, seed=7, source=made)
        first = pool(CoupledTarget(), 400)
        loss = LiouvilleLoss(ExactField(), first, feeder=source, grow_every=10, capacity=1_000)
        for step in steps:
            loss.grow(step)
        source.close()
        return loss

    for last in (25, 45, 155):
        walked = grown(list(range(last + 11)))
        jumped = grown([last, last + 10])
        if last == 155:  # the pool holds the newest four of sixteen
            assert set(numbers).isdisjoint(range(3, 8))
        assert len(walked.pool.y) == min(1_000, 400 + 300 * (last // 10 + 1))
        assert torch.equal(walked.pool.y, jumped.pool.y)
        assert torch.equal(walked.cumulative, jumped.cumulative)
        assert torch.equal(walked.mean_log_weight, jumped.mean_log_weight)


@pytest.mark.parametrize(
    "wrong", [{"levels": 0}, {"prior_share": 0.0}, {"prior_share": 1.0}, {"n_steps": 0}]
)
def test_numbers_out_of_range_are_errors(wrong):
    with pytest.raises(ValueError, match="expected at least 1 each"):
        sampler(GaussianTarget(), **wrong)


ANNEALED = {
    "annealed": {"levels": 3, "n_trajectories": 2, "n_steps": 3},
    "max_pool": 3_000,
    "max_steps": 25,
    "train_seconds": 600,
    "grow_every": 10,
    "n_shards": 1,
}


@pytest.fixture(scope="module")
def molecule(tmp_path_factory):
    """Run directory of a small molecule with reference data; its recipe has a renewed pool."""
    folder = tmp_path_factory.mktemp("annealed")
    write_system(folder / "hooh", recipe=ANNEALED)
    system = load_system(folder / "hooh")
    with build_target(system) as target:
        run = RunDirectory.create(
            folder / "run", system, target, budget="quick", seed=0, device="cpu"
        )
        run_stage(run, "reference")
        yield run, target, load_reference(run.path)


def test_a_recipe_has_a_renewed_pool_and_resumes_bit_for_bit(molecule, tmp_path, monkeypatch):
    run, target, data = molecule
    assert run.config.recipe.annealed == ANNEALED["annealed"]
    levels: list[set[float]] = []
    set_pool = LiouvilleLoss.set_pool

    def watched(self: LiouvilleLoss, new: Pool) -> None:
        set_pool(self, new)
        levels.append(set(new.level.tolist()))

    monkeypatch.setattr(LiouvilleLoss, "set_pool", watched)
    often = fitting.training_settings
    monkeypatch.setattr(
        fitting, "training_settings", lambda *a, **k: replace(often(*a, **k), checkpoint_seconds=0)
    )

    def trained(folder: Path, stop_at: int = 0) -> list[Tensor]:
        calls = []
        step = LiouvilleLoss.__call__

        def counted(self: LiouvilleLoss, n: int, generator: torch.Generator) -> Tensor:
            calls.append(n)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return step(self, n, generator)

        with monkeypatch.context() as patch:
            patch.setattr(LiouvilleLoss, "__call__", counted)
            _, result = fitting.train_flow(
                run.config.recipe, target, data, seed=0, folder=folder
            )
        assert result.n_steps == 25
        return list(result.average.state_dict().values())

    whole = trained(tmp_path / "whole")
    path = {0.0, 1 / 3, 2 / 3, 1.0}
    assert levels[:2] == [path, {0.0, 1.0}]  # held-out pool, then that of the training
    assert path in levels[2:]
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop_at=18)
    assert load_tensors(tmp_path / "parts" / "checkpoint.safetensors")[1]["step"] == 17
    resumed = trained(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_an_unknown_entry_of_annealed_is_an_error(molecule, tmp_path):
    run, target, data = molecule
    recipe = replace(run.config.recipe, annealed={"levles": 3})
    with pytest.raises(ConfigurationError, match=r"annealed: .*'levles'.*did you mean 'levels'"):
        fitting.train_flow(recipe, target, data, seed=0, folder=tmp_path)


def test_without_a_prior_sample_the_next_action_is_told() -> None:
    log_w = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(TrainingError, match=r"none of 5 points is a sample .*--budget"):
        path_weights(log_w, torch.ones(5), torch.tensor([0.0, 1.0]).double())
