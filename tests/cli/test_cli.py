"""The command line: bad input is one line and exit code 2, a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openmm
import pytest
import torch
import yaml
from openmm import unit
from stand_ins import ROOT
from stand_ins.peroxide import QUICK, write_inputs, write_system
from stand_ins.peroxide import system as peroxide

from openmm_eqflow.targets.library import load_system, systems_directory

DIPEPTIDE = systems_directory() / "alanine-dipeptide" / "alanine-dipeptide.pdb"


def everything(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what should work -----------------------------------------------------------------------------


def test_systems_lists_all(shell):
    outcome = shell("systems")
    assert outcome.code == 0
    names = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    folders = {path.parent.name for path in systems_directory().glob("*/system.yaml")}
    assert len(folders) > 8
    assert folders <= set(names)


def test_init_as_the_documentation_writes_it(shell, tmp_path):
    (tmp_path / "mol.pdb").write_bytes(DIPEPTIDE.read_bytes())
    line = (
        "init my-molecule --pdb mol.pdb --forcefield amber14-all.xml implicit/obc2.xml "
        "--temperature 310"
    )
    outcome = shell(*line.split())
    assert outcome.code == 0, outcome
    assert "openmm-eqflow run my-molecule" in outcome.out
    made = load_system(tmp_path / "my-molecule")
    assert made.temperature == 310 * unit.kelvin
    assert made.n_particles == 22
    content = yaml.safe_load((tmp_path / "my-molecule" / "system.yaml").read_text())
    assert content["forcefield"] == ["amber14-all.xml", "implicit/obc2.xml"]
    # Repeated options mean the same.
    outcome = shell(
        *"init other --pdb mol.pdb --forcefield amber14-all.xml".split(),
        *"--forcefield implicit/obc2.xml".split(),
    )
    assert outcome.code == 0
    other = yaml.safe_load((tmp_path / "other" / "system.yaml").read_text())
    assert other["forcefield"] == content["forcefield"]
    write_inputs(tmp_path / "in")
    outcome = shell(*"init hooh --system in/system.xml --pdb in/mol.pdb".split())
    assert outcome.code == 0, outcome
    assert load_system(tmp_path / "hooh").n_particles == 4


def test_what_is_said_is_written_as_json(shell, tmp_path):
    def said(*command):
        outcome = shell(*command, "--json", "said.json")
        assert outcome.code == 0, outcome
        return json.loads((tmp_path / "said.json").read_text())

    listed = {row["name"]: row for row in said("systems")["systems"]}
    assert listed["lj13"]["flow"] is True
    assert listed["harmonic"]["temperature_kelvin"] > 0
    write_inputs(tmp_path / "in")
    made = said("init", "hooh", "--system", "in/system.xml", "--pdb", "in/mol.pdb")
    assert (made["folder"], made["n_atoms"], made["warnings"]) == ("hooh", 4, [])
    assert any(line.startswith("Size: small (4 atoms") for line in made["lines"])
    for name in ("a", "b"):
        shutil.copytree(ROOT / "tests" / "data" / "frozen" / "run", tmp_path / name)
    run = said("report", "a")
    assert run["run"] == "a"
    assert set(run["stages"]) == {"reference", "train", "sample", "report"}
    assert run["metrics"]["verdict"]["word"]
    both = said("compare", "a", "b")
    assert both["page"] == "comparison.html"
    assert both["runs"]["b"]["n_samples"] == run["metrics"]["n_samples"]
    assert said("publish", "a", "--out", "kept")["run"] == "a"
    audited = said("audit", "a", "--n-samples", 16)
    assert audited["passed"] is True


def test_printed_commands_quote_paths_with_spaces(shell, tmp_path):
    write_inputs(tmp_path / "in")
    outcome = shell("init", "my mol", "--system", "in/system.xml", "--pdb", "in/mol.pdb")
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("next: openmm-eqflow run 'my mol'\n")
    assert "openmm-eqflow run 'my mol'" in shell.refuses("evaluate", "my mol")


@pytest.mark.parametrize("folder", ["file/mol", "in/closed/mol"])
def test_folders_that_cannot_be_written(shell, tmp_path, monkeypatch, folder):
    """A file in the way, and a folder of another person's (which root may write to: played)."""
    write_inputs(tmp_path / "in")
    (tmp_path / "file").write_text("x")

    make = Path.mkdir

    def mkdir(self, *arguments, **options):
        if "closed" in str(self):
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = shell.refuses("init", folder, "--system", "in/system.xml", "--pdb", "in/mol.pdb")
    assert f"{folder} cannot be written" in line
    assert "Errno" not in line
    assert ".tmp" not in line
    write_system(tmp_path / "hooh")
    line = shell.refuses("run", "hooh", "--out", folder)
    assert "Errno" not in line
    assert line.startswith(f"error: {folder.rpartition('/')[0]}")
    assert "choose another file or folder" in line


