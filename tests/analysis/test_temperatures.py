"""Other temperatures by weights, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openmm_eqflow.analysis.temperatures import at_temperatures, log_weights_at

R = 8.31446261815324e-3
KELVINS = [270.0, 300.0, 340.0]


def samples(n, seed):
    """Five harmonic modes at 300 K, drawn 10 % too wide, with their weights."""
    rng = np.random.default_rng(seed)
    x = 1.1 * rng.normal(size=(n, 5))
    u = 0.5 * (x**2).sum(1)
    log_q = -0.5 * (x**2).sum(1) / 1.21 - 5 * math.log(1.1) - 2.5 * math.log(2 * math.pi)
    return -u - log_q, u


@pytest.mark.statistical
def test_harmonic_modes_at_three_temperatures():
    found = [at_temperatures(*samples(4000, seed), 300.0, KELVINS) for seed in range(60)]
    for k, t in enumerate(KELVINS):
        exact = {
            "log_z": 2.5 * math.log(2 * math.pi * t / 300.0),
            "mean_potential": 2.5 * R * t,
            "heat_capacity": 2.5 * R,
        }
        for key, value in exact.items():
            z = np.array([(r[k][key] - value) / r[k][f"{key}_error"] for r in found])
            # Right, and with errors of the right size.
            assert abs(z.mean()) < 4 / math.sqrt(len(z))
            assert 0.7 < z.std() < 1.3
            # Power: the weights of 300 K are wrong everywhere else.
            if t != 300.0 and key != "heat_capacity":
                still = [(r[1][key] - value) / r[1][f"{key}_error"] for r in found]
                assert abs(np.mean(still)) > 4 / math.sqrt(len(z))
        assert found[0][k]["effective_samples"] > 1000


def test_zero_weights_stay_zero_whatever_their_energy():
    log_w, u = np.array([0.0, -np.inf, 0.0]), np.array([1.0, np.nan, 3.0])
    shifted = log_weights_at(log_w, u, 300.0, 600.0)
    np.testing.assert_allclose(shifted[[0, 2]], [0.5, 1.5])
    assert shifted[1] == -np.inf
    (row,) = at_temperatures(log_w, u, 300.0, [300.0])
    assert row["mean_potential"] == pytest.approx(2.0 * R * 300.0)
    assert row["log_z"] == pytest.approx(math.log(2.0 / 3.0))
