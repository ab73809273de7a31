"""Liouville residual: zero for the exact field, and training on it gives the right weights."""

from __future__ import annotations

import math

import pytest
import torch
from flow_stand_ins import stream, uniform_grid
from scipy import special
from torch import Tensor, nn

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import latent_target
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.pool import Pool, PoolFeeder, build_pool, join_pools
from openmm_eqflow.vector_fields import ChartField

MEAN = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
SPREAD = 0.8


class FlatPrior:
    """Three standard normal residuals and one uniform torsion; positions are y itself."""

    n_particles, n_dims, n_soft = 2, 2, 1
    event_shape = (4,)

    def sample_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        tau = 2 * math.pi * (torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5)
        return torch.cat([z, tau], 1)

    def latent_log_prob(self, y: Tensor) -> Tensor:
        return (
            -0.5 * y[:, :3].square().sum(1) - 1.5 * math.log(2 * math.pi) - math.log(2 * math.pi)
        )

    def to_cartesian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.reshape(-1, 2, 2), torch.zeros_like(y[:, 0])

    def from_cartesian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, 4), torch.zeros_like(x[:, 0, 0])


class CoupledTarget:
    """z | tau ~ N(MEAN + cos(tau) e0, SPREAD^2), tau ~ von Mises(0.8); unnormalised."""

    coupling = 0.5
    kappa = 0.8

    def log_p(self, y: Tensor) -> Tensor:
        z, tau = y[:, :3], y[:, 3]
        shift = self.coupling * torch.cos(tau)[:, None] * torch.eye(3, dtype=y.dtype)[0]
        return -0.5 * ((z - MEAN - shift) / SPREAD).square().sum(1) + self.kappa * torch.cos(tau)

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = -self.log_p(x.reshape(-1, 4))
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact samples by rejection, standing in for reference frames."""
        generator = stream(seed)
        tau = 2 * math.pi * (torch.rand(4 * n, generator=generator, dtype=torch.float64) - 0.5)
        keep = torch.rand(4 * n, generator=generator).log() < self.kappa * (torch.cos(tau) - 1)
        tau = tau[keep][:n]
        z = MEAN + SPREAD * torch.randn(n, 3, generator=generator, dtype=torch.float64)
        z[:, 0] += self.coupling * torch.cos(tau)
        return torch.cat([z, tau[:, None]], 1).reshape(-1, 2, 2)


class GaussianTarget(CoupledTarget):
    coupling = 0.0
    kappa = 0.0


class ExactField(nn.Module):
    """Linear field along p_t ~ p0^(1-t) p1^t between the two Gaussians (zero for tau)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        t = t[:, None].double()
        precision = (1 - t) + t / SPREAD**2
        slope = 1 / SPREAD**2 - 1
        centre = t * MEAN / SPREAD**2 / precision
        drift = MEAN / SPREAD**2 / precision - centre * slope / precision
        rate = -0.5 * slope / precision  # d log sigma / dt
        v = drift + rate * (y[:, :3] - centre)
        v = self.factor * torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        return v, self.factor * 3 * rate[:, 0]


def pool(target: CoupledTarget, n: int, *, n_frames: int = 0, seed: int = 0) -> Pool:
    frames = target.sample(n_frames, seed + 50) if n_frames else None
    return build_pool(FlatPrior(), target, n_prior=n, frames=frames, generator=stream(seed))


@pytest.mark.parametrize("n_frames", [0, 10_000])
def test_exact_field_has_no_residual(n_frames):
    loss = LiouvilleLoss(ExactField(), pool(GaussianTarget(), 40_000, n_frames=n_frames))
    index, _ = loss.draw(2_000, stream(1))
    for t in (0.0, 0.31, 0.5, 0.97, 1.0):
        r = loss.residual(index, torch.full((2_000,), t)).detach()
        # Pointwise: the same at every point up to float32; its level is the pool's E_t[log w].
        assert float((r - r.mean()).abs().max()) < 2e-4
        assert float(r.mean().abs()) < 0.03
    wrong = LiouvilleLoss(ExactField(0.9), loss.pool)
    r = wrong.residual(index, torch.full((2_000,), 0.5)).detach()
    assert float(r.std()) > 0.02


