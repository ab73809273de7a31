"""Progress in a file or a pipe: few lines, each on one line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from openmm_eqflow.cli import progress
from openmm_eqflow.cli.progress import stage_progress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(calls, clock) -> list[str]:
    file = io.StringIO()
    with stage_progress("reference", Console(file=file, width=80)) as report:
        for seconds, fraction, text in calls:
            clock[0] += seconds
            report(fraction, text)
    return file.getvalue().splitlines()


def test_the_end_is_one_line(clock):
    found = lines([(0, 0.0, "a"), (1, 0.5, "b"), *[(1, 1.0, "c")] * 12], clock)
    assert [line.split()[-1] for line in found] == ["a", "c"]
    assert found[1].startswith("reference  100%")


def test_work_after_the_end_is_told_now_and_then(clock):
    found = lines([(0, 1.0, "a"), (1, 1.0, "b"), (20, 1.0, "c"), (1, 0.5, "d")], clock)
    assert [line.split()[-1] for line in found] == ["a", "c"]


def test_lines_do_not_wrap_and_text_is_no_markup(clock):
    text = "step 1200, loss 0.1234, [bold] " + 10 * "relative ESS 0.5 "
    (line,) = lines([(0, 0.5, text)], clock)
    assert line.endswith(text.rstrip()) or line.endswith(text)
    assert "[bold]" in line


def test_time_left_counts_what_this_attempt_did(clock):
    fresh = lines([(0, 0.0, "a"), (20, 0.05, "b"), (80, 0.25, "c")], clock)
    assert ["-:-- left", "-:-- left", "5:00 left"] == [line[31:40].strip() for line in fresh]
    resumed = lines([(0, 0.0, "a"), (20, 0.5, "b"), (80, 0.75, "c")], clock)
    assert ["-:-- left", "-:-- left", "1:20 left"] == [line[31:40].strip() for line in resumed]


def test_preparations_do_not_count_as_pace(clock):
    """A prior that takes five minutes to fit, then ninety seconds of training."""
    found = lines([(0, 0.0, "fit"), (300, 0.01, "a"), (18, 0.2, "b"), (36, 0.6, "c")], clock)
    left = ["-:-- left", "-:-- left", "1:15 left", "0:36 left"]
    assert [line[31:40].strip() for line in found] == left
