"""Weighted draws: log w = -u - log q, whose mean is Z; each part has its own random numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins.energies import reference
from stand_ins.lies import LIES, LyingFlow
from stand_ins.moves import harmonic_flow

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.model_systems import harmonic_log_z
from openmm_eqflow.units import kt_in_kj_mol


@pytest.fixture(scope="module")
def target():
    with build_target(load_system("harmonic")) as made:
        yield made


@pytest.fixture
def flow():
    made = harmonic_flow()
    made.chunk_size = 64
    return made


def test_weights_are_those_of_the_densities(flow, target):
    found = draw_weighted(flow, target, 300, seed=1)
    system = load_system("harmonic")
    energies, _ = reference(system.system, found.x.numpy())
    u = torch.from_numpy(energies / kt_in_kj_mol(system.temperature))
    torch.testing.assert_close(found.u, u)
    torch.testing.assert_close(found.log_q, flow.log_prob(found.x), atol=1e-5, rtol=0)
    assert torch.equal(found.log_weight, -found.u - found.log_q)


@pytest.mark.statistical
@pytest.mark.parametrize("lie", [None, *LIES])
def test_mean_weight_is_the_partition_function(flow, target, lie):
    told = flow if lie is None else LyingFlow(flow, lie, tilt=3.0)
    found = log_z(draw_weighted(told, target, 4000, seed=2).log_weight.numpy())
    assert found.error < 0.05 or lie in ("dropped", "turned")
    assert (abs(found.value - harmonic_log_z(6)) < 4 * found.error) == (lie is None)


def test_a_part_has_its_own_draws_and_a_cut_evaluation_goes_on(
    flow, target, tmp_path: Path, monkeypatch
):
    drawn: list[int] = []
    draw = type(flow).sample_and_log_prob

    def counted(self, n, **options):
        drawn.append(n)
        return draw(self, n, **options)

    monkeypatch.setattr(type(flow), "sample_and_log_prob", counted)
    whole = draw_weighted(flow, target, 600, seed=3, folder=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    assert len(np.unique(whole.x.numpy().reshape(600, -1), axis=0)) == 600
    assert sum(drawn) == 600
    kept = files[0].stat().st_mtime_ns
    for file in files[1:]:
        file.unlink()
    drawn.clear()
    again = draw_weighted(flow, target, 600, seed=3, folder=tmp_path)
    assert torch.equal(again.x, whole.x)
    assert torch.equal(again.log_weight, whole.log_weight)
    assert 0 < sum(drawn) < 600  # what is there is not drawn again
    assert files[0].stat().st_mtime_ns == kept
    other = draw_weighted(flow, target, 600, seed=4, folder=tmp_path)
    assert not torch.isin(other.log_q, whole.log_q).any()
