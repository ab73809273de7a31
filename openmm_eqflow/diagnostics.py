r"""Numbers that say how far samples and weights can be trusted.

Importance weights are given as logarithms, :math:`\log w = -u(x) - \log q(x)`; ``-inf`` is a
weight of exactly zero (an invalid proposal) and counts in n, NaN and ``+inf`` are errors.
Everything is RAW: nothing is clipped, dropped or smoothed before it is reported.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.log_weights import checked_log_weights, relative_weights
from openmm_eqflow.pareto import pareto_k

__all__ = [
    "Estimate",
    "autocorrelation_ess",
    "kish_ess",
    "log_z",
    "longest_stuck",
    "max_weight_share",
    "mean_with_error",
    "pareto_k",
    "relative_ess",
    "relative_ess_with_error",
    "weighted_mean_with_error",
]

FloatArray = NDArray[np.float64]


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


def _autocovariance(chains: FloatArray) -> FloatArray:
    """Biased autocovariance of every row by FFT, ``(n_chains, n_steps)``."""
    n = chains.shape[1]
    centred = chains - chains.mean(axis=1, keepdims=True)
    n_fft = 2 ** math.ceil(math.log2(2 * n))
    spectrum = np.fft.rfft(centred, n=n_fft, axis=1)
    result: FloatArray = np.fft.irfft(np.abs(spectrum) ** 2, n=n_fft, axis=1)[:, :n] / n
    return result


def _checked_chains(values: ArrayLike) -> FloatArray:
    chains = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if chains.ndim != 2 or chains.shape[1] < 4:
        raise ValueError(
            f"chains have shape {chains.shape}; expected (n_steps,) or (n_chains, n_steps) with "
            "at least 4 steps"
        )
    if not np.isfinite(chains).all():
        raise ValueError("chains contain NaN or infinite values; drop or repair them first")
    return chains


def autocorrelation_ess(values: ArrayLike) -> float:
    r"""Effective sample size of the mean of one or several chains.

    .. math:: \mathrm{ESS} = \frac{m n}{1 + 2 \sum_{t \ge 1} \hat\rho_t}, \qquad
              \hat\rho_t = 1 - \frac{W - \bar\gamma_t}{\widehat{\mathrm{var}}^+}

    with m chains of n steps, W their mean within-chain variance, :math:`\bar\gamma_t` the mean
    autocovariance and :math:`\widehat{\mathrm{var}}^+` the variance that includes the spread
    between chains (Vehtari et al. 2021, arXiv:1903.08008, eqs 3 and 10); the sum is cut by
    Geyer's initial monotone positive sequence (Geyer 1992). Chains that disagree lower the ESS.

    Parameters
    ----------
    values
        ``(n_steps,)`` or ``(n_chains, n_steps)``; booleans are fine.

    Returns
    -------
    float
        0 if nothing ever changed (no evidence of mixing), at most m n log10(m n).
    """
    chains = _checked_chains(values)
    m, n = chains.shape
    gamma = _autocovariance(chains).mean(axis=0)
    within = float(gamma[0]) * n / (n - 1)
    var_plus = float(gamma[0])
    if m > 1:
        var_plus += float(chains.mean(axis=1).var(ddof=1))
    # Round-off of a constant chain must not pass for fluctuation.
    if var_plus <= 1e-24 * max(1.0, float(np.square(chains).max())):
        return 0.0
    rho = 1.0 - (within - gamma * n / (n - 1)) / var_plus
    rho[0] = 1.0
    pairs = rho[: 2 * (n // 2)].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0.0)
    pairs = pairs[: negative[0]] if negative.size else pairs
    tau = -1.0 + 2.0 * float(np.minimum.accumulate(pairs).sum())
    tau = max(tau, 1.0 / math.log10(m * n))
    return float(m * n / tau)


def mean_with_error(values: ArrayLike) -> Estimate:
    r"""Mean of correlated chains and its error :math:`\sqrt{\mathrm{var}/\mathrm{ESS}}`.

    ``values`` as in :func:`autocorrelation_ess`; the error is ``inf`` if the ESS is 0.
    """
    chains = _checked_chains(values)
    ess = autocorrelation_ess(chains)
    error = math.inf if ess == 0.0 else float(chains.std(ddof=1)) / math.sqrt(ess)
    return Estimate(float(chains.mean()), error)


def longest_stuck(moved: ArrayLike) -> int:
    """Longest run of consecutive rejections in any chain.

    ``moved`` is ``(n_steps,)`` or ``(n_chains, n_steps)``, True where the chain moved.
    """
    rows = np.atleast_2d(np.asarray(moved, dtype=bool))
    longest = 0
    for row in rows:
        stops = np.concatenate(([-1], np.flatnonzero(row), [row.size]))
        longest = max(longest, int(np.diff(stops).max()) - 1)
    return longest


def weighted_mean_with_error(
    values: ArrayLike,
    log_weights: ArrayLike,
    *,
    block_length: int = 1,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Estimate:
    r"""Self-normalised average :math:`\sum_i w_i f_i / \sum_i w_i` with a block-bootstrap error.

    Parameters
    ----------
    values
        ``(n,)`` or ``(n, k)``. Values of zero-weight samples are ignored and may be anything.
    log_weights
        ``(n,)`` unnormalised log weights.
    block_length
        Consecutive samples resampled together: 1 for independent flow samples, longer than the
        correlation time for a chain. A remainder shorter than a block forms a block of its own.
    n_bootstrap, seed
        Number of resamples and the seed of their generator.

    Raises
    ------
    ValueError
        Shapes that differ, fewer than two blocks, or no positive weight.
    """
    log_w = checked_log_weights(log_weights)
    f = np.asarray(values, dtype=np.float64)
    if f.ndim not in (1, 2) or f.shape[0] != log_w.size:
        raise ValueError(
            f"values have shape {f.shape}; expected ({log_w.size},) or ({log_w.size}, k)"
        )
    w = relative_weights(log_w)
    positive = w > 0.0
    if not positive.any():
        raise ValueError("every weight is zero; no average exists")
    if np.isnan(f[positive]).any():
        raise ValueError("values of samples with positive weight contain NaN")
    columns = f.reshape(f.shape[0], -1)
    numerator = np.where(positive[:, None], w[:, None] * columns, 0.0)
    starts = np.arange(0, w.size, block_length)
    if starts.size < 2:
        raise ValueError(
            f"block_length {block_length} leaves {starts.size} block(s) of {w.size} samples; "
            "choose a shorter one"
        )
    block_num = np.add.reduceat(numerator, starts, axis=0)
    block_den = np.add.reduceat(w, starts)
    rng = np.random.default_rng(seed)
    means = np.empty((n_bootstrap, columns.shape[1]))
    for b in range(n_bootstrap):
        counts = rng.multinomial(starts.size, np.full(starts.size, 1.0 / starts.size))
        den = float(counts @ block_den)
        means[b] = counts @ block_num / den if den > 0.0 else np.nan
    value = block_num.sum(axis=0) / block_den.sum()
    # A resample without any weight carries no average; leaving it out can only happen at tiny ESS.
    error = np.nanstd(means, axis=0, ddof=1)
    if f.ndim == 1:
        return Estimate(float(value[0]), float(error[0]))
    return Estimate(value, error)
