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

from collections.abc import Callable
from typing import Any, NamedTuple

import mdtraj
import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.analysis.chains import (
    block_index,
    block_length_of,
    bootstrap_shares,
    chosen_block_length,
    normalised_weights,
    population,
    split_r_hat,
)
from openmm_eqflow.analysis.export import to_inference_data, write_colvar

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


def _edges(
    values: FloatArray, bins: int | ArrayLike, range: tuple[float, float] | None
) -> FloatArray:
    finite = values[np.isfinite(values)]
    edges: FloatArray = np.histogram_bin_edges(
        finite,
        bins=bins,
        range=range,
    ).astype(np.float64)
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
    w = normalised_weights(log_weights, values.size)
    edges = _edges(values, bins, range)
    length = chosen_block_length(values, log_weights, chain, block_length)
    share, error = bootstrap_shares(
        _bin(values, edges),
        len(edges) - 1,
        w,
        block_index(values.size, length, chain),
        n_bootstrap,
        seed,
    )
    return Histogram(edges, share, error)


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
    length = chosen_block_length(
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
    r"""Free energy :math:`-\log p(x, y)` in kT, p the share of each bin; its minimum is 0.

    Parameters
    ----------
    x, y
        Coordinates of every frame, ``(n,)``.
    log_weights, chain, block_length, n_bootstrap, seed
        As for :func:`weighted_histogram`.
    bins, range
        Bins along each coordinate, and what they span; torsions in radians by default.

    Raises
    ------
    ValueError
        Shapes that differ, or no frame in range.

    Examples
    --------
    >>> phi, psi = np.random.default_rng(0).uniform(-np.pi, np.pi, size=(2, 1000))
    >>> surface = free_energy_map(phi, psi, bins=4)
    >>> surface.free_energy.shape, float(surface.free_energy.min())
    ((4, 4), 0.0)
    """
    a, b = _values(x, None), _values(y, None)
    w = normalised_weights(log_weights, a.size)
    x_edges, y_edges = (np.linspace(*limits, bins + 1) for limits in range)
    i, j = _bin(a, x_edges), _bin(b, y_edges)
    index = np.where((i < 0) | (j < 0), -1, i * bins + j)
    length = max(chosen_block_length(v, log_weights, chain, block_length) for v in (a, b))
    share, error = bootstrap_shares(
        index, bins * bins, w, block_index(a.size, length, chain), n_bootstrap, seed
    )
    if not (share > 0.0).any():
        raise ValueError(f"no frame with weight lies in the range {range}: give another one")
    free_energy, spread = _free_energy(share, error)
    free_energy -= free_energy.min()
    shape = (bins, bins)
    return FreeEnergyMap(
        x_edges, y_edges, free_energy.reshape(shape), spread.reshape(shape), share.reshape(shape)
    )
