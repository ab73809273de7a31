"""Flows with Monte Carlo between their steps: weights and chains are exact, lies are found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_ins.flows import molecule_flow, planar_flow, stream
from stand_ins.water import TARGET, water_flow
from torch import Tensor

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.relaxed import RelaxedFlow, anneal, relax
from openmm_eqflow.flows.storage import save_flow
from openmm_eqflow.flows.streams import RowStreams


@pytest.fixture(scope="module")
def relaxed() -> RelaxedFlow:
    return relax(water_flow(), TARGET, n_leapfrog=3, seed=1)


@pytest.mark.statistical
def test_relaxation_raises_the_ess(relaxed: RelaxedFlow) -> None:
    x, log_q = water_flow().sample_and_log_prob(4000, generator=stream(2))
    plain = relative_ess((-TARGET.reduced_potential(x) - log_q).numpy())
    x, log_q = relaxed.sample_and_log_prob(4000, generator=stream(2))
    assert relative_ess((-TARGET.reduced_potential(x) - log_q).numpy()) > plain + 0.05
    assert all(0.05 < size < 3.0 for size in relaxed.relaxation.step_sizes)
    assert len(relaxed.relaxation.step_sizes) == 5


def test_invalid_points_stay_invalid_and_raise_nothing(relaxed: RelaxedFlow) -> None:
    """A target without density anywhere: every layer is the identity."""

    class Nowhere:
        def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full((len(x),), torch.inf, dtype=torch.float64), torch.zeros_like(x)

    flow = water_flow()
    x, log_q = RelaxedFlow(flow, Nowhere(), relaxed.relaxation).sample_and_log_prob(
        50, generator=stream(1)
    )
    torch.testing.assert_close(log_q, flow.log_prob(x), atol=1e-6, rtol=0)


def test_works_of_the_levels_add_up_to_the_weight() -> None:
    """Path by path, not only in the mean; without one level they do not."""
    prior = water_flow().prior
    path = anneal(prior, TARGET, n_levels=6, seed=2)
    path.chunk_size = 40
    works = path.works(100, generator=stream(3))
    again = stream(3)
    z, streams = prior.sample_latent(100, generator=again), RowStreams.drawn(100, again)
    x, log_q = path.ends(z, streams)
    log_w = -TARGET.reduced_potential(x) - log_q
    torch.testing.assert_close(works.sum(0), log_w, atol=1e-9, rtol=0)
    for k in range(6):
        assert float((works.sum(0) - works[k] - log_w).abs().max()) > 1e-3


def test_what_cannot_be_relaxed_is_refused(relaxed: RelaxedFlow, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="internal coordinates"):
        relax(planar_flow(), TARGET)
    with pytest.raises(ConfigurationError, match="at least 1 leapfrog step"):
        relax(water_flow(), TARGET, n_leapfrog=0)
    with pytest.raises(ConfigurationError, match="grid of 2 steps"):
        relax(molecule_flow(n_steps=1), TARGET)
    with pytest.raises(ConfigurationError, match="no BoltzmannTarget"):
        save_flow(relaxed, tmp_path / "flow")


def test_tuning_and_evaluation_with_one_seed_share_no_latent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    flow = water_flow()
    draw = flow.prior.sample_latent

    def watched(n: int, *, generator: torch.Generator | None = None) -> Tensor:
        seen.append(draw(n, generator=generator))
        return seen[-1]

    monkeypatch.setattr(flow.prior, "sample_latent", watched)
    relax(flow, TARGET, n_leapfrog=1, seed=0)
    n = sum(map(len, seen))
    for same in (stream(0), stream(0)):
        watched(64, generator=same)
    rows = torch.cat(seen)
    assert len(torch.unique(rows[: n + 64], dim=0)) == n + 64
    assert len(torch.unique(rows, dim=0)) == n + 64  # power control: one seed twice is seen
