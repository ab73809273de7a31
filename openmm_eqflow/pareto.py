"""How heavy the tail of importance weights is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.log_weights import checked_log_weights

__all__ = ["pareto_k"]


def _fit_generalised_pareto(exceedances: NDArray[np.float64]) -> float:
    r"""Shape k of a generalised Pareto distribution (Zhang & Stephens 2009, empirical Bayes).

    ``exceedances`` are sorted, positive. The profile likelihood is averaged over a grid of
    :math:`\theta` placed by the first quartile, so no optimiser can fail; the result is then
    shrunk towards 0.5 with the weight of ten observations (Vehtari et al. 2024, appendix C).
    """
    n = exceedances.size
    n_grid = 30 + math.isqrt(n)
    quartile = exceedances[int(n / 4 + 0.5) - 1]
    j = np.arange(1, n_grid + 1, dtype=np.float64)
    theta = 1.0 / exceedances[-1] + (1.0 - np.sqrt(n_grid / (j - 0.5))) / (3.0 * quartile)
    k = np.log1p(-theta[:, None] * exceedances).mean(axis=1)
    log_likelihood = n * (np.log(-theta / k) - k - 1.0)
    weights = np.exp(log_likelihood - log_likelihood.max())
    weights /= weights.sum()
    theta_mean = float(np.sum(theta * weights))
    shape = float(np.log1p(-theta_mean * exceedances).mean())
    return (n * shape + 10 * 0.5) / (n + 10)


def pareto_k(log_weights: ArrayLike) -> float:
    r"""Pareto shape k of the upper tail of the weights (Vehtari et al. 2024, arXiv:1507.02646).

    A generalised Pareto distribution is fitted to the :math:`\min(n/5, 3\sqrt n)` largest
    weights. Moments of the weights beyond 1/k do not exist: k < 0.5 is good, k > 0.7 means that
    averages and error bars from these weights cannot be trusted.

    ``inf`` if the tail has fewer than five positive weights; 0 if the tail has no spread.
    """
    log_w = np.sort(checked_log_weights(log_weights))
    n = log_w.size
    n_tail = math.ceil(min(0.2 * n, 3.0 * math.sqrt(n)))
    if n_tail < 5 or n_tail >= n or log_w[-n_tail] == -np.inf:
        return math.inf
    w = np.exp(log_w[-n_tail - 1 :] - log_w[-1])
    exceedances = w[1:] - w[0]
    if exceedances[-1] <= 1e-10:
        return 0.0
    # Ties with the threshold carry no information on the tail and break the likelihood at 0.
    exceedances = exceedances[exceedances > 0.0]
    return math.inf if exceedances.size < 5 else _fit_generalised_pareto(exceedances)
