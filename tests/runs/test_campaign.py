"""Campaigns: the table, failures that stay alone, kill -9 and going on, a scheduler that runs."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from stand_ins import ROOT
from stand_ins.command_line import Shell
from stand_ins.molecule_tables import IMPOSSIBLE, MOLECULES, write_molecules
from stand_ins.peroxide import write_system

from openmm_eqflow.cli.campaign import SOME_FAILED
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.runs import campaign
from openmm_eqflow.runs.campaign import attempt, read_molecules

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "openmm_eqflow.cli", "campaign", "molecules.csv", "--out", "many"]
CHEAP = ["--budget", "anneal", "--n-samples", "100"]


def table(folder: Path, text: str) -> Path:
    path = folder / "molecules.csv"
    path.write_text(text)
    return path


def job(out: Path, **row: str) -> dict[str, Any]:
    row = {"name": "a", "budget": "anneal", **row}
    return {"row": row, "out": str(out), "base": ".", "n_samples": 100, "environment": {}}


def answers(folder: Path) -> dict[str, Any]:
    """What jobs have said so far."""
    found = {}
    for file in (folder / "jobs").glob("[a-z]*.json"):
        result = json.loads(file.read_text())["result"]
        if result is not None:
            found[file.stem] = result
    return found


def test_a_table_is_read(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "name, smiles, pdb, forcefield, temperature, budget, seed\n"
        "a,CCO,,,,,\n"
        "\n"
        'b,,b.pdb,"amber14-all.xml implicit/obc2.xml",350,anneal,7\n',
    )
    assert read_molecules(path, "quick") == [
        {"name": "a", "smiles": "CCO", "budget": "quick"},
        {
            "name": "b",
            "pdb": "b.pdb",
            "forcefield": "amber14-all.xml implicit/obc2.xml",
            "temperature": "350",
            "budget": "anneal",
            "seed": "7",
        },
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,smile\na,C\n", "unknown column 'smile'; did you mean smiles"),
        ("name,smiles\na/b,C\n", "line 2: name is 'a/b', expected letters"),
        ("name;smiles\na;C\n", "separated by commas, not by ';'"),
        ("name,smiles,smiles\na,C,CC\n", "column 'smiles' stands twice"),
        ("name,smiles\na,C\n\nA,CC\n", r"line 4: A is named twice \(line 2\)"),
        ("name,smiles,pdb\na,C,a.pdb\n", "expected one of smiles, sdf, pdb, folder, got smiles"),
        ("name,smiles\na,\n", "expected one of .*, got none"),
        ("name,smiles,system\na,C,a.xml\n", "system does not go with smiles"),
        ("name,folder,temperature\na,lj13,300\n", "temperature does not go with folder"),
        ("name,smiles,budget\na,C,huge\n", "budget is 'huge', expected one of quick"),
        ("name,smiles,temperature\na,C,warm\n", "temperature or seed is no number"),
        ("name,smiles,temperature\na,C,-5\n", "temperature is -5 K"),
        ("name,smiles,seed\na,C,-5\n", "seed is -5"),
        ("name,smiles\na,C,300\n", "expected 2 cells, got 3"),
        ("name,smiles\n", "names no molecule"),
    ],
)
def test_a_wrong_table_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_molecules(table(tmp_path, text))


def test_nobody_else_can_reach_the_local_cluster() -> None:
    process = psutil.Process()

    def listening() -> set[tuple[str, int]]:
        found = process.net_connections("tcp")
        return {tuple(c.laddr) for c in found if c.status == psutil.CONN_LISTEN}

    before = listening()
    with campaign._cluster(None, 2):
        opened = listening() - before
    assert opened
    assert {address for address, _ in opened} == {"127.0.0.1"}


def test_without_dask_one_line_says_what_to_install(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path, "name,folder\na,lj13\n")
    for missing in ("pyarrow", "distributed"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            line = shell.refuses("campaign", "molecules.csv", "--out", "many")
        assert 'pip install "openmm-eqflow[campaign]"' in line
        assert missing in line


def test_a_failure_is_told_kept_and_tried_again_when_asked(shell: Shell, tmp_path: Path) -> None:
    table(tmp_path, "name,pdb,forcefield\na,missing.pdb,amber14-all.xml\n")
    command = ("campaign", "molecules.csv", "--out", "many", "--workers", 1)
    outcome = shell(*command, "--json", "rows.json")
    assert outcome.code == SOME_FAILED
    assert "failed: a: " in outcome.out
    assert "missing.pdb is not a file" in outcome.out
    assert "missing.pdb is not a file" in Path("many/logs/a.log").read_text()
    (row,) = json.loads(Path("rows.json").read_text())["molecules"]
    assert (row["name"], row["status"], row["n_samples"]) == ("a", "failed", None)
    kept = Path("many/jobs/a.json").stat().st_mtime_ns
    assert shell(*command).code == SOME_FAILED
    assert Path("many/jobs/a.json").stat().st_mtime_ns == kept
    assert shell(*command, "--retry").code == SOME_FAILED
    assert Path("many/jobs/a.json").stat().st_mtime_ns > kept
    table(tmp_path, "name,pdb,forcefield\na,other.pdb,amber14-all.xml\n")
    assert "holds a made with pdb 'missing.pdb', now 'other.pdb'" in shell.refuses(*command)


def test_other_samples_than_those_there_are_refused(tmp_path: Path, shell: Shell) -> None:
    folder = tmp_path / "many" / "jobs"
    folder.mkdir(parents=True)
    row = {"name": "a", "folder": "mol", "budget": "anneal"}
    result = {"status": "done", "message": "", "n_samples": 100}
    (folder / "a.json").write_text(json.dumps({"asked": row, "result": result}))
    table(tmp_path, "name,folder\na,mol\n")
    command = ["campaign", str(tmp_path / "molecules.csv"), "--out", str(tmp_path / "many")]
    line = shell.refuses(*command, "--budget", "anneal", "--n-samples", "200")
    assert "holds a with 100 samples, now 200: choose another --out" in line


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    """For good with a code of its own, to be tried again after a signal."""
    result = attempt(job(tmp_path, folder="lj13", seed="many"))
    assert result["status"] == "failed"
    assert "ended with code 1 (ValueError: invalid literal" in result["message"]
    assert answers(tmp_path) == {"a": result}
    (tmp_path / "jobs" / "a.json").unlink()
    with (tmp_path / "jobs" / ".a.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the job waits for us

        def kill() -> None:
            while not (children := psutil.Process().children()):
                time.sleep(0.05)
            children[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        result = attempt(job(tmp_path, folder="lj13"))
        killer.join()
    assert "ended by signal 9" in result["message"]
    assert not answers(tmp_path)


@pytest.mark.slow
def test_a_molecule_through_the_main_job(tmp_path: Path) -> None:
    """Quick settings in system.yaml; the answer has the verdict and populations of the chains."""
    write_system(tmp_path / "mol")
    result = attempt(job(tmp_path / "many", folder=str(tmp_path / "mol"), budget="quick"))
    assert result["status"] == "done", result
    assert result["n_atoms"] == 4
    assert result["verdict"]
    assert 0.0 < result["relative_ess"] <= 1.0
    assert {row["torsion"] for row in result["populations"]}
    assert (tmp_path / "many" / "runs" / "a" / "report.html").is_file()


def wait_for_some(process: subprocess.Popen[bytes], folder: Path, n: int) -> dict[str, Any]:
    deadline = time.monotonic() + 200
    while len(found := answers(folder)) < n:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def killed_half_way(folder: Path, *options: str) -> dict[str, int]:
    """Kill -9 a campaign with some answers; times at which they were written."""
    process = subprocess.Popen(
        [*COMMAND, *CHEAP, *options], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    wait_for_some(process, folder / "many", 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return {k: written(folder, k) for k in answers(folder / "many")}


def written(folder: Path, name: str) -> int:
    return (folder / "many" / "jobs" / f"{name}.json").stat().st_mtime_ns


def goes_on(folder: Path, before: dict[str, int], *options: str) -> None:
    """The same command does what is left, and all tables and pages have it all."""
    assert 4 <= len(before) < len(MOLECULES)
    done = subprocess.run(
        [*COMMAND, *CHEAP, *options], cwd=folder, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == SOME_FAILED, done.stderr
    assert b"11 of 12 molecules done" in done.stdout
    for name, when in before.items():
        assert written(folder, name) == when, f"{name} was done twice"
    many = folder / "many"
    with (many / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert {row["name"] for row in rows} == {*MOLECULES, IMPOSSIBLE}
    assert [row["name"] for row in rows if row["status"] != "done"] == [IMPOSSIBLE]
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert "3 atoms but the System has 5 particles" in failed["message"]
    for row in rows:
        if row["status"] == "done":
            assert int(row["n_samples"]) == 100
            assert int(row["n_atoms"]) == MOLECULES[row["name"]][0].getNumAtoms()
            assert float(row["relative_ess"]) > 0.3
    arrow = pyarrow.parquet.read_table(many / "results.parquet").to_pylist()
    assert [row["name"] for row in arrow] == [row["name"] for row in rows]
    assert [row["temperature"] for row in arrow] == [float(row["temperature"]) for row in rows]
    shares: dict[str, float] = {}
    for row in pyarrow.parquet.read_table(many / "populations.parquet").to_pylist():
        shares[row["name"]] = shares.get(row["name"], 0.0) + row["population"]
    assert set(shares) == {"peroxide", "diazene"}
    assert shares["peroxide"] == pytest.approx(1.0)
    page = (many / "index.html").read_text()
    assert page.count('href="runs/') >= 3 * len(MOLECULES)
    assert "11 done" in page


@pytest.mark.slow
def test_twelve_molecules_killed_half_way_go_on(tmp_path: Path) -> None:
    write_molecules(tmp_path)
    before = killed_half_way(tmp_path, "--workers", "2")
    # No process is left behind: every lock is free in a moment.
    for name in {*MOLECULES, IMPOSSIBLE} - before.keys():
        lock = tmp_path / "many" / "jobs" / f".{name}.lock"
        deadline = time.monotonic() + 20
        while lock.exists():
            with lock.open("w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline, f"{name} goes on without its campaign"
                    time.sleep(0.1)
    goes_on(tmp_path, before, "--workers", "2")


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    """Address of a scheduler with two workers, as a person would start them."""
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker"]
    file = folder / "scheduler.json"
    place = ["--scheduler-file", str(file)]
    options: dict[str, Any] = {"cwd": folder, "env": ENVIRONMENT, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([*dask, *place, "--port", "0", "--no-dashboard"], **options),
        subprocess.Popen(
            [*worker, *place, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"], **options
        ),
    ]
    try:
        deadline = time.monotonic() + 60
        while not (file.is_file() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


@pytest.mark.slow
def test_the_same_through_a_scheduler(tmp_path: Path) -> None:
    """Jobs that its workers still run for the killed campaign are waited for, not done twice."""
    write_molecules(tmp_path)
    with scheduler(tmp_path) as address:
        before = killed_half_way(tmp_path, "--scheduler", address)
        goes_on(tmp_path, before, "--scheduler", address)


def test_a_scheduler_that_does_not_answer_is_told(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "_PATIENCE", 0.5)
    table(tmp_path, "name,folder\na,lj13\n")
    address = "tcp://127.0.0.1:9"
    line = shell.refuses("campaign", "molecules.csv", "--out", "m", "--scheduler", address)
    assert f"no Dask scheduler answers at {address}" in line
