"""The training loop: resume bit for bit, give up cleanly, keep what is good."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openmm_eqflow.errors import CheckpointError, TrainingError
from openmm_eqflow.files import COLUMNS, write_history
from openmm_eqflow.flows.storage import load_tensors
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs import fit as fitting
from openmm_eqflow.training import loop
from openmm_eqflow.training.loop import TrainingResult, TrainingSettings, train


class Regression:
    """Fit y = sin(3 x); grows its data, and fails or goes bad at chosen calls."""

    def __init__(self, module: nn.Module, *, stop_at: int = 10**9, bad_from: int = 10**9) -> None:
        self.module, self.stop_at, self.bad_from = module, stop_at, bad_from
        self.n_calls, self.grown = 0, 0

    def grow(self, step: int) -> None:
        self.grown = step // 10

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        self.n_calls += 1
        if self.n_calls > self.stop_at:
            raise KeyboardInterrupt
        x = 2 * torch.rand(batch_size, 1, generator=generator) - 1
        loss = (self.module(x) - torch.sin(3 * x) - 0.001 * self.grown).square().mean()
        return loss * float("nan") if self.n_calls >= self.bad_from else loss

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        x = 2 * torch.rand(n, 1, generator=generator) - 1
        return (self.module(x) - torch.sin(3 * x)).square().mean()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def settings(n_threads: int = 1, **changes: float) -> TrainingSettings:
    options: dict[str, float] = {"seconds": 1e6, "max_steps": 60, "batch_size": 16}
    options |= {"warmup_steps": 5, "checkpoint_seconds": 0.0, "validation_size": 64}
    options |= changes
    return TrainingSettings(n_threads=n_threads, **options)  # type: ignore[arg-type]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def run(path: Path | None, n_threads: int = 1, **faults: int) -> tuple[TrainingResult, nn.Module]:
    module = network()
    objective = Regression(module, **faults)
    return train(module, objective, settings(n_threads), checkpoint=path), module


@pytest.mark.parametrize("n_threads", [1, 2])
def test_resume_is_bit_identical(tmp_path, n_threads):
    whole, module = run(None, n_threads)
    path = tmp_path / "training" / "checkpoint.safetensors"
    for stop_at in (n_threads * 13, n_threads * 20):  # interrupted twice
        with pytest.raises(KeyboardInterrupt):
            run(path, n_threads, stop_at=stop_at)
    assert 0 < load_tensors(path)[1]["step"] < 60
    resumed, module_resumed = run(path, n_threads)
    assert resumed.n_steps == whole.n_steps == 60
    assert same(module, module_resumed)
    assert same(whole.average, resumed.average)
    assert not same(module, whole.average)
    # A finished run is not trained further.
    again, module_again = run(path, n_threads)
    assert again.n_steps == 60
    assert same(module_again, module)
    assert same(again.average, whole.average)
    # Power control: another data order gives other weights.
    other = network()
    train(other, Regression(other), settings(n_threads, seed=1))
    assert not same(other, module)


def test_loss_falls_and_history_tells():
    module = network()
    before = Regression(module).validation(512, torch.Generator().manual_seed(5))
    result = train(
        module,
        Regression(module),
        settings(max_steps=400, learning_rate=1e-2, average=0.98, batch_size=64),
        evaluate=lambda average: {"relative_ess": 0.5},
    )
    after = Regression(result.average).validation(512, torch.Generator().manual_seed(5))
    assert float(after.detach()) < 0.2 * float(before.detach())
    assert result.history[-1]["step"] == 400
    assert result.history[-1]["relative_ess"] == 0.5
    assert result.history[-1]["validation_loss"] > 0


@pytest.mark.parametrize("bad_from", [1, 31])
def test_lasting_nan_stops_and_keeps_the_last_good_weights(tmp_path, bad_from):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(
        TrainingError, match=r"not finite 20 times.*checkpoint\.safetensors"
    ) as info:
        run(path, bad_from=bad_from)
    assert "\n" not in str(info.value)
    tensors, words = load_tensors(path)
    assert words["step"] == bad_from - 1
    assert all(bool(torch.isfinite(v).all()) for k, v in tensors.items() if k != "generator")
    module = network()
    with pytest.raises(TrainingError, match="none kept"):
        train(module, Regression(module, bad_from=1), settings())


def test_a_single_nan_is_passed_over():
    """Such a step leaves the weights as they are, bit for bit; every other one moves them."""
    weights: list[Tensor] = []

    class Hiccup(Regression):
        def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
            loss = super().__call__(batch_size, generator)
            weights.append(torch.cat([p.detach().flatten() for p in self.module.parameters()]))
            return loss * float("inf") if self.n_calls % 10 == 0 else loss

    module = network()
    result = train(module, Hiccup(module), settings())
    assert result.n_steps == 60
    assert all(bool(torch.isfinite(p).all()) for p in result.average.parameters())
    kept = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert [k + 1 for k, same_ in enumerate(kept) if same_] == [10, 20, 30, 40, 50]


def test_weights_the_loss_does_not_see():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    module = Spare()
    before = module.spare.weight.detach().clone()
    train(module, Regression(module), settings(max_steps=5))
    assert torch.equal(before, module.spare.weight)


def test_checkpoint_of_another_architecture(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run(path)
    module = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(CheckpointError, match="another architecture; delete the folder"):
        train(module, Regression(module), settings(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(path)


def test_time_budget_counts_earlier_attempts(tmp_path, monkeypatch):
    """On a clock of its own, which goes on by a hundredth of a second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "clock", lambda: 0.01 * next(ticks))

    def trained(seconds: float, name: str) -> TrainingResult:
        module = network()
        options = settings(seconds=seconds, max_steps=10**9, checkpoint_seconds=0.1)
        return train(module, Regression(module), options, checkpoint=tmp_path / name)

    first = trained(0.2, "a")
    assert first.seconds == pytest.approx(0.2, abs=0.03)
    assert trained(0.2, "a").n_steps == first.n_steps
    whole, longer = trained(0.4, "b"), trained(0.4, "a")
    assert longer.seconds == pytest.approx(0.4, abs=0.03)
    assert abs(longer.n_steps - whole.n_steps) <= 3 < whole.n_steps - first.n_steps


