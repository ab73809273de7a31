"""The divergence benchmark measures what it says and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openmm_eqflow.bench.divergence import CASES, run_bench, time_case
from openmm_eqflow.errors import ConfigurationError


@pytest.mark.parametrize("case", CASES)
def test_one_case(case: str) -> None:
    timing = time_case(case, 5, n_repeats=3, n_threads=torch.get_num_threads())
    assert timing.n_repeats == 3
    assert 0.0 < timing.lower_quartile_ms <= timing.median_ms <= timing.upper_quartile_ms
    assert timing.peak_memory_mib >= 0.0


def test_a_slow_case_stops_early() -> None:
    timing = time_case(CASES[0], 5, n_threads=torch.get_num_threads(), max_seconds=0.0)
    assert timing.n_repeats == 1


@pytest.mark.slow
def test_bench_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run_bench(path, sizes=(6,), n_repeats=2)
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [case["case"] for case in result["cases"]] == list(CASES)
    (ratio,) = result["ratios"]
    assert ratio["n_particles"] == 6
    assert ratio["overhead"] > 0.0
    assert ratio["speedup"] > 0.0


def test_bad_arguments() -> None:
    with pytest.raises(ConfigurationError, match="unknown case"):
        time_case("no such", 5)
    with pytest.raises(ConfigurationError, match="sizes"):
        run_bench(sizes=(1,))
