"""The benchmark of energies writes every figure; what it measures is compiled."""

from __future__ import annotations

import json

import pytest

from openmm_eqflow.bench.energies import run_bench
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import load_system


def test_bench_writes_every_figure(tmp_path):
    lines = []
    path = tmp_path / "bench.json"
    result = run_bench(["dw4"], path, batches=(1, 64), seconds=0.01, report=lines.append)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    entry = result["systems"]["dw4"]
    assert {"Reference", "CPU"} <= set(entry["platforms"])
    assert set(entry["torch"]) == {"1", "64", "512"}
    for rates in (
        entry["platforms"]["Reference"],
        entry["context_pool"],
        *entry["torch"].values(),
    ):
        assert rates["energy"] > 0
        assert rates["energy_force"] > 0
    assert lines[0].startswith("dw4")
    for what in ("energy", "energy_force"):
        best = max(entry["platforms"][name][what] for name in ("Reference", "CPU"))
        assert entry["speedup"][what] == pytest.approx(entry["torch"]["512"][what] / best)


@pytest.mark.parametrize("name", ["lj13", "alanine-dipeptide", "ala3", "toluene"])
def test_what_makes_it_fast_is_there(name):
    """No force of a system that ships is left to the slow evaluation: every term is compiled."""
    system = load_system(name).system
    names = [f"{type(f).__name__} (force {k})" for k, f in enumerate(system.getForces())]
    with_kernels = TorchEnergy(system, n_threads=1)
    assert set(with_kernels.compiled_forces) == {n for n in names if "CMMotion" not in n}
    assert TorchEnergy(system, compiled=False).compiled_forces == ()
