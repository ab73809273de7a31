"""Basins of torsions that go together: partition, normalisation, sampling, fit, storage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from stand_ins.flows import coupled_torsions, stream, table

from openmm_eqflow.priors.torsions import (
    Conformers,
    TorsionDensity,
    _independent,
    find_basins,
)


def _product(density: TorsionDensity) -> TorsionDensity:
    return TorsionDensity(density.groups, density.tables)


def _grid(n: int) -> tuple[torch.Tensor, float]:
    axis = -math.pi + (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * math.pi / n
    return torch.cartesian_prod(axis, axis), (2 * math.pi / n) ** 2


def _chi_square(tau: torch.Tensor, density: TorsionDensity) -> tuple[float, int]:
    n = 12
    mass = density.log_prob(_grid(n * 20)[0]).exp().reshape(n, 20, n, 20).sum((1, 3)).numpy()
    expected = len(tau) * mass / mass.sum()
    counts = np.histogram2d(tau[:, 0], tau[:, 1], bins=n, range=[[-math.pi, math.pi]] * 2)[0]
    keep = expected > 8
    return float(((counts - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1


def test_basins_follow_the_peaks_across_the_periodic_edge():
    density = np.outer(table(math.pi).numpy(), table(-1.0, 2.0).numpy())
    basins = find_basins(density)
    assert basins.shape == density.shape
    assert sorted(np.unique(basins)) == [0, 1]
    # One peak sits on the edge of the first axis: both its sides are the same basin.
    assert (basins[0] == basins[-1]).all()
    # The second axis is cut at the two minima between its peaks.
    assert len(np.flatnonzero(np.diff(basins[0]))) == 2


def test_small_basins_join_the_nearest_peak():
    density = table(-2.0, 1.5).numpy()
    density[66] += 0.01  # a bump of its own, about a hundredth of the whole
    split, joined = find_basins(density, least=0.0), find_basins(density, least=0.05)
    assert len(np.unique(split)) == 3
    assert len(np.unique(joined)) == 2
    assert joined[66] == joined[int((1.5 + math.pi) / (2 * math.pi) * 72)]
    assert find_basins(np.full((4, 4), 0.1)).shape == (4, 4)


def test_mixture_is_normalised_by_quadrature():
    points, cell = _grid(240)
    density = coupled_torsions()
    assert float(density.log_prob(points).exp().sum() * cell) == pytest.approx(1, abs=1e-9)
    # Power control: without the weights of the conformers it is not.
    assert density.conformers is not None
    bare = density.conformers.log_mixture(
        [torch.zeros(1, dtype=torch.float64)] * 2, [torch.zeros(1, 2, dtype=torch.float64)] * 2
    )
    assert float(bare) == pytest.approx(0.0, abs=1e-12)
    density.conformers.weights.mul_(1.01)
    assert abs(float(density.log_prob(points).exp().sum() * cell) - 1) > 5e-3


def test_samples_match_their_density_and_not_the_product_of_groups():
    density = coupled_torsions()
    tau = density.sample(40_000, generator=stream(0))
    chi2, freedom = _chi_square(tau, density)
    assert stats.chi2.sf(chi2, freedom) > 1e-4
    assert _chi_square(tau, _product(density))[0] > 20 * chi2


def test_gradient_and_single_precision():
    density = coupled_torsions()
    tau = density.sample(20, generator=stream(1)).requires_grad_(True)
    assert torch.autograd.gradcheck(density.log_prob, (tau,))
    torch.testing.assert_close(
        density.log_prob(tau.detach().float()).double(),
        density.log_prob(tau.detach()),
        atol=1e-4,
        rtol=1e-4,
    )


def test_fit_finds_the_coupling():
    truth = coupled_torsions()
    tau, fresh = (truth.sample(n, generator=stream(n)) for n in (20_000, 5_000))
    fitted = TorsionDensity.fit(tau, fold=[1, 1])
    assert fitted.conformers is not None
    assert [len(torch.unique(b)) for b in fitted.conformers.basins] == [2, 2]
    assert fitted.conformers.independent == pytest.approx(0.05)
    best = fitted.conformers.members[0].tolist()
    assert float(fitted.conformers.weights[0]) == pytest.approx(0.6, abs=0.05), best
    gap = float((truth.log_prob(fresh) - fitted.log_prob(fresh)).mean())
    alone = float((truth.log_prob(fresh) - _product(fitted).log_prob(fresh)).mean())
    assert gap < 0.05
    assert alone > 5 * gap


def test_weights_of_frames_count():
    truth = coupled_torsions()
    tau = truth.sample(10_000, generator=stream(3))
    inside = (tau[:, 0] > 0).double()
    fitted = TorsionDensity.fit(tau, fold=[1, 1], weights=inside / inside.sum())
    # Only one basin of the first torsion is left: nothing to couple.
    assert fitted.conformers is None
    skewed = 0.02 + inside
    coupled = TorsionDensity.fit(tau, fold=[1, 1], weights=skewed / skewed.sum()).conformers
    assert coupled is not None
    plain = TorsionDensity.fit(tau, fold=[1, 1]).conformers
    assert plain is not None
    assert float(coupled.weights[0]) > float(plain.weights.max()) + 0.2


def test_conformers_never_seen_keep_the_independent_share():
    density = coupled_torsions(independent=0.2)
    missing = torch.tensor([[1.4, 0.1]], dtype=torch.float64)  # basins (1, 0)
    free = 0.2 * float(_product(density).log_prob(missing).exp())
    # Kernels reach a little over the borders of basins.
    assert float(density.log_prob(missing).exp()) == pytest.approx(free, rel=0.05)
    few = TorsionDensity.fit(density.sample(30, generator=stream(5)), fold=[1, 1])
    assert few.conformers is not None
    assert few.conformers.independent > 0.05


def test_the_independent_share_follows_from_halves():
    """Little where every combination is counted, more where many are met once or never."""
    generator = np.random.default_rng(0)
    basin = generator.integers(0, 4, 4000)
    tied = np.stack([basin, basin, basin], 1)
    assert _independent(tied, np.ones(4000), 4000) == 0.05
    many = generator.integers(0, 6, (4000, 5))
    loose = np.where(generator.random((4000, 1)) < 0.5, tied[:, [0, 0, 0, 0, 0]], many)
    found = _independent(loose, np.ones(4000), 4000)
    assert 0.2 <= found <= 0.7
    # Power: frames that both halves have hide what is missing.
    assert _independent(np.tile(loose, (2, 1)), np.ones(8000), 8000) < found
    # Weights that leave one half without any say nothing.
    assert _independent(loose, np.repeat([1.0, 0.0], 2000), 4000) == 0.05


def test_rotors_and_single_groups_are_notcoupled_torsions():
    tau = coupled_torsions().sample(2_000, generator=stream(6))
    assert TorsionDensity.fit(tau[:, :1], fold=[1]).conformers is None
    assert TorsionDensity.fit(tau, fold=[1, 3]).conformers is None


def test_state_survives_storage():
    density = coupled_torsions()
    assert density.conformers is not None
    config, tensors = density.conformers.state()
    loaded = Conformers.from_state(json.loads(json.dumps(config)), tensors)
    again = TorsionDensity(density.groups, density.tables, loaded)
    tau = density.sample(100, generator=stream(7))
    assert torch.equal(again.log_prob(tau), density.log_prob(tau))
    assert torch.equal(
        again.sample(100, generator=stream(8)), density.sample(100, generator=stream(8))
    )
