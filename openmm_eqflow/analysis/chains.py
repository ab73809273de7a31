r"""Chains of correlated frames: effective sample sizes, block bootstrap, populations, R-hat.

Errors of weighted, correlated frames by a block bootstrap.

Blocks of consecutive frames, longer than the correlation time and never across two chains, are
drawn with replacement (Künsch 1989, Ann. Stat. 17, 1217). Also populations of states, and
agreement between chains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.analysis.weights import Estimate, checked_log_weights, relative_weights

__all__ = [
    "Population",
    "autocorrelation_ess",
    "block_index",
    "block_length_of",
    "bootstrap_shares",
    "chosen_block_length",
    "longest_stuck",
    "mean_with_error",
    "normalised_weights",
    "population",
    "split_chains",
    "split_r_hat",
    "weighted_mean_with_error",
]

FloatArray = NDArray[np.float64]


class Population(NamedTuple):
    """Share of a state: an estimate with its standard error, and the samples it is worth.

    Examples
    --------
    >>> found = Population(Estimate(0.25, 0.05), 80.0)
    >>> found.value, found.error, found.ess
    (0.25, 0.05, 80.0)
    """

    estimate: Estimate
    ess: float
    """Effective sample size."""

    @property
    def value(self) -> float:
        """Share between 0 and 1."""
        return float(self.estimate.value)

    @property
    def error(self) -> float:
        """Its standard error."""
        return float(self.estimate.error)


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

_MAX_BLOCKS = 1000
_BLOCK = 4.0  # statistical inefficiencies in a block


def normalised_weights(log_weights: ArrayLike | None, n: int) -> FloatArray:
    """Weights ``(n,)`` of sum 1 from log weights; equal for None."""
    if log_weights is None:
        return np.full(n, 1.0 / n)
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.shape != (n,):
        raise ValueError(f"log_weights has shape {log_w.shape}, expected ({n},) as the values")
    if np.isnan(log_w).any() or (log_w == np.inf).any():
        raise ValueError("log_weights contain NaN or +inf; give invalid frames -inf")
    top = log_w.max()
    if top == -np.inf:
        raise ValueError("every weight is zero; no average exists")
    w = np.exp(log_w - top)
    normalised: FloatArray = w / w.sum()
    return normalised


def split_chains(values: FloatArray, chain: ArrayLike | None) -> list[FloatArray]:
    """Values of every chain, in order of the labels."""
    if chain is None:
        return [values]
    labels = np.asarray(chain)
    if labels.shape != values.shape:
        raise ValueError(f"chain has shape {labels.shape}, expected {values.shape}")
    return [values[labels == label] for label in np.unique(labels)]


def block_length_of(values: ArrayLike, chain: ArrayLike | None = None) -> int:
    r"""Four times the statistical inefficiency :math:`n / \mathrm{ESS}` of one or several chains.

    A block of b inefficiencies makes an error too small by about 1 / (4 b) of itself.
    A quantity that never changes, or chains that disagree entirely, give whole chains as blocks.
    """
    parts = split_chains(np.asarray(values, dtype=np.float64), chain)
    shortest = min(len(part) for part in parts)
    if shortest < 4:
        return max(1, shortest)
    ess = autocorrelation_ess(np.stack([part[:shortest] for part in parts]))
    total = shortest * len(parts)
    return shortest if ess == 0.0 else min(shortest, max(1, math.ceil(_BLOCK * total / ess)))


def block_index(n: int, block_length: int, chain: ArrayLike | None) -> NDArray[np.int64]:
    """Block index of every frame; blocks are made longer rather than more than a thousand."""
    block_length = max(block_length, -(-n // _MAX_BLOCKS))
    if chain is None:
        return np.arange(n) // block_length
    labels = np.asarray(chain)
    index = np.empty(n, dtype=np.int64)
    start = 0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        index[rows] = start + np.arange(rows.size) // block_length
        start = int(index[rows[-1]]) + 1
    return index


def bootstrap_shares(
    bins: NDArray[np.int64],
    n_bins: int,
    w: FloatArray,
    blocks: NDArray[np.int64],
    n_bootstrap: int,
    seed: int,
) -> tuple[FloatArray, FloatArray]:
    """Share of the weight in every bin and its standard error; bin -1 is outside of all."""
    n_blocks = int(blocks.max()) + 1
    inside = bins >= 0
    table = np.zeros((n_blocks, n_bins))
    np.add.at(table, (blocks[inside], bins[inside]), w[inside])
    totals = np.bincount(blocks, weights=w, minlength=n_blocks)
    share = table.sum(axis=0) / totals.sum()
    if n_blocks < 2:
        return share, np.full(n_bins, np.inf)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_blocks, np.full(n_blocks, 1.0 / n_blocks), size=n_bootstrap)
    denominators = counts @ totals
    used = denominators > 0.0
    draws = (counts[used] @ table) / denominators[used, None]
    return share, draws.std(axis=0, ddof=1)


def chosen_block_length(
    values: FloatArray,
    log_weights: ArrayLike | None,
    chain: ArrayLike | None,
    block_length: int | None,
) -> int:
    """``block_length`` if given; 1 for weighted samples of no chain; else by autocorrelation.

    Weighted chains take the longer of the lengths that values and weights ask for: an average is
    as correlated as the worse of the two.
    """
    if block_length is not None:
        if block_length < 1:
            raise ValueError(f"block_length is {block_length}, expected at least 1")
        return block_length
    if log_weights is not None and chain is None:
        return 1
    length = block_length_of(np.where(np.isfinite(values), values, 0.0), chain)
    weights = normalised_weights(log_weights, len(values))
    # Equal weights have no correlation to ask for.
    return length if np.ptp(weights) == 0.0 else max(length, block_length_of(weights, chain))


def population(
    inside: ArrayLike,
    *,
    log_weights: ArrayLike | None = None,
    chain: ArrayLike | None = None,
) -> Population:
    r"""Give the population of a state, its standard error and its effective sample size.

    The ESS is Kish's for weighted samples, divided by the statistical inefficiency of the weighted
    deviations :math:`w_i (1_i - p)` if they come from chains; without weights, that of the chains'
    autocorrelation.
    The error is :math:`\sqrt{\tilde p (1 - \tilde p) / \mathrm{ESS}}` with
    :math:`\tilde p = (p\,\mathrm{ESS} + 1) / (\mathrm{ESS} + 2)` (add one success and one failure,
    Laplace), so that a state never visited does not get an error of zero; for weighted samples
    the bootstrap error is used where it is larger.

    Parameters
    ----------
    inside
        ``(n,)`` booleans.
    log_weights, chain
        As for :func:`openmm_eqflow.analysis.profiles.weighted_histogram`.

    Returns
    -------
    Population
        ``value``, ``error`` and ``ess``.

    Raises
    ------
    ValueError
        Shapes that differ, or no positive weight.

    Examples
    --------
    >>> found = population([True, False, False, False] * 25, log_weights=[0.0] * 100)
    >>> found.value, round(found.error, 3), round(found.ess)
    (0.25, 0.044, 100)
    """
    state = np.asarray(inside, dtype=bool)
    w = normalised_weights(log_weights, state.size)
    p = float(w[state].sum())
    bootstrap = 0.0
    if log_weights is not None:
        ess = float(1.0 / np.square(w).sum())
        length = 1 if chain is None else block_length_of(w * (state - p), chain)
        ess *= min(1.0, _BLOCK / length)
        blocks = block_index(state.size, length, chain)
        _, errors = bootstrap_shares(state.astype(np.int64) - 1, 1, w, blocks, 200, 0)
        bootstrap = float(errors[0]) if np.isfinite(errors[0]) else 0.0
    else:
        parts = split_chains(state.astype(np.float64), chain)
        shortest = min(len(part) for part in parts)
        if shortest < 4:
            ess = float(len(parts))
        else:
            ess = autocorrelation_ess(np.stack([part[:shortest] for part in parts]))
            # Nothing ever changed: each chain counts once.
            ess = min(float(state.size), ess) if ess > 0.0 else float(len(parts))
    smoothed = (p * ess + 1.0) / (ess + 2.0)
    error = math.sqrt(smoothed * (1.0 - smoothed) / max(ess, 1.0))
    return Population(Estimate(p, max(error, bootstrap)), ess)


def split_r_hat(values: ArrayLike) -> float:
    r"""Split :math:`\hat R` of ``(n_chains, n_steps)`` (Vehtari et al. 2021, arXiv:1903.08008).

    Every chain is cut into halves; :math:`\hat R^2 = (n-1)/n + B / (n W)`. 1 is agreement, above
    1.01 is suspicious; nan if there are fewer than 4 steps, 1 for a constant.
    """
    chains = np.atleast_2d(np.asarray(values, dtype=np.float64))
    half = chains.shape[1] // 2
    if half < 2:
        return math.nan
    halves = np.concatenate([chains[:, :half], chains[:, -half:]])
    within = float(halves.var(axis=1, ddof=1).mean())
    between = float(halves.mean(axis=1).var(ddof=1))
    if within <= 1e-24 * max(1.0, float(np.square(chains).max())):
        return 1.0 if between <= within else math.inf
    return math.sqrt((half - 1) / half + between / within)