def test_help(shell):
    for arguments in (["--help"], ["run", "--help"], ["init", "-h"]):
        outcome = shell(*arguments)
        assert outcome.code == 0
        assert outcome.err == ""
        named = " ".join(["openmm-eqflow", *(a for a in arguments if a[0] != "-")])
        assert f"{named} [OPTIONS]" in outcome.out.splitlines()[0]


# -- names and options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run alanine-dipeptid", "did you mean alanine-dipeptide"),
        ("run lj14", "did you mean lj13"),
        ("run qqq", "shipped systems: ala3"),
        ("evaluate nothing-here", "no system 'nothing-here'"),
        ("evaluate harmonic --n-samples 5", "5 is not in the range"),
        ("run dw4 --budget fast", "'fast' is not one of 'quick'"),
        ("run dw4 --seed x", "'x' is not a valid int"),
        ("run", "Missing argument 'SYSTEM'"),
        ("rnu dw4", "No such command 'rnu'"),
        ("run dw4 --frobnicate", "No such option"),
        ("train dw4 --device tpu", "'tpu' is not one of"),
        ("init mol", "give them with --pdb"),
        ("init mol --pdb none.pdb --forcefield amber14-all.xml", "none.pdb is not a file"),
        ("init mol --pdb none.pdb", "give either force-field files"),
        ("init mol --pdb none.pdb --temperature -3", "temperature is -3 K"),
        ("init mol --pdb none.pdb --temperature nan", "temperature is nan K"),
        ("init mol --pdb none.pdb --temperature 1e6", "temperature is 1e+06 K"),
        ("init mol --pdb none.pdb --temperature 1e-3", "kelvin from 1 to 10000"),
        ("run dw4 --seed -1", "-1 is not in the range from 0 to 2^32 - 1"),
        ("evaluate dw4 --seed 99999999999", "99999999999 is not in the range"),
    ],
)
def test_usage_errors(shell, tmp_path, arguments, message):
    assert message in shell.refuses(*arguments.split())
    assert not list(tmp_path.iterdir())


def test_no_gpu(shell, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = shell.refuses("run", "harmonic", "--device", "cuda")
    assert "torch finds no CUDA GPU; use --device cpu" in line
    write_system(tmp_path / "hooh")
    assert "no CUDA GPU" in shell.refuses("evaluate", "hooh", "--device", "cuda")
    assert not (tmp_path / "runs").exists()


# -- system.yaml ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature_kelvin": None}, "key 'temperature_kelvin' is missing"),
        ({"temperature_kelvin": "warm"}, "key 'temperature_kelvin' is 'warm' (str)"),
        ({"temperature_kelvin": -5}, "expected a number of kelvin from 1"),
        ({"temprature_kelvin": 300}, "did you mean 'temperature_kelvin'"),
        ({"coordinates": "other.pdb"}, "names 'other.pdb', which is not a file"),
        ({"kind": "polymer"}, "key 'kind' is 'polymer'"),
        ({"system_xml": None}, "expected exactly one of the keys"),
        (
            {"settings": {"recipe": {"n_chian": 3}}},
            "'n_chian'; did you mean 'n_chains'",
        ),
        ({"settings": {"recipe": {"train_seconds": "x"}}}, "key 'train_seconds' is 'x'"),
        ({"settings": {"recipie": {}}}, "unknown section 'recipie'; did you mean 'recipe'"),
    ],
)
def test_system_yaml_errors(shell, tmp_path, change, message):
    content = write_system(tmp_path / "hooh") | change
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "hooh" / "system.yaml").write_text(yaml.safe_dump(content))
    assert message in shell.refuses("run", "hooh")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["a: [1,\nb: }", "\t- x: y", "- one\n- two", "", "\x00"])
def test_malformed_yaml(shell, tmp_path, text):
    write_system(tmp_path / "hooh")
    (tmp_path / "hooh" / "system.yaml").write_text(text)
    assert "hooh/system.yaml" in shell.refuses("run", "hooh")
    assert not (tmp_path / "runs").exists()


# -- OpenMM Systems a flow would be wrong for -----------------------------------------------------


