"""The internal-coordinate prior: normalisation, sampling, invariance, fits with forces or not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from stand_ins.flows import CHAIN, METHANOL, WATER, chain_prior, stream, table, water_prior

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.geometry import random_rotations, remove_mean, rotate
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.fit import fit_internal_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity, TorsionGroup
from openmm_eqflow.priors.zmatrix import InternalCoordinates, ZMatrix, wrap_angle
from openmm_eqflow.vector_fields.chart import ChartField

# -- torsion densities ----------------------------------------------------------------------------


def test_torsion_density_is_normalised_by_quadrature():
    axis = torch.linspace(-math.pi, math.pi, 201, dtype=torch.float64)[:-1]
    step = 2 * math.pi / 200
    single = TorsionDensity([TorsionGroup((0,), (1,), 0.11, 0.02)], [table(0.3, 3.1)])
    assert float(single.log_prob(axis[:, None]).exp().sum() * step) == pytest.approx(1, abs=1e-9)
    folded = TorsionDensity([TorsionGroup((0,), (3,), 0.2, 0.02)], [table(2.9)])
    assert float(folded.log_prob(axis[:, None]).exp().sum() * step) == pytest.approx(1, abs=1e-9)
    pair = chain_prior().torsions
    assert pair is not None
    grid = torch.cartesian_prod(axis, axis)
    assert float(pair.log_prob(grid).exp().sum() * step**2) == pytest.approx(1, abs=1e-9)


def test_torsion_samples_match_their_density():
    density = TorsionDensity(
        [TorsionGroup((1,), (3,), 0.3, 0.05), TorsionGroup((0,), (1,), 0.1, 0.01)],
        [table(2.9), table(-3.1, 0.4)],
    )
    tau = density.sample(40_000, generator=stream(0))
    assert float(tau.abs().max()) <= math.pi
    axis = torch.linspace(-math.pi, math.pi, 7201, dtype=torch.float64)
    middle = 0.5 * (axis[1:] + axis[:-1])
    for k in (0, 1):
        points = torch.zeros(7200, 2, dtype=torch.float64)
        points[:, k] = middle
        other = torch.zeros_like(points)
        # The joint is a product: divide the other factor out.
        mass = (density.log_prob(points) - density.log_prob(other)).exp()
        mass = (mass / mass.sum()).reshape(60, 120).sum(1).numpy()
        counts = np.histogram(tau[:, k], bins=60, range=(-math.pi, math.pi))[0]
        expected = 40_000 * mass
        keep = expected > 10
        chi2 = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
        assert stats.chi2.sf(chi2, int(keep.sum()) - 1) > 1e-4
        # Power control: the density of the other torsion does not fit these counts.
        assert np.abs(counts - expected[::-1]).sum() > 2_000


def test_pair_samples_match_their_density():
    density = chain_prior().torsions
    assert density is not None
    tau = density.sample(40_000, generator=stream(4))
    n = 12
    axis = -math.pi + (torch.arange(n * 20, dtype=torch.float64) + 0.5) * 2 * math.pi / (n * 20)
    p = density.log_prob(torch.cartesian_prod(axis, axis)).exp()
    mass = (p / p.sum()).reshape(n, 20, n, 20).sum((1, 3)).numpy()
    counts = np.histogram2d(tau[:, 0], tau[:, 1], bins=n, range=[[-math.pi, math.pi]] * 2)[0]
    keep = mass * 40_000 > 8
    expected = 40_000 * mass
    chi2 = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert stats.chi2.sf(chi2, int(keep.sum()) - 1) > 1e-4
    assert ((counts.T - expected)[keep] ** 2 / expected[keep]).sum() > 10 * chi2


def test_fold_makes_density_periodic_and_smooth():
    density = TorsionDensity([TorsionGroup((0,), (3,), 0.2, 0.01)], [table(2.9)])
    tau = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    shifted = wrap_angle(tau + 2 * math.pi / 3)
    torch.testing.assert_close(density.log_prob(tau), density.log_prob(shifted))
    assert float((density.log_prob(tau) - density.log_prob(tau + 1.0)).abs().max()) > 0.5
    edge = torch.tensor([[-math.pi], [math.pi]], dtype=torch.float64, requires_grad=True)
    log_p = density.log_prob(edge)
    torch.testing.assert_close(log_p[0], log_p[1])
    (slope,) = torch.autograd.grad(log_p.sum(), edge)
    torch.testing.assert_close(slope[0], slope[1])
    assert torch.autograd.gradcheck(density.log_prob, (tau.requires_grad_(),))


def test_torsion_fit_recovers_density_and_keeps_a_floor():
    truth = chain_prior().torsions
    assert truth is not None
    tau = truth.sample(20_000, generator=stream(5))
    fitted = TorsionDensity.fit(tau, fold=[1, 1], coupled=[(0, 1)])
    assert fitted.groups[0].members == (0, 1)
    alone = TorsionDensity.fit(tau, fold=[1, 1])
    fresh = truth.sample(5_000, generator=stream(6))
    gap = (truth.log_prob(fresh) - fitted.log_prob(fresh)).mean()
    assert float(gap) < 0.06
    assert float((truth.log_prob(fresh) - alone.log_prob(fresh)).mean()) > 3 * float(gap)
    axis = torch.linspace(-3.1, 3.1, 40, dtype=torch.float64)
    lowest = fitted.log_prob(torch.cartesian_prod(axis, axis)).min()
    assert float(lowest) >= math.log(0.004 * (2 * math.pi) ** -2) - 1e-9
    # Hot frames lend a share to what the cold ones missed.
    cold = tau[tau[:, 0] > 0]
    with_hot = TorsionDensity.fit(cold, fold=[1, 1], coupled=[(0, 1)], extra=tau)
    missed = truth.sample(2_000, generator=stream(7))
    missed = missed[missed[:, 0] < -1]
    without = TorsionDensity.fit(cold, fold=[1, 1], coupled=[(0, 1)])
    gain = with_hot.log_prob(missed).mean() - without.log_prob(missed).mean()
    assert float(gain) > 1.0


# -- the prior ------------------------------------------------------------------------------------


def test_triatomic_density_integrates_to_one_and_matches_samples():
    prior = water_prior()
    assert isinstance(prior, Prior)
    b1 = torch.linspace(0.07, 0.13, 81, dtype=torch.float64)
    b2 = torch.linspace(0.08, 0.14, 81, dtype=torch.float64)
    theta = torch.linspace(1e-3, math.pi - 1e-3, 161, dtype=torch.float64)
    grid = torch.meshgrid(b1, b2, theta, indexing="ij")
    bonds = torch.stack([grid[0].flatten(), grid[1].flatten()], 1)
    x, log_volume = prior.zmatrix.from_internal(
        InternalCoordinates(bonds, grid[2].reshape(-1, 1), bonds[:, :0])
    )
    cell = float((b1[1] - b1[0]) * (b2[1] - b2[0]) * (theta[1] - theta[0]))
    mass = ((prior.log_prob(x) + log_volume).exp() * cell).reshape(81, 81, 161)
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-4)
    samples = prior.zmatrix.to_internal(prior.sample(50_000, generator=stream(0)))
    mean = float((mass.sum((1, 2)) * b1).sum())
    second = float((mass.sum((1, 2)) * (b1 - mean) ** 2).sum())
    drawn = samples.bonds[:, 0]
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (second / 50_000) ** 0.5)
    assert float(drawn.var()) == pytest.approx(second, rel=0.04)
    cross = float((mass.sum(1) * (b1[:, None] - mean) * (theta - 1.82)).sum())
    found = float(((drawn - mean) * (samples.angles[:, 0] - 1.82)).mean())
    assert found == pytest.approx(cross, rel=0.05)


def test_gradient_against_finite_differences():
    prior = chain_prior(tail_share=0.1)
    x = prior.sample(3, generator=stream(4))
    gradient = prior.gradient(x)
    # No force and no torque: the density is invariant.
    assert float(gradient.sum(1).abs().max()) < 1e-6
    assert float(torch.linalg.cross(x, gradient, dim=-1).sum(1).abs().max()) < 1e-6
    h = 1e-6
    for atom in range(5):
        for axis in range(3):
            shift = torch.zeros_like(x)
            shift[:, atom, axis] = h
            slope = (prior.log_prob(x + shift) - prior.log_prob(x - shift)) / (2 * h)
            torch.testing.assert_close(slope, gradient[:, atom, axis], rtol=1e-5, atol=1e-2)


def test_tails_are_wider_and_still_normalised():
    prior = chain_prior(tail_share=0.1)
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    narrow = chain_prior()
    y = torch.zeros(1, 9, dtype=torch.float64)
    y[:, 0] = 9.0
    assert float(prior.latent_log_prob(y) - narrow.latent_log_prob(y)) > 5
    water = water_prior()
    grid = torch.cartesian_prod(z[::25], z[::25], z[::25])
    total = water.latent_log_prob(grid).exp().sum() * float(z[25] - z[0]) ** 3
    assert float(total) == pytest.approx(1.0, abs=1e-6)
    drawn = water.sample_latent(40_000, generator=stream(1))
    expected = 0.8 + 0.2 * 1.5**2
    assert float(drawn.square().mean()) == pytest.approx(expected, rel=0.03)


def test_points_outside_the_chart_get_weight_zero():
    prior = water_prior()
    field = ChartField(3, 0, [], width=4, conditioner_width=4, torsion_width=4)
    flow = EquivariantFlow(prior, field)
    z = torch.zeros(4, 3, dtype=torch.float64)
    z[1, 0] = -60.0  # a negative bond length
    z[2, 2] = 40.0  # an angle beyond pi
    z[3, 2] = -40.0  # a negative angle
    with torch.no_grad():
        _, log_q = flow.transform(z)
    assert torch.isfinite(log_q).tolist() == [True, False, False, False]
    assert log_q[1:].tolist() == [math.inf] * 3
    # A stiff torsion turned by more than half a turn has no inverse image either.
    bonds, masses = METHANOL
    x = fit_frames(600)
    methanol = fit_internal_prior(x, bonds, masses)
    y = torch.zeros(2, *methanol.event_shape, dtype=torch.float64)
    y[1, methanol.n_stiff - 1] = 1e3
    _, log_volume = methanol.to_cartesian(y)
    assert torch.isfinite(log_volume).tolist() == [True, False]


# -- fits -----------------------------------------------------------------------------------------


def fit_frames(n: int) -> torch.Tensor:
    """Methanol with a threefold rotor and little else."""
    bonds, masses = METHANOL
    zmatrix = ZMatrix.from_bonds(6, bonds, masses=masses)
    generator = stream(9)

    def noise(k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=generator, dtype=torch.float64)

    leader = [k for k, f in enumerate(zmatrix.fold) if f == 3]
    tau = torch.empty(n, 3, dtype=torch.float64)
    third = 2 * math.pi / 3
    sheet = torch.randint(3, (n,), generator=generator)
    tau[:, leader[0]] = 1.0 + 0.15 * noise(1)[:, 0] + third * sheet
    follower = [k for k in range(3) if k != leader[0]]
    tau[:, follower] = torch.tensor([third, -third], dtype=torch.float64) + 0.08 * noise(2)
    x, _ = zmatrix.from_internal(
        InternalCoordinates(0.11 + 0.003 * noise(5), 1.9 + 0.06 * noise(4), wrap_angle(tau))
    )
    return rotate(x, random_rotations(n, generator=generator))


def test_fit_finds_the_methyl_and_its_symmetry():
    bonds, masses = METHANOL
    x = fit_frames(2_000)
    prior = fit_internal_prior(x, bonds, masses)
    assert prior.n_soft == 1
    assert prior.fold == [3]
    # A third of a turn of the whole methyl costs nothing, a sixth does.
    y, log_volume = prior.from_cartesian(x)
    for turn, same in ((2 * math.pi / 3, True), (math.pi / 3, False)):
        turned = y.clone()
        turned[:, -1] = wrap_angle(y[:, -1] + turn)
        there, _ = prior.to_cartesian(turned)
        gap = (prior.log_prob(there) - prior.log_prob(x)).abs()
        assert (float(gap.max()) < 1e-8) == same
    assert bool(torch.isfinite(log_volume).all())


def divergence_from(truth: InternalCoordinatePrior, fitted: InternalCoordinatePrior) -> float:
    fresh = truth.sample(4_000, generator=stream(77))
    return float((truth.log_prob(fresh) - fitted.log_prob(fresh)).mean())


def test_plain_fit_converges_to_the_truth():
    truth = chain_prior()
    x = truth.sample(20_000, generator=stream(10))
    fitted = fit_internal_prior(x, *CHAIN, tail_share=0.0)
    assert fitted.n_soft == 2
    assert -0.01 < divergence_from(truth, fitted) < 0.12
    few = fit_internal_prior(x[:500], *CHAIN, tail_share=0.0)
    assert divergence_from(truth, few) > 5 * divergence_from(truth, fitted)


def test_forces_make_the_fit_data_efficient():
    truth = chain_prior()
    gaps = {}
    for n in (100, 300):
        x = truth.sample(n, generator=stream(11))
        plain = fit_internal_prior(x, *CHAIN, tail_share=0.0)
        forced = fit_internal_prior(x, *CHAIN, gradient=-truth.gradient(x), tail_share=0.0)
        # The same torsion density in both: what differs is the stiff part.
        assert forced.torsions is not None
        gaps[n] = divergence_from(truth, plain), divergence_from(truth, forced)
    assert gaps[100][1] < gaps[100][0]
    assert gaps[300][1] < gaps[300][0]
    # Wrong forces must not do as well (power control).
    x = truth.sample(300, generator=stream(11))
    wrong = fit_internal_prior(x, *CHAIN, gradient=truth.gradient(x), tail_share=0.0)
    assert divergence_from(truth, wrong) > gaps[300][1] + 0.1


def test_forces_in_any_frame_give_the_same_fit():
    truth = chain_prior()
    x = truth.sample(300, generator=stream(12))
    g = -truth.gradient(x)
    r = random_rotations(300, generator=stream(13))
    one = fit_internal_prior(x, *CHAIN, gradient=g)
    two = fit_internal_prior(rotate(x, r) + 1.0, *CHAIN, gradient=rotate(g, r))
    torch.testing.assert_close(one.cholesky, two.cholesky, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.coefficients, two.coefficients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("forces", [False, True])
def test_molecules_without_soft_torsions(forces):
    truth = water_prior()
    x = truth.sample(4_000, generator=stream(14))
    gradient = -truth.gradient(x) if forces else None
    fitted = fit_internal_prior(x, *WATER, gradient=gradient, tail_share=0.2, tail_scale=1.5)
    assert fitted.n_soft == 0
    assert fitted.event_shape == (3,)
    assert divergence_from(truth, fitted) < 0.05
    config, tensors = fitted.state()
    again = InternalCoordinatePrior.from_state(json.loads(json.dumps(config)), tensors)
    assert torch.equal(again.log_prob(x), fitted.log_prob(x))
    rigid = remove_mean(
        torch.tensor([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    )
    star = [(0, k) for k in range(1, 5)]
    methane = 0.063 * rigid + 0.004 * torch.randn(800, 5, 3, generator=stream(15)).double()
    fitted = fit_internal_prior(methane, star, [12.0, 1.0, 1.0, 1.0, 1.0])
    assert fitted.n_soft == 0
    assert bool(torch.isfinite(fitted.log_prob(fitted.sample(100, generator=stream(1)))).all())


def test_few_frames_still_give_a_proper_density():
    truth = chain_prior()
    x = truth.sample(30, generator=stream(16))
    for gradient in (None, -truth.gradient(x)):
        fitted = fit_internal_prior(x, *CHAIN, gradient=gradient)
        assert len(fitted.modes) <= 30 / 12 or len(fitted.modes) <= 4
        fresh = truth.sample(500, generator=stream(17))
        log_p = fitted.log_prob(fresh)
        assert bool(torch.isfinite(log_p).all())
        # Its integral is 1, by samples of the truth; it is not far from it.
        ratio = (log_p - truth.log_prob(fresh)).exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 500**0.5 < 0.8
        assert float((truth.log_prob(fresh) - log_p).mean()) < 4.0


# -- two atoms, and atoms in line -----------------------------------------------------------------

STRETCH, LENGTH = 4.0e4, 0.12  # kT/nm^2, nm
BEND = 60.0  # u = BEND (1 + cos theta): harmonic about atoms in line


def bond_mass():
    """Integral of b^2 exp(-STRETCH (b - LENGTH)^2 / 2)."""
    return math.sqrt(2 * math.pi / STRETCH) * (LENGTH**2 + 1 / STRETCH)


def stretches(x, pairs):
    lengths = torch.stack([(x[:, a] - x[:, b]).norm(dim=-1) for a, b in pairs], 1)
    return 0.5 * STRETCH * (lengths - LENGTH).square().sum(1)


def linear_energy(x):
    a, b = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
    cosine = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    return stretches(x, [(0, 1), (1, 2)]) + BEND * (1 + cosine)


def linear_frames(n):
    """Exact draws but for the weight b^2, which hardly varies."""
    generator = stream(3)
    b = LENGTH + torch.randn(n, 2, generator=generator, dtype=torch.float64) / STRETCH**0.5
    c = -torch.rand(n, generator=generator, dtype=torch.float64).log() / BEND
    theta = math.pi - 2 * torch.asin((c / 2).sqrt())
    x = torch.zeros(n, 3, 3, dtype=torch.float64)
    x[:, 0, 0] = b[:, 0]
    x[:, 2, 0], x[:, 2, 1] = b[:, 1] * torch.cos(theta), b[:, 1] * torch.sin(theta)
    return remove_mean(x)


def weighted(prior, energy, n=20_000):
    x = prior.sample(n, generator=stream(5))
    log_w = -energy(x) - prior.log_prob(x)
    weights = (log_w - log_w.max()).exp()
    relative = float(weights.sum() ** 2 / weights.square().sum() / n)
    log_z = float(log_w.max() + weights.mean().log())
    return log_z, float(weights.std() / weights.mean()) / n**0.5, relative


def test_atoms_in_line_have_their_normalisation(monkeypatch):
    """The angle's density ends at pi, where the Gaussian of a bent angle has half its mass."""
    frames = linear_frames(4000)
    leaf = frames.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(linear_energy(leaf).sum(), leaf)
    exact = math.log(8 * math.pi**2 * 3**-1.5 * bond_mass() ** 2 * -math.expm1(-2 * BEND) / BEND)
    masses = [16.0, 12.0, 16.0]
    for given in ({}, {"gradient": gradient}):
        prior = fit_internal_prior(frames, [(0, 1), (1, 2)], masses, **given)
        assert list(prior.bends) == [0]
        assert prior.bends[0] == pytest.approx(BEND, rel=0.1)
        y, _ = prior.from_cartesian(frames)
        assert float(y.std(0).max()) == pytest.approx(1.0, abs=0.1)
        log_z, error, relative = weighted(prior, linear_energy)
        assert relative > 0.95
        assert abs(log_z - exact) < 5 * error
    config, tensors = prior.state()
    again = InternalCoordinatePrior.from_state(json.loads(json.dumps(config)), tensors)
    assert torch.equal(again.log_prob(frames), prior.log_prob(frames))
    # Power control: the volume of sin(theta) alone is not that of the coordinate.
    monkeypatch.setattr(InternalCoordinatePrior, "_bend_volume", lambda *_: 0.0)
    log_z, error, _ = weighted(prior, linear_energy)
    assert abs(log_z - exact) > 20 * error


