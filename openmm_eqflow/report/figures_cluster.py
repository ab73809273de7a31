"""Figures of clusters: pair distances, distance from the centre."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.analysis.observables import pair_distances
from openmm_eqflow.report.data import Ensemble, RunData
from openmm_eqflow.report.theme import COLOURS, Panel, legend, new_figure, to_svg

__all__ = [
    "cluster_panels",
    "mean_histogram",
]

FloatArray = NDArray[np.float64]
_MAX_FRAMES = 4000


def _centre_distances(x: NDArray[np.float32]) -> FloatArray:
    y = x.astype(np.float64)
    distances: FloatArray = np.linalg.norm(y - y.mean(axis=1, keepdims=True), axis=-1)
    return distances


def mean_histogram(
    values: FloatArray, weights: FloatArray, edges: FloatArray, n_groups: int = 20
) -> tuple[FloatArray, FloatArray]:
    """Density of all columns of ``(n, k)`` and its error over groups of consecutive frames."""
    n = len(values)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, -1, len(edges) - 1)
    inside = (bins >= 0) & (bins < len(edges) - 1) & (values <= edges[-1])
    groups = np.minimum(np.arange(n) * n_groups // max(n, 1), n_groups - 1)
    table = np.zeros((n_groups, len(edges) - 1))
    rows = np.broadcast_to(groups[:, None], values.shape)
    spread = np.broadcast_to(weights[:, None] / values.shape[1], values.shape)
    np.add.at(table, (rows[inside], bins[inside]), spread[inside])
    totals = np.bincount(groups, weights=weights, minlength=n_groups)
    width = np.diff(edges)
    density = table.sum(axis=0) / totals.sum() / width
    filled = totals > 0.0
    if filled.sum() < 2:
        return density, np.zeros_like(density)
    # Ratio estimator: residuals of every group against the common density.
    residual = table[filled] / width - totals[filled, None] * density
    k = int(filled.sum())
    error = np.sqrt(np.square(residual).sum(axis=0) * k / (k - 1)) / totals.sum()
    return density, error


def _panel(
    run: RunData,
    key: str,
    title: str,
    xlabel: str,
    caption: str,
    function: Callable[[NDArray[np.float32]], FloatArray],
) -> Panel:
    figure, axes = new_figure()
    rows: list[tuple[Ensemble, str, str, FloatArray, FloatArray]] = []
    for ensemble, colour, label in (
        (run.flow, "raw", "flow, unweighted"),
        (run.reference, "reference", "reference MD"),
        (run.chain, "chain", "Markov chain"),
        (run.flow, "flow", "reweighted flow"),
    ):
        if ensemble is None:
            continue
        step = max(1, len(ensemble.x) // _MAX_FRAMES)
        values = function(ensemble.x[::step])
        weights = ensemble.weights[::step]
        if colour == "raw":
            weights = np.ones(len(values))
        rows.append((ensemble, colour, label, values, weights / weights.sum()))
    exact = [r[3] for r in rows if r[1] not in ("raw", "flow")]
    low = min(float(v.min()) for v in exact)
    high = max(float(np.quantile(v, 0.9995)) for v in exact)
    pad = 0.05 * (high - low)
    edges = np.linspace(max(0.0, low - pad), high + pad, 91)
    for _, colour, label, values, weights in rows:
        density, error = mean_histogram(values, weights, edges)
        if colour == "raw":
            axes.stairs(
                density, edges, color=COLOURS["raw"], fill=True, alpha=0.35, label=label
            )
            continue
        dash = (0, (4, 1.5)) if colour == "flow" else "-"
        axes.stairs(
            density, edges, color=COLOURS[colour], linestyle=dash, linewidth=1.3, label=label
        )
        axes.stairs(
            density + error,
            edges,
            baseline=np.maximum(density - error, 0.0),
            color=COLOURS[colour],
            fill=True,
            alpha=0.22,
        )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("density (1/nm)")
    legend(figure, axes)
    return Panel(key, title, to_svg(figure, key, title), caption)


def cluster_panels(run: RunData) -> list[Panel]:
    """Pair distances and distances from the centre."""
    return [
        _panel(
            run,
            "pairs",
            "Pair distances",
            "pair distance (nm)",
            "Radial distribution over all pairs, normalised to 1 without a shell volume (a "
            "cluster has no bulk density). Bands: one standard error over 20 blocks.",
            pair_distances,
        ),
        _panel(
            run,
            "centre",
            "Distance from the centre",
            "distance from the centroid (nm)",
            "Shells of the cluster. Bands: one standard error over 20 blocks.",
            _centre_distances,
        ),
    ]
