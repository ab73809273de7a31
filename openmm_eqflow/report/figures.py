"""Figures of the overlap of flow and target: energies, importance weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.theme import COLOURS, INK, Panel, legend, new_figure, to_svg

__all__ = [
    "energy_panel",
    "log_weight_panel",
    "weight_share_panel",
]

FloatArray = NDArray[np.float64]


def _quantile_range(
    values: list[FloatArray], low: float, high: float, pad: float
) -> tuple[float, float]:
    finite = [v[np.isfinite(v)] for v in values]
    finite = [v for v in finite if v.size]
    a = min(float(np.quantile(v, low)) for v in finite)
    b = max(float(np.quantile(v, high)) for v in finite)
    margin = pad * max(b - a, 1e-6)
    return a - margin, b + margin


def energy_panel(run: RunData) -> Panel:
    """Histogram of the reduced potential of reference, raw flow, reweighted flow and chain."""
    figure, axes = new_figure()
    # The reweighted flow holds the same outliers as the raw one, with hardly any weight.
    exact = [e.u for e in (run.reference, run.chain) if e is not None]
    low, high = _quantile_range(exact, 0.0005, 0.9995, 0.15)
    raw = run.flow_u[np.isfinite(run.flow_u)]
    if raw.size:
        high = max(high, min(float(np.quantile(raw, 0.98)), high + 1.0 * (high - low)))
    edges = np.linspace(low, high, 61)
    counts, _ = np.histogram(raw, edges)
    axes.stairs(
        counts / run.flow_u.size / np.diff(edges),
        edges,
        color=COLOURS["raw"],
        fill=True,
        alpha=0.35,
        label="flow, unweighted",
    )
    for ensemble, key, dash in (
        (run.reference, "reference", "-"),
        (run.chain, "chain", "-"),
        (run.flow, "flow", (0, (4, 1.5))),
    ):
        if ensemble is None:
            continue
        finite = np.isfinite(ensemble.u)
        density, _ = np.histogram(
            ensemble.u[finite], edges, weights=ensemble.weights[finite]
        )
        axes.stairs(
            density / np.diff(edges),
            edges,
            color=COLOURS[key],
            linestyle=dash,
            linewidth=1.4,
            label=ensemble.label,
        )
    axes.set_xlabel("reduced potential u = U/kT (kT)")
    axes.set_ylabel("probability density (1/kT)")
    axes.set_xlim(low, high)
    legend(figure, axes)
    beyond = float(np.mean(~(run.flow_u <= high)))
    note = f" {beyond:.1%} of the unweighted flow lies right of it." if beyond > 0.001 else ""
    return Panel(
        "energy",
        "Energy overlap",
        to_svg(figure, "energy", "Histograms of the reduced potential"),
        "The chain and the reweighted flow should fall on the reference; the filled histogram is "
        "what the flow proposes before any weight or rejection." + note,
    )


def _centred(log_weight: FloatArray) -> FloatArray:
    """Log of w / mean(w); the mean includes zero weights."""
    top = log_weight.max()
    if not np.isfinite(top):
        return log_weight
    centred: FloatArray = log_weight - top - np.log(np.exp(log_weight - top).mean())
    return centred


def log_weight_panel(run: RunData) -> Panel:
    """Distribution of the log weights of flow and prior, with the chain's largest."""
    figure, axes = new_figure()
    flow, prior = _centred(run.log_weight), _centred(run.prior_log_weight)
    shift = float(flow.max() - run.log_weight.max()) if np.isfinite(flow.max()) else 0.0
    chain_top = float(run.chain_log_weight.max()) + shift
    shown = [v for v in (flow, prior) if np.isfinite(v).any()]
    low = max(-25.0, _quantile_range(shown, 0.01, 1.0, 0.0)[0]) if shown else -1.0
    high = max([float(v.max()) for v in shown] + [chain_top, 1.0]) + 0.8
    edges = np.linspace(low, high, 71)
    for values, key, label in ((prior, "prior", "prior alone"), (flow, "flow", "flow")):
        counts, _ = np.histogram(np.clip(values[np.isfinite(values)], low, high), edges)
        axes.stairs(
            counts / max(values.size, 1) / np.diff(edges),
            edges,
            color=COLOURS[key],
            fill=key == "prior",
            alpha=0.4 if key == "prior" else 1.0,
            linewidth=1.4,
            label=f"{label} (n = {values.size:,})",
        )
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
    gap = run.metrics["chain"].get("max_log_weight_gap")
    if np.isfinite(chain_top):
        axes.axvline(
            chain_top,
            color=COLOURS["alert"],
            linewidth=1.2,
            linestyle="--",
            label="largest in the chain",
        )
    axes.set_yscale("log")
    axes.set_xlabel("log(w / mean w)")
    axes.set_ylabel("probability density")
    legend(figure, axes)
    text = (
        f" The chain met a weight e^{gap:.1f} times the largest proposed in it."
        if gap is not None and gap > 0.0
        else ""
    )
    return Panel(
        "log-weights",
        "Importance weights",
        to_svg(figure, "log-weights", "Distribution of log weights"),
        "A perfect flow is a spike at 0. The upper tail decides: configurations that the flow "
        "proposes too rarely have large weights, and a chain sticks in them." + text,
    )


def weight_share_panel(run: RunData) -> Panel:
    """Share of the total weight carried by the largest weights."""
    figure, axes = new_figure()
    for values, key, label in (
        (run.prior_log_weight, "prior", "prior alone"),
        (run.log_weight, "flow", "flow"),
    ):
        top = values.max()
        if not np.isfinite(top):
            continue
        w = np.sort(np.exp(values - top))[::-1]
        axes.plot(
            np.arange(1, w.size + 1) / w.size,
            np.cumsum(w) / w.sum(),
            color=COLOURS[key],
            label=label,
        )
    x = np.geomspace(1.0 / run.log_weight.size, 1.0, 100)
    axes.plot(x, x, color=INK, linestyle=":", linewidth=0.9, label="equal weights")
    axes.set_xscale("log")
    axes.set_xlabel("share of the samples, largest weights first")
    axes.set_ylabel("share of the total weight")
    axes.set_ylim(0.0, 1.02)
    legend(figure, axes)
    return Panel(
        "weight-share",
        "How few samples carry the weight",
        to_svg(figure, "weight-share", "Cumulated share of the weight"),
        "Close to the dotted line is good. A curve that starts high on the left means that a few "
        "samples decide every average.",
    )
