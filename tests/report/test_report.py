"""The report of a run and the comparison of runs, on run directories with known answers."""

from __future__ import annotations

import dataclasses
import json
import re
from html import escape
from xml.etree import ElementTree

import numpy as np
import pytest
from stand_ins.pages import check_page
from stand_ins.runs import PHI_POSITIVE, write_run

from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.report import write_report
from openmm_eqflow.report.compare import compare
from openmm_eqflow.report.data import load_run
from openmm_eqflow.report.populations import compare_ensembles
from openmm_eqflow.report.theme import COLOURS, new_figure, style, to_svg
from openmm_eqflow.report.verdict import chain_checks, judge


def report_of(path):
    html = write_report(path).read_text(encoding="utf-8")
    return html, json.loads((path / "metrics.json").read_text(encoding="utf-8"))


def judged(path):
    """Verdict and quantities alone: figures take most of the time of a report."""
    run = load_run(path)
    quantities = compare_ensembles(run)
    return judge(run, quantities), {row.name: row for row in quantities}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture(scope="module")
def good_report(good):
    return report_of(good)


def test_good_run_says_why(good_report):
    html, metrics = good_report
    figures = check_page(html)
    verdict = metrics["verdict"]
    # psi and the amides of these frames never turn.
    assert verdict["word"] == "Confined"
    assert verdict["flow"] == "good"
    sentence = verdict["sentence"]
    assert "ω (5-7), ω (15-17) were seen in one state only" in sentence
    for word in ("chains agree", "raw relative ESS", "n = 1,500", "Pareto k", "φ > 0", "audited"):
        assert word in sentence
    assert escape(sentence) in html
    assert {
        "energy",
        "log-weights",
        "weight-share",
        "acceptance",
        "streaks",
        "autocorrelation",
        "loss",
        "training-ess",
        "rama-6-0",
        "rama-6-1",
        "rama-6-2",
        "rama-6-difference",
        "rama-6-error",
        "torsion-0",
        "torsion-6",
    } <= figures
    for text in ("Chirality", "8π²", "log 8", "twice finer grid", "openmm 8", "evaluation 11"):
        assert text in html


def test_numbers_behind_the_verdict_are_added_to_metrics(good, good_report):
    _, metrics = good_report
    assert metrics["relative_ess"] > 0.8
    (phi,) = [row for row in metrics["populations"] if row["name"] == "φ > 0"]
    for label in ("reference MD", "Markov chain", "reweighted flow"):
        estimate = phi["estimates"][label]
        assert abs(estimate["value"] - PHI_POSITIVE) < 5 * estimate["error"]
        assert estimate["effective_samples"] > 100
    assert abs(phi["z"]) < 4
    # Reading the run again, with the report's own additions there, gives the same.
    verdict, quantities = judged(good)
    assert verdict.to_json()["sentence"] == metrics["verdict"]["sentence"]
    assert quantities["φ > 0"].to_json() == phi


def test_stuck_chains_and_heavy_weights_read_as_bad(tmp_path):
    verdict, _ = judged(write_run(tmp_path / "run", stuck=True, spread=4.0))
    assert verdict.word == "Not converged"
    assert verdict.flow == "poor"
    assert "100% of all flow moves lie in long stretches of rejections" in verdict.sentence
    assert "the flow is poor" in verdict.sentence
    assert "--budget standard" in verdict.advice
    grades = {check.name: check.grade for check in verdict.checks}
    assert grades["largest weight in the chain against proposals"] == "poor"
    assert grades["agreement between chains"] == "poor"
    assert grades["Pareto k of the weights"] == "poor"


def test_weighted_samples_decide_where_they_are_enough(tmp_path):
    path = write_run(tmp_path / "run", n_steps=8)
    verdict, _ = judged(path)
    assert verdict.word == "Confined"
    assert "1,500 independent weighted samples are worth 1," in verdict.sentence
    assert "effective samples" in verdict.sentence  # short chains are told all the same
    # Power: too few of them, or a weight that the flow never proposed, and the chains decide.
    few, _ = judged(write_run(tmp_path / "few", n_steps=8, n_flow=300))
    assert few.word == "Not converged"
    metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    metrics["chain"]["max_log_weight_gap"] = 7.0
    (path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert judged(path)[0].word == "Not converged"


def test_a_heavy_tail_of_even_weights_decides_nothing(tmp_path):
    path = write_run(tmp_path / "run")
    file = path / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) | {"pareto_k": 0.9}
    for largest, flow in ((1.5, "good"), (5.0, "poor")):
        metrics["max_weight_share"] = largest / metrics["n_samples"]
        file.write_text(json.dumps(metrics), encoding="utf-8")
        assert judged(path)[0].flow == flow


