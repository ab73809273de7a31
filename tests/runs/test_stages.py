"""The main job from end to end on a molecule of four atoms, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
import torch
import yaml
from openmm import unit
from scipy.integrate import quad
from scipy.special import i0e
from stand_ins.peroxide import QUICK, chain_molecule, exact, write_system

from openmm_eqflow.bench.prior import run_bench
from openmm_eqflow.errors import CheckpointError, ConfigurationError, TrainingError
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.runs.publish import publish
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.stages import (
    _starting_points,
    build_target,
    flow_of,
    run,
    run_stage,
)
from openmm_eqflow.targets.forcefield import write_pdb
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.training.precision import resolve_device
from openmm_eqflow.units import kt_in_kj_mol

CONTRACT = {
    "system",
    "n_samples",
    "relative_ess",
    "relative_ess_error",
    "prior_relative_ess",
    "pareto_k",
    "max_weight_share",
    "mean_log_weight",
    "log_z",
    "log_z_error",
    "test_nll",
    "mean_reduced_potential",
    "seconds_per_sample",
    "log_q_error_p99",
    "device",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete run; tests that change it work on copies."""
    folder = tmp_path_factory.mktemp("job")
    write_system(folder / "hooh")
    system = load_system(folder / "hooh")
    with build_target(system) as target:
        run = RunDirectory.create(
            folder / "run", system, target, budget="quick", seed=None, device="cpu"
        )
    for stage in STAGES:
        assert run_stage(run, stage) is not None
    return run.path


def test_everything_is_there(finished):
    names = {p.name for p in finished.iterdir()}
    assert {
        "config.yaml",
        "reference.dcd",
        "reference.npz",
        "flow.safetensors",
        "flow.json",
        "samples.dcd",
        "topology.pdb",
        "samples.npz",
        "metrics.json",
        "report.html",
        "run.log",
    } <= names
    assert not [p for p in finished.rglob("*") if ".tmp" in p.name]
    with np.load(finished / "reference.npz") as reference:
        assert {"energies", "temperatures"} <= set(reference.files)
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in html
    log = (finished / "run.log").read_text(encoding="utf-8")
    assert all(f"stage {stage} took" in log for stage in STAGES)


def test_trajectory_opens_and_belongs_to_the_numbers(finished):
    trajectory = mdtraj.load(finished / "samples.dcd", top=finished / "topology.pdb")
    with np.load(finished / "samples.npz") as archive:
        samples = dict(archive)
    assert trajectory.n_atoms == 4
    assert trajectory.n_frames == len(samples["u"]) == 240
    np.testing.assert_array_equal(samples["chain"], np.repeat(np.arange(12), 20))
    np.testing.assert_allclose(samples["log_weight"], -samples["u"] - samples["log_q"])
    x = torch.from_numpy(trajectory.xyz.astype(np.float64))
    run = RunDirectory.open(finished)
    with build_target(run.load_system()) as target:
        u = target.reduced_potential(x).numpy()
    np.testing.assert_allclose(u, samples["u"], atol=0.05)
    log_q = load_flow(finished / "flow").log_prob(x).numpy()
    np.testing.assert_allclose(log_q, samples["log_q"], atol=0.05)
    # Superposed on the first frame: chains of a molecule do not tumble.
    assert float(np.sqrt(((trajectory.xyz - trajectory.xyz[0]) ** 2).sum(2).mean())) < 0.1


