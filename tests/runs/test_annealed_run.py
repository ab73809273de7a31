"""The main job without reference dynamics: what it leaves, its numbers, resume, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from stand_ins.command_line import Shell
from stand_ins.peroxide import exact, write_system

from openmm_eqflow.analysis.weights import kish_ess, relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.relaxed import AnnealedPath, Levels
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.priors.torsions import TorsionDensity, TorsionGroup
from openmm_eqflow.runs import ways
from openmm_eqflow.runs.annealing import describe_path
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.stages import build_target, flow_of, open_run, run, run_stage
from openmm_eqflow.targets.library import load_system

EXACT = exact(8.31446261815324e-3 * 300).log_z
RECIPE = {"n_points": 300, "check_with_md": 1, "max_frames": 1200, "n_samples": 600}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annealed")
    write_system(folder / "mol", recipe=RECIPE)
    return run(folder / "mol", folder / "run", budget="quick", method="annealing", ess=0.8).path


def test_everything_is_there(finished: Path) -> None:
    made = RunDirectory.open(finished)
    assert all(made.is_complete(stage) for stage in STAGES)
    assert made.config.recipe.method == "annealing"
    assert made.config.recipe.ess == 0.8
    stages = {s: json.loads((finished / f"stages/{s}.json").read_text()) for s in STAGES}
    assert stages["reference"]["method"] == "annealing"
    assert stages["reference"]["check"]["n_frames"] == 1200
    names = [row["name"] for row in stages["train"]["ways"]]
    assert names[:2] == ["prior alone", "levels alone"]
    assert [row["chosen"] for row in stages["train"]["ways"]].count(True) == 1
    html = (finished / "report.html").read_text(encoding="utf-8")
    for text in ("Isomers and free energies", "What each way costs", "taken"):
        assert text in html
    (chosen,) = [row["name"] for row in stages["train"]["ways"] if row["chosen"]]
    assert ("Work per level" in html) == (chosen == "levels alone")
    assert "adopted" not in html
    assert not (finished / "reference" / "drawn").exists()


def test_weighted_points_stay_and_frames_are_worth_them(finished: Path) -> None:
    with np.load(finished / "reference.npz") as archive:
        log_w, u, x = archive["log_weight"], archive["u"], archive["positions"]
    assert len(log_w) == len(u) == len(x) == 600
    data = load_reference(finished)
    assert data.method == "annealing"
    assert data.n_frames == int(kish_ess(log_w))
    assert relative_ess(log_w) > 0.7
    trajectory = mdtraj.load(str(finished / "reference.dcd"), top=str(finished / "topology.pdb"))
    np.testing.assert_allclose(trajectory.xyz, data.positions, atol=1e-5)
    again = load_reference(finished)
    np.testing.assert_array_equal(again.positions, data.positions)
    # Frames carry the energies that belong to them.
    with build_target(load_system(finished.parent / "mol")) as target:
        found = target.reduced_potential(torch.from_numpy(data.positions[:50]).double()).numpy()
    np.testing.assert_allclose(found, data.reduced_energies[:50], atol=0.02)


@pytest.mark.statistical
def test_path_chains_and_dynamics_agree_and_log_z_is_exact(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    z = (metrics["log_z"] - EXACT) / metrics["log_z_error"]
    assert abs(z) < 4
    assert metrics["log_z_error"] < 0.1
    dynamics = metrics["dynamics"]
    assert dynamics["n_frames"] == 1200
    assert dynamics["largest_z"] < 4
    assert metrics["weights_of"] in ("paths", "points")
    assert {row["state"] for row in metrics["isomers"]} == {"gauche+", "anti", "gauche-"}
    populations = {row["name"]: row for row in metrics["populations"]}
    assert all(abs(row["z"]) < 4 for row in populations.values() if row["z"] is not None)
    # Power: weights of another path (levels left out) miss log Z.
    flow = load_flow(finished / "reference" / "path")
    with np.load(finished / "reference.npz") as archive:
        positions = torch.from_numpy(archive["positions"]).double()
        u = torch.from_numpy(archive["u"])
    wrong = torch.logsumexp(-u - flow.prior.log_prob(positions), 0) - np.log(len(u))
    assert abs(float(wrong) - EXACT) > 4 * metrics["log_z_error"]


def test_a_run_goes_on_where_it_was_cut(finished: Path, tmp_path: Path) -> None:
    """Killed after the path was made: it is not made again, and the rest comes out the same."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "stages" / "reference.json").unlink()
    for name in ("reference.npz", "reference.dcd"):
        (tmp_path / "run" / name).unlink()
    before = (tmp_path / "run" / "reference" / "path.json").read_bytes()
    run_stage(RunDirectory.open(tmp_path / "run"), "reference")
    assert (tmp_path / "run" / "reference" / "path.json").read_bytes() == before
    with (
        np.load(finished / "reference.npz") as first,
        np.load(tmp_path / "run" / "reference.npz") as second,
        np.load(finished / "flow_samples.npz") as evaluated,
    ):
        np.testing.assert_array_equal(first["log_weight"], second["log_weight"])
        # No draw twice, and none that the run evaluates with.
        assert len(np.unique(second["u"])) == len(second["u"])
        assert not np.intersect1d(second["u"], evaluated["u"]).size


