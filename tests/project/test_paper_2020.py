"""The experiments of the 2020 paper, with tiny budgets: one command each, resumable, honest."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from stand_ins import ROOT
from stand_ins.runs import write_run

from openmm_eqflow.analysis.weights import Estimate
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.geometry import augment_together
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.vector_fields import KernelField

sys.path.insert(0, str(ROOT / "examples" / "paper_2020"))

import experiment
import minima
import new_minima
import nll_vs_size
import one_training
import reference_frames
import results_page
import reweighting

TINY = "--steps 4 --batch-size 8 --n-test 12"
NLL = f"--systems dw4 --fields KernelField MLPField --seeds 0 1 {TINY}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("dw4", "lj13"):
        write_run(folder / name, name, n_steps=4, n_flow=20)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Path:
    """Return the results of all three experiments."""
    folder = tmp_path_factory.mktemp("paper")
    common = ["--out", str(folder), "--runs", str(runs)]
    nll_vs_size.main([*common, *NLL.split(), "--sizes", "10", "20"])
    reweighting.main([*common, *NLL.split(), "--sizes", "20", "--n-samples", "40"])
    words = f"--fields KernelField --augmentation off --seeds 0 {TINY} --sizes 10 --n-samples 12"
    new_minima.main([*common, *words.split()])
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(values: list[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def test_nll_table_has_the_numbers_of_the_records(out: Path) -> None:
    found = records(out / "trainings")
    of_dw4 = [r for r in found if r["task"]["system"] == "dw4"]
    assert len(of_dw4) == 2 * 2 * 2 * 2
    text = (out / "nll_vs_size.md").read_text()
    assert (out / "nll_vs_size.png").read_bytes().startswith(b"\x89PNG")
    for key, start in (("test_nll", "| test NLL"), ("excess", "| excess")):
        table = rows(text[text.index(start) :])
        assert table[0][1:] == ["10", "20"]
        for field, augmented in (("KernelField", False), ("MLPField", True)):
            name = field + (", augmented" if augmented else "")
            cells = next(row for row in table if row[0] == name)[1:]
            for size, cell in zip((10, 20), cells, strict=True):
                values = [
                    r[key]
                    for r in of_dw4
                    if (r["task"]["field"], r["task"]["augmented"]) == (field, augmented)
                    and r["task"]["size"] == size
                ]
                assert cell == shown(values, 2)
    assert "4 optimiser steps" in text
    for record in of_dw4:
        assert record["n_steps"] == 4
        assert record["n_training"] + record["n_validation"] == record["task"]["size"]
        assert record["n_test"] == 12
        assert record["training_seconds"] > 0
        assert record["machine"]
        assert record["kept_step"] in [row["step"] for row in record["history"]]
        assert f"{record['floor']:.2f}" in text


def test_ess_table_has_the_numbers_of_the_records(out: Path) -> None:
    found = records(out / "reweighting")
    assert len(found) == 8
    (row,) = [r for r in rows((out / "reweighting.md").read_text()) if r[2] == "KernelField"]
    values = [
        r["relative_ess"]
        for r in found
        if r["task"]["field"] == "KernelField" and not r["task"]["augmented"]
    ]
    assert row[3:5] == [shown(values, 4), "40"]
    assert all(1 / 40 <= value <= 1 for value in values)


def test_minima_table_has_the_numbers_of_the_records(out: Path) -> None:
    (found,) = records(out / "minima")
    text = (out / "new_minima.md").read_text()
    (row,) = [r for r in rows(text) if r[0] == "lj13"]
    share = next(r for r in rows(text) if r[0] == "KernelField")
    order = ("training", "reference", "flow", "prior")
    assert share[1:] == [f"{found[source]['lowest_share']:.3f}" for source in order]
    flow, training = found["flow"], found["training"]
    assert row[3] == str(training["n_distinct"])
    assert row[4:7] == [str(flow[k]) for k in ("n_quenched", "n_distinct", "n_new")]
    assert training["n_quenched"] == 10
    assert training["n_new"] == 0
    assert flow["n_converged"] == flow["n_quenched"] == 12
    assert 0 < flow["n_new"] <= flow["n_distinct"] == len(flow["energies"]) <= 12
    assert min(flow["energies"]) > -83.0897


def test_what_is_done_is_skipped(
    out: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (out / "trainings").iterdir()}
    text = (out / "nll_vs_size.md").read_text()
    made = []

    def count(*arguments):
        made.append(arguments[0].name)
        return one_training.train_one(*arguments)

    monkeypatch.setattr(experiment, "train_one", count)
    words = ["--out", str(out), "--runs", str(runs), *NLL.split(), "--sizes", "10", "20"]
    nll_vs_size.main(words)
    assert made == []
    assert {p: p.stat().st_mtime_ns for p in (out / "trainings").iterdir()} == before
    # The table is made of all that is there: by now, of the training of the minima too.
    again = (out / "nll_vs_size.md").read_text()
    assert text[text.index("**dw4**") : text.index("Means over")].strip() in again
    assert "**lj13** (every training: 4 optimiser steps, flow-matching, batch 8)" in again
    missing = out / "trainings" / "dw4-KernelField-plain-10-seed1.json"
    record = json.loads(missing.read_text())
    missing.unlink()
    nll_vs_size.main(words)
    assert made == ["dw4-KernelField-plain-10-seed1"]
    assert json.loads(missing.read_text())["test_nll"] == record["test_nll"]
    with pytest.raises(SystemExit) as stop:
        nll_vs_size.main([*words, "--steps", "5"])
    (line,) = str(stop.value).splitlines()
    assert re.search(r"steps 4, now 5: choose another --out", line)
    capsys.readouterr()


def test_training_by_likelihood(tmp_path: Path, runs: Path) -> None:
    words = f"--systems dw4 --fields KernelField --seeds 0 {TINY} --sizes 10 --objective nll"
    nll_vs_size.main(["--out", str(tmp_path), "--runs", str(runs), *words.split()])
    plain, augmented = (
        next(r for r in records(tmp_path / "trainings") if r["task"]["augmented"] == how)
        for how in (False, True)
    )
    assert plain["settings"]["objective"] == "nll"
    for record in (plain, augmented):
        # The loss is the NLL of the training frames, also of augmented ones.
        assert record["history"][0]["loss"] == pytest.approx(record["test_nll"], abs=2.0)
    assert ", nll, batch 8" in (tmp_path / "nll_vs_size.md").read_text()
    with pytest.raises(SystemExit, match="objective nll, now flow-matching: choose another"):
        reweighting.main(
            ["--out", str(tmp_path), "--runs", str(runs), *words.split()[:-2], "--n-samples", "9"]
        )


def test_refusals_are_one_line(tmp_path: Path, runs: Path) -> None:
    for words, wanted in (
        (["--sizes", "1000"], "360 training frames, 1000 are wanted"),
        (["--sizes", "2"], "at least 4 frames"),
        (["--sizes", "10", "--systems", "toluene"], "no system|expected one of"),
    ):
        options = ["--out", str(tmp_path), "--runs", str(runs), *NLL.split(), *words]
        if "toluene" in words:
            write_run(tmp_path / "other" / "toluene", "dw4", n_steps=4, n_flow=20)
            options += ["--runs", str(tmp_path / "other")]
            wanted = "is a run of dw4, expected one of toluene"
        with pytest.raises(SystemExit) as stop:
            nll_vs_size.main(options)
        assert re.search(wanted, str(stop.value))
        assert "\n" not in str(stop.value)


def test_results_page(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "paper_2020.md"
    page.parent.mkdir()
    page.write_text((ROOT / "docs" / "paper_2020.md").read_text())
    for _ in range(2):  # the second time changes nothing
        results_page.main([str(out), "--page", str(page)])
        text = page.read_text()
        for name in results_page.TITLES:
            assert text.count((out / f"{name}.md").read_text()) == 1
            picture = f"paper-2020-{name.replace('_', '-')}.png"
            assert f"(images/{picture})" in text
            copied = (page.parent / "images" / picture).read_bytes()
            assert copied == (out / f"{name}.png").read_bytes()
    with pytest.raises(SystemExit, match="has no tables"):
        results_page.main([str(tmp_path), "--page", str(page)])


def test_nll_is_the_full_density_on_the_mean_free_subspace() -> None:
    """A field v = N b x makes a Gaussian wider; everything about it is known."""
    n, n_dims, prior_scale, rate, scale = 4, 2, 1.3, 0.05, 1.7
    field = KernelField(classes=[0] * n, n_dims=n_dims, reach=5.0, n_rbf=4, n_times=2)
    with torch.no_grad():
        field.weight.zero_()
        field.bias.fill_(rate)
    flow = EquivariantFlow(MeanFreeGaussian(n, n_dims, prior_scale), field.double())
    dimension = (n - 1) * n_dims
    truth = MeanFreeGaussian(n, n_dims, scale)
    x = truth.sample(4000, generator=torch.Generator().manual_seed(0))
    log_z = 0.5 * dimension * math.log(2 * math.pi * scale**2)
    target = types.SimpleNamespace(
        reduced_potential=lambda y: 0.5 * (y / scale).square().sum((1, 2))
    )
    frames = types.SimpleNamespace(target=target, log_z=Estimate(log_z, 0.0))
    found = one_training.measure_nll(flow, frames, x, seed=0)
    width = prior_scale * math.exp(n * rate)
    square = float((x / width).square().sum((1, 2)).mean())
    exact = 0.5 * dimension * math.log(2 * math.pi * width**2) + 0.5 * square
    assert found["test_nll"] == pytest.approx(exact, abs=2e-3)
    ratio = (scale / width) ** 2
    divergence = 0.5 * dimension * (ratio - 1 - math.log(ratio))
    assert abs(found["excess"] - divergence) < 5 * found["excess_error"] + 2e-3
    assert found["excess_error"] < 0.2 * found["test_nll_error"]
    # Power control: the convention without 1/2 D log 2 pi is 5.51 away.
    dropped = 0.5 * dimension * math.log(2 * math.pi)
    assert dropped == pytest.approx(5.51, abs=0.01)
    assert abs(found["test_nll"] - dropped - exact) > 5


def test_floor_is_the_entropy(runs: Path) -> None:
    run = reference_frames.RunDirectory.open(runs / "dw4")
    frames = reference_frames.load_frames(run, "dw4", n_pool=300, n_test=20)
    data = reference_frames.load_reference(run.path)
    x = data.positions.astype(np.float64)
    d = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)[:, *np.tril_indices(4, -1)]
    u = (0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2).sum(1)
    assert float(frames.floor.value) == pytest.approx(u.mean() + 29.662, abs=1e-4)
    assert float(frames.floor.error) > 0.005


@pytest.mark.parametrize("name", ["dw4", "lj13"])
def test_augmentation_leaves_the_energy_alone(name: str) -> None:
    with build_target(load_system(name)) as target:
        stream = torch.Generator().manual_seed(0)
        x = torch.from_numpy(target.positions)[None]
        x = x + 0.05 * torch.randn(
            50, target.n_particles, target.n_dims, generator=stream, dtype=torch.float64
        )
        (y,) = augment_together(x, classes=target.symmetry.classes, proper=False, generator=stream)
        assert float((y - x).abs().amax((1, 2)).min()) > 0.1
        torch.testing.assert_close(target.reduced_potential(y), target.reduced_potential(x))


def icosahedron() -> torch.Tensor:
    """Thirteen particles, the shell at distance 1 from the centre."""
    golden = (1 + 5**0.5) / 2
    corners = torch.tensor(
        [[0.0, s, t * golden] for s in (1, -1) for t in (1, -1)], dtype=torch.float64
    )
    shell = torch.cat([corners.roll(k, 1) for k in range(3)]) / (1 + golden**2) ** 0.5
    return torch.cat([torch.zeros(1, 3, dtype=torch.float64), shell])


def test_the_icosahedron_is_found_once() -> None:
    ideal = icosahedron()
    unit = torch.pdist(ideal).numpy()

    def energy(radius: float) -> float:
        d = radius * unit
        return float((2 * (d**-12 - 2 * d**-6)).sum() + 0.5 * 12 * radius**2)

    best = minimize_scalar(energy, bounds=(0.8, 1.2), method="bounded", options={"xatol": 1e-10})
    stream = torch.Generator().manual_seed(4)
    noise = 0.03 * torch.randn(40, 13, 3, generator=stream, dtype=torch.float64)
    (x,) = augment_together(
        best.x * ideal + noise, classes=[0] * 13, proper=False, generator=stream
    )
    # The same with a corner moved onto a face: another minimum.
    moved = best.x * ideal.clone()
    moved[1] = 1.7 * moved[[-1, -2, -3]].mean(0)
    (y,) = augment_together(
        moved.expand(5, -1, -1), classes=[0] * 13, proper=False, generator=stream
    )
    with build_target(load_system("lj13")) as target:
        ends = minima.quench(target, torch.cat([x, y]))
        assert bool(ends.converged.all())
        labels = minima.label_minima(ends.x, ends.u)
        assert bool((labels[:40] == 0).all())
        assert bool((labels[40:] == 1).all())
        torch.testing.assert_close(
            ends.u[:40], torch.full((40,), best.fun, dtype=torch.float64), atol=1e-7, rtol=0
        )
        assert float(minima.lowest_curvature(target, ends.x[:1])) > 1.0
        # The moved corner is held by symmetry at a saddle; off it, there is a minimum below.
        assert float(minima.lowest_curvature(target, ends.x[-1:])) < 0.0
        off = torch.cat([ends.x[20:], y[:1] + noise[:1]])
        parts = {"training": ends.x[:20], "flow": off, "reference": ends.x[:3]}
        result = new_minima.compare(
            target, {k: minima.quench(target, part) for k, part in parts.items()}
        )
        assert [result["flow"][k] for k in ("n_quenched", "n_distinct", "n_new")] == [26, 2, 1]
        assert result["flow"]["lowest_share"] == pytest.approx(20 / 26)
        assert result["training"]["n_distinct"] == result["n_saddles"] == 1
        assert result["n_new_confirmed"] == 0
        # Two particles on top of each other have no finite energy, and still find a minimum.
        overlap = best.x * ideal.clone()
        overlap[1] = overlap[2] + 1e-3
        end = minima.quench(target, overlap[None])
        assert bool(end.converged)
        assert float(end.u) < -60.0
