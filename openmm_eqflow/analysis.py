r"""Weighted averages, histograms and free-energy profiles of trajectories, with errors.

Frames may be a Markov chain (equal weights, correlated) or independent flow samples (weights
:math:`w = e^{-u} / q`). Errors come from a block bootstrap (Künsch 1989, Ann. Stat. 17, 1217):
blocks longer than the correlation time, never across two chains, are drawn with replacement.
Weights are used raw; ``log_weights`` of -inf are weights of zero.

Examples
--------
>>> import numpy as np
>>> values = np.random.default_rng(0).normal(size=4000)
>>> profile = free_energy_profile(values, bins=20, range=(-2.0, 2.0))
>>> bool(abs(profile.free_energy[0] - profile.free_energy[10] - 1.8) < 5 * profile.error[0] + 0.1)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mdtraj
import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.atomic import write_text
from openmm_eqflow.diagnostics import Estimate, autocorrelation_ess

__all__ = [
    "FreeEnergyMap",
    "FreeEnergyProfile",
    "Histogram",
    "block_length_of",
    "free_energy_map",
    "free_energy_profile",
    "population",
    "split_r_hat",
    "to_inference_data",
    "weighted_histogram",
    "write_colvar",
]

FloatArray = NDArray[np.float64]
Observable = Callable[[mdtraj.Trajectory], ArrayLike]
_MAX_BLOCKS = 1000


class Histogram(NamedTuple):
    """Probabilities of bins: edges (k + 1,), probability, its error and density, (k,)."""

    edges: FloatArray
    probability: FloatArray
    error: FloatArray

    @property
    def density(self) -> FloatArray:
        """Probability per unit of the value."""
        result: FloatArray = self.probability / np.diff(self.edges)
        return result


class FreeEnergyProfile(NamedTuple):
    r"""Free energy along a coordinate, kT.

    Attributes
    ----------
    centres, edges
        Bins, ``(k,)`` and ``(k + 1,)``, in the unit of the coordinate.
    free_energy
        :math:`-\log p` shifted so that its minimum is 0; +inf in empty bins.
    error
        Standard error of :math:`-\log p` (delta method on bootstrapped p); +inf in empty bins.
    probability, probability_error
        Share of each bin, ``(k,)``.
    block_length
        Frames per block behind the errors.
    """

    centres: FloatArray
    edges: FloatArray
    free_energy: FloatArray
    error: FloatArray
    probability: FloatArray
    probability_error: FloatArray
    block_length: int


class FreeEnergyMap(NamedTuple):
    """As :class:`FreeEnergyProfile` in two coordinates; arrays are ``(k_x, k_y)``."""

    x_edges: FloatArray
    y_edges: FloatArray
    free_energy: FloatArray
    error: FloatArray
    probability: FloatArray


def _weights(log_weights: ArrayLike | None, n: int) -> FloatArray:
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
    w: FloatArray = np.exp(log_w - top)
    return w / w.sum()


def _by_chain(values: FloatArray, chain: ArrayLike | None) -> list[FloatArray]:
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
    parts = _by_chain(np.asarray(values, dtype=np.float64), chain)
    shortest = min(len(part) for part in parts)
    if shortest < 4:
        return max(1, shortest)
    ess = autocorrelation_ess(np.stack([part[:shortest] for part in parts]))
    total = shortest * len(parts)
    return shortest if ess == 0.0 else min(shortest, max(1, math.ceil(2.0 * total / ess)))


def _blocks(n: int, block_length: int, chain: ArrayLike | None) -> NDArray[np.int64]:
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


def _bootstrap_shares(
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


def _values(
    data: mdtraj.Trajectory | ArrayLike, function: Observable | None
) -> FloatArray:
    if function is not None:
        data = function(data)
    elif isinstance(data, mdtraj.Trajectory):
        raise ValueError("a trajectory needs a function; for example mdtraj.compute_rg")
    values = np.asarray(data, dtype=np.float64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or not values.size:
        raise ValueError(f"the coordinate has shape {values.shape}, expected one value per frame")
    return values


def _bin(values: FloatArray, edges: FloatArray) -> NDArray[np.int64]:
    index = np.searchsorted(edges, values, side="right") - 1
    # The last bin is closed on the right, as in numpy.histogram.
    index[values == edges[-1]] = len(edges) - 2
    outside = (index < 0) | (index > len(edges) - 2) | ~np.isfinite(values)
    index[outside] = -1
    return index.astype(np.int64)


def _edges(values: FloatArray, bins: int | ArrayLike, range: tuple[float, float] | None) -> FloatArray:
    finite = values[np.isfinite(values)]
    edges: FloatArray = np.histogram_bin_edges(finite, bins=bins, range=range).astype(np.float64)  # type: ignore[arg-type]
    return edges


def weighted_histogram(
    data: mdtraj.Trajectory | ArrayLike,
    function: Observable | None = None,
    *,
    log_weights: ArrayLike | None = None,
    chain: ArrayLike | None = None,
    bins: int | ArrayLike = 50,
    range: tuple[float, float] | None = None,
    block_length: int | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Histogram:
    r"""Histogram :math:`p_k = \sum_i w_i 1[f_i \in k] / \sum_i w_i` with block-bootstrap errors.

    Parameters
    ----------
    data
        A trajectory (with ``function``), or the values ``(n,)`` themselves.
    function
        Any function of a trajectory that gives one value per frame.
    log_weights
        ``(n,)``, unnormalised; equal weights by default.
    chain
        ``(n,)`` label of the Markov chain of each frame; one chain by default.
    bins, range
        As in :func:`numpy.histogram`. Weight outside of the range counts in the total.
    block_length
        Frames per block; by default 1 for weighted samples without ``chain`` (independent), else
        :func:`block_length_of` the values.
    n_bootstrap, seed
        Number of resamples, seed of their generator.
    """
    values = _values(data, function)
    w = _weights(log_weights, values.size)
    edges = _edges(values, bins, range)
    length = _length(values, log_weights, chain, block_length)
    share, error = _bootstrap_shares(
        _bin(values, edges),
        len(edges) - 1,
        w,
        _blocks(values.size, length, chain),
        n_bootstrap,
        seed,
    )
    return Histogram(edges, share, error)


def _length(
    values: FloatArray,
    log_weights: ArrayLike | None,
    chain: ArrayLike | None,
    block_length: int | None,
) -> int:
    if block_length is not None:
        if block_length < 1:
            raise ValueError(f"block_length is {block_length}, expected at least 1")
        return block_length
    if log_weights is not None and chain is None:
        return 1
    return block_length_of(np.where(np.isfinite(values), values, 0.0), chain)


def _free_energy(share: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
    free_energy, spread = np.full(share.shape, np.inf), np.full(share.shape, np.inf)
    seen = share > 0.0
    free_energy[seen] = -np.log(share[seen])
    spread[seen] = error[seen] / share[seen]
    return free_energy, spread


def free_energy_profile(
    data: mdtraj.Trajectory | ArrayLike,
    function: Observable | None = None,
    **options: Any,
) -> FreeEnergyProfile:
    r"""Free energy :math:`F(f) = -\log p(f)` in kT along any function of a trajectory.

    Parameters
    ----------
    data, function, **options
        As for :func:`weighted_histogram`.

    Examples
    --------
    >>> trajectory = mdtraj.load("samples.dcd", top="topology.pdb")          # doctest: +SKIP
    >>> profile = free_energy_profile(                                        # doctest: +SKIP
    ...     trajectory, lambda t: mdtraj.compute_phi(t)[1], bins=36, range=(-np.pi, np.pi))
    """
    values = _values(data, function)
    length = _length(
        values, options.get("log_weights"), options.get("chain"), options.get("block_length")
    )
    histogram = weighted_histogram(values, **{**options, "block_length": length})
    # Bins of unequal width: the free energy is that of the density.
    widths = np.diff(histogram.edges) / np.diff(histogram.edges).mean()
    free_energy, error = _free_energy(histogram.probability / widths, histogram.error / widths)
    return FreeEnergyProfile(
        0.5 * (histogram.edges[1:] + histogram.edges[:-1]),
        histogram.edges,
        free_energy - free_energy.min(),
        error,
        histogram.probability,
        histogram.error,
        length,
    )


def free_energy_map(
    x: ArrayLike,
    y: ArrayLike,
    *,
    log_weights: ArrayLike | None = None,
    chain: ArrayLike | None = None,
    bins: int = 36,
    range: tuple[tuple[float, float], tuple[float, float]] = ((-np.pi, np.pi), (-np.pi, np.pi)),
    block_length: int | None = None,
    n_bootstrap: int = 100,
    seed: int = 0,
) -> FreeEnergyMap:
    r"""Free energy :math:`-\log p(x, y)` in kT, p the share of each bin (not shifted)."""
    a, b = _values(x, None), _values(y, None)
    w = _weights(log_weights, a.size)
    x_edges, y_edges = (np.linspace(*limits, bins + 1) for limits in range)
    i, j = _bin(a, x_edges), _bin(b, y_edges)
    index = np.where((i < 0) | (j < 0), -1, i * bins + j)
    length = max(_length(v, log_weights, chain, block_length) for v in (a, b))
    share, error = _bootstrap_shares(
        index, bins * bins, w, _blocks(a.size, length, chain), n_bootstrap, seed
    )
    free_energy, spread = _free_energy(share, error)
    shape = (bins, bins)
    return FreeEnergyMap(
        x_edges, y_edges, free_energy.reshape(shape), spread.reshape(shape), share.reshape(shape)
    )


def population(
    inside: ArrayLike,
    *,
    log_weights: ArrayLike | None = None,
    chain: ArrayLike | None = None,
) -> tuple[Estimate, float]:
    r"""Population of a state, its standard error, and the effective sample size behind it.

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
        As for :func:`weighted_histogram`.
    """
    state = np.asarray(inside, dtype=bool)
    w = _weights(log_weights, state.size)
    p = float(w[state].sum())
    bootstrap = 0.0
    if log_weights is not None:
        ess = float(1.0 / np.square(w).sum())
        blocks = _blocks(state.size, _length(w, log_weights, chain, None), chain)
        _, errors = _bootstrap_shares(state.astype(np.int64) - 1, 1, w, blocks, 200, 0)
        bootstrap = float(errors[0]) if np.isfinite(errors[0]) else 0.0
    else:
        parts = _by_chain(state.astype(np.float64), chain)
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


def write_colvar(
    path: Path,
    columns: Mapping[str, ArrayLike],
    *,
    log_weights: ArrayLike | None = None,
    kt: float = 1.0,
    periodic: tuple[str, ...] = (),
) -> Path:
    r"""Write coordinates and weights in PLUMED's COLVAR format (also read by numpy.loadtxt).

    The column ``flow.bias`` is :math:`kT \log w`: PLUMED's ``REWEIGHT_BIAS ARG=flow.bias`` (with
    the same temperature) gives each frame the weight w. Frames of weight zero are left out.

    Parameters
    ----------
    columns
        Name to values ``(n,)``; names without blanks.
    log_weights
        ``(n,)``; zero (a Markov chain) by default. Shifted so that the largest is 0.
    kt
        kT in the energy unit of the file (2.494 kJ/mol at 300 K).
    periodic
        Names of columns that are angles in radians; their domain is written as -pi, pi.
    """
    names = list(columns)
    bad = [name for name in names if not name or any(c.isspace() for c in name)]
    if bad or not names:
        raise ValueError(f"column names {bad or names} must exist and hold no blanks")
    values = np.column_stack([np.asarray(columns[name], dtype=np.float64) for name in names])
    log_w = np.zeros(len(values)) if log_weights is None else np.asarray(log_weights, np.float64)
    w = _weights(log_w, len(values))
    lines = ["#! FIELDS time " + " ".join([*names, "flow.bias"])]
    for name in periodic:
        lines += [f"#! SET min_{name} -pi", f"#! SET max_{name} pi"]
    bias = kt * (log_w - log_w.max())
    for k in np.flatnonzero(w > 0.0):
        row = " ".join(f"{value:.9g}" for value in (*values[k], bias[k]))
        lines.append(f"{k} {row}")
    write_text(Path(path), "\n".join(lines) + "\n")
    return Path(path)


def to_inference_data(
    values: Mapping[str, ArrayLike],
    chain: ArrayLike,
    *,
    reduced_potential: ArrayLike | None = None,
) -> Any:
    """Convert chains to ArviZ (InferenceData, or a DataTree from ArviZ 1.0 on).

    Parameters
    ----------
    values
        Name to values per frame, ``(n,)`` or ``(n, k)``.
    chain
        ``(n,)`` labels; chains of equal length.
    reduced_potential
        ``(n,)``; stored as ``lp = -u`` in ``sample_stats``.

    Raises
    ------
    ImportError
        ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_inference_data needs ArviZ: pip install arviz") from error
    labels = np.asarray(chain)
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"chains have lengths {sorted({len(r) for r in rows})}, expected one length")
    index = np.stack(rows)
    groups = {"posterior": {name: np.asarray(v)[index] for name, v in values.items()}}
    if reduced_potential is not None:
        groups["sample_stats"] = {"lp": -np.asarray(reduced_potential)[index]}
    if hasattr(arviz, "InferenceData"):
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)
