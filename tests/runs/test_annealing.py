"""Sampling without reference data: what is written, populations, resume, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from stand_ins.command_line import Shell
from stand_ins.peroxide import held, held_exactly, write_inputs, write_system

from openmm_eqflow.analysis.isomers import isomer_populations
from openmm_eqflow.analysis.observables import Torsion
from openmm_eqflow.analysis.weights import log_z, relative_ess_with_error
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.relaxed import AnnealedPath, Levels
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.priors.torsions import TorsionDensity, TorsionGroup
from openmm_eqflow.runs.annealing import (
    _one_way,
    _single_conformers,
    _warnings,
    anneal_system,
    backwards,
)
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.constraints import Constraints
from openmm_eqflow.targets.isomers import Isomers
from openmm_eqflow.targets.library import MolecularSystem, load_system

KT = 8.314462618e-3 * 300


def torsion_weight(tau: float) -> float:
    """Boltzmann weight of the peroxide's torsion, which is independent of all else."""
    u = 4 * (1 + math.cos(2 * tau - 0.3)) + 3 * (1 + math.cos(tau - math.pi))
    return math.exp(-u / KT)


def exact_log_z() -> float:
    z = 8 * math.pi**2 * 4**-1.5
    for length in (0.097, 0.147, 0.097):
        z *= quad(
            lambda b, r=length: b * b * math.exp(-150_000 * (b - r) ** 2 / KT),
            length - 0.05,
            length + 0.05,
            points=[length],
        )[0]
    bend = quad(lambda t: math.sin(t) * math.exp(-250 * (t - 1.77) ** 2 / KT), 0, math.pi)[0]
    return math.log(z * bend**2 * quad(torsion_weight, -math.pi, math.pi)[0])


@pytest.fixture(scope="module")
def molecule(tmp_path_factory: pytest.TempPathFactory) -> MolecularSystem:
    folder = tmp_path_factory.mktemp("peroxide") / "mol"
    write_system(folder)
    return load_system(folder)


