"""README's commands and code, and the examples, do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_screen_has_exactly_two_commands():
    head = README.split("## What it does")[0]
    blocks = re.findall(r"```bash\n(.*?)```", head, re.S)
    assert len(blocks) == 2
    assert all(block.count("\n") == 1 for block in blocks)
    assert "openmm-eqflow run alanine-dipeptide --budget quick" in blocks[0]
    assert "pytest" in blocks[1]


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "<!-- test command -->" in README


def test_python_example_is_short_and_is_the_example_file():
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15
    example = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    for line in lines:
        if "import" in line or "Move(" in line or "load_" in line:
            assert line in example


@pytest.mark.slow
def test_python_example_runs(tmp_path):
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    script = tmp_path / "readme.py"
    script.write_text(block.replace("sampler.run(20)", "sampler.run(6)"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    acceptance = float(done.stdout.split()[-1])
    assert 0.0 < acceptance <= 1.0


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "EQFLOW_ITERATIONS": "4"},
    )
    assert done.stdout.startswith("acceptance ")
