"""The comparison of objectives: same start for all, a clock of training alone, honest records."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stand_ins.runs import write_run
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.bench import objectives
from openmm_eqflow.bench.learning_curve import tensors_sha256, times
from openmm_eqflow.bench.objectives import choose, parse_schedules, run_bench, suited, table
from openmm_eqflow.errors import CheckpointError, ConfigurationError, TrainingError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.seeds import child
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.recipes import Recipe, make_recipe

FIELD = {
    "width": 8,
    "n_layers": 1,
    "n_vectors": 3,
    "readout_width": 8,
    "n_steps": 2,
    "n_nodes": 8,
    "n_rbf": 4,
}
SCHEDULE = {"flow-matching": [[0.3, 1], [0.6, 0]], "path-forward": [[0.3, 0], [0.6, 1]]}
OPTIONS: dict[str, Any] = {"seconds": 0.3, "n_points": 2, "n_samples": 100, "seed": 4}


def tiny_run(path: Path) -> Path:
    write_run(path, "dw4")
    file = path / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["recipe"] |= {"field": FIELD, "batch_size": 16, "ode_steps": 2, "n_shards": 1}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("objectives") / "run")


@pytest.fixture(scope="module")
def measured(run: Path) -> tuple[Path, dict[str, Any]]:
    """Every objective that suits dw4, and one schedule."""
    out = run.parent / "out"
    result = run_bench(run, out=out, schedules={"then-path": SCHEDULE}, **OPTIONS)
    return out, result


def test_every_objective_is_measured_at_increasing_times(measured):
    out, result = measured
    assert list(result["objectives"]) == [
        "flow-matching",
        "nll",
        "reverse-kl",
        "path-forward",
        "path-reverse",
        "then-path",
    ]
    assert result["chosen"] == "flow-matching"
    assert result["times"] == [0.15, 0.3]
    assert result["prior"]["n"] == 100
    assert 0 < result["prior"]["relative_ess"] <= 1
    for name, record in result["objectives"].items():
        assert record["status"] == "done", (name, record["error"])
        rows = record["rows"]
        assert 1 <= len(rows) <= 2
        assert rows[-1]["seconds"] >= 0.3
        for before, after in itertools.pairwise(rows):
            assert before["seconds"] < after["seconds"]
            assert before["steps"] < after["steps"]
        for row in rows:
            assert row["n"] == 100
            assert 0 <= row["relative_ess"] <= 1
    assert json.loads((out / "objectives.json").read_text(encoding="utf-8")) == result
    assert (out / "objectives.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("training-*"))


def test_start_and_prior_are_the_same_for_all(measured):
    out, result = measured
    starts = {record["initial_sha256"] for record in result["objectives"].values()}
    assert len(starts) == 1
    flow = objectives.load_flow(out / "start")
    assert starts == {tensors_sha256(flow.module.state_dict())}
    assert result["start_sha256"] == flow.source[1]
    # Power control: the hash sees one bit of one weight.
    with torch.no_grad():
        parameter = next(p for p in flow.module.parameters() if p.numel())
        parameter.view(-1)[0] += 1e-3
    assert starts != {tensors_sha256(flow.module.state_dict())}


def test_finished_objectives_are_skipped_and_new_ones_added(measured, run, monkeypatch):
    out, result = measured

    def refuse(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(objectives, "learning_curve", refuse)
    again = run_bench(run, out=out, schedules={"then-path": SCHEDULE}, **OPTIONS)
    assert again == result
    two = run_bench(run, out=out, objectives=["nll", "reverse-kl"], **OPTIONS)
    assert list(two["objectives"]) == ["nll", "reverse-kl"]
    with pytest.raises(AssertionError, match="trained again"):
        run_bench(run, out=out, objectives=["nll"], schedules={"new": SCHEDULE}, **OPTIONS)
    other = {"nll": [[0, 1]]}
    with pytest.raises(ConfigurationError, match="another schedule"):
        run_bench(run, out=out, schedules={"then-path": other}, **OPTIONS)
    with pytest.raises(ConfigurationError, match=r"its seconds is 0\.3, now 0\.9"):
        run_bench(run, out=out, **OPTIONS | {"seconds": 0.9})
    with pytest.raises(ConfigurationError, match=r"no settings\.json"):
        run_bench(run, out=run, **OPTIONS)


def test_a_training_that_was_interrupted_goes_on(run, tmp_path, monkeypatch):
    """Killed in the second measurement, it does not repeat what the checkpoint has."""
    from openmm_eqflow.bench import learning_curve

    calls: list[int] = []
    true = learning_curve.measure

    def killed(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:  # the prior alone comes first
            raise KeyboardInterrupt
        return true(*arguments)

    eager = learning_curve.training_settings

    def always_saved(*arguments: Any, **options: Any) -> TrainingSettings:
        return dataclasses.replace(eager(*arguments, **options), checkpoint_seconds=0.0)

    monkeypatch.setattr(learning_curve, "training_settings", always_saved)
    monkeypatch.setattr(learning_curve, "measure", killed)
    # Long enough that no single step, the slow first one included, passes two points in time.
    more = {"objectives": ["flow-matching"], "out": tmp_path / "out", "n_points": 3, "seconds": 6}
    options = OPTIONS | more
    with pytest.raises(KeyboardInterrupt):
        run_bench(run, **options)
    result = run_bench(run, **options)
    rows = result["objectives"]["flow-matching"]["rows"]
    assert len(rows) == 3
    assert len(calls) == 3 + 3  # again the prior, the one that was killed, and the last


def test_table_is_that_of_the_numbers(measured, run):
    out, result = measured
    run_bench(run, out=out, schedules={"then-path": SCHEDULE}, **OPTIONS)  # trains nothing
    text = (out / "objectives.md").read_text(encoding="utf-8")
    assert text == table(json.loads((out / "objectives.json").read_text(encoding="utf-8")))
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[1:3]] == ["| ---", "| prior alone"]
    assert lines[0].split(" | ")[1:3] == ["0.15 s", "0.3 s"]
    for line, (name, record) in zip(lines[3:9], result["objectives"].items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0].removesuffix(" (the recipe's)") == name
        last = record["rows"][-1]
        shown = float(cells[2].split()[0])
        assert shown == pytest.approx(last["relative_ess"], rel=0.06, abs=6e-4)
        assert cells[4] == f"{last['steps']:,}"
    assert "flow-matching (the recipe's)" in text
    assert f"seed {OPTIONS['seed']}; {record['machine']}, {record['n_threads']} thread" in text


class _Breaks:
    """Finite at first, then never again."""

    def __init__(self, module: nn.Module, after: int) -> None:
        self.module, self.after, self.calls = module, after, 0

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        self.calls += 1
        time.sleep(0.001)
        bad = torch.nan if self.calls > self.after else 1.0
        return bad * sum(p.square().sum() for p in self.module.parameters())

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.tensor(0.0)


def test_a_divergence_is_reported_with_its_rows(run, tmp_path, monkeypatch):
    from openmm_eqflow.bench import learning_curve

    def breaks(recipe: Recipe, field: nn.Module, *rest: Any, **options: Any) -> Any:
        return _Breaks(field, 150), lambda: None

    monkeypatch.setattr(learning_curve, "build_objective", breaks)
    options = OPTIONS | {"seconds": 30.0, "n_points": 9}
    result = run_bench(run, out=tmp_path / "out", objectives=["nll"], **options)
    record = result["objectives"]["nll"]
    assert record["status"] == "aborted"
    assert "not finite 20 times" in record["error"]
    assert 1 <= len(record["rows"]) < 9
    text = (tmp_path / "out" / "objectives.md").read_text(encoding="utf-8")
    assert "nll ended early: the loss was not finite" in text
    assert "| - |" in text


def test_a_field_that_exploded_has_no_effective_samples(measured, run):
    """Measuring ends and says so, whatever a diverged field does."""
    from openmm_eqflow.bench.learning_curve import Start, _Still, measure, prior_alone

    out, result = measured
    flow = objectives.load_flow(out / "start")
    with objectives.build_target(objectives.RunDirectory.open(run).load_system()) as target:
        start = Start(
            recipe=Recipe(1.0, 1.0),
            target=target,
            flow=flow,
            frames=torch.zeros(0),
            test=torch.zeros(0),
            device="cpu",
            seconds=1.0,
            n_points=1,
            n_samples=100,
            seed=4,
        )
        assert prior_alone(start) == result["prior"]
        # Nothing but the prior's own density is left where the field moves nothing.
        x, log_q = EquivariantFlow(flow.prior, _Still((4, 2)), chunk_size=128).sample_and_log_prob(
            100, generator=child(4, "evaluation")
        )
        torch.testing.assert_close(log_q, flow.prior.log_prob(x))
        by_hand = relative_ess((-target.reduced_potential(x) - log_q).numpy())
        assert prior_alone(start)["relative_ess"] == pytest.approx(by_hand)
        # The untrained field, measured here, is the flow of the same grid drawn by hand.
        row = measure(start, flow.module)
        grid = tuple(k / row["n_ode_steps"] for k in range(int(row["n_ode_steps"]) + 1))
        same = EquivariantFlow(flow.prior, flow.vector_field, grid=grid, chunk_size=128)
        samples = draw_weighted(same, target, 100, seed=4)
        weights = samples.log_weight.exp()
        by_hand = float(weights.sum() ** 2 / weights.square().sum() / 100)
        assert row["relative_ess"] == pytest.approx(by_hand, rel=1e-9)
        with torch.no_grad():
            for parameter in flow.module.parameters():
                parameter.fill_(torch.nan)
        row = measure(start, flow.module)
    assert row["relative_ess"] == 0
    assert row["n_invalid"] == 100


@pytest.mark.parametrize("counted", [False, True])
def test_the_clock_stands_still_while_measuring(counted):
    module = nn.Linear(2, 1)
    settings = TrainingSettings(
        seconds=0.5, evaluate_seconds=0.1, evaluate_at=() if counted else (0.1, 0.2, 0.5)
    )

    def slow(average: nn.Module) -> dict[str, float]:
        time.sleep(0.4)
        return {}

    result = train(module, _Breaks(module, 10**9), settings, evaluate=slow)
    seconds = [row["seconds"] for row in result.history]
    if counted:  # power control: the sleep is in the seconds
        assert seconds[1] - seconds[0] >= 0.4
        return
    assert len(seconds) == 3
    assert seconds[0] >= 0.1
    assert 0.5 <= result.seconds == seconds[2] < 0.9
    assert seconds[1] - seconds[0] < 0.4


def test_an_error_of_training_has_the_history():
    module = nn.Linear(2, 1)
    with pytest.raises(TrainingError) as info:
        train(
            module,
            _Breaks(module, 60),
            TrainingSettings(seconds=20.0, evaluate_at=(0.02, 20.0)),
            evaluate=lambda average: {"mark": 7.0},
        )
    assert [row["mark"] for row in info.value.history] == [7.0]


def test_which_objectives_suit():
    molecule, cluster = (make_recipe(kind, "quick") for kind in ("molecule", "cluster"))
    assert "flow-matching" not in suited(molecule)
    assert "liouville" in choose(molecule)
    assert "liouville" not in choose(cluster)
    assert choose(cluster, ["nll", "nll"]) == {"nll": "nll"}
    combined = dataclasses.replace(cluster, objective=SCHEDULE)
    assert choose(combined)["recipe"] == SCHEDULE
    assert times(300.0, 3) == (75.0, 150.0, 300.0)
    with pytest.raises(ConfigurationError, match="'liouville' does not suit the gaussian prior"):
        choose(cluster, ["liouville"])
    with pytest.raises(ConfigurationError, match="'flow-matching' does not suit the internal"):
        choose(molecule, None, {"both": SCHEDULE})
    with pytest.raises(ConfigurationError, match=r"'path-forwards' is unknown.*'path-forward'"):
        choose(cluster, ["path-forwards"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nll", "expected NAME=JSON"),
        ("../up={}", "expected NAME=JSON"),
        ("nll={}", "taken"),
        ("a={", "not valid JSON"),
        ('a={"nll": [[0, 0]]}', "positive weight"),
    ],
)
def test_schedules_are_checked(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_schedules([text])


def test_command_line(run, tmp_path, shell):
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    common = ["--seconds", 0.3, "--points", 2, "--n-samples", 50, "--seed", 1]
    schedule = f"then-path={json.dumps(SCHEDULE)}"
    words = ["bench", "objectives", run, "--objectives", "nll,flow-matching", *common]
    outcome = shell(*words, "--schedule", schedule, "--out", out, "--json", copy)
    assert outcome.code == 0, outcome
    assert "| nll |" in outcome.out
    assert " left " in outcome.out
    result = json.loads(copy.read_text(encoding="utf-8"))
    assert list(result["objectives"]) == ["nll", "flow-matching", "then-path"]
    assert copy.read_bytes() == (out / "objectives.json").read_bytes()

    bench = ["bench", "objectives"]
    assert "does not exist" in shell.refuses(*bench, tmp_path / "no", "--out", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    assert "no run directory" in shell.refuses(*bench, tmp_path / "empty", "--out", tmp_path / "x")
    line = shell.refuses(*bench, run, "--objectives", "nl", "--out", tmp_path / "x")
    assert "did you mean 'nll'" in line
    assert not (tmp_path / "x").exists()


def test_a_run_without_reference_data_is_refused(tmp_path):
    write_run(tmp_path / "run", "dw4", reference=False)
    with pytest.raises(CheckpointError, match="no complete 'reference' stage"):
        run_bench(tmp_path / "run", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