def test_chains_flow_and_reference_have_the_exact_energy(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    with np.load(finished / "samples.npz") as archive:
        u = archive["u"].reshape(12, 20)
    data, known = load_reference(finished), exact(kt_in_kj_mol(300 * unit.kelvin)).mean_u
    # Of so few frames no autocorrelation time is sure; of 20,000 it is 4.3 frames.
    frames = data.reduced_energies
    reference = frames.mean(), frames.std() * (4.3 / len(frames)) ** 0.5
    for mean, error, most in (
        (u.mean(), u.mean(1).std(ddof=1) / 12**0.5, 0.2),
        (metrics["mean_reduced_potential"], metrics["mean_reduced_potential_error"], 0.1),
        (*reference, 0.15),
    ):
        assert error < most
        assert abs(mean - known) < 5 * error
        # Power: two more degrees of freedom are another energy.
        assert abs(mean + 1.0 - known) > 5 * error
    assert metrics["relative_ess"] > 0.5
    assert metrics["chain"]["acceptance"] > 0.5


def test_second_run_skips_everything(finished):
    run = RunDirectory.open(finished)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert [run_stage(run, stage) for stage in STAGES] == [None] * 4
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    assert before == after


def test_evaluate_writes_the_keys_of_the_contract(finished, shell, tmp_path):
    found = []
    for name in ("a.json", "b.json"):
        outcome = shell(
            "evaluate", finished, "--n-samples", 300, "--seed", 5, "--json", tmp_path / name
        )
        assert outcome.code == 0, outcome
        assert outcome.err == ""
        found.append(json.loads((tmp_path / name).read_text()))
    first, second = found
    assert set(first) >= CONTRACT
    assert first["n_samples"] == 300
    assert first["system"] == "hooh"
    assert first["device"] == "cpu"
    for key in CONTRACT - {"system", "device", "seconds_per_sample"}:
        assert isinstance(first[key], (int, float)), key
        assert first[key] == second[key], key  # the seed decides
    assert 0 < first["relative_ess"] <= 1
    assert first["log_q_error_p99"] < 0.01
    other = shell("evaluate", finished, "--n-samples", 300, "--seed", 6, "--json", tmp_path / "c")
    assert other.code == 0
    third = json.loads((tmp_path / "c").read_text())
    known = exact(kt_in_kj_mol(300 * unit.kelvin)).log_z
    for found in (first, third):
        assert found["log_z_error"] < 0.05
        assert abs(found["log_z"] - known) < 5 * found["log_z_error"]
    assert first["log_z"] != third["log_z"]


def test_audit_command(finished, shell):
    outcome = shell("audit", finished, "--n-samples", 16)
    assert outcome.code == 0
    assert json.loads(outcome.out)["passed"] is True


def test_run_command_on_a_finished_run_skips(finished, shell):
    outcome = shell("run", finished)
    assert outcome.code == 0
    assert outcome.out.count("complete") == 4
    assert "relative ESS" in outcome.out
    assert outcome.err == ""


def test_sample_with_a_flow_that_ships(finished, shell, tmp_path, monkeypatch):
    shutil.copytree(finished.parent / "hooh", tmp_path / "hooh")
    monkeypatch.chdir(tmp_path)
    line = shell.refuses("sample", "hooh")
    assert "no flow ships with 'hooh'; train one (openmm-eqflow run" in line
    assert not (tmp_path / "runs").exists()
    flow = load_flow(finished / "flow")
    save_flow(flow, tmp_path / "hooh" / "flow", flow.metadata)
    outcome = shell("sample", "hooh", "--out", "fresh")
    assert outcome.code == 0, outcome
    assert (tmp_path / "fresh" / "report.html").is_file()
    assert mdtraj.load(tmp_path / "fresh" / "samples.dcd", top=tmp_path / "fresh/topology.pdb")
    evaluated = shell("evaluate", "hooh", "--n-samples", 50, "--json", "e.json")
    assert evaluated.code == 0
    assert json.loads(Path("e.json").read_text())["test_nll"] is None  # no reference, no claim


def test_retrained_flow_starts_new_chains(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    content = yaml.safe_load((copy / "config.yaml").read_text())
    run = RunDirectory.open(copy)
    (copy / "flow.json").unlink()
    content["recipe"]["train_seconds"] = 0.5
    content["seed"] = 1
    (copy / "config.yaml").write_text(yaml.safe_dump(content))
    shutil.rmtree(copy / "training")
    run = RunDirectory.open(copy)
    for stage in STAGES[1:]:
        assert run_stage(run, stage) is not None
    with np.load(copy / "samples.npz") as new, np.load(finished / "samples.npz") as old:
        assert not np.isin(new["u"], old["u"]).any()


def test_flow_of_another_system_is_refused(finished, shell, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    flow = load_flow(copy / "flow")
    save_flow(flow, copy / "flow", flow.metadata | {"system_hash": "0" * 64})
    with pytest.raises(ConfigurationError, match="trained for another System"):
        flow_of(str(copy))
    assert "trained for another System" in shell.refuses("evaluate", copy)
    (copy / "stages" / "sample.json").unlink()
    assert "trained for another System" in shell.refuses("sample", copy)


@pytest.mark.parametrize("damage", ["truncated", "altered", "words"])
def test_damaged_flow_is_one_line(finished, shell, tmp_path, damage):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    weights, words = copy / "flow.safetensors", copy / "flow.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "altered":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 4
        weights.write_bytes(content)
    else:
        words.write_text(words.read_text().replace('"tail_share": 0.', '"tail_share": 0.0'))
    assert "altered" in shell.refuses("evaluate", copy)
    (copy / "stages" / "sample.json").unlink()
    samples = (copy / "samples.npz").read_bytes()
    assert "altered" in shell.refuses("run", copy)
    assert (copy / "samples.npz").read_bytes() == samples


def test_starting_points_follow_the_weights():
    log_w = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf])
    picked = _starting_points(4000, log_w, torch.Generator().manual_seed(0))
    assert set(picked.tolist()) == {0, 2}
    share, expected = float((picked == 2).double().mean()), math.e / (1 + math.e)
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 4000)
    assert abs(share - 0.5) > 0.1  # power: as if all that are possible were as likely
    with pytest.raises(TrainingError, match="none of 4 flow samples"):
        _starting_points(2, torch.full((4,), -torch.inf), torch.Generator())


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")
    with pytest.raises(ConfigurationError, match="expected auto, cpu or cuda"):
        resolve_device("tpu")


