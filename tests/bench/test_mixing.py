"""The yardstick of the mixing benchmark, on chains whose effective sample size is known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from stand_ins import DATA

from openmm_eqflow.bench import mixing
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.targets.library import load_system


def two_state(p: float, rate: float, n: int, seed: int) -> np.ndarray:
    """Two-state Markov chain of population p; each step forgets with probability ``rate``."""
    rng = np.random.default_rng(seed)
    forget, fresh = rng.uniform(size=n) < rate, rng.uniform(size=n) < p
    last = np.maximum.accumulate(np.where(forget, np.arange(n), 0))
    return fresh[last].astype(float)


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_effective_samples_of_a_known_chain(rate: float) -> None:
    chain = two_state(0.05, rate, 100_000, 0)
    result = mixing.summarise("m", [chain], 10.0, 1000, 0.05)
    assert result.effective_samples == pytest.approx(100_000 * rate / (2 - rate), rel=0.15)
    assert result.per_second == result.effective_samples / 10.0
    assert abs(result.mean - 0.05) < 4 * result.mean_error


def test_one_short_visit_is_not_good_mixing() -> None:
    chain = np.zeros(5000)
    chain[2500] = 1.0
    result = mixing.summarise("m", [chain], 10.0, 1, 0.02)
    assert result.n_transitions == 2
    assert result.effective_samples < 30.0
    never = mixing.summarise("m", [np.zeros(5000)], 10.0, 1, 0.02)
    assert never.effective_samples_is_upper_limit
    assert 0.0 < never.effective_samples < 45.0
    assert never.mean_error == math.inf


def test_ratio_and_break_even() -> None:
    fast = mixing.summarise("a", [two_state(0.3, 1.0, 20_000, 1)], 10.0, 1, 0.3)
    slow = mixing.summarise("b", [two_state(0.3, 0.02, 20_000, 2)], 10.0, 1, 0.3)
    ratio = mixing._ratio(fast, slow, 60.0)
    assert ratio["ratio"] == pytest.approx(99.0, rel=0.3)
    assert 0.0 < ratio["error"] < 40.0
    assert ratio["break_even_seconds"] == pytest.approx(60.0 / (1 - 1 / ratio["ratio"]))
    assert mixing._ratio(slow, fast, 60.0)["break_even_seconds"] is None


def test_phi_is_found_by_names() -> None:
    assert mixing.phi_torsion(load_system("alanine-dipeptide").topology) == (4, 6, 8, 14)
    assert mixing.phi_torsion(load_system("toluene").topology) is None


@pytest.mark.slow
def test_bench_writes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(DATA / f"alanine-dipeptide-flow{suffix}", tmp_path / f"flow{suffix}")
    system, flow = load_system("alanine-dipeptide"), load_flow(tmp_path / "flow")
    monkeypatch.setattr(mixing, "flow_of", lambda name, device: (system, flow, None))
    record = mixing.run_bench("alanine-dipeptide", json_path=tmp_path / "f.json", seconds=2.0)
    assert json.loads((tmp_path / "f.json").read_text()) == record
    assert record["coordinate"] == "phi > 0"
    assert set(record["methods"]) == {
        "langevin",
        "parallel_tempering",
        "flow_chains",
        "langevin_flow_move",
    }
    assert len(record["speedup"]) == 4
    for method in record["methods"].values():
        assert method["n_energy_evaluations"] > 0
        assert 1.9 < method["seconds"] < 20.0