def constrained() -> openmm.System:
    made = peroxide()
    for pair in ((0, 1), (1, 2), (0, 2)):
        made.addConstraint(*pair, 0.15)
    return made


def periodic() -> openmm.System:
    made = peroxide()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    for _ in range(4):
        force.addParticle(0.0, 0.1, 0.0)
    made.addForce(force)
    return made


def barostat() -> openmm.System:
    made = peroxide()
    made.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    return made


def virtual_site() -> openmm.System:
    made = peroxide()
    made.setParticleMass(3, 0.0)
    made.setVirtualSite(3, openmm.TwoParticleAverageSite(1, 2, 0.5, 0.5))
    return made


def drude() -> openmm.System:
    made = peroxide()
    force = openmm.DrudeForce()
    force.addParticle(3, 2, -1, -1, -1, -1.0, 0.001, 1.0, 1.0)
    made.addForce(force)
    return made


def external() -> openmm.System:
    made = peroxide()
    force = openmm.CustomExternalForce("100*x^2")
    force.addParticle(0)
    made.addForce(force)
    return made


REFUSED: dict[str, tuple[Callable[[], openmm.System], str]] = {
    "constraints": (constrained, "close a ring (a rigid angle or a rigid ring): rebuild"),
    "periodic": (periodic, "NonbondedForce uses periodic boundary conditions"),
    "barostat": (barostat, "MonteCarloBarostat"),
    "virtual": (virtual_site, "atom 4 is a virtual site"),
    "drude": (drude, "DrudeForce"),
    "external": (external, "CustomExternalForce changes from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_systems_are_named(shell, tmp_path, name):
    make, message = REFUSED[name]
    write_inputs(tmp_path / "in", make())
    line = shell.refuses("init", "mol", "--pdb", "in/mol.pdb", "--system", "in/system.xml")
    assert message in line
    assert not (tmp_path / "mol").exists()
    write_system(tmp_path / "hooh")
    (tmp_path / "hooh" / "system.xml").write_bytes((tmp_path / "in" / "system.xml").read_bytes())
    assert message in shell.refuses("run", "hooh")
    assert not (tmp_path / "runs").exists()


def test_pdb_without_a_template(shell, tmp_path):
    toluene = systems_directory() / "toluene" / "toluene.pdb"
    line = shell.refuses("init", "mol", "--pdb", toluene, "--forcefield", "amber14-all.xml")
    assert "No template found for residue" in line
    assert "--system system.xml" in line
    assert not list(tmp_path.iterdir())


def test_atoms_differ(shell, tmp_path):
    _, xml = write_inputs(tmp_path / "in")
    line = shell.refuses("init", "mol", "--pdb", DIPEPTIDE, "--system", xml)
    assert "22 atoms but the System has 4 particles" in line
    write_system(tmp_path / "hooh")
    (tmp_path / "hooh" / "mol.pdb").write_bytes(DIPEPTIDE.read_bytes())
    assert "22 atoms but the System has 4" in shell.refuses("run", "hooh")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "mol").exists()


def test_existing_folder_is_not_overwritten(shell, tmp_path):
    write_inputs(tmp_path / "in")
    (tmp_path / "mol").mkdir()
    line = shell.refuses("init", "mol", "--pdb", "in/mol.pdb", "--system", "in/system.xml")
    assert "mol exists" in line
    assert not list((tmp_path / "mol").iterdir())


# -- run directories ------------------------------------------------------------------------------


def test_run_directory_of_something_else(shell, tmp_path):
    for name, kelvin in (("cold", 300), ("warm", 320)):
        write_system(tmp_path / name, temperature_kelvin=kelvin)
    assert "no complete 'reference'" in shell.refuses("train", "cold", "--out", "run")
    before = everything(tmp_path / "run")
    assert "temperature kelvin" in shell.refuses("run", "warm", "--out", "run")
    assert "system hash" in shell.refuses("run", "harmonic", "--out", "run")
    assert "its seed is 0, now 3" in shell.refuses("run", "cold", "--out", "run", "--seed", "3")
    assert "seed 0, now 3" in shell.refuses("run", "run", "--seed", "3")
    assert "budget standard, now quick" in shell.refuses("run", "run", "--budget", "quick")
    assert "is no run directory" in shell.refuses("run", "cold", "--out", "warm")
    (tmp_path / "file").write_text("x")
    assert "ot a directory" in shell.refuses("run", "cold", "--out", "file")
    assert "no complete 'sample'" in shell.refuses("report", "run")
    assert "no complete 'train'" in shell.refuses("evaluate", "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text[: len(text) // 2])
    assert "malformed" in shell.refuses("run", "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    left = {p: c for p, c in everything(tmp_path / "run").items() if p.name != "run.log"}
    assert left == {p: c for p, c in before.items() if p.name != "run.log"}


# -- the disk is full -----------------------------------------------------------------------------


def test_full_disk_before_the_first_file(shell, tmp_path, monkeypatch):
    write_system(tmp_path / "hooh")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in shell.refuses("run", "hooh")
    assert everything(tmp_path / "runs") == {}
    write_inputs(tmp_path / "in")
    monkeypatch.setattr("shutil.copyfile", full)
    line = shell.refuses("init", "mol", "--pdb", "in/mol.pdb", "--system", "in/system.xml")
    assert "No space left" in line
    assert not [p for p in tmp_path.iterdir() if "mol" in p.name]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["openmm-eqflow", *sys.argv[2:]]
from openmm_eqflow.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "limit"), [("reference", 2_000), ("train", 12_000)])
def test_disk_that_fills_up_inside_a_stage(tmp_path, stage, limit):
    # Files larger than the limit cannot be written: numpy, safetensors and mdtraj all fail for
    # real, each in its own words.
    write_system(tmp_path / "hooh", recipe={"max_frames": 100, "field": None})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if stage == "train":
        subprocess.run(
            [sys.executable, "-m", "openmm_eqflow.cli", "reference", "hooh", "--out", "run"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
        )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), stage, "hooh", "--out", "run"],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr or "os error 27" in done.stderr
    assert not (tmp_path / "run" / "stages" / f"{stage}.json").exists()
    assert not [p for p in (tmp_path / "run").rglob("*") if ".tmp" in p.name]


