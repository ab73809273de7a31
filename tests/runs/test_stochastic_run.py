"""The main job with a stochastic flow, from end to end on lj13, and what users see of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from stand_ins.command_line import Shell

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.flow_moves import FlowMove, LatentMove
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.runs.publish import publish
from openmm_eqflow.runs.stages import build_target, run_stage
from openmm_eqflow.targets.library import load_system, systems_directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    source = systems_directory() / "lj13"
    (folder / "cluster").mkdir()
    shutil.copy(source / "lj13.pdb", folder / "cluster")
    content = yaml.safe_load((source / "system.yaml").read_text())
    content["settings"] = {
        "reference": {"max_temperature_ratio": 1.0},
        "recipe": {
            "objective": "liouville",
            "reference_seconds": 3,
            "min_frames": 50,
            "stochastic": {"n_levels": 150, "n_leapfrog": 8, "n_fit": 512, "stride": 0.1},
            "n_evaluate": 1024,
            "n_samples": 100,
            "n_chains": 20,
            "n_proposals": 1,
        },
        "quick": {},
    }
    (folder / "cluster" / "system.yaml").write_text(yaml.safe_dump(content))
    system = load_system(folder / "cluster")
    with build_target(system) as target:
        run = RunDirectory.create(
            folder / "run", system, target, budget="quick", seed=None, device="cpu"
        )
    # The budget's own numbers of samples come after those for all budgets.
    for stage in STAGES:
        assert run_stage(run, stage) is not None
    return run.path


def test_figures_and_files(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["relative_ess"] > 0.1 > 10 * metrics["prior_relative_ess"]
    assert metrics["n_ode_steps"] == 149
    assert metrics["log_q_error_p99"] < 0.01
    assert metrics["log_z_error"] < 0.2
    assert abs(metrics["log_z"] - 59.86) < 4 * metrics["log_z_error"]
    assert abs(metrics["mean_log_weight"] - 59.86) > 4 * metrics["mean_log_weight_error"]  # power
    with (finished / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["time"]) == 0.0
    assert float(rows[-1]["time"]) == 1.0
    assert all(float(row["residual"]) > 0 for row in rows)
    with np.load(finished / "samples.npz") as archive:
        samples = dict(archive)
    np.testing.assert_allclose(samples["log_weight"], -samples["u"] - samples["log_q"])
    assert samples["accepted"].mean() > 0.1
    record = json.loads((finished / "flow.json").read_text())
    # A short training may leave maps so coarse that their determinants are computed.
    assert set(record["layers"]) - {"exact_determinants"} == {"path", "timesteps", "n_leapfrog"}


def test_report_and_card_say_what_it_is(finished: Path, tmp_path: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "What relaxation has to do along the path" in html
    assert "150 (field steps and Monte Carlo in turn)" in html
    assert "RK4" not in html
    card = publish(finished, tmp_path / "out").read_text(encoding="utf-8")
    assert "150 levels, on each a Hamiltonian trajectory of 8 leapfrog steps" in card
    assert "weights of paths" in card
    assert "512 configurations of the path" in card
    assert "RK4" not in card


def test_commands_work_on_it(finished: Path, shell: Shell) -> None:
    result = shell("audit", str(finished), "--n-samples", "64")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["passed"] is True
    assert report["against_jacobian"]["p99"] < 0.01
    result = shell("evaluate", str(finished), "--n-samples", "192", "--json", "m.json")
    assert result.code == 0, result
    metrics = json.loads(Path("m.json").read_text())
    assert metrics["log_z_error"] < 0.3
    assert abs(metrics["log_z"] - 59.86) < 4 * metrics["log_z_error"]
    assert f"{metrics['relative_ess']:.6g}" in result.out


def test_moves_of_openmmtools_take_it(finished: Path) -> None:
    flow, system = load_flow(finished / "flow"), load_system("lj13")
    state = ThermodynamicState(system.system, system.temperature)
    langevin = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    move = SequenceMove([FlowMove(flow, n_proposals=2, n_predraw=64, seed=1), langevin])
    sampler = MCMCSampler(state, SamplerState(system.positions), move)
    sampler.minimize()
    sampler.run(12)
    statistics = move.move_list[0].statistics
    assert statistics["n_proposed"] == 12
    assert 2 <= statistics["n_accepted"] <= 12
    with pytest.raises(ConfigurationError, match="no latent point"):
        MCMCSampler(state, SamplerState(system.positions), LatentMove(flow, seed=2)).run(1)


def test_same_seed_same_flow(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "stages" / "train.json").unlink()
    assert run_stage(RunDirectory.open(copy), "train") is not None
    ours, theirs = (json.loads((folder / "flow.json").read_text()) for folder in (copy, finished))
    for key in ("sha256", "grid", "layers"):
        assert ours[key] == theirs[key]


def test_wrong_entry_stops_before_anything_runs(tmp_path: Path) -> None:
    shutil.copytree(systems_directory() / "lj13", tmp_path / "cluster")
    file = tmp_path / "cluster" / "system.yaml"
    content = yaml.safe_load(file.read_text())
    content["settings"] = {"recipe": {"stochastic": {"levels": 3}}}
    file.write_text(yaml.safe_dump(content))
    system = load_system(tmp_path / "cluster")
    with (
        build_target(system) as target,
        pytest.raises(ConfigurationError, match="not 'levels'; did you mean 'n_levels'"),
    ):
        RunDirectory.create(tmp_path / "run", system, target, budget="quick", seed=None)