def test_every_latent_point_of_a_bend_is_in_the_chart_and_comes_back():
    prior = fit_internal_prior(linear_frames(500), [(0, 1), (1, 2)], [16.0, 12.0, 16.0])
    y = prior.sample_latent(2000, generator=stream(6))
    y[:7, 2] = torch.tensor([-7.0, -5.0, -3.0, 0.0, 3.0, 5.0, 7.0])
    x, log_volume = prior.to_cartesian(y)
    assert bool(torch.isfinite(log_volume).all())
    back, again = prior.from_cartesian(x)
    torch.testing.assert_close(back[7:], y[7:], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(again[7:], log_volume[7:], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(back[:7], y[:7], atol=0.02, rtol=0.0)  # 1e-7 rad from pi
    # The volume element against the derivative of the angle by the coordinate.
    s = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64, requires_grad=True)
    stiff = torch.stack([torch.full_like(s, LENGTH)] * 2 + [s], 1)
    internal = prior.internal_from_stiff(stiff, stiff[:, :0])
    (slope,) = torch.autograd.grad(internal.angles.sum(), s)
    torch.testing.assert_close(
        prior._bend_volume(stiff, internal).detach(), slope.abs().log(), atol=1e-9, rtol=1e-9
    )


def test_bent_angles_are_left_as_they_were():
    assert water_prior().bends == {}
    config, _ = water_prior().state()
    assert "bends" not in config


def test_two_atoms_have_their_normalisation():
    generator = stream(8)
    b = LENGTH + torch.randn(2000, generator=generator, dtype=torch.float64) / STRETCH**0.5
    x = torch.zeros(2000, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = b
    x = rotate(remove_mean(x), random_rotations(2000, generator=generator))
    leaf = x.clone().requires_grad_(True)

    def energy(y):
        return stretches(y, [(0, 1)])

    (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    exact = math.log(4 * math.pi * 2**-1.5 * bond_mass())
    for given in ({}, {"gradient": gradient}):
        prior = fit_internal_prior(x, [(0, 1)], [1.0, 1.0], **given)
        log_z, error, relative = weighted(prior, energy)
        assert relative > 0.95
        assert abs(log_z - exact) < 5 * error
        # Power control: with the orientations of three atoms, 8 pi^2 of them, it is far off.
        assert abs(log_z + math.log(2 * math.pi) - exact) > 100 * error
        y = prior.sample_latent(50, generator=stream(1))
        torch.testing.assert_close(prior.from_cartesian(prior.to_cartesian(y)[0])[0], y)
