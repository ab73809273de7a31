"""Liouville residual: zero for the exact field, and training on it gives the right weights."""

from __future__ import annotations

import pytest
import torch
from scipy import special
from stand_ins.flows import stream, uniform_grid
from stand_ins.liouville import (
    MEAN,
    CoupledTarget,
    ExactField,
    FlatPrior,
    GaussianTarget,
    pool,
)
from torch import Tensor

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import latent_target
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.pool import Pool, PoolFeeder, join_pools
from openmm_eqflow.vector_fields import ChartField


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
    assert float((loss.pool.y[:, :3].double().mean(0) - expected).abs().min()) > 0.08  # power
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