def test_weights_of_the_pool_give_moments_of_the_path():
    target = CoupledTarget()
    loss = LiouvilleLoss(ExactField(), pool(target, 30_000, n_frames=10_000), breadth=0.0)
    index, t = loss.draw(40_000, stream(2))
    late = t > 0.95
    z = loss.pool.y[index[late], :3].double()
    bessel = 0.371  # I1(0.8) / I0(0.8)
    expected = MEAN + torch.tensor([0.5 * bessel, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(z.mean(0), expected, atol=0.08, rtol=0)
    early = t < 0.05
    assert float(loss.pool.y[index[early], :3].mean(0).abs().max()) < 0.12


def test_scores_are_gradients():
    target = CoupledTarget()
    y = FlatPrior().sample_latent(5, generator=stream(3))
    value, gradient = latent_target(FlatPrior(), target, y)
    torch.testing.assert_close(value, target.log_p(y))
    h = 1e-6
    for k in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[k] = h
        slope = (target.log_p(y + shift) - target.log_p(y - shift)) / (2 * h)
        torch.testing.assert_close(gradient[:, k], slope, atol=1e-7, rtol=1e-6)


def test_points_without_energy_are_left_out_of_the_pool():
    class Clash(CoupledTarget):
        def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, g = super().reduced_potential_and_gradient(x)
            u[::5], g[::5] = torch.inf, 0.0
            return u, g

    made = pool(Clash(), 1_000)
    assert len(made.y) == 800
    assert all(bool(torch.isfinite(column).all()) for column in made)


def test_feeder_is_reproducible_and_stops():
    def chunks() -> list[Pool]:
        feeder = PoolFeeder(FlatPrior(), CoupledTarget(), chunk=50, n_chunks=3, seed=7)
        feeder.prefetch()
        made = []
        while (chunk := feeder.next()) is not None:
            made.append(chunk)
        feeder.close()
        return made

    one, two = chunks(), chunks()
    assert len(one) == 3
    assert all(torch.equal(a.y, b.y) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].y, one[1].y)
    joined = join_pools(*one)
    assert len(joined.y) == sum(len(c.y) for c in one)
    # Growth is a function of the step alone, also when a resumed run jumps ahead.
    feeder = PoolFeeder(FlatPrior(), CoupledTarget(), chunk=50, n_chunks=3, seed=7)
    loss = LiouvilleLoss(ExactField(), one[0], feeder=feeder, grow_every=10)
    loss.grow(25)
    feeder.close()
    torch.testing.assert_close(loss.pool.y, join_pools(one[0], one[0], one[1]).y)


def test_training_drives_residual_down_and_weights_are_right():
    target, prior = CoupledTarget(), FlatPrior()
    torch.manual_seed(0)
    field = ChartField(3, 1, [1], width=24, conditioner_width=24, torsion_width=24)
    loss = LiouvilleLoss(
        field, pool(target, 12_000, n_frames=3_000), held_out=pool(target, 2_000, seed=9)
    )
    before = float(loss.validation(2_000, stream(4)).detach())
    result = train(
        field,
        loss,
        TrainingSettings(
            seconds=1e6,
            max_steps=700,
            batch_size=256,
            learning_rate=6e-3,
            average=0.99,
            warmup_steps=20,
        ),
    )
    after = result.history[-1]["validation_loss"]
    assert after < 0.05 * before
    flow = EquivariantFlow(prior, result.average.requires_grad_(False), grid=uniform_grid(8))  # type: ignore[arg-type]
    z = prior.sample_latent(20_000, generator=stream(5))
    with torch.no_grad():
        x, log_q = flow.transform(z)
    y = x.reshape(-1, 4)
    log_p = target.log_p(y)
    log_w = log_p - log_q
    assert relative_ess(log_w.numpy()) > 0.99
    prior_w = target.log_p(z) - prior.latent_log_prob(z)
    assert relative_ess(prior_w.numpy()) < 0.7

    # Known moment: E[cos tau] = I1(kappa) / I0(kappa). Power: without log q, or with the sign of
    # ladj flipped, the same estimator is far off.
    ladj = prior.latent_log_prob(z) - log_q
    observable = torch.cos(y[:, 3])
    exact = special.ive(1, target.kappa) / special.ive(0, target.kappa)

    def off_by(log_weight: Tensor) -> float:
        w = torch.softmax(log_weight, 0)
        mean = (w * observable).sum()
        error = (w.square() * (observable - mean).square()).sum().sqrt()
        return float((mean - exact).abs() / error)

    assert off_by(log_w) < 5
    assert off_by(log_p) > 15
    assert off_by(log_p - prior.latent_log_prob(z) - ladj) > 15
