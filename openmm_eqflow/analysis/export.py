"""Weighted frames for other tools: mdtraj, PLUMED's COLVAR format, ArviZ, deeptime."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mdtraj
import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.analysis.chains import normalised_weights, split_chains
from openmm_eqflow.files import write_text

__all__ = [
    "WeightedSeries",
    "to_inference_data",
    "to_series",
    "to_trajectory",
    "write_colvar",
]

FloatArray = NDArray[np.float64]
_GREEK = {"φ": "phi", "ψ": "psi", "ω": "omega", "χ": "chi"}


def _plain_name(name: str) -> str:
    """Letters, digits, dots and underscores of a name, Greek letters spelt out."""
    for letter, word in _GREEK.items():
        name = name.replace(letter, word)
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("_")


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
        Name to values ``(n,)``. PLUMED takes letters, digits, ``.`` and ``_``: Greek letters are
        spelt out and anything else becomes ``_`` (``ω (4-6)`` is ``omega_4_6``).
    log_weights
        ``(n,)``; zero (a Markov chain) by default. Shifted so that the largest is 0.
    kt
        kT in the energy unit of the file (2.494 kJ/mol at 300 K).
    periodic
        Names of columns that are angles in radians; their domain is written as -pi, pi.

    Raises
    ------
    ValueError
        No columns, or two whose names become the same.
    """
    safe = {name: _plain_name(name) for name in columns}
    names = list(safe.values())
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"column names {list(columns)} must exist and differ (written: {names})")
    values = np.column_stack([np.asarray(v, dtype=np.float64) for v in columns.values()])
    log_w = np.zeros(len(values)) if log_weights is None else np.asarray(log_weights, np.float64)
    w = normalised_weights(log_w, len(values))
    lines = ["#! FIELDS time " + " ".join([*names, "flow.bias"])]
    for name in (safe[key] for key in periodic):
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
    log_weights: ArrayLike | None = None,
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
    log_weights
        ``(n,)``; stored as ``log_weight`` in ``sample_stats``. ArviZ's own summaries do not use
        it: draw frames by weight first (:func:`to_trajectory`) where they must.

    Raises
    ------
    ValueError
        Chains differ in length.
    ImportError
        ArviZ is not installed.
    """
    try:
        arviz = importlib.import_module("arviz")
    except ImportError as error:
        raise ImportError("to_inference_data needs ArviZ: pip install arviz") from error
    labels = np.asarray(chain)
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len({len(row) for row in rows}) != 1:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"chains have lengths {lengths}, expected one length")
    index = np.stack(rows)
    groups = {"posterior": {name: np.asarray(v)[index] for name, v in values.items()}}
    stats = {}
    if reduced_potential is not None:
        stats["lp"] = -np.asarray(reduced_potential)[index]
    if log_weights is not None:
        stats["log_weight"] = np.asarray(log_weights)[index]
    if stats:
        groups["sample_stats"] = stats
    if hasattr(arviz, "InferenceData"):
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)


class WeightedSeries(NamedTuple):
    """Trajectories of coordinates and the weights of their frames, one array a chain."""

    values: list[FloatArray]
    """``(n_frames, n_coordinates)`` each."""
    weights: list[FloatArray]
    """``(n_frames,)`` each; their mean over all frames is 1."""


def to_series(
    columns: Mapping[str, ArrayLike],
    *,
    chain: ArrayLike | None = None,
    log_weights: ArrayLike | None = None,
) -> WeightedSeries:
    """Cut coordinates into one array a chain, as deeptime takes them.

    Its estimators take the list as it is; weights go in chain by chain, as in
    ``for x, w in zip(*series): covariance.partial_fit(x, weights=w)``.

    Parameters
    ----------
    columns
        Name to values ``(n,)``; give sine and cosine of an angle.
    chain
        ``(n,)`` labels; one chain by default. Independent samples have no time: use them with
        lag 0 alone (a weighted covariance, clusters).
    log_weights
        ``(n,)``; equal weights by default.

    Raises
    ------
    ValueError
        No columns, or lengths that differ.

    Examples
    --------
    >>> series = to_series({"x": [1.0, 2.0, 3.0]}, chain=[0, 0, 1])
    >>> [values.shape for values in series.values], [float(w.sum()) for w in series.weights]
    ([(2, 1), (1, 1)], [2.0, 1.0])
    """
    if not columns:
        raise ValueError("no columns: give at least one coordinate, name to values (n,)")
    table = np.column_stack([np.asarray(v, dtype=np.float64) for v in columns.values()])
    n = len(table)
    w = n * normalised_weights(log_weights, n)
    rows = split_chains(np.arange(n, dtype=np.float64), chain)
    index = [part.astype(np.int64) for part in rows]
    return WeightedSeries([table[part] for part in index], [w[part] for part in index])


def to_trajectory(
    positions: ArrayLike,
    topology: mdtraj.Topology,
    log_weights: ArrayLike | None = None,
    *,
    n_frames: int | None = None,
    seed: int = 0,
) -> mdtraj.Trajectory:
    r"""Draw frames by weight, so that every function of mdtraj sees frames of equal weight.

    Systematic resampling (Kitagawa 1996): frame i is taken :math:`\lfloor m w_i \rfloor` or one
    more time, m times its normalised weight on average. A weighted average loses less: with
    ``numpy.average(mdtraj.compute_rg(trajectory), weights=...)`` no frame is left out.

    Parameters
    ----------
    positions
        ``(n, n_atoms, 3)`` in nm.
    topology
        Of mdtraj.
    log_weights
        ``(n,)``; equal weights by default.
    n_frames
        Frames to draw, m; by default Kish's effective sample size, more would only repeat.
    seed
        Of the one random number it takes.

    Raises
    ------
    ValueError
        Shapes that differ, no positive weight, or ``n_frames`` below 1.

    Examples
    --------
    >>> topology = mdtraj.Topology()
    >>> _ = topology.add_atom("Ar", mdtraj.element.argon, topology.add_residue(
    ...     "Ar", topology.add_chain()))
    >>> x = np.arange(6.0).reshape(2, 1, 3)
    >>> to_trajectory(x, topology, np.log([0.25, 0.75]), n_frames=4).xyz[:, 0, 0].tolist()
    [0.0, 3.0, 3.0, 3.0]
    """
    x = np.asarray(positions)
    if x.ndim != 3 or x.shape[1:] != (topology.n_atoms, 3):
        raise ValueError(f"positions have shape {x.shape}, expected (n, {topology.n_atoms}, 3)")
    w = normalised_weights(log_weights, len(x))
    count = max(1, int(1.0 / np.square(w).sum() + 1e-9)) if n_frames is None else n_frames
    if count < 1:
        raise ValueError(f"n_frames is {count}, expected at least 1")
    places = (np.arange(count) + np.random.default_rng(seed).random()) / count
    index = np.searchsorted(np.cumsum(w), places, side="right").clip(max=len(x) - 1)
    return mdtraj.Trajectory(x[index], topology)
