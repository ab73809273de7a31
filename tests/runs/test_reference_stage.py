"""The reference stage of a run whose molecule makes few frames says so."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from stand_ins.peroxide import write_system

from openmm_eqflow.runs import stages as workflow
from openmm_eqflow.runs.stages import open_run, run_stage


def stand_in(n_frames: list[int]):
    asked = []

    def run_reference(system, path, *, seconds, **options):
        asked.append(seconds)
        for name in ("reference.npz", "reference.dcd"):
            (path / name).write_text("x")
        return SimpleNamespace(
            n_frames=n_frames[len(asked) - 1],
            temperatures=np.array([300.0]),
            frame_interval_ps=1.0,
            platform="Reference",
            wall_seconds=seconds,
            convergence={},
        )

    return run_reference, asked


@pytest.fixture
def run(tmp_path):
    write_system(tmp_path / "hooh", recipe={"min_frames": 100, "reference_seconds": 10})
    return open_run(tmp_path / "hooh", tmp_path / "run", budget="standard", device="cpu")


def test_too_few_frames_after_the_last_extension_is_one_warning(run, monkeypatch, caplog):
    fake, asked = stand_in([10, 20, 30])
    monkeypatch.setattr(workflow, "run_reference", fake)
    with caplog.at_level(logging.INFO):
        run_stage(run, "reference")
    assert asked == [10, 20, 40]
    assert [m for m in caplog.messages if "goes on" in m] == [
        "only 10 frames so far: the reference stage goes on",
        "only 20 frames so far: the reference stage goes on",
    ]
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.startswith("30 reference frames after 40 s, fewer than the 100 wanted")
    assert "--budget" in warning
    assert "reference_seconds" in warning
    assert warning in (run.path / "run.log").read_text(encoding="utf-8")


def test_enough_frames_give_no_warning(run, monkeypatch, caplog):
    fake, asked = stand_in([10, 100])
    monkeypatch.setattr(workflow, "run_reference", fake)
    run_stage(run, "reference")
    assert asked == [10, 20]
    assert not caplog.records or max(r.levelno for r in caplog.records) < logging.WARNING


def test_the_command_line_prints_the_warning_once(run, monkeypatch, shell):
    monkeypatch.setattr(workflow, "run_reference", stand_in([10, 20, 30])[0])
    outcome = shell("reference", run.path)
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: 30 reference frames")
    assert not [h for h in logging.getLogger("openmm_eqflow").handlers]
