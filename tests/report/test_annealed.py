"""The page of an annealed path, and reference dynamics beside it."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from stand_ins.command_line import Shell
from stand_ins.pages import check_page
from stand_ins.peroxide import write_system
from stand_ins.runs import molecule_frames, turned_frames, write_run

from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.report.annealed import write_annealed_report
from openmm_eqflow.runs.annealing import anneal_system
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system

OPTIONS = {"n_samples": 1500, "n_points": 300, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """System, run whose dynamics turn three frames in ten, and path compared with it."""
    folder = tmp_path_factory.mktemp("annealed")
    write_system(folder / "mol")
    write_run(folder / "run", str(folder / "mol"), draw=turned_frames)
    molecule = load_system(folder / "mol")
    with build_target(molecule) as target:
        anneal_system(molecule, target, folder / "out", compare_with=folder / "run", **OPTIONS)
    return folder / "mol", folder / "run", folder / "out"


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_page_of_a_path_beside_dynamics(folders: tuple[Path, Path, Path]) -> None:
    mol, _, out = folders
    html = write_annealed_report(out, load_system(mol)).read_text(encoding="utf-8")
    panels = check_page(html, least=5)
    assert panels >= {"view", "drawing", "path-work", "path-ess", "path-cost", "torsion-0"}
    m = metrics_of(out)
    assert f"{m['relative_ess']:.3f}" in html
    for row in m["isomers"]:
        assert row["state"] in html
    # The peroxide of the dynamics is another one: the page says so.
    assert max(abs(z) for z in m["dynamics"]["z"]) > 4
    assert "grade poor" in html
    assert "Seen by the path and not by dynamics" in html
    assert any("by the dynamics" in w or "standard errors" in w for w in m["warnings"])
    assert m["warnings"][0] in unescape(html)
    # The floor is told of the bond that turns, by its name.
    (floor,) = m["floor"]
    assert floor["of"] == m["isomers"][0]["torsion"]
    assert 0.0 < floor["share"] < 0.5
    assert f"a state was lost by the fit): {floor['of']} {floor['share']:.2g}" in html
    # A path without levels left out: the ESS falls from level to level to that of the weights.
    levels = m["levels"]
    assert len(levels["time"]) == len(levels["work_spread"]) == m["n_levels"]
    assert levels["relative_ess"][-1] == pytest.approx(m["relative_ess"], abs=0.05)
    with np.load(out / "samples.npz") as stored:
        assert set(stored) == {"positions", "log_weight", "u"}


def test_page_of_a_path_alone(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    mol, _, out = folders
    shutil.copytree(out, tmp_path / "out")
    m = metrics_of(out)
    del m["dynamics"]
    m["warnings"] = ["a state is probably missing"]
    m["isomers"][0] |= {"population": 0.0, "free_energy_kj_mol": None}
    m["isomers"][1] |= {"population": 1e-4, "population_error": 1e-3}
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(m), encoding="utf-8")
    html = write_annealed_report(tmp_path / "out", load_system(mol)).read_text(encoding="utf-8")
    check_page(html, least=5)
    assert "reference MD" not in html
    assert "a state is probably missing" in html
    assert f"Never seen among 1,500 samples: {m['isomers'][0]['torsion']}" in html
    assert f"a population below its error: {m['isomers'][1]['torsion']}" in html
    assert "Every state in the table was seen" not in html


def test_dynamics_of_another_system_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    molecule = load_system(folders[0])
    write_run(tmp_path / "other", "alanine-dipeptide", draw=molecule_frames)
    write_run(tmp_path / "none", str(folders[0]), reference=False, draw=molecule_frames)
    with build_target(molecule) as target:
        for name, error, words in (
            ("other", ConfigurationError, "another System or temperature"),
            ("none", CheckpointError, "no reference data"),
        ):
            with pytest.raises(error, match=words):
                anneal_system(
                    molecule, target, tmp_path / "out", compare_with=tmp_path / name, **OPTIONS
                )
    assert not (tmp_path / "out").exists()


def test_command_writes_the_page(folders: tuple[Path, Path, Path], shell: Shell) -> None:
    mol, run, out = folders
    found = shell(
        *("anneal", mol, "--out", out, "--n-samples", 1500, "--n-points", 300, "--seed", 3),
        *("--compare-with", run),
    )
    assert found.code == 0, found.err
    assert "report.html" in found.out
    assert "standard errors" in found.out
