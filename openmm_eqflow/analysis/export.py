"""Trajectory data for other tools: PLUMED's COLVAR format, ArviZ."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openmm_eqflow.analysis.chains import normalised_weights
from openmm_eqflow.files import write_text

__all__ = [
    "to_inference_data",
    "write_colvar",
]

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
    if reduced_potential is not None:
        groups["sample_stats"] = {"lp": -np.asarray(reduced_potential)[index]}
    if hasattr(arviz, "InferenceData"):
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)
