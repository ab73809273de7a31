r"""Importance weights: checked logarithms, their tail, effective sample sizes and log Z.

Logarithms of importance weights: checked, and taken relative to the largest.

How heavy the tail of importance weights is.

Numbers that say how far samples and weights can be trusted.

Importance weights are given as logarithms, :math:`\log w = -u(x) - \log q(x)`; ``-inf`` is a
weight of exactly zero (an invalid proposal) and counts in n, NaN and ``+inf`` are errors.
Everything is RAW: nothing is clipped, dropped or smoothed before it is reported.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "TAME",
    "Estimate",
    "checked_log_weights",
    "forward_ess_with_error",
    "kish_ess",
    "log_z",
    "max_weight_share",
    "pareto_k",
    "relative_ess",
    "relative_ess_with_error",
    "relative_weights",
    "systematic",
]

#: Largest weight over the mean below which a heavy tail (Pareto k) decides nothing.
TAME = 3.0

FloatArray = NDArray[np.float64]


def checked_log_weights(log_weights: ArrayLike) -> FloatArray:
    """Log weights as a float64 array ``(n,)``; ValueError for NaN, ``+inf`` or no weight."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or log_w.size == 0:
        raise ValueError(
            f"log_weights has shape {log_w.shape}; expected a non-empty one-dimensional array"
        )
    n_bad = int(np.count_nonzero(np.isnan(log_w) | (log_w == np.inf)))
    if n_bad:
        raise ValueError(
            f"{n_bad} of {log_w.size} log weights are NaN or +inf; give invalid configurations "
            "u = +inf (log weight -inf) before asking for diagnostics"
        )
    return log_w


def relative_weights(log_w: FloatArray) -> FloatArray:
    """Weights divided by the largest one; all zero if every log weight is -inf."""
    top = log_w.max()
    return np.zeros_like(log_w) if top == -np.inf else np.exp(log_w - top)


def systematic(log_weights: ArrayLike, u: float, n: int | None = None) -> NDArray[np.int64]:
    """Resample systematically: rows that stand for the weights when all weigh the same.

    A row comes as often as n times its normalised weight, rounded up or down (Kitagawa 1996).

    Parameters
    ----------
    log_weights
        ``(m,)``, one at least finite.
    u
        A uniform random number from [0, 1).
    n
        Rows to draw; as many as the weights are worth (:func:`kish_ess`) where not given.

    Returns
    -------
    ndarray
        Indices ``(n,)``, ascending.

    Examples
    --------
    >>> systematic(np.log([1.0, 2.0, 1.0]), 0.5, 4).tolist()
    [0, 1, 1, 2]
    """
    weights = relative_weights(checked_log_weights(log_weights))
    if not weights.any():
        raise ValueError("all weights are zero: there is nothing to draw")
    n = max(1, int(kish_ess(log_weights))) if n is None else n
    reached = weights.cumsum()
    places = (np.arange(n) + u) / n * reached[-1]
    rows = np.searchsorted(reached, places, side="right")
    return np.minimum(rows, np.flatnonzero(weights)[-1])


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


class Estimate(NamedTuple):
    """A value with its standard error (floats, or arrays of one shape)."""

    value: float | FloatArray
    error: float | FloatArray


def kish_ess(log_weights: ArrayLike) -> float:
    r"""Kish's effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2` (Kish 1965).

    ``log_weights`` are ``(n,)`` and need not be normalised; 0 if every weight is zero.

    Examples
    --------
    >>> kish_ess([0.0, 0.0, float("-inf"), float("-inf")])
    2.0
    """
    w = relative_weights(checked_log_weights(log_weights))
    total = w.sum()
    return 0.0 if total == 0.0 else float(total**2 / np.square(w).sum())


def relative_ess(log_weights: ArrayLike) -> float:
    """Kish's effective sample size divided by n, raw (zero weights count in n)."""
    log_w = checked_log_weights(log_weights)
    return kish_ess(log_w) / log_w.size


