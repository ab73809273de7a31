"""Two processes under torchrun do what one does: curves, weights, files, stop."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import ROOT, TESTS, train_together
from stand_ins.peroxide import write_system

from openmm_eqflow import parallel as distributed
from openmm_eqflow.parallel import available_threads

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(*arguments: object, folder: Path) -> None:
    """Run python twice under torchrun, in ``folder``."""
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes left behind."""
    made = tmp_path_factory.mktemp("two")
    torchrun(TESTS / "stand_ins" / "train_together.py", made, folder=made)
    return made


def reports(folder: Path, what: str) -> list[dict[str, Any]]:
    records = [json.loads((folder / f"found-{k}.json").read_text()) for k in range(2)]
    assert [record["world_size"] for record in records] == [2, 2]
    return [record[what] for record in records]


def curve(record: dict[str, Any], key: str = "loss") -> torch.Tensor:
    return torch.tensor([row[key] for row in record["history"]], dtype=torch.float64)


def test_the_loss_curve_is_that_of_one_process(folder, tmp_path):
    first, second = reports(folder, "steps")
    one = train_together.training(tmp_path, 2, 1e6)
    assert len(curve(one)) == 25
    for key in ("loss", "validation_loss"):
        torch.testing.assert_close(curve(first, key), curve(one, key), rtol=1e-5, atol=0)
    # Gradients are sums over both; alone they are what they are.
    assert reports(folder, "sum") == [[[2.0, 1.0]]] * 2
    (alone,) = distributed.sum_over_processes([torch.tensor([1.0, 0.0])])
    assert alone.tolist() == [1.0, 0.0]
    # All processes hold the same weights and the same history, bit for bit.
    assert first == second
    # Power control: another number of shards is another random stream.
    other = train_together.training(tmp_path / "other", 1, 1e6)
    assert float((curve(other) / curve(one) - 1).abs().max()) > 1e-3
    # Only rank 0 writes.
    assert {p.name for p in (folder / "steps" / "rank-0").iterdir()} == {
        "checkpoint.safetensors",
        "history.csv",
    }
    assert not (folder / "steps" / "rank-1").exists()


def test_a_timed_stop_is_decided_together(folder):
    # Rank 1 is late at every step; were each to ask its own clock, one would wait for ever.
    first, second = reports(folder, "seconds")
    assert first["n_steps"] == second["n_steps"] > 3
    assert first["weights"] == second["weights"]
    assert len(first["history"]) == 1


def test_samples_are_shared_out(folder, tmp_path):
    first, second = reports(folder, "evaluation")
    one = train_together.evaluation(tmp_path)
    assert first == second
    for key, n in (("log_weight", 200), ("prior", 9000)):
        assert len(one[key]) == n
        torch.testing.assert_close(
            torch.tensor(first[key]).double(), torch.tensor(one[key]).double(), rtol=0, atol=1e-6
        )
    assert len(list((folder / "evaluation" / "rank-0").iterdir())) == 4
    assert not (folder / "evaluation" / "rank-1").exists()


@pytest.mark.slow
def test_command_line(tmp_path, shell):
    recipe = {"train_seconds": 1000, "max_steps": 40, "n_shards": 2, "n_evaluate": 600}
    write_system(tmp_path / "hooh", recipe=recipe | {"max_frames": 400, "prior_samples": 500})
    assert shell("reference", "hooh", "--out", "one", "--device", "cpu").code == 0
    shutil.copytree("one", "two")
    measure = ("--n-samples", "300", "--json")
    assert shell("train", "one").code == 0
    assert shell("evaluate", "one", *measure, "one.json").code == 0
    for command in (("train", "two"), ("evaluate", "one", *measure, "two.json")):
        torchrun("-m", "openmm_eqflow.cli", *command, folder=tmp_path)
    rows = []
    for name in ("one", "two"):
        with (tmp_path / name / "history.csv").open() as handle:
            rows.append(list(csv.DictReader(handle)))
    assert len(rows[0]) == len(rows[1]) == 1
    for key in ("step", "loss", "validation_loss", "relative_ess", "learning_rate"):
        assert float(rows[1][0][key]) == pytest.approx(float(rows[0][0][key]), rel=1e-4), key
    metrics = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    for key in ("relative_ess", "prior_relative_ess", "log_z", "test_nll", "max_weight_share"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], rel=1e-6), key
    assert (tmp_path / "two" / "flow.safetensors").is_file()
    log = (tmp_path / "two" / "run.log").read_text()
    assert log.count("stage train starts") == 1


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with distributed.process_group(), distributed.main_first():
        assert distributed.world_size() == 1
        assert distributed.is_main()
        assert distributed.share({"a": [1]}) == {"a": [1]}
        tensors = {"x": torch.arange(3)}
        assert distributed.share_tensors(tensors) is tensors
        (same,) = distributed.sum_over_processes([tensors["x"]])
        assert same is tensors["x"]
        items = distributed.in_rounds(lambda k: {"k": torch.tensor(k)}, range(3))
        assert [int(item["k"]) for item in items] == [0, 1, 2]
        assert distributed.clock() <= distributed.clock()


def test_processes_share_the_cores(monkeypatch):
    alone = available_threads()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_threads() == max(1, alone // 2)
    assert available_threads(together=True) == alone
