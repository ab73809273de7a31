"""One body for every prior: density, samples, chart, volume, symmetries, files.

A new prior joins ``MEMBERS``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from stand_ins.flows import (
    chain_prior,
    coupled_torsions,
    methanol_prior,
    mixed_water,
    stream,
    water_prior,
)
from torch import Tensor

from openmm_eqflow.geometry import mean_free_basis, random_rotations, rotate
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def wide_normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """From unit normals to a mixture of sd 1.1 and 2, and its log density per row."""
    scale = torch.where(torch.arange(len(z)) % 2 == 0, 1.1, 2.0).to(z)
    z = z * scale[:, None]
    parts = [
        -0.5 * (z / s).square().sum(1) - z.shape[1] * math.log(s * math.sqrt(2 * math.pi))
        for s in (1.1, 2.0)
    ]
    return z, torch.logsumexp(torch.stack(parts), 0) - math.log(2)


@dataclasses.dataclass(frozen=True)
class Member:
    """A prior, and what its chart leaves out.

    ``wide`` draws latent points from a known density that covers the prior's; ``oriented`` says
    that a point of the chart stands for every orientation.
    """

    make: Callable[[], Prior]
    oriented: bool
    chiral: bool
    permutation: tuple[int, ...] | None = None

    def wide(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        prior = self.make()
        if not self.oriented:
            shape = (n, prior.n_particles - 1, prior.n_dims)
            z, log_r = wide_normal(
                torch.randn(shape, generator=generator, dtype=torch.float64).flatten(1)
            )
            scale = prior.scale  # type: ignore[attr-defined]
            y = torch.einsum("kn,bnd->bkd", mean_free_basis(prior.n_particles), z.view(shape))
            return scale * y, log_r - z.shape[1] * math.log(scale)
        n_soft = prior.n_soft  # type: ignore[attr-defined]
        n_stiff = prior.event_shape[0] - n_soft
        z = torch.randn(n, n_stiff, generator=generator, dtype=torch.float64)
        z, log_r = wide_normal(z)
        tau = 2 * math.pi * (torch.rand(n, n_soft, generator=generator, dtype=torch.float64) - 0.5)
        return torch.cat([z, tau], 1), log_r - n_soft * math.log(2 * math.pi)


MEMBERS = {
    "plane": Member(lambda: MeanFreeGaussian(4, 2, 0.7), False, False, (2, 0, 3, 1)),
    "space": Member(lambda: MeanFreeGaussian(3, 3, 0.2), False, False, (1, 2, 0)),
    "chain": Member(chain_prior, True, True),
    "tails": Member(lambda: chain_prior(tail_share=0.1), True, True),
    "conformers": Member(lambda: chain_prior(torsions=coupled_torsions()), True, True),
    "water": Member(water_prior, True, False),
    "components": Member(mixed_water, True, False),
    "methyl": Member(methanol_prior, True, True),
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


@pytest.fixture
def prior(member: Member) -> Prior:
    return member.make()


def test_draws_are_float64_seeded_and_mean_free(prior: Prior) -> None:
    assert isinstance(prior, Prior)
    y = prior.sample_latent(200, generator=stream(1))
    x = prior.sample(200, generator=stream(1))
    assert y.shape == (200, *prior.event_shape)
    assert x.shape == (200, prior.n_particles, prior.n_dims)
    assert y.dtype == x.dtype == prior.log_prob(x).dtype == torch.float64
    assert float(x.mean(1).abs().max()) < 1e-14
    assert torch.equal(y, prior.sample_latent(200, generator=stream(1)))
    assert torch.equal(x, prior.sample(200, generator=stream(1)))
    assert len(y.flatten(1).unique(dim=0)) == 200
    assert not torch.isin(prior.sample_latent(200, generator=stream(2)), y).any()


def distances(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
    return (x[:, i] - x[:, j]).norm(dim=-1)


def observables(prior: Prior, y: Tensor, length: float) -> Tensor:
    """Bounded functions of latent points and of their shapes, (n, k); the first is 1."""
    d = distances(prior.to_cartesian(y)[0])
    flat = y.flatten(1)
    parts = [
        torch.ones_like(flat[:, :1]),
        torch.cos(flat),
        torch.sin(flat),
        torch.exp(-d / length),
    ]
    return torch.cat(parts, 1)


def worst(prior: Prior, member: Member, *, log_factor: float = 0.0, stretch: float = 1.0) -> float:
    """Means over samples against means under exp(latent_log_prob), in standard errors."""
    n = 60_000
    length = float(distances(prior.sample(100, generator=stream(2))).mean())
    drawn = observables(prior, stretch * prior.sample_latent(n, generator=stream(3)), length)
    y, log_r = member.wide(n, stream(4))
    w = (prior.latent_log_prob(y) + log_factor - log_r).exp()
    assert float(w.sum().square() / w.square().sum()) > 1000
    weighted = w[:, None] * observables(prior, y, length)
    gap = (drawn.mean(0) - weighted.mean(0)).abs()
    error = ((drawn.var(0) + weighted.var(0)) / n).sqrt()
    return float((gap / error).max())


@pytest.mark.statistical
def test_normalised_and_the_density_of_its_samples(prior: Prior, member: Member) -> None:
    """The integral of p is 1, and the moments of samples are those of p."""
    assert worst(prior, member) < 5
    # Power controls: another normalisation, another spread.
    assert worst(prior, member, log_factor=0.2) > 5
    assert worst(prior, member, stretch=1.1) > 5


def test_chart_round_trip(prior: Prior) -> None:
    y = prior.sample_latent(500, generator=stream(5))
    x, log_volume = prior.to_cartesian(y)
    assert float(x.mean(1).abs().max()) < 1e-14
    assert bool(torch.isfinite(log_volume).all())
    back, log_volume_back = prior.from_cartesian(x)
    torch.testing.assert_close(back, y, atol=1e-9, rtol=0)
    torch.testing.assert_close(log_volume_back, log_volume)
    torch.testing.assert_close(prior.log_prob(x), prior.latent_log_prob(y) - log_volume)
    # Samples in space are those of the chart, turned.
    z, _ = prior.from_cartesian(prior.sample(500, generator=stream(6)))
    assert z.shape == y.shape
    assert bool(torch.isfinite(prior.latent_log_prob(z)).all())


def skew(w: Tensor) -> Tensor:
    zero = torch.zeros_like(w[0])
    rows = [[zero, -w[2], w[1]], [w[2], zero, -w[0]], [-w[1], w[0], zero]]
    return torch.stack([torch.stack(row) for row in rows])


def test_log_volume_is_the_jacobian_determinant(prior: Prior, member: Member) -> None:
    """Against autograd in float64: latent point (and turn) to an orthonormal basis of positions.

    The Lebesgue measure of a rotation vector at the identity is Haar's times 8 pi^2.
    """
    n, d = prior.n_particles, prior.n_dims
    basis = mean_free_basis(n)
    y = prior.sample_latent(3, generator=stream(7))
    _, log_volume = prior.to_cartesian(y)
    for row in range(3):
        if member.oriented:

            def place(q: Tensor) -> Tensor:
                x = prior.to_cartesian(q[None, :-3])[0][0]
                return (basis.T @ (x @ torch.linalg.matrix_exp(skew(q[-3:])).T)).flatten()

            point = torch.cat([y[row], torch.zeros(3, dtype=torch.float64)])
            constant = math.log(8 * math.pi**2)
        else:

            def place(q: Tensor) -> Tensor:
                x = prior.to_cartesian((basis @ q.view(n - 1, d))[None])[0][0]
                return (basis.T @ x).flatten()

            point, constant = (basis.T @ y[row]).flatten(), 0.0
        jacobian = torch.autograd.functional.jacobian(place, point)
        assert jacobian.shape == ((n - 1) * d, (n - 1) * d)
        found = float(torch.linalg.slogdet(jacobian)[1]) + constant
        assert found == pytest.approx(float(log_volume[row]), abs=1e-8)


def test_invariance(prior: Prior, member: Member) -> None:
    x = prior.sample(300, generator=stream(8))
    log_p = prior.log_prob(x)
    assert float(log_p.std()) > 0.1
    turned = rotate(x, random_rotations(300, prior.n_dims, generator=stream(9))) + 7.0
    torch.testing.assert_close(prior.log_prob(turned), log_p, atol=1e-7, rtol=0)
    mirrored = x.clone()
    mirrored[..., 0] *= -1
    assert (float((prior.log_prob(mirrored) - log_p).abs().max()) > 1) == member.chiral
    if member.permutation is not None:
        swapped = x[:, list(member.permutation)]
        torch.testing.assert_close(prior.log_prob(swapped), log_p)


@pytest.mark.statistical
def test_every_orientation_is_as_likely(prior: Prior) -> None:
    """First and second moments of a direction, against those of the uniform distribution."""
    n, d = 20_000, prior.n_dims

    def gap(x: Tensor) -> float:
        u = x[:, -1] - x[:, 0]
        u = u / u.norm(dim=1, keepdim=True)
        first = u.mean(0).abs().max() * (n * d) ** 0.5
        second = torch.einsum("bi,bj->ij", u, u) / n - torch.eye(d, dtype=u.dtype) / d
        return float(torch.maximum(first, second.abs().max() * n**0.5 * d / 2))

    assert gap(prior.sample(n, generator=stream(10))) < 5
    # Power control: pulled along one axis.
    assert gap(prior.sample(n, generator=stream(10)) * torch.tensor([1.2, *[1.0] * (d - 1)])) > 5


def test_gradients(prior: Prior) -> None:
    """Of the latent density and of both ends of the chart; of the positions it has no torque."""
    y = prior.sample_latent(3, generator=stream(11)).requires_grad_()
    assert torch.autograd.gradcheck(prior.latent_log_prob, (y,))
    assert torch.autograd.gradcheck(prior.to_cartesian, (y,))
    x = prior.sample(3, generator=stream(12)).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    scale = float(gradient.abs().max())
    assert float(gradient.sum(1).abs().max()) < 1e-9 * scale
    torque = torch.einsum("bni,bnj->bij", x.detach(), gradient)
    assert float((torque - torque.mT).abs().max()) < 1e-7 * scale
    step = torch.randn(x.shape, generator=stream(13), dtype=torch.float64)
    h = 1e-8
    with torch.no_grad():
        numeric = (prior.log_prob(x + h * step) - prior.log_prob(x - h * step)) / (2 * h)
    torch.testing.assert_close((gradient * step).sum((1, 2)), numeric, rtol=1e-4, atol=1e-3)


def test_rows_do_not_see_each_other(prior: Prior) -> None:
    x = prior.sample(20, generator=stream(14))
    together = prior.log_prob(x)
    alone = torch.cat([prior.log_prob(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-11)
    assert prior.log_prob(x[:0]).shape == (0,)


def test_state_round_trip(prior: Prior) -> None:
    config, tensors = prior.state()
    again = type(prior).from_state(json.loads(json.dumps(config)), tensors)  # type: ignore[attr-defined]
    y = prior.sample_latent(20, generator=stream(15))
    assert torch.equal(y, again.sample_latent(20, generator=stream(15)))
    assert torch.equal(prior.latent_log_prob(y), again.latent_log_prob(y))
    for one, two in zip(prior.to_cartesian(y), again.to_cartesian(y), strict=True):
        assert torch.equal(one, two)
    x = prior.sample(20, generator=stream(16))
    assert torch.equal(prior.log_prob(x), again.log_prob(x))