def test_the_number_of_shards_decides_not_that_of_threads(tmp_path):
    results = []
    for n_threads, n_shards in ((1, 2), (2, 2), (2, 0), (1, 0)):
        module = network()
        train(module, Regression(module), settings(n_threads, n_shards=n_shards))
        results.append(module)
    assert same(results[0], results[1])
    assert same(results[1], results[2])  # as many as threads
    assert not same(results[2], results[3])  # power control: one stream for the whole batch


class Overfitting(Regression):
    """Its validation loss is best at evaluation ``best``, whatever the training does."""

    def __init__(self, module: nn.Module, best: int, **faults: int) -> None:
        super().__init__(module, **faults)
        self.best, self.kept = best, None

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        k = self.n_calls - 1  # evaluated after every step
        if k == self.best:
            self.kept = {k: v.clone() for k, v in self.module.state_dict().items()}
        return torch.tensor(math.nan if k == 0 else 1.0 + abs(k - self.best))


def test_early_stop_returns_the_best_weights(tmp_path):
    options = {"evaluate_seconds": 0.0, "patience": 3}
    module = network()
    objective = Overfitting(module, best=4)
    path = tmp_path / "checkpoint.safetensors"
    result = train(module, objective, settings(**options), checkpoint=path)
    # evaluations 1 to 8: the best is the fifth, three more bring nothing
    assert result.stopped_early
    assert result.n_steps == len(result.history) == 8
    kept = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    kept.load_state_dict(objective.kept)
    assert same(result.average, kept)
    # Resumed, it is finished; nothing is trained, the best is still there.
    again_module = network()
    again = train(again_module, Overfitting(again_module, 4), settings(**options), checkpoint=path)
    assert again.n_steps == 8
    assert again.stopped_early
    assert same(again.average, kept)
    # Without patience it goes on, and ends with the last average.
    module = network()
    result = train(module, Overfitting(module, 4), settings(evaluate_seconds=0.0))
    assert result.n_steps == 60
    assert not result.stopped_early
    assert not same(result.average, kept)


def test_early_stop_survives_a_kill(tmp_path):
    options = {"evaluate_seconds": 0.0, "patience": 3}
    path = tmp_path / "checkpoint.safetensors"
    module = network()
    with pytest.raises(KeyboardInterrupt):
        train(module, Overfitting(module, 4, stop_at=6), settings(**options), checkpoint=path)
    module = network()
    resumed = Overfitting(module, best=10**6)
    resumed.n_calls = 10**6 + 100  # from now on every evaluation is worse
    result = train(module, resumed, settings(**options), checkpoint=path)
    assert result.stopped_early
    whole = network()
    objective = Overfitting(whole, best=4)
    train(whole, objective, settings(**options))
    kept = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    kept.load_state_dict(objective.kept)
    assert same(result.average, kept)


def test_evaluations_at_step_numbers():
    module = network()
    result = train(module, Regression(module), settings(max_steps=25, evaluate_steps=10))
    assert [row["step"] for row in result.history] == [10, 20, 25]


def test_history_as_csv(tmp_path):
    path, log = tmp_path / "checkpoint.safetensors", tmp_path / "history.csv"

    def attempt(**faults: int) -> TrainingResult:
        module = network()
        return train(
            module,
            Regression(module, **faults),
            settings(evaluate_seconds=0.0, max_steps=12),
            checkpoint=path,
            log=log,
            evaluate=lambda average: {"relative_ess": 0.25, "other": 1.0},
        )

    with pytest.raises(KeyboardInterrupt):
        attempt(stop_at=6)
    result = attempt()
    with log.open() as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == [str(k) for k in range(1, 13)]
    for row, kept in zip(rows, result.history, strict=True):
        for name in COLUMNS:
            assert float(row[name]) == pytest.approx(kept[name], rel=1e-8)
    assert float(rows[-1]["learning_rate"]) < float(rows[6]["learning_rate"])
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name]
    write_history(log, [{"step": 3.0, "loss": math.nan}])
    assert log.read_text() == ",".join(COLUMNS) + "\n3,,,,,\n"


def test_scheduled_objectives_are_told_the_fraction():
    class Told(Regression):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.fractions: list[float] = []

        def advance(self, fraction: float) -> None:
            self.fractions.append(fraction)

    module = network()
    objective = Told(module)
    train(module, objective, settings(max_steps=8))
    assert objective.fractions == pytest.approx([k / 8 for k in range(8)], abs=1e-4)


@pytest.mark.parametrize(("n_particles", "expected"), [(4, 256), (13, 256), (32, 64), (55, 40)])
def test_large_clusters_are_monitored_on_fewer_points(n_particles: int, expected: int) -> None:
    prior = MeanFreeGaussian(n_particles, 3, 0.1)
    assert fitting._affordable(256, prior, 40) == expected