def relative_ess_with_error(log_weights: ArrayLike) -> Estimate:
    r"""Relative effective sample size and its standard error (delta method).

    .. math:: \hat f = \bar w^2 / \overline{w^2}, \qquad
              \sigma = \hat f \, \mathrm{sd}\!\left(
              \frac{2 w}{\bar w} - \frac{w^2}{\overline{w^2}} \right) \Big/ \sqrt n

    The error rests on fourth moments of the weights, which do not exist where ``pareto_k``
    exceeds 1/4: there it is a lower bound, and the value itself more often too high than too low.

    Error ``inf`` if n = 1 or every weight is zero.

    Examples
    --------
    >>> value, error = relative_ess_with_error([0.0, 0.0, float("-inf"), float("-inf")])
    >>> value, round(error, 3)
    (0.5, 0.289)
    """
    log_w = checked_log_weights(log_weights)
    value = relative_ess(log_w)
    if value == 0.0 or log_w.size == 1:
        return Estimate(value, math.inf)
    w = relative_weights(log_w)
    influence = 2.0 * w / w.mean() - np.square(w) / np.square(w).mean()
    return Estimate(value, value * float(influence.std(ddof=1)) / math.sqrt(w.size))


def forward_ess_with_error(log_weights: ArrayLike) -> Estimate:
    r"""Relative effective sample size as points of the target see it, and its standard error.

    .. math:: \hat f = \left[ \frac1n \sum_i w_i \cdot \frac1n \sum_i w_i^{-1} \right]^{-1}
              \to \frac{Z}{E_p[w]} = \frac{E_q[w]^2}{E_q[w^2]}, \qquad x_i \sim p

    (Nicoli et al., Phys. Rev. D 108, 114501, 2023: the forward ESS.) Both kinds estimate one
    number. A region to which q gives too little density is rare among draws of q but not among
    points of p, so that the lower of the two is the safer one. The error (delta method) takes the
    points as independent; of correlated frames it is too small.

    Parameters
    ----------
    log_weights
        ``-u - log q`` at points x of the target, (n,). ``-inf`` (the target has no density there)
        is an error; ``+inf`` (q has none) makes the value 0.

    Examples
    --------
    >>> forward_ess_with_error([0.0, 0.0]).value
    1.0
    """
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or log_w.size == 0:
        raise ValueError(
            f"log_weights has shape {log_w.shape}; expected a non-empty one-dimensional array"
        )
    if np.isnan(log_w).any() or (log_w == -np.inf).any():
        raise ValueError("points of the target have weights, none may be NaN or zero")
    if (log_w == np.inf).any():
        return Estimate(0.0, math.inf)
    w, v = relative_weights(log_w), relative_weights(-log_w)
    span = float(log_w.max() - log_w.min())
    value = math.exp(-span) / float(w.mean() * v.mean())
    if log_w.size == 1:
        return Estimate(value, math.inf)
    influence = w / w.mean() + v / v.mean()
    return Estimate(value, value * float(influence.std(ddof=1)) / math.sqrt(w.size))


def max_weight_share(log_weights: ArrayLike) -> float:
    r"""Share of the largest weight, :math:`\max_i w_i / \sum_i w_i`; 1 if all weights are zero."""
    total = relative_weights(checked_log_weights(log_weights)).sum()
    return 1.0 if total == 0.0 else float(1.0 / total)


def log_z(log_weights: ArrayLike) -> Estimate:
    r"""Log normalising constant of the target from independent samples of a normalised q.

    .. math:: \log\hat Z = \log \frac1n \sum_i w_i, \qquad
              \sigma = \sqrt{\frac{\sum_i (w_i - \bar w)^2}{n (n-1)}} \Big/ \bar w

    (delta method). With this package's densities Z is the integral of exp(-u) over the mean-free
    subspace, in nm^((N-1)D). The error is itself unreliable where ``pareto_k`` exceeds 0.7.

    Value ``-inf`` and error ``inf`` if every weight is zero; error ``inf`` if n = 1.
    """
    log_w = checked_log_weights(log_weights)
    w = relative_weights(log_w)
    mean = float(w.mean())
    if mean == 0.0:
        return Estimate(-math.inf, math.inf)
    value = float(log_w.max()) + math.log(mean)
    if w.size == 1:
        return Estimate(value, math.inf)
    return Estimate(value, float(w.std(ddof=1)) / math.sqrt(w.size) / mean)
