"""Figures of an annealed path: the work of its levels, and efficiency against their number."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_eqflow.report.theme import COLOURS, INK, Panel, legend, new_figure, to_svg

__all__ = [
    "path_panels",
]


def path_panels(metrics: dict[str, Any]) -> list[Panel]:
    """Draw what :func:`~openmm_eqflow.runs.annealing.anneal_system` measured of its path."""
    levels = metrics["levels"]
    return [_work_panel(levels), _efficiency_panel(levels), _cost_panel(metrics)]


def _along() -> tuple[Figure, Axes]:
    """Axes over the levels of a path."""
    figure, axes = new_figure()
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("level t, from prior (0) to target (1)")
    return figure, axes


def _work_panel(levels: dict[str, list[float]]) -> Panel:
    figure, axes = _along()
    time, spread = np.array(levels["time"]), np.array(levels["work_spread"])
    axes.stairs(
        spread, [0.0, *time], color=COLOURS["flow"], fill=len(time) < 60, alpha=0.6, linewidth=1.4
    )
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("spread of the work (kT)")
    return Panel(
        "path-work",
        "Work per level",
        to_svg(figure, "path-work", "Standard deviation of the work of every level"),
        "Standard deviation over paths. Levels are efficient where it is even and well below 1; a "
        "peak is a place where the path wants more of them.",
    )


def _efficiency_panel(levels: dict[str, list[float]]) -> Panel:
    figure, axes = _along()
    axes.plot([0.0, *levels["time"]], [1.0, *levels["relative_ess"]], color=COLOURS["flow"])
    axes.set_ylim(0.0, 1.02)
    axes.set_ylabel("relative ESS so far")
    return Panel(
        "path-ess",
        "Efficiency along the path",
        to_svg(figure, "path-ess", "Relative ESS of the weights gathered up to each level"),
        "Of the weights gathered up to each level: where it falls, efficiency is lost.",
    )


def _cost_panel(metrics: dict[str, Any]) -> Panel:
    figure, axes = new_figure()
    trials = metrics["adaptation"]["trials"]
    counts = [trial["n_levels"] for trial in trials]
    axes.plot(
        counts,
        [trial["ess"] for trial in trials],
        "o",
        color=COLOURS["raw"],
        label="trials, few points",
    )
    axes.errorbar(
        [metrics["n_levels"]],
        [metrics["relative_ess"]],
        [metrics["relative_ess_error"]],
        fmt="s",
        color=COLOURS["flow"],
        label=f"the path (n = {metrics['n_samples']:,})",
    )
    axes.axhline(metrics["ess_asked"], color=INK, linestyle=":", linewidth=0.9, label="asked for")
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("levels (the cost of a sample)")
    axes.set_ylabel("relative ESS")
    legend(figure, axes)
    return Panel(
        "path-cost",
        "Efficiency against cost",
        to_svg(figure, "path-cost", "Relative ESS against the number of levels"),
        "A sample costs energies with forces in proportion to the levels: "
        f"{1e3 * metrics['seconds_per_sample']:.2g} ms each on this machine, "
        f"{1e3 * metrics['seconds_per_sample'] / max(metrics['relative_ess'], 1e-9):.2g} ms an "
        "effective one.",
    )
