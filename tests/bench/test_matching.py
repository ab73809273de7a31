"""The benchmark of the fields' learning measures what it says; the one of the prior: workflow."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from stand_ins.runs import write_run

from openmm_eqflow.bench.matching import run_bench
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.training.flow_matching import FlowMatchingLoss


def test_both_fields_learn_from_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bytes]] = defaultdict(set)
    draw = FlowMatchingLoss.pairs

    def listen(self: FlowMatchingLoss, *given: Any, **options: Any) -> Any:
        made = draw(self, *given, **options)
        seen[type(self.field).__name__] |= {x.numpy().tobytes() for x in made}
        return made

    monkeypatch.setattr(FlowMatchingLoss, "pairs", listen)
    run = write_run(tmp_path / "run", "dw4")
    path = tmp_path / "matching.json"
    result = run_bench(
        run, n_steps=12, n_validation=256, egnn={"width": 8, "n_layers": 1}, json_path=path
    )
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert set(seen) == {"LeaveOneOutField", "EGNNField"}
    assert seen["LeaveOneOutField"] == seen["EGNNField"]
    assert len(seen["EGNNField"]) > 2 * 12
    rows = [result["curves"][name][-1] for name in ("LeaveOneOutField", "EGNNField")]
    assert [row["step"] for row in rows] == [12.0, 12.0]
    assert result["loss_ratio"] == pytest.approx(rows[0]["loss"] / rows[1]["loss"])
    # Almost untrained fields leave |x1 - x0|^2: equal but for what they learnt.
    assert rows[0]["loss"] != rows[1]["loss"]
    assert result["loss_ratio"] == pytest.approx(1.0, abs=0.5)


def test_a_molecule_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "alanine-dipeptide")
    with pytest.raises(ConfigurationError, match="name a cluster"):
        run_bench(run)