def test_what_a_path_may_have_missed_is_no_convergence(tmp_path):
    path = write_run(tmp_path / "run")
    file = path / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))
    for told, word in (([], "Confined"), (["a state is probably missing"], "Doubtful")):
        file.write_text(json.dumps(metrics | {"warnings": told}), encoding="utf-8")
        verdict, _ = judged(path)
        assert verdict.word == word
        assert ("a state is probably missing" in verdict.sentence) == bool(told)


@pytest.mark.parametrize(
    ("n_stuck", "length", "grade"),
    [(0, 0, "good"), (1, 30, "good"), (1, 100, "good"), (8, 60, "fair"), (40, 100, "poor")],
)
def test_one_unlucky_chain_of_many_is_no_verdict(good, n_stuck, length, grade):
    accepted = np.ones((100, 100), dtype=bool)
    accepted[:n_stuck, :length] = False
    run = dataclasses.replace(load_run(good), accepted=accepted)
    (check,) = [c for c in chain_checks(run, {}, None) if "stuck" in c.name]
    assert check.grade == grade


@pytest.mark.parametrize("n_steps", [4, 5, 8, 40])
def test_chains_that_never_move_are_stuck_however_short(good, n_steps):
    run = dataclasses.replace(load_run(good), accepted=np.zeros((20, n_steps), dtype=bool))
    (check,) = [c for c in chain_checks(run, {}, None) if "stuck" in c.name]
    assert check.grade == "poor"


def test_poor_flow_alone_makes_agreeing_chains_doubtful(tmp_path):
    verdict, _ = judged(write_run(tmp_path / "run", spread=4.0, seed=3))
    assert verdict.flow == "poor"
    assert verdict.word == "Doubtful"


def test_wrong_population_is_not_converged(tmp_path):
    path = write_run(tmp_path / "run", n_chains=50, n_steps=20)
    run = load_run(path)
    # The chain sees only the frames with phi < 0, as often as it likes.
    keep = np.flatnonzero(run.chain.angles[:, 0] < 0.0)
    rows = keep[np.arange(len(run.chain.x)) % len(keep)]
    chain = dataclasses.replace(run.chain, x=run.chain.x[rows], u=run.chain.u[rows])
    run = dataclasses.replace(run, chain=chain)
    verdict = judge(run, compare_ensembles(run))
    assert verdict.word == "Not converged"
    assert "φ > 0 is 0.000" in verdict.sentence


def test_failed_audit_is_not_converged(tmp_path):
    path = write_run(tmp_path / "run")
    record = json.loads((path / "flow.json").read_text(encoding="utf-8"))
    record["audit"] |= {"passed": False, "log_q_error_p99": 0.5}
    (path / "flow.json").write_text(json.dumps(record), encoding="utf-8")
    verdict, _ = judged(path)
    assert verdict.word == "Not converged"
    assert "log q is off by 5.0e-01 kT" in verdict.sentence


def test_adopted_flow_is_compared_with_its_reweighted_samples(tmp_path):
    path = write_run(tmp_path / "run", reference=False, n_steps=40, n_flow=400)
    html, metrics = report_of(path)
    figures = check_page(html)
    assert "loss" not in figures
    assert "rama-6-2" not in figures
    assert "the flow was adopted" in html
    (phi,) = [row for row in metrics["populations"] if row["name"] == "φ > 0"]
    assert phi["compared_with"] == "reweighted flow"
    assert "reference MD" not in phi["estimates"]


def test_harmonic_run_is_compared_with_exact_values(tmp_path):
    html, metrics = report_of(write_run(tmp_path / "run", "harmonic"))
    assert {"pairs", "centre"} <= check_page(html)
    rows = {row["name"]: row for row in metrics["populations"]}
    assert rows["mean energy"]["exact"] == 7.5
    estimate = rows["log Z"]["estimates"]["reweighted flow"]
    assert abs(estimate["value"] - rows["log Z"]["exact"]) < 5 * estimate["error"]
    names = [check["name"] for check in metrics["verdict"]["checks"]]
    assert "mean energy: Markov chain against the exact value" in names