@pytest.mark.statistical
def test_frames_of_dynamics_judge_a_path_backwards(finished: Path) -> None:
    levels = load_flow(finished / "reference" / "path")
    system, check = load_system(finished.parent / "mol"), load_reference(finished / "check")
    with build_target(system) as target:
        told = describe_path(
            levels,
            system,
            target,
            draw_weighted(levels, target, 1000, seed=8),
            dynamics=("run/check", check),
            seed=8,
        )
        back = told["dynamics"]["backwards"]
        assert abs(back["log_z"] - EXACT) < 4 * back["log_z_error"] < 0.2
        assert not any("backwards" in line for line in told["warnings"])
        # Power: a path that has lost all but one side of the torsion.
        density, lost = levels.prior.torsions, levels.prior.copy()
        cut = torch.where(density.centres > 0, density.tables[0], 0.0)
        group = TorsionGroup((0,), (1,), 0.15, 0.0)
        lost.torsions = TorsionDensity([group], [cut / cut.sum()])
        steps = levels.levels.steps[-1:].expand(2, -1)
        half = AnnealedPath(lost, target, Levels(1, (0.5, 1.0), 0.1 * steps))
        half.metadata |= levels.metadata
        samples = draw_weighted(half, target, 1000, seed=8)
        told = describe_path(half, system, target, samples, dynamics=("run/check", check), seed=8)
        assert any("backwards from frames of run/check" in line for line in told["warnings"])


def test_the_flow_is_found_and_isomers_are_told(finished: Path, shell: Shell) -> None:
    _, flow, test = flow_of(str(finished))
    assert flow.audit_report is not None
    assert test is not None
    done = shell("isomers", finished, "--json", "out.json")
    assert done.code == 0
    assert "gauche+" in done.out
    assert "reference dynamics" in done.out or "frames of dynamics" in done.out
    content = json.loads(Path("out.json").read_text())
    assert {row["torsion"] for row in content["isomers"]} == {"O1-O2"}
    shutil.copytree(finished, "other")
    metrics = json.loads(Path("other/metrics.json").read_text())
    del metrics["isomers"]
    Path("other/metrics.json").write_text(json.dumps(metrics))
    assert "earlier version" in shell.refuses("isomers", "other")
    Path("empty").mkdir()
    assert "no samples yet" in shell.refuses("isomers", "empty")


def test_publish_and_sample_without_a_run(finished: Path, tmp_path: Path, shell: Shell) -> None:
    write_system(tmp_path / "mol", recipe=RECIPE | {"n_evaluate": 200, "n_samples": 200})
    outcome = shell("publish", finished, "--out", tmp_path / "mol")
    assert outcome.code == 0, outcome
    card = (tmp_path / "mol" / "card.md").read_text(encoding="utf-8")
    assert "--budget quick --seed 0 --method annealing --ess 0.8`" in card
    assert "frames of an annealed path of" in card
    outcome = shell("sample", tmp_path / "mol", "--budget", "quick", "--out", tmp_path / "fresh")
    assert outcome.code == 0, outcome
    metrics = json.loads((tmp_path / "fresh" / "metrics.json").read_text(encoding="utf-8"))
    assert abs(metrics["log_z"] - EXACT) < 4 * metrics["log_z_error"]
    assert metrics["isomers"]


def test_frames_of_a_path_are_no_dynamics_to_compare_with(finished: Path, shell: Shell) -> None:
    system = finished.parent / "mol"
    line = shell.refuses("anneal", system, "--out", "x", "--compare-with", finished)
    assert "no dynamics" in line


def test_refusals(finished: Path, shell: Shell) -> None:
    system = finished.parent / "mol"
    with pytest.raises(ConfigurationError, match="was made with method annealing"):
        open_run(finished, method="tempering")
    with pytest.raises(ConfigurationError, match=r"was made with ess 0\.8"):
        open_run(finished, ess=0.9)
    with pytest.raises(ConfigurationError, match="belongs to another run: its method"):
        open_run(system, finished, method="tempering")
    assert "add --method annealing" in shell.refuses("run", system, "--out", "a", "--ess", "0.8")
    line = shell.refuses("run", "lj13", "--out", "b", "--method", "annealing")
    assert "only bonded molecules" in line
    assert not Path("a").exists()
    assert not Path("b").exists()


def test_the_cheapest_way_that_reaches_what_was_asked() -> None:
    def row(name: str, ess: float, rate: float) -> dict:
        return {
            "name": name,
            "relative_ess": ess,
            "relative_ess_error": 0.01,
            "effective_per_second": rate,
        }

    rows = [row(ways.PRIOR, 0.5, 1e6), row("levels", 0.9, 10.0), row("field", 0.89, 30.0)]
    assert ways.cheapest(rows, 0.9) == "field"  # within two standard errors
    assert ways.cheapest(rows, 0.915) == "levels"
    assert ways.cheapest(rows, 0.99) == "levels"  # none does: the highest
    assert ways.cheapest(rows, 0.5) == ways.PRIOR
