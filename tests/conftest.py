"""Fixtures of many files; one thread: torch's own would wait for each other, spinning."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; for subprocesses too

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded: a GPU's kernels run
from stand_ins.command_line import Shell


def pytest_addoption(parser):
    parser.addoption(
        "--run-directory",
        action="append",
        default=[],
        help="a finished run whose report tests/report/test_browser.py opens, too",
    )


@pytest.fixture(autouse=True)
def _threads():
    """One thread, whatever a command line set in an earlier test."""
    torch.set_num_threads(1)


@pytest.fixture
def shell(monkeypatch, capfd, tmp_path) -> Shell:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capfd)
