"""Chains whose autocorrelation is known."""

from __future__ import annotations

import numpy as np


def ar1(n_chains, n_steps, rho, seed, mean=0.0):
    """Stationary AR(1) chains of unit variance."""
    rng = np.random.default_rng(seed)
    x = np.empty((n_chains, n_steps))
    x[:, 0] = rng.normal(size=n_chains)
    noise = rng.normal(size=(n_chains, n_steps)) * np.sqrt(1 - rho**2)
    for t in range(1, n_steps):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x + mean
