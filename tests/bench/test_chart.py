"""The chart benchmark measures what it says and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openmm_eqflow.bench.chart import run_bench
from openmm_eqflow.errors import ConfigurationError


def test_bench_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "chart.json"
    result = run_bench(["toluene"], batch=64, n_repeats=3, json_path=path)
    assert json.loads(path.read_text(encoding="utf-8")) == result
    entry = result["systems"]["toluene"]
    for what in ("target", "prior", "both"):
        assert entry[what]["ratio"] == pytest.approx(
            entry[what]["autograd"] / entry[what]["compiled"]
        )
    assert 0 < entry["energy"]


def test_a_flow_without_internal_coordinates_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no compiled chart"):
        run_bench(["dw4"], n_repeats=1)