def test_unknown_stage(finished):
    with pytest.raises(ConfigurationError, match="no stage 'pack'"):
        run_stage(RunDirectory.open(finished), "pack")


def test_bench_prior_measures_every_size_and_seed(finished: Path, tmp_path: Path) -> None:
    system, frames = finished.parent / "hooh", finished / "reference.dcd"
    path = tmp_path / "prior.json"
    result = run_bench(
        str(system), frames, sizes=(100, 300), seeds=(0, 1), n_samples=400, json_path=path
    )
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [(c["n_frames"], c["seed"]) for c in result["cases"]] == [
        (100, 0),
        (100, 1),
        (300, 0),
        (300, 1),
    ]
    for case in result["cases"]:
        assert 0.3 < case["relative_ess"] <= 1.0
        assert 1 / 400 <= case["max_weight_share"] < 0.1


def test_bench_prior_names_what_does_not_fit(finished: Path) -> None:
    with pytest.raises(ConfigurationError, match="no internal-coordinate prior"):
        run_bench("lj13", finished / "reference.dcd")
    with pytest.raises(ConfigurationError, match="does not fit the system"):
        run_bench("alanine-dipeptide", finished / "reference.dcd")


def test_publish_gives_a_flow_and_its_card(finished: Path, tmp_path: Path) -> None:
    card = publish(finished, tmp_path / "out").read_text(encoding="utf-8")
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    ess, error = metrics["relative_ess"], metrics["relative_ess_error"]
    assert f"{ess:.3f} +- {error:.3f}, n = 1,200" in card
    assert f"{metrics['prior_relative_ess']:.3f}, same n" in card
    assert f"mean log weight {metrics['mean_log_weight']:.3f} +- " in card
    assert "--budget quick --seed 0" in card
    assert f"--seed {metrics['seed']}" in card
    ours, theirs = (load_flow(p / "flow") for p in (tmp_path / "out", finished))
    x = theirs.sample(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), atol=0, rtol=0)
    assert ours.metadata["setup_seconds"] > 0


