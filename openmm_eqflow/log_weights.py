"""Logarithms of importance weights: checked, and taken relative to the largest."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["checked_log_weights", "relative_weights"]

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
