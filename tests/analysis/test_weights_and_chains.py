"""Diagnostics against closed forms and known processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stand_ins.processes import ar1

from openmm_eqflow.analysis.chains import (
    autocorrelation_ess,
    longest_stuck,
    mean_with_error,
    weighted_mean_with_error,
)
from openmm_eqflow.analysis.weights import (
    forward_ess_with_error,
    kish_ess,
    log_z,
    max_weight_share,
    pareto_k,
    relative_ess,
    relative_ess_with_error,
    systematic,
)


def test_kish_ess_closed_forms() -> None:
    assert kish_ess(np.zeros(10)) == pytest.approx(10.0)
    assert kish_ess([1e4, -np.inf, 0.0]) == pytest.approx(1.0)
    assert kish_ess([-np.inf] * 3) == 0.0
    assert relative_ess([0.0, 0.0, -np.inf, -np.inf]) == 0.5
    w = np.array([1.0, 2.0, 3.0])
    assert kish_ess(np.log(w) + 700.0) == pytest.approx(36.0 / 14.0)
    assert max_weight_share(np.log(w) - 700.0) == pytest.approx(0.5)


def test_forward_ess_of_two_gaussians() -> None:
    """q = N(0, 1.2^2) for N(0, 1): sqrt(2 s^2 - 1) / s^2, from points of the target."""
    s, n = 1.2, 20_000
    exact = math.sqrt(2 * s**2 - 1) / s**2
    points = np.random.default_rng(0).normal(size=n)
    log_w = -0.5 * points**2 * (1 - 1 / s**2)
    value, error = forward_ess_with_error(log_w + 500.0)
    assert error < 0.002
    assert abs(value - exact) < 4 * error
    assert forward_ess_with_error(log_w).value == pytest.approx(value)
    # Power: points of q give another number.
    wrong = forward_ess_with_error(s**2 * log_w)
    assert abs(wrong.value - exact) > 10 * wrong.error


def test_forward_ess_sees_a_state_that_draws_of_q_lack() -> None:
    """A hundredth of the target has e^-12 of its density in q."""
    log_w = np.zeros(1000)
    assert forward_ess_with_error(log_w).value == 1.0
    log_w[:10] = 12.0
    expected = 1.0 / ((0.99 + 0.01 * math.exp(12)) * (0.99 + 0.01 * math.exp(-12)))
    assert forward_ess_with_error(log_w).value == pytest.approx(expected)
    log_w[0] = np.inf
    assert forward_ess_with_error(log_w).value == 0.0
    assert forward_ess_with_error([3.0, -3000.0]).value == 0.0  # nothing overflows
    assert forward_ess_with_error([3.0]) == (1.0, math.inf)
    for bad in ([0.0, -np.inf], [0.0, np.nan]):
        with pytest.raises(ValueError, match="points of the target"):
            forward_ess_with_error(bad)
    with pytest.raises(ValueError, match="non-empty"):
        forward_ess_with_error([])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_weights_are_errors(bad: float) -> None:
    for function in (kish_ess, relative_ess, pareto_k, max_weight_share, log_z):
        with pytest.raises(ValueError, match="1 of 3 log weights"):
            function([0.0, bad, 1.0])


def test_gaussian_log_weights_reproduce_their_relative_ess() -> None:
    sd = 0.8
    log_w = np.random.default_rng(0).normal(scale=sd, size=100_000)
    assert relative_ess(log_w) == pytest.approx(math.exp(-(sd**2)), rel=0.02)


def test_relative_ess_covers_the_truth_at_the_stated_rate() -> None:
    rng = np.random.default_rng(2)
    sd = 0.4
    truth, pulls = math.exp(-(sd**2)), []
    for _ in range(400):
        value, error = relative_ess_with_error(rng.normal(loc=-700.0, scale=sd, size=2000))
        pulls.append((value - truth) / error)
    assert np.std(pulls) == pytest.approx(1.0, abs=0.12)
    assert abs(np.mean(pulls)) < 0.2
    half = relative_ess_with_error(np.where(np.arange(1000) < 500, 0.0, -np.inf))
    assert half == (0.5, pytest.approx(math.sqrt(0.25 / 999)))  # binomial
    assert relative_ess_with_error([-np.inf, -np.inf]) == (0.0, math.inf)
    assert relative_ess_with_error([3.0]) == (1.0, math.inf)


def test_log_z_covers_the_truth_at_the_stated_rate() -> None:
    rng = np.random.default_rng(1)
    sd = 0.7
    pulls = []
    for _ in range(400):
        value, error = log_z(rng.normal(loc=3.0 - sd**2 / 2, scale=sd, size=500))
        pulls.append((value - 3.0) / error)
    assert np.std(pulls) == pytest.approx(1.0, abs=0.12)
    assert abs(np.mean(pulls)) < 0.2
    assert log_z([-np.inf, -np.inf]) == (-math.inf, math.inf)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_recovers_the_shape(k: float) -> None:
    uniform = np.random.default_rng(2).uniform(size=200_000)
    assert pareto_k(-k * np.log(uniform)) == pytest.approx(k, abs=0.1)


def test_pareto_k_of_bounded_and_degenerate_weights() -> None:
    rng = np.random.default_rng(3)
    assert pareto_k(np.log(rng.uniform(size=20_000))) < 0.0
    assert pareto_k(np.zeros(1000)) == 0.0
    assert pareto_k(np.zeros(10)) == math.inf
    assert pareto_k(np.where(np.arange(1000) < 3, 0.0, -np.inf)) == math.inf


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.9])
@pytest.mark.parametrize("shape", [(1, 40_000), (8, 5_000)])
def test_autocorrelation_ess_of_ar1(rho: float, shape: tuple[int, int]) -> None:
    expected = shape[0] * shape[1] * (1 - rho) / (1 + rho)
    assert autocorrelation_ess(ar1(*shape, rho, 4)) == pytest.approx(expected, rel=0.15)


def test_chains_that_disagree_have_no_effective_samples() -> None:
    chains = np.random.default_rng(5).normal(size=(4, 1000)) + 20.0 * np.arange(4)[:, None]
    assert autocorrelation_ess(chains) < 10.0
    assert autocorrelation_ess(np.ones(100)) == 0.0
    assert mean_with_error(np.ones(100)) == (1.0, math.inf)


def test_mean_error_is_calibrated_on_correlated_chains() -> None:
    chains = ar1(300, 2000, 0.8, 6)
    pulls = [estimate.value / estimate.error for estimate in map(mean_with_error, chains)]
    assert np.std(pulls) == pytest.approx(1.0, abs=0.15)


def test_longest_stuck() -> None:
    assert longest_stuck([1, 0, 0, 1, 0]) == 2
    assert longest_stuck([[1, 1, 1], [0, 0, 0]]) == 3
    assert longest_stuck([True] * 4) == 0


def test_weighted_mean_error_is_calibrated() -> None:
    rng = np.random.default_rng(7)
    pulls = []
    for seed in range(150):
        x = rng.normal(size=400)
        value, error = weighted_mean_with_error(x, 0.5 * x, n_bootstrap=200, seed=seed)
        pulls.append((value - 0.5) / error)
    assert np.std(pulls) == pytest.approx(1.0, abs=0.2)


def test_weighted_mean_ignores_zero_weights_and_takes_columns() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0], [np.nan, np.nan]])
    mean, error = weighted_mean_with_error(values, [0.0, 0.0, -np.inf])
    np.testing.assert_allclose(mean, [2.0, 3.0])
    assert np.shape(error) == (2,)
    with pytest.raises(ValueError, match="NaN"):
        weighted_mean_with_error(values, [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="every weight is zero"):
        weighted_mean_with_error([1.0], [-np.inf])
    with pytest.raises(ValueError, match="block_length"):
        weighted_mean_with_error([1.0, 2.0], [0.0, 0.0], block_length=2)


def test_blocks_raise_the_error_of_a_correlated_chain() -> None:
    x = ar1(1, 20_000, 0.9, 8)[0]
    naive = weighted_mean_with_error(x, np.zeros(x.size), n_bootstrap=300).error
    blocked = weighted_mean_with_error(
        x, np.zeros(x.size), block_length=200, n_bootstrap=300
    ).error
    assert blocked / naive == pytest.approx(math.sqrt(19.0), rel=0.25)


@pytest.mark.parametrize(
    "function",
    [
        kish_ess,
        relative_ess,
        max_weight_share,
        log_z,
        pareto_k,
        autocorrelation_ess,
        mean_with_error,
        lambda v: longest_stuck(v > 0 if hasattr(v, "shape") else [k > 0 for k in v]),
        lambda v: weighted_mean_with_error(v, v, n_bootstrap=20),
    ],
)
def test_arrays_lists_and_tensors_are_the_same(function):
    values = np.random.default_rng(0).normal(size=200)
    expected = function(values)
    assert function(torch.from_numpy(values)) == expected
    assert function(values.tolist()) == expected
    single = values.astype(np.float32)
    assert function(torch.from_numpy(single)) == function(single)


@pytest.mark.statistical
def test_systematic_resampling_keeps_expectations():
    rng = np.random.default_rng(8)
    log_w = rng.normal(size=50)
    weights = np.exp(log_w) / np.exp(log_w).sum()
    draws = [systematic(log_w - 700.0, u, 50) for u in rng.random(400)]
    counts = np.stack([np.bincount(rows, minlength=50) for rows in draws]).astype(float)
    assert (counts.sum(1) == 50).all()
    assert (np.abs(counts - 50 * weights) < 1).all()
    # A count is one of two neighbours: its standard deviation is at most a half.
    assert np.abs(counts.mean(0) - 50 * weights).max() < 5 * 0.5 / 400**0.5
    assert np.abs(counts[0] - 50 * weights).max() > 5 * 0.5 / 400**0.5  # power: one alone
    # As many as the weights are worth; never a row without weight.
    log_w[:40] = -np.inf
    rows = systematic(log_w, 0.5)
    assert len(rows) == int(kish_ess(log_w))
    assert rows.min() >= 40
    assert systematic([-np.inf, 0.0, -np.inf], 0.0).tolist() == [1]
    with pytest.raises(ValueError, match="nothing to draw"):
        systematic(np.full(3, -np.inf), 0.5)
