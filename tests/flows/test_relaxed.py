"""Flows with Monte Carlo between their steps: weights and chains are exact, lies are found out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stand_ins.flows import molecule_flow, planar_flow, stream, uniform_grid, water_prior
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import log_z, relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.relaxed import RelaxedFlow, relax
from openmm_eqflow.moves.metropolis import i_sir
from openmm_eqflow.moves.steps import StateMemory, flow_step

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
def test_weights_forwards_and_backwards_give_log_z(relaxed: RelaxedFlow) -> None:
    x, log_q = relaxed.sample_and_log_prob(4000, generator=stream(2))
    u = TARGET.reduced_potential(x)
    ours = log_z((-u - log_q).numpy())
    assert abs(ours.value) < 4 * ours.error < 0.1
    y = TARGET.draw(4000, 3)
    back = log_z((TARGET.reduced_potential(y) + relaxed.log_prob(y)).numpy())  # E[1/w] = 1/Z
    assert abs(back.value) < 4 * back.error < 0.1
    for lie in (-u, -u + log_q):  # power: log q dropped, its sign turned
        wrong = log_z(lie.numpy())
        assert abs(wrong.value) > 4 * wrong.error


@pytest.mark.statistical
def test_relaxation_raises_the_ess(relaxed: RelaxedFlow) -> None:
    x, log_q = water_flow().sample_and_log_prob(4000, generator=stream(2))
    plain = relative_ess((-TARGET.reduced_potential(x) - log_q).numpy())
    x, log_q = relaxed.sample_and_log_prob(4000, generator=stream(2))
    assert relative_ess((-TARGET.reduced_potential(x) - log_q).numpy()) > plain + 0.05
    assert all(0.05 < size < 3.0 for size in relaxed.relaxation.step_sizes)
    assert len(relaxed.relaxation.step_sizes) == 5


@pytest.mark.statistical
@pytest.mark.parametrize("part", ["forwards", "backwards"])
def test_without_the_heat_log_z_is_wrong(
    relaxed: RelaxedFlow, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    honest = RelaxedFlow._trajectory

    def lie(self: RelaxedFlow, *given: object) -> tuple[Tensor, Tensor]:
        y, heat = honest(self, *given)  # type: ignore[arg-type]
        return y, 0.0 * heat

    monkeypatch.setattr(RelaxedFlow, "_trajectory", lie)
    if part == "forwards":
        x, log_q = relaxed.sample_and_log_prob(4000, generator=stream(2))
        wrong = log_z((-TARGET.reduced_potential(x) - log_q).numpy())
    else:
        y = TARGET.draw(4000, 3)
        wrong = log_z((TARGET.reduced_potential(y) + relaxed.log_prob(y)).numpy())
    assert abs(wrong.value) > 4 * wrong.error


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_chains_that_accept_by_paths_are_exact(relaxed: RelaxedFlow, factor: float) -> None:
    """Metropolis over (x, path), exact moves in between; power control: log q times 0 or -1."""

    class Altered:
        def sample_and_log_prob(
            self, n: int, *, generator: torch.Generator | None = None
        ) -> tuple[Tensor, Tensor]:
            x, log_q = relaxed.sample_and_log_prob(n, generator=generator)
            return x, factor * log_q

        def log_prob(self, x: Tensor) -> Tensor:
            return factor * relaxed.log_prob(x)

    generator, memory = stream(5), StateMemory()
    x = TARGET.draw(1000, 6)
    means, moved = [], []
    for step in range(12):
        if step % 4 == 3:  # fresh exact states for half of the chains: paths drawn backwards
            x = torch.cat([x[:500], TARGET.draw(500, 100 + step)])
        x, info = flow_step(Altered(), TARGET, x, 1, generator, memory=memory)
        moved.append(float(info.accepted.double().mean()))
        if step >= 4:
            means.append(bond(x).numpy())
    per_chain = np.mean(means, axis=0)
    error = per_chain.std(ddof=1) / math.sqrt(len(per_chain))
    gap = abs(per_chain.mean() - VARIANCE)
    if factor == 1.0:
        assert np.mean(moved) > 0.3
        assert gap < 5 * error
    else:
        assert gap > 5 * error


def test_same_seed_same_paths(relaxed: RelaxedFlow) -> None:
    one, two, other = (
        relaxed.sample_and_log_prob(300, generator=stream(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    x = one[0][:20]
    assert torch.equal(relaxed.log_prob(x), relaxed.log_prob(x))
    assert not torch.equal(relaxed.log_prob(x), one[1][:20])  # another path
    again = relax(water_flow(), TARGET, n_leapfrog=3, seed=1)
    assert again.relaxation.step_sizes == relaxed.relaxation.step_sizes


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


def test_what_cannot_be_relaxed_is_refused(relaxed: RelaxedFlow) -> None:
    with pytest.raises(ConfigurationError, match="internal coordinates"):
        relax(planar_flow(), TARGET)
    with pytest.raises(ConfigurationError, match="at least 1 leapfrog step"):
        relax(water_flow(), TARGET, n_leapfrog=0)
    with pytest.raises(ConfigurationError, match="grid of 2 steps"):
        relax(molecule_flow(n_steps=1), TARGET)
    for method in (relaxed.transform, relaxed.inverse, relaxed.rsample, relaxed.calibrate):
        with pytest.raises(ConfigurationError, match="no latent point"):
            method(torch.zeros(1))


def test_a_state_whose_path_fails_is_never_left(
    relaxed: RelaxedFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a draw it means no weight, of a state an infinite one: +inf for both left such states."""
    x = TARGET.draw(4, 5)
    honest = relaxed.log_prob(x)
    assert torch.isfinite(honest).all()
    trajectory = relaxed._trajectory

    def failing(k: int, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y, heat = trajectory(k, y, generator)
        return y, torch.where(torch.arange(len(y)) % 2 == 0, torch.nan, heat)

    monkeypatch.setattr(relaxed, "_trajectory", failing)
    log_q = relaxed.log_prob(x)
    assert (log_q[::2] == -torch.inf).all()
    assert torch.isfinite(log_q[1::2]).all()
    _, drawn = relaxed.sample_and_log_prob(4, generator=stream(6))
    assert (drawn[::2] == torch.inf).all()
    # Offered the best of draws, a chain leaves its state only where the path did not fail.
    offered = torch.full((4, 1), 50.0, dtype=torch.float64)
    _, info = i_sir(-log_q, offered, stream(7), metropolized=True)
    assert info.accepted.tolist() == [False, True, False, True]


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