@pytest.mark.statistical
def test_a_molecule_with_a_known_torsion(
    molecule: MolecularSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with build_target(molecule) as target:
        metrics = anneal_system(molecule, target, out, n_samples=4000, n_points=400, seed=3)
        assert metrics["relative_ess"] > 0.85
        assert metrics["warnings"] == []
        exact = exact_log_z()
        assert abs(metrics["log_z"] - exact) < 4 * metrics["log_z_error"]
        assert metrics["log_z_error"] < 0.02
        whole = quad(torsion_weight, -math.pi, math.pi)[0]
        assert {row["state"] for row in metrics["isomers"]} == {"gauche+", "anti", "gauche-"}
        for row in metrics["isomers"]:
            low, high = {
                "gauche+": (0.0, 2 * math.pi / 3),
                "anti": (2 * math.pi / 3, 4 * math.pi / 3),
                "gauche-": (-2 * math.pi / 3, 0.0),
            }[row["state"]]
            p = quad(torsion_weight, low, high)[0] / whole
            assert abs(row["population"] - p) < 4 * row["population_error"]
            assert row["population_error"] < 0.02
        # Backwards from its own frames a path says the same.
        back = metrics["backwards"]
        assert abs(back["log_z"] - exact) < 4 * back["log_z_error"] < 0.1
        assert back["relative_ess"] == pytest.approx(metrics["relative_ess"], abs=0.08)
        stored = np.load(out / "samples.npz")
        assert stored["positions"].shape == (4000, 4, 3)
        # power: log q dropped, the samples say something else of log Z
        assert abs(log_z(-stored["u"]).value - exact) > 1.0
        frames = mdtraj.load(str(out / "samples.dcd"), top=str(out / "topology.pdb"))
        assert frames.n_frames == pytest.approx(metrics["relative_ess"] * 4000, abs=2)
        # The path is a flow like any other.
        x, log_q = load_flow(out / "flow").sample_and_log_prob(
            500, generator=torch.Generator().manual_seed(1)
        )
        log_w = -target.reduced_potential(x) - log_q
        assert abs(float(torch.logsumexp(log_w, 0)) - math.log(500) - exact) < 0.1
        # Again: nothing is made anew.
        before = (out / "flow.safetensors").stat().st_mtime_ns
        with monkeypatch.context() as patch:
            patch.setattr(AnnealedPath, "sample_and_log_prob", None)
            again = anneal_system(molecule, target, out, n_samples=4000, n_points=400, seed=3)
        assert again["log_z"] == metrics["log_z"]
        assert (out / "flow.safetensors").stat().st_mtime_ns == before
        # Cut: what is lost of the draws is drawn again, and nothing else.
        parts = sorted((out / "drawn").iterdir())
        parts[-1].unlink()
        (out / "metrics.json").unlink()
        drawn: list[int] = []
        with monkeypatch.context() as patch:
            draw = AnnealedPath.sample_and_log_prob
            patch.setattr(
                AnnealedPath,
                "sample_and_log_prob",
                lambda self, n, **options: drawn.append(n) or draw(self, n, **options),
            )
            again = anneal_system(molecule, target, out, n_samples=4000, n_points=400, seed=3)
        assert 0 < sum(drawn) < 4000
        assert len(np.unique(np.load(out / "samples.npz")["u"])) == 4000  # no draw twice
        assert again["log_z"] == pytest.approx(metrics["log_z"], abs=1e-9)
        with pytest.raises(ConfigurationError, match="other settings"):
            anneal_system(molecule, target, out, n_points=400, seed=4)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        with pytest.raises(ConfigurationError, match="holds other files"):
            anneal_system(molecule, target, tmp_path / "full")
        with pytest.raises(ConfigurationError, match="above 0 and below 1"):
            anneal_system(molecule, target, tmp_path / "never", ess=1.2)


@pytest.mark.statistical
@pytest.mark.slow
def test_a_molecule_with_its_bonds_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log Z and mean energy of constrained dynamics, determinant of the mass metric included."""
    write_system(tmp_path / "mol")
    write_inputs(tmp_path / "mol", held())
    molecule = load_system(tmp_path / "mol")

    def deviations(name: str) -> tuple[float, float]:
        with build_target(molecule) as target:
            found = anneal_system(
                molecule, target, tmp_path / name, n_samples=40_000, n_points=400, seed=4
            )
            stored = np.load(tmp_path / name / "samples.npz")
            x = torch.from_numpy(stored["positions"]).double()
            u = target.kT * target.reduced_potential(x).numpy()
        assert found["relative_ess"] > 0.85
        bonds = (x[:, 1:] - x[:, :-1]).norm(dim=-1)
        assert (bonds - torch.tensor([0.097, 0.147, 0.097])).abs().max() < 1e-7
        w = np.exp(stored["log_weight"] - stored["log_weight"].max())
        mean = (w @ u) / w.sum()
        error = np.sqrt((w**2) @ (u - mean) ** 2) / w.sum()
        assert found["log_z_error"] < 0.005
        assert error < 0.03
        log_z, energy = held_exactly(KT)
        return (found["log_z"] - log_z) / found["log_z_error"], (mean - energy) / error

    assert all(abs(away) < 3 for away in deviations("out"))
    # power: without the determinant both are wrong
    monkeypatch.setattr(Constraints, "half_log_det", lambda self, x: 0 * x[:, 0, 0])
    monkeypatch.setattr(
        Constraints, "half_log_det_and_gradient", lambda self, x: (0 * x[:, 0, 0], 0 * x)
    )
    assert all(abs(away) > 4 for away in deviations("flat"))


def four_atoms(tau: np.ndarray) -> np.ndarray:
    x = np.zeros((len(tau), 4, 3))
    x[:, 0, 1], x[:, 2, 0] = 0.1, 0.1
    x[:, 3, 0], x[:, 3, 1], x[:, 3, 2] = 0.1, 0.1 * np.cos(tau), 0.1 * np.sin(tau)
    return x


def test_states_and_free_energies() -> None:
    tau = np.radians(np.array([0.5, 60.0, 119.0, 121.0, 180.0, -150.0, -119.0, -60.0]))
    x, kt = four_atoms(tau), 2.5
    log_w = np.log(np.array([1.0, 1, 1, 2, 2, 2, 0.5, 0.5]))
    single, amide, methyl = (
        Torsion("a", (0, 1, 2, 3)),
        Torsion("b", (0, 1, 2, 3), kind="amide"),
        Torsion("c", (0, 1, 2, 3), fold=3),
    )
    rows = isomer_populations((single, amide, methyl), x, log_w, kt)
    found = {(row["torsion"], row["state"]): row for row in rows}
    assert set(found) == {
        ("a", "gauche+"), ("a", "anti"), ("a", "gauche-"), ("b", "cis"), ("b", "trans"),
    }  # fmt: skip
    assert found["a", "gauche+"]["population"] == pytest.approx(0.3)
    assert found["a", "anti"]["population"] == pytest.approx(0.6)
    assert found["a", "gauche-"]["population"] == pytest.approx(0.1)
    assert found["b", "cis"]["population"] == pytest.approx(0.25)
    free = found["a", "gauche-"]
    assert free["free_energy_kj_mol"] == pytest.approx(kt * math.log(6))
    assert free["free_energy_kcal_mol"] == pytest.approx(kt * math.log(6) / 4.184)
    unseen = isomer_populations((amide,), four_atoms(np.full(50, 3.0)), np.zeros(50), kt)
    assert [row["free_energy_kj_mol"] for row in unseen] == [None, 0.0]
    assert unseen[0]["population_error"] > 0


def test_a_ring_in_one_conformer_is_named() -> None:
    four = Torsion("ring a-b", (0, 1, 2, 3), 1, "ring", 0)
    other = Torsion("ring c-d", (0, 1, 2, 3), 1, "ring", 1)
    isomers = Isomers((four, other), ("ring A", "ring B"), ())
    one = [{"torsion": "ring a-b", "population": p} for p in (0.9995, 0.0005)]
    two = [{"torsion": "ring c-d", "population": p} for p in (0.99, 0.01)]
    (line,) = _single_conformers(isomers, one + two)
    assert line.startswith("ring A was found in one conformer only")
    assert _single_conformers(isomers, two) == []  # rings without states are not asked about
    assert _single_conformers(isomers, []) == []


@pytest.mark.statistical
def test_paths_backwards_find_what_those_forwards_hardly_meet(
    molecule: MolecularSystem, tmp_path: Path
) -> None:
    with build_target(molecule) as target:
        anneal_system(molecule, target, tmp_path, n_samples=1000, n_points=400, seed=5)
        path = load_flow(tmp_path / "flow")
        frames = mdtraj.load(str(tmp_path / "samples.dcd"), top=str(tmp_path / "topology.pdb"))
        x = torch.from_numpy(frames.xyz[::3]).double()

        def forwards(some: AnnealedPath) -> np.ndarray:
            y, log_q = some.sample_and_log_prob(1000, generator=torch.Generator().manual_seed(7))
            return (-target.reduced_potential(y) - log_q).numpy()

        whole = backwards(path, target, x, forwards(path))
        assert _one_way(whole, forwards(path)) == []
        # One of ten paths ends where the target has next to nothing: no contradiction.
        wasteful = path.prior.copy()
        density = path.prior.torsions
        spread = 0.3 * density.tables[0] + 0.7 / len(density.tables[0])
        wasteful.torsions = TorsionDensity(density.groups, [spread])
        short = AnnealedPath(wasteful, target, Levels(1, (1.0,), 1e-3 * path.levels.steps[-1:]))
        seen = forwards(short)
        tiny = seen < log_z(seen).value + math.log(0.1)
        assert tiny.mean() > 0.1
        lean = backwards(short, target, x, seen)
        assert _one_way(lean, seen) == []
        assert abs(lean["log_z"] - exact_log_z()) < 4 * lean["log_z_error"] < 0.5
        both = relative_ess_with_error(seen)  # the same ESS from both sides, dead paths included
        chance = math.hypot(both.error, lean["relative_ess_error"])
        assert abs(lean["relative_ess"] - both.value) < 4 * chance < 0.25
        # A prior that has lost one side of the torsion, and a path too short to cross.
        cut = torch.where(density.centres > 0, density.tables[0], 0.0)
        lost = path.prior.copy()
        group = density.groups[0]
        lost.torsions = TorsionDensity(
            [TorsionGroup(group.members, group.fold, 0.15, 0.0)],
            [(1 - 1e-6) * cut / cut.sum() + 1e-6 / len(cut)],
        )
        levels = Levels(1, (0.5, 1.0), path.levels.steps[-1:].expand(2, -1))
        half = AnnealedPath(lost, target, levels)
        seen = forwards(half)
        assert relative_ess_with_error(seen).value > 0.5  # nothing to be seen forwards,
        assert abs(log_z(seen).value - exact_log_z()) > 0.5  # and wrong
        told = _one_way(backwards(half, target, x, seen), seen)
        assert len(told) == 1
        assert "a few states carry far more weight" in told[0]


def test_command(shell: Shell, molecule: MolecularSystem) -> None:
    sizes = ("--n-samples", 200, "--n-points", 200)
    outcome = shell("anneal", molecule.directory, *sizes, "--json", "out.json")
    assert outcome.code == 0
    assert "relative ESS" in outcome.out
    assert "anti" in outcome.out
    written = json.loads(Path("runs/mol-annealed/metrics.json").read_text())
    assert written["n_samples"] == 200
    said = json.loads(Path("out.json").read_text())
    assert said == {"folder": "runs/mol-annealed", "metrics": written}
    assert "above 0" in shell.refuses("anneal", molecule.directory, "--ess", "1.5", "--out", "x")
    assert "bonded molecule with a structure" in shell.refuses("anneal", "dw4")


def test_what_is_told_of_doubtful_results() -> None:
    good = {"rounds": [{"log_z": 2.0}], "trials": [{"log_z": 2.1}], "second_log_z": 2.05}
    assert _warnings(1000.0, good, 0.2, 2.0) == []
    assert "only 20 effective samples" in _warnings(20.0, good, 0.2, 2.0)[0]
    assert "Pareto k is 0.90" in _warnings(1000.0, good, 0.9, 2.0)[0]
    for where in ("second", "round"):
        lost = good | (
            {"second_log_z": 2.4} if where == "second" else {"rounds": [{"log_z": 2.4}]}
        )
        (line,) = _warnings(1000.0, lost, 0.2, 2.0)
        assert "found a log Z of 2.40, this path 2.00: a state is probably missing" in line
