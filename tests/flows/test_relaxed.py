"""Flows with Monte Carlo between their steps: weights and chains are exact, lies are found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_ins.flows import molecule_flow, planar_flow, stream, uniform_grid, water_prior
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.relaxed import RelaxedFlow, relax
from openmm_eqflow.flows.storage import save_flow

WIDER = 1.5  # the target's bonds against the prior's
VARIANCE = WIDER**2 * (0.8 + 0.2 * 1.5**2)  # a fifth of the density has tails 1.5 times as wide


class Stretch(nn.Module):
    """v = rate * y: less than the target asks for, and blind to its correlations."""

    exact_divergence = True
    event_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.25, 0.25, 0.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self(t, y), self.rate.sum().expand(len(y))


class WaterTarget:
    """A normalised density with exact samples: log Z = 0 on the mean-free subspace."""

    kT = 1.0
    density = water_prior(WIDER * 0.003)

    def reduced_potential(self, x: Tensor) -> Tensor:
        return -self.density.log_prob(x)

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            u = self.reduced_potential(point)
            (gradient,) = torch.autograd.grad(u.sum(), point)
        return u.detach(), gradient

    def draw(self, n: int, seed: int) -> Tensor:
        return self.density.sample(n, generator=stream(seed))


TARGET = WaterTarget()


def water_flow() -> EquivariantFlow:
    return EquivariantFlow(water_prior(0.003), Stretch(), grid=uniform_grid(6), chunk_size=512)


@pytest.fixture(scope="module")
def relaxed() -> RelaxedFlow:
    return relax(water_flow(), TARGET, n_leapfrog=3, seed=1)


def bond(x: Tensor) -> Tensor:
    """Square deviation of the first bond, in the prior's variances."""
    return (((x[:, 0] - x[:, 1]).norm(dim=-1) - 0.1) / 0.003).square()


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
