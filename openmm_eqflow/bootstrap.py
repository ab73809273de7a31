r"""Errors of weighted, correlated frames by a block bootstrap.

Blocks of consecutive frames, longer than the correlation time and never across two chains, are
drawn with replacement (Künsch 1989, Ann. Stat. 17, 1217). Also populations of states, and
agreement between chains.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.diagnostics import Estimate, autocorrelation_ess

__all__ = [
    "block_index",
    "block_length_of",
    "bootstrap_shares",
    "chosen_block_length",
    "normalised_weights",
    "population",
    "split_chains",
    "split_r_hat",
]

FloatArray = NDArray[np.float64]
_MAX_BLOCKS = 1000


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
    r"""Twice the statistical inefficiency :math:`n / \mathrm{ESS}` of one or several chains.

    A quantity that never changes, or chains that disagree entirely, give whole chains as blocks.
    """
    parts = split_chains(np.asarray(values, dtype=np.float64), chain)
    shortest = min(len(part) for part in parts)
    if shortest < 4:
        return max(1, shortest)
    ess = autocorrelation_ess(np.stack([part[:shortest] for part in parts]))
    total = shortest * len(parts)
    return shortest if ess == 0.0 else min(shortest, max(1, math.ceil(2.0 * total / ess)))


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
    """``block_length`` if given; 1 for weighted samples of no chain; else by autocorrelation."""
    if block_length is not None:
        if block_length < 1:
            raise ValueError(f"block_length is {block_length}, expected at least 1")
        return block_length
    if log_weights is not None and chain is None:
        return 1
    return block_length_of(np.where(np.isfinite(values), values, 0.0), chain)


def population(
    inside: ArrayLike,
    *,
    log_weights: ArrayLike | None = None,
    chain: ArrayLike | None = None,
) -> tuple[Estimate, float]:
    r"""Give the population of a state, its standard error and its effective sample size.

    The ESS is Kish's for independent weighted samples, else that of the chains' autocorrelation.
    The error is :math:`\sqrt{\tilde p (1 - \tilde p) / \mathrm{ESS}}` with
    :math:`\tilde p = (p\,\mathrm{ESS} + 1) / (\mathrm{ESS} + 2)` (add one success and one failure,
    Laplace), so that a state never visited does not get an error of zero; for weighted samples
    the bootstrap error is used where it is larger.

    Parameters
    ----------
    inside
        ``(n,)`` booleans.
    log_weights, chain
        As for :func:`openmm_eqflow.analysis.weighted_histogram`.
    """
    state = np.asarray(inside, dtype=bool)
    w = normalised_weights(log_weights, state.size)
    p = float(w[state].sum())
    bootstrap = 0.0
    if log_weights is not None:
        ess = float(1.0 / np.square(w).sum())
        blocks = block_index(state.size, chosen_block_length(w, log_weights, chain, None), chain)
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
    return Estimate(p, max(error, bootstrap)), ess


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