def test_planar_cluster_has_pair_states(tmp_path):
    html, metrics = report_of(write_run(tmp_path / "run", "dw4"))
    assert {"pairs", "centre", "energy"} <= check_page(html)
    assert any(row["name"] == "close pairs" for row in metrics["populations"])


def test_molecule_without_a_backbone(tmp_path):
    html, _ = report_of(write_run(tmp_path / "run", "toluene", n_steps=20))
    figures = check_page(html)
    assert "torsion-0" in figures
    assert not any(key.startswith("rama") for key in figures)
    assert "No stereocentre" in html


@pytest.mark.parametrize("name", ["alanine-dipeptide", "dw4", "harmonic"])
def test_tiny_runs_still_get_a_report(tmp_path, name):
    path = write_run(
        tmp_path / "run",
        name,
        n_chains=3,
        n_steps=1,
        n_flow=12,
        n_reference=6,
        n_invalid=2,
    )
    html, metrics = report_of(path)
    check_page(html)
    assert metrics["verdict"]["word"] == "Not converged"
    assert "too short to judge" in metrics["verdict"]["sentence"]


def test_flow_with_one_valid_sample(tmp_path):
    verdict, _ = judged(write_run(tmp_path / "run", n_flow=50, n_invalid=49))
    assert verdict.flow == "poor"


def test_trajectory_alone_is_enough(tmp_path, capfd):
    path = write_run(tmp_path / "run", n_steps=20)
    whole = load_run(path)
    (path / "samples" / "chunk-00000.npz").unlink()
    rest = load_run(path)
    capfd.readouterr()  # the DCD reader prints
    # The trajectory is superposed, so only invariants are the same.
    assert np.abs(rest.chain.angles - whole.chain.angles).max() < 1e-3


def test_damaged_run_is_named(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10, n_flow=50, n_reference=20)
    (path / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"metrics\.json"):
        write_report(path)


def test_compare_overlays_runs_of_one_system(tmp_path, good):
    other = write_run(tmp_path / "other", spread=1.0, seed=5, budget="standard")
    html = compare([good, other], tmp_path / "out.html").read_text(encoding="utf-8")
    figures = check_page(html)
    assert {"compare-energy", "compare-weights", "compare-torsion-0"} <= figures
    assert "standard, 5" in html
    assert "φ &gt; 0" in html


def test_compare_of_different_systems_overlays_only_weights(tmp_path, good):
    other = write_run(tmp_path / "other", "harmonic", n_steps=20)
    html = compare([good, other], tmp_path / "out.html").read_text(encoding="utf-8")
    figures = check_page(html)
    assert "compare-weights" in figures
    assert "compare-energy" not in figures
    assert "different systems" in html


def test_compare_needs_two_runs(tmp_path, good):
    with pytest.raises(ConfigurationError, match="two or more"):
        compare([good, good], tmp_path / "out.html")


def test_svg_follows_the_page_and_does_not_depend_on_the_clock(monkeypatch):
    def draw():
        with style():
            figure, axes = new_figure()
            axes.plot([0, 1], np.array([1.0, 2.0]), color=COLOURS["chain"])
            axes.set_xlabel("a < b & c")
            return to_svg(figure, "key", 'x < "y"')

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the clock of matplotlib's files
    svg = draw()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert svg == draw()
    assert "var(--c-chain)" in svg
    assert "var(--ink)" in svg
    assert "font-family" not in svg
    assert all(found.startswith("key-") for found in re.findall(r'\bid="([^"]+)"', svg))
    ElementTree.fromstring(svg)


def test_moderate_weight_gap_is_a_warning(tmp_path):
    path = write_run(tmp_path / "run")
    metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    for gap, word in ((3.5, "Confined"), (7.0, "Not converged")):
        metrics["chain"]["max_log_weight_gap"] = gap
        (path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        verdict, _ = judged(path)
        assert verdict.word == word
        assert f"weights e^{gap:.1f} times" in verdict.sentence