def test_evaluate_renews_the_figures_of_a_card(shell, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hooh"
    shutil.copytree(finished.parent / "hooh", folder)
    card = publish(finished, folder)
    before = card.read_text(encoding="utf-8")
    given = ("--n-samples", "640", "--seed", "5", "--json", str(tmp_path / "m.json"), "--card")
    assert shell("evaluate", str(folder), *given).code == 0
    metrics = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    after = card.read_text(encoding="utf-8")
    ess, error = metrics["relative_ess"], metrics["relative_ess_error"]
    assert f"{ess:.3f} +- {error:.3f}, n = 640, evaluation seed 5" in after
    assert "evaluate hooh --n-samples 640 --seed 5" in after
    lines, old = after.splitlines(), before.splitlines()
    assert [line.split(" | ")[0] for line in lines[:-1]] == [
        line.split(" | ")[0] for line in old[:-1]
    ]
    changed = {line.split(" | ")[0] for line in set(lines[:-1]) - set(old)}
    assert "| relative ESS (raw)" in changed
    assert not changed & {"| made by", "| data", "| prior, field", "| training", "| hardware"}


def test_evaluate_relaxed_has_the_same_log_z(shell, finished: Path, tmp_path: Path) -> None:
    found = []
    for extra in ((), ("--relax",)):
        path = tmp_path / f"m{len(extra)}.json"
        given = ("--n-samples", "1000", "--json", path, *extra)
        assert shell("evaluate", finished, *given).code == 0
        found.append(json.loads(path.read_text(encoding="utf-8")))
    plain, relaxed = found
    error = np.hypot(plain["log_z_error"], relaxed["log_z_error"])
    assert abs(plain["log_z"] - relaxed["log_z"]) < 4 * error
    assert relaxed["relative_ess"] > plain["relative_ess"]
    assert relaxed["weights_of"] == "paths"
    assert "take --card or --relax" in shell("evaluate", "toluene", "--card", "--relax").err


def test_evaluate_says_what_a_folder_of_anneal_is(tmp_path: Path) -> None:
    (tmp_path / "flow.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"what anneal made.*openmm-eqflow isomers"):
        flow_of(str(tmp_path))


def test_evaluate_at_other_temperatures(shell, finished: Path, tmp_path: Path) -> None:
    done = shell(
        *("evaluate", finished, "--n-samples", 3000, "--temperatures", "280,300,330"),
        *("--frames", tmp_path / "frames", "--json", tmp_path / "m.json"),
    )
    assert done.code == 0
    assert "its C, J/(mol K)" in done.out
    rows = json.loads((tmp_path / "m.json").read_text())["temperatures"]
    name = RunDirectory.open(finished).load_system().name
    for row in rows:
        truth = exact(8.31446261815324e-3 * row["kelvin"])
        assert abs(row["log_z"] - truth.log_z) < 4 * row["log_z_error"]
        kt = 8.31446261815324e-3 * row["kelvin"]
        assert abs(row["mean_potential"] - kt * truth.mean_u) < 4 * row["mean_potential_error"]
        frames = mdtraj.load(
            str(tmp_path / "frames" / f"{name}-{row['kelvin']:g}K.dcd"),
            top=str(tmp_path / "frames" / "topology.pdb"),
        )
        assert len(frames) == int(row["effective_samples"])
    # Power: log Z of one temperature is not that of another.
    cold, warm = (exact(8.31446261815324e-3 * t).log_z for t in (280.0, 300.0))
    assert abs(warm - cold) > 4 * rows[0]["log_z_error"]
    line = shell.refuses("evaluate", finished, "--temperatures", "300,hot")
    assert "280,300,350" in line
    assert "between 1 and 10000" in shell.refuses("evaluate", finished, "--temperatures", "0.1")


def test_a_card_is_asked_for_before_anything_is_measured(
    shell, finished: Path, tmp_path: Path
) -> None:
    assert "is a run and has no card" in shell("evaluate", str(finished), "--card").err
    shutil.copytree(finished.parent / "hooh", tmp_path / "hooh")
    assert "card.md does not exist" in shell("evaluate", str(tmp_path / "hooh"), "--card").err


def test_publish_refuses_an_unfinished_run(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match="no complete 'sample' stage"):
        publish(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def exact_log_z(n: int) -> float:
    """Of ``chain_molecule(n)`` at 300 K: bonds, bends and the torsion are independent."""
    kt = kt_in_kj_mol(300 * unit.kelvin)
    lengths = {2: (0.074,), 4: (0.106, 0.12, 0.106)}[n]
    z = {2: 4 * math.pi, 4: 8 * math.pi**2}[n] * n**-1.5
    for length in lengths:
        z *= math.sqrt(2 * math.pi * kt / 3e5) * (length**2 + kt / 3e5)
    for _ in range(n - 2):
        z *= quad(lambda t: math.sin(t) * math.exp(-200 * (t - math.pi) ** 2 / kt), 2, math.pi)[0]
    return math.log(z) + (math.log(2 * math.pi * i0e(0.65 / kt)) if n == 4 else 0.0)


@pytest.mark.parametrize("n", [2, 4])
def test_molecules_of_two_atoms_and_in_line_run_to_the_right_log_z(tmp_path, n):
    structure, system, positions = chain_molecule(n)
    write_pdb(tmp_path / "mol.pdb", structure, positions)
    (tmp_path / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
    folder = tmp_path / "mol"
    init_system(folder, pdb=tmp_path / "mol.pdb", system_xml=tmp_path / "in.xml")
    content = yaml.safe_load((folder / "system.yaml").read_text())
    content["settings"] = {"recipe": QUICK | {"reference_seconds": 4, "n_evaluate": 4000}}
    (folder / "system.yaml").write_text(yaml.safe_dump(content))
    metrics = run(folder, tmp_path / "run", budget="quick", device="cpu").metrics()
    assert metrics["relative_ess"] > 0.8
    assert metrics["log_z_error"] < 0.02
    assert abs(metrics["log_z"] - exact_log_z(n)) < 5 * metrics["log_z_error"] + 1e-4
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_card_names_the_method_that_is_not_the_default(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished.parent / "hooh", tmp_path / "hooh")
    system = tmp_path / "hooh" / "system.yaml"
    content = yaml.safe_load(system.read_text(encoding="utf-8"))
    del content["settings"]  # which speak of dynamics
    system.write_text(yaml.safe_dump(content), encoding="utf-8")
    config = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(config.read_text(encoding="utf-8")) | {"system": str(system.parent)}
    content["versions"] = content.pop("versions")  # the last entry
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    card = publish(tmp_path / "run", tmp_path / "out").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(openmm-eqflow run .*?)`", card)
    assert command.endswith("--method tempering")  # --ess is refused beside it
