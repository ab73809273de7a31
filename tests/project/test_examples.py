"""Every example runs as a reader would run it, with a tiny budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import ROOT
from stand_ins.runs import write_run

EXAMPLES = ROOT / "examples"


def run_example(name: str | Path, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_this_file_runs_every_example() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'run_example("{script.name}"' in source


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = run_example("quickstart.py", "--iterations", 10, cwd=tmp_path)
    assert 0.3 < number(r"acceptance (\d\.\d\d)", out) <= 1.0  # four proposals of a good flow


@pytest.mark.slow
def test_replica_exchange(tmp_path: Path) -> None:
    out = run_example("replica_exchange.py", "--quick", cwd=tmp_path)
    assert number(r"accepted: (\d) of 5", out) >= 1
    # The shipped flow's card: -195.59.
    assert abs(number(r"log Z at 300 K: (-\d+\.\d+)", out) + 195.6) < 1.0


@pytest.mark.slow
def test_free_energy(tmp_path: Path) -> None:
    out = run_example("free_energy.py", "--quick", cwd=tmp_path)
    one, two = (number(rf"log Z, {how} +(-\d+\.\d+)", out) for how in ("flow.*", "Bennett.*"))
    assert abs(one - two) < 0.3
    assert number(r"solvation free energy, kT +(-\d+\.\d+)", out) < -10.0


@pytest.mark.slow
def test_umbrella_sampling(tmp_path: Path) -> None:
    options = ("--windows", 24, "--picoseconds", 3, "--n-samples", 3000)
    out = run_example("umbrella_sampling.py", *options, cwd=tmp_path)
    path, umbrella = (
        number(rf"{way}: +cis - trans (-?\d+\.\d+)", out) for way in ("path", "umbrella")
    )
    assert abs(path - umbrella) < 1.5
    assert path > 1.0


@pytest.mark.slow
def test_own_molecule(tmp_path: Path) -> None:
    # In vacuum, where OpenMM's Reference platform is fast.
    options = ("--quick", "--forcefield", "amber14-all.xml", "--out", "here")
    out = run_example("own_molecule.py", *options, cwd=tmp_path)
    assert "36 relabellings" in out
    assert number(r"raw relative ESS (\d\.\d+)", out) > 0.01
    assert (tmp_path / "here" / "run" / "report.html").is_file()


@pytest.mark.slow
def test_analyse_trajectory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n_steps=20, n_flow=200)
    out = run_example("analyse_trajectory.py", run, "--bins", 12, cwd=tmp_path)
    assert abs(number(r"φ +chains (\d\.\d+)", out) - 0.2) < 0.2  # made with a fifth
    header, *rows = (run / "COLVAR").read_text().splitlines()
    assert header.startswith("#! FIELDS time torsion_5_7_9_15 ")
    assert len([row for row in rows if not row.startswith("#!")]) == 160


@pytest.mark.slow
def test_notebook(tmp_path: Path) -> None:
    """Its cells as one script, on fewer samples and points."""
    (notebook,) = EXAMPLES.glob("*.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for old, new in (("n_samples=10_000", "n_samples=300"), ("n_points=1000", "n_points=200")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (tmp_path / "cells.py").write_text(code)
    out = run_example(tmp_path / "cells.py", cwd=tmp_path)
    assert number(r"relative ESS (\d\.\d+)", out) > 0.5
    states = re.findall(r"^φ +\S+ +(\d\.\d{4}) \+- ", out, flags=re.M)
    assert sum(map(float, states)) == pytest.approx(1.0, abs=2e-4)
    # ff14SB in vacuum prefers phi < 0.
    assert number(r"phi > 0: (\d\.\d+)", out) < 0.3
    assert (tmp_path / "populations.png").stat().st_size > 10_000


@pytest.mark.slow
def test_python_force(tmp_path: Path) -> None:
    out = run_example("python_force.py", "--n", 4000, cwd=tmp_path)
    assert number(r"relative ESS (\d\.\d+)", out) > 0.3
    assert abs(number(r"du/dx> (\d+\.\d+)", out) - 9.0) < 0.5
