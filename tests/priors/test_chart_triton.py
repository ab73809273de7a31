"""The chart's kernels on a GPU, interpreted, against the compiled ones of the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stand_ins.flows import stream
from stand_ins.priors import agree, prior_of
from torch import Tensor

from openmm_eqflow.priors import compiled_chart

pytest.importorskip("triton", reason="no Triton here")
if torch.cuda.is_available():
    pytest.skip("a GPU runs them itself: -m gpu", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy off the chart
PRIORS = ["water", "held water", "methanol", "conformers", "toluene", "alanine-dipeptide"]


def points(prior: Any) -> Tensor:
    """Samples, some far out (and off the chart), some at the wrap."""
    y = prior.sample_latent(70, generator=stream(0))
    y[60:, : prior.n_stiff] *= 40
    y[50:60, prior.n_stiff :] = math.pi
    return y


def springs(x: Tensor) -> tuple[Tensor, Tensor]:
    gaps = x[:, :, None] - x[:, None]
    return 3.0 * gaps.square().sum((1, 2, 3)), 12.0 * gaps.sum(2)


@pytest.mark.parametrize("name", PRIORS)
def test_target_in_the_chart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = prior_of(name)
    y = points(prior)
    value, score = compiled_chart.target_value_and_score(prior, springs, y)
    monkeypatch.setattr(compiled_chart, "_OnCPU", compiled_chart._OnGPU)
    ours, ours_score = compiled_chart.target_value_and_score(prior, springs, y)
    valid = torch.isfinite(value)
    assert torch.equal(valid, torch.isfinite(ours))
    assert valid[:50].all()
    assert not valid.all()
    assert agree(ours[valid], value[valid])
    assert agree(ours_score, score)


@pytest.mark.parametrize("name", PRIORS[2:])
def test_torsion_tables(name: str) -> None:
    prior = prior_of(name)
    tau = prior.split(points(prior))[1]
    for g, (group, table) in enumerate(
        zip(prior.torsions.groups, prior.torsions.tables, strict=True)
    ):
        label = prior.torsions.basin_of_cell(g)
        total, slope = compiled_chart._sums(group, table, label, tau)
        ours, by = compiled_chart._sums_on_gpu(
            group, table, label, prior.torsions.n_basins(g), tau
        )
        assert agree(ours, total)
        assert agree(by, slope)
        lost = tau.clone()
        lost[3] = torch.nan  # no cell: nothing is read where there is none
        for whole, one in zip(
            (ours, by),
            compiled_chart._sums_on_gpu(group, table, label, prior.torsions.n_basins(g), lost),
            strict=True,
        ):
            assert torch.isnan(one[3]).all()
            assert torch.equal(one[4:], whole[4:])
        none = compiled_chart._sums_on_gpu(
            group, table, label, prior.torsions.n_basins(g), tau[:0]
        )
        assert [v.shape for v in none] == [(0, *total.shape[1:]), (0, *slope.shape[1:])]


def test_the_means_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient with a common motion is the same gradient; power: one reversed is not."""
    prior = prior_of("methanol")
    y = points(prior)[:8]
    monkeypatch.setattr(compiled_chart, "_OnCPU", compiled_chart._OnGPU)
    one = compiled_chart.target_value_and_score(prior, springs, y)[1]

    def pushed(x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = springs(x)
        return u, gradient + torch.tensor([1.0, -2.0, 3.0]).to(x)

    assert agree(compiled_chart.target_value_and_score(prior, pushed, y)[1], one)

    def turned(x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = springs(x)
        return u, -gradient

    assert not agree(compiled_chart.target_value_and_score(prior, turned, y)[1], one)