# -- unexpected errors ----------------------------------------------------------------------------


def test_traceback_only_with_debug(tmp_path):
    code = (
        "import sys\nimport openmm_eqflow.targets.library as library\n"
        "library.list_systems = lambda: 1 / 0\n"
        "sys.argv = ['openmm-eqflow', 'systems', *sys.argv[1:]]\n"
        "from openmm_eqflow.cli import main\nmain()"
    )
    for flag, lines in ((), 1), (("--debug",), None):
        done = subprocess.run(
            [sys.executable, "-c", code, *flag],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 1
        assert "division by zero" in done.stderr
        assert ("Traceback" in done.stderr) == bool(flag)
        assert lines is None or len(done.stderr.splitlines()) == lines


# -- kill -9 --------------------------------------------------------------------------------------


def killed(folder: Path, ready: Callable[[], bool]) -> None:
    """Start the main job, wait until ``ready``, and kill it as the kernel would."""
    command = [sys.executable, "-m", "openmm_eqflow.cli", "run", "hooh", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_kill_in_every_stage_then_the_same_command_finishes(tmp_path):
    recipe = {"max_frames": 6000, "n_samples": 1200, "train_seconds": 1.5}
    reference = {"max_temperature_ratio": 1.2, "steps_per_swap": 60, "swaps_per_frame": 1}
    write_system(tmp_path / "hooh", settings={"reference": reference, "recipe": QUICK | recipe})
    run = tmp_path / "run"

    def done(stage: str) -> bool:
        return (run / "stages" / f"{stage}.json").is_file()

    def chunks() -> list[Path]:
        return sorted((run / "reference").glob("walker-*/chunk-*.npz"))

    killed(tmp_path, lambda: bool(chunks()))
    assert not done("reference")
    kept = {p: p.read_bytes() for p in chunks()}
    assert kept
    killed(tmp_path, (run / "training" / "checkpoint.safetensors").is_file)
    assert not done("train")
    frames = everything(run / "reference")
    assert all(frames[p] == content for p, content in kept.items())
    killed(tmp_path, lambda: bool(list((run / "samples").glob("chunk-*.npz"))))
    assert not done("sample")
    flow = (run / "flow.safetensors").read_bytes()
    killed(tmp_path, lambda: done("sample"))
    assert not done("report")
    chains = (run / "samples.npz").read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    last = subprocess.run(
        [sys.executable, "-m", "openmm_eqflow.cli", "run", "hooh", "--out", "run"],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert last.returncode == 0, last.stderr
    assert last.stdout.count(" complete") == 3
    assert "relative ESS" in last.stdout
    assert (run / "report.html").is_file()
    # Nothing that was finished was made again.
    assert everything(run / "reference") == frames
    assert (run / "flow.safetensors").read_bytes() == flow
    assert (run / "samples.npz").read_bytes() == chains
