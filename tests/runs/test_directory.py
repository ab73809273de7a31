"""The run directory: the right one, complete or not, and its recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from stand_ins.peroxide import write_system

from openmm_eqflow.errors import CheckpointError, ConfigurationError, UnsupportedSystemError
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.runs.stages import build_target, open_run, run_stage
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.training.recipes import BUDGETS, Recipe, make_recipe


def create(path, system, **options):
    settings = {"budget": None, "seed": None, "device": "cpu"} | options
    with build_target(system) as target:
        return RunDirectory.create(path, system, target, **settings)


@pytest.fixture
def system(tmp_path):
    write_system(tmp_path / "hooh")
    return load_system(tmp_path / "hooh")


def fake_stage(run: RunDirectory, stage: str) -> None:
    from openmm_eqflow.runs.directory import _OUTPUTS

    for name in _OUTPUTS[stage]:
        (run.path / name).write_text("x")
    run.finish(stage, {"n": 1, "bad": float("nan")})


def test_config_holds_everything_resolved(tmp_path, system):
    run = create(tmp_path / "run", system, budget="quick", seed=3)
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert content["budget"] == "quick"
    assert content["seed"] == 3
    assert len(content["system_hash"]) == 64
    assert content["recipe"]["train_seconds"] == 2.0  # of system.yaml
    assert {"openmm", "torch", "python"} <= set(content["versions"])
    again = RunDirectory.open(tmp_path / "run")
    assert again.config == run.config
    assert again.load_system().n_particles == 4


def test_same_run_reopens_and_others_are_refused(tmp_path, system):
    run = create(tmp_path / "run", system, budget="quick", seed=3)
    assert create(tmp_path / "run", system).config == run.config
    assert create(tmp_path / "run", system, budget="quick", seed=3).config == run.config
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigurationError, match="its budget is quick, now thorough"):
        create(tmp_path / "run", system, budget="thorough")
    with pytest.raises(ConfigurationError, match="its seed is 3, now 4"):
        create(tmp_path / "run", system, seed=4)
    write_system(tmp_path / "warm", temperature_kelvin=310)
    with pytest.raises(ConfigurationError, match=r"temperature kelvin is 300\.0, now 310\.0"):
        create(tmp_path / "run", load_system(tmp_path / "warm"))
    with pytest.raises(ConfigurationError, match="system hash"):
        create(tmp_path / "run", load_system("harmonic"))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_other_folders_are_left_alone(tmp_path, system):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(ConfigurationError, match="is no run directory"):
        create(tmp_path / "photos", system)
    with pytest.raises(ConfigurationError, match="is no run directory"):
        RunDirectory.open(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    # A kill while config.yaml was written leaves this, and must not block the next attempt.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.123.tmp.yaml").write_text("system: hoo")
    assert create(tmp_path / "killed", system).config.seed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, "TypeError"),
        ({"recipe": {"train_secnods": 3}}, "did you mean 'train_seconds'"),
        (
            {"recipe": {"reference_seconds": 1, "train_seconds": "long"}},
            "'train_seconds' is 'long'",
        ),
    ],
)
def test_malformed_config_is_named(tmp_path, system, change, message):
    create(tmp_path / "run", system)
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    for n in range(len(lines)):  # cut between two entries it is still YAML
        file.write_text("".join(lines[:n]))
        with pytest.raises(ConfigurationError, match="malformed"):
            RunDirectory.open(tmp_path / "run")
    content = yaml.safe_load("".join(lines))
    file.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ConfigurationError, match=message):
        RunDirectory.open(tmp_path / "run")
    del content["system_hash"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match="KeyError: 'system_hash'"):
        RunDirectory.open(tmp_path / "run")
    for text in ("a: [", "- 1", "", "just words"):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=r"config\.yaml is malformed"):
            RunDirectory.open(tmp_path / "run")


def test_stages_complete_and_invalidate_what_follows(tmp_path, system):
    run = create(tmp_path / "run", system)
    assert not any(run.is_complete(stage) for stage in STAGES)
    with pytest.raises(CheckpointError, match="no complete 'train' stage; run: openmm-eqflow"):
        run.require("train")
    for stage in STAGES:
        fake_stage(run, stage)
    assert all(run.is_complete(stage) for stage in STAGES)
    assert json.loads((run.path / "stages" / "train.json").read_text()) == {"n": 1, "bad": None}
    (run.path / "samples.dcd").unlink()
    assert not run.is_complete("sample")
    assert run.is_complete("report")
    # A new flow: chains and weights of the old one must not be continued.
    for folder in ("samples", "evaluation", "training", "reference"):
        (run.path / folder).mkdir()
    fake_stage(run, "train")
    assert run.is_complete("reference")
    assert not run.is_complete("report")
    assert not (run.path / "samples").exists()
    assert not (run.path / "evaluation").exists()
    assert (run.path / "training").exists()
    fake_stage(run, "reference")
    assert not (run.path / "training").exists()
    assert (run.path / "reference").exists()


def test_own_folder_beside_others_called_systems(tmp_path):
    # A user's own systems/ folder is not the shipped one.
    write_system(tmp_path / "systems" / "dw4")
    run = create(tmp_path / "run", load_system(tmp_path / "systems" / "dw4"))
    assert run.load_system().n_particles == 4
    assert RunDirectory.open(tmp_path / "run").load_system().kind == "molecule"
    shipped = create(tmp_path / "other", load_system("harmonic"))
    assert shipped.config.system == "harmonic"


def test_molecule_in_pieces_is_refused_before_any_work(tmp_path, system):
    atoms = system.topology
    atoms._bonds = atoms._bonds[:2]
    with pytest.raises(UnsupportedSystemError, match="2 pieces"):
        create(tmp_path / "run", system)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["molecule", "cluster", "harmonic"])
def test_recipes_of_every_budget(kind):
    seconds = [make_recipe(kind, budget).train_seconds for budget in BUDGETS]
    assert seconds == sorted(seconds)
    recipe = make_recipe(kind, "quick")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.prior == ("internal" if kind == "molecule" else "gaussian")


def test_recipe_overrides_are_checked():
    overrides = {"recipe": {"n_chains": 7}, "quick": {"train_seconds": 9}}
    assert make_recipe("molecule", "quick", overrides).train_seconds == 9
    assert make_recipe("molecule", "standard", overrides).train_seconds != 9
    assert make_recipe("molecule", "standard", overrides).n_chains == 7
    bad = [
        ({"recipe": {"n_chain": 7}}, "did you mean 'n_chains'"),
        ({"quikc": {"n_chains": 7}}, "did you mean 'quick'"),
        ({"recipe": {"n_chains": 7.5}}, "'n_chains' is 7.5, expected a whole number"),
        ({"recipe": {"n_chains": -1}}, "'n_chains' is -1"),
        ({"recipe": {"train_seconds": 0}}, "expected more than 0"),
        ({"recipe": {"train_seconds": True}}, "'train_seconds' is True"),
        ({"recipe": {"prior": 3}}, "'prior' is 3, expected text"),
        ({"recipe": {"field": [1]}}, "expected a mapping"),
    ]
    for override, message in bad:
        with pytest.raises(ConfigurationError, match=message):
            make_recipe("molecule", "quick", override)
    with pytest.raises(ConfigurationError, match="budget is 'fast'"):
        make_recipe("molecule", "fast")  # type: ignore[arg-type]


def test_device_is_no_identity_and_is_recorded(tmp_path, system, monkeypatch):
    run = create(tmp_path / "run", system, seed=3)
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert create(tmp_path / "run", system, device=None).config.device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    moved = create(tmp_path / "run", system, device="cuda")
    assert moved.config.device == "cuda"
    after = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert after == before | {"device": "cuda"}
    assert open_run(tmp_path / "run").config.device == "cuda"
    assert open_run(tmp_path / "run", device="cpu").config.device == "cpu"
    assert RunDirectory.open(tmp_path / "run").config.device == "cpu"
    # A flow that is trained keeps saying where.
    fake_stage(run, "reference")
    fake_stage(run, "train")
    assert open_run(tmp_path / "run", device="cuda").config.device == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="use --device cpu"):
        open_run(tmp_path / "run", device="cuda")


def test_run_of_a_machine_with_a_gpu_goes_on_without(tmp_path, system, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    create(tmp_path / "run", system, device="auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="use --device cpu"):
        open_run(tmp_path / "run")
    assert open_run(tmp_path / "run", device="auto").config.device == "cpu"


def test_metrics_need_the_sampling_stage(tmp_path, system):
    run = create(tmp_path / "run", system)
    with pytest.raises(CheckpointError, match="no complete 'sample' stage"):
        run.metrics()


HOLD = """
import sys, time
from pathlib import Path
from openmm_eqflow.runs.directory import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_in_use_is_refused_until_its_process_is_gone(tmp_path, system):
    """Whatever ends the holder, kill -9 included, ends the lock."""
    run = create(tmp_path / "run", system, budget="quick")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = {p.name for p in run.path.iterdir()}
        with pytest.raises(ConfigurationError, match=f"in use by process {holder.pid} on "):
            run_stage(run, "reference")
        assert {p.name for p in run.path.iterdir()} == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run.locked(), run.locked():  # free again, and nested use is one use
        text = (run.path / ".lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        other = RunDirectory.open(run.path)
        with pytest.raises(ConfigurationError, match=f"in use by process {os.getpid()}"):
            with other.locked():
                pass
    with RunDirectory.open(run.path).locked():
        pass


def test_a_seed_is_not_negative(tmp_path, system):
    with pytest.raises(ConfigurationError, match="seed is -1, expected 0 to"):
        create(tmp_path / "run", system, seed=-1)
    assert not (tmp_path / "run").exists()
