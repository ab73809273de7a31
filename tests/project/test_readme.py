"""The shape of README; that its code runs is tested with the pages of the documentation."""

import re
import tomllib

from stand_ins import ROOT

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
    # And the slow tests, which the default command leaves out.
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (slow,) = re.findall(r"`(\.venv/bin/python -m pytest [^`]*-m slow)`", contributing)
    assert "-n 2" in slow
    assert "CONTRIBUTING.md" in script
    with (ROOT / "pyproject.toml").open("rb") as handle:
        options = tomllib.load(handle)["tool"]["pytest"]["ini_options"]
    assert options["addopts"][-2:] == ["-m", "not slow"]
    assert {mark.split(":")[0] for mark in options["markers"]} >= {"slow", "gpu"}


def test_python_example_is_short_and_is_the_example_file():
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15
    example = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    for line in lines:
        if "import" in line or "Move(" in line or "load_" in line:
            assert line in example
