"""Overlays of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.analysis.observables import pair_distances
from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.populations import Quantity
from openmm_eqflow.report.theme import Panel, legend, new_figure, to_svg
from openmm_eqflow.report.verdict import Verdict

__all__ = [
    "DASHES",
    "SERIES",
    "Entry",
    "energy_panel",
    "structure_panels",
    "training_panel",
    "weight_share_panel",
    "weights_panel",
]

FloatArray = NDArray[np.float64]
SERIES = ("chain", "flow", "prior", "alert", "raw", "sky", "reference")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_MAX_FRAMES = 4000
_MAX_TORSIONS = 6


@dataclass(frozen=True, eq=False)
class Entry:
    """One run of the comparison, with its name and line style."""

    name: str
    run: RunData
    quantities: list[Quantity]
    verdict: Verdict
    colour: str
    dash: Any


def _stairs(axes: Any, entry: Entry, density: FloatArray, edges: FloatArray) -> None:
    axes.stairs(
        density,
        edges,
        color=entry.colour,
        linestyle=entry.dash,
        linewidth=1.4,
        label=entry.name,
    )


def energy_panel(entries: Sequence[Entry]) -> Panel:
    """Energies of every chain."""
    figure, axes = new_figure()
    u = [e.run.chain.u for e in entries]
    low = min(float(np.quantile(v, 0.0005)) for v in u)
    high = max(float(np.quantile(v, 0.9995)) for v in u)
    edges = np.linspace(low, high + 1e-6, 51)
    for entry, values in zip(entries, u, strict=True):
        counts, _ = np.histogram(values, edges)
        _stairs(axes, entry, counts / values.size / np.diff(edges), edges)
    axes.set_xlabel("reduced potential u = U/kT (kT)")
    axes.set_ylabel("probability density (1/kT)")
    legend(figure, axes)
    return Panel(
        "compare-energy",
        "Energies of the chains",
        to_svg(figure, "compare-energy", "Energy histograms of the chains"),
        "Exact chains of one system give one distribution, whatever their flows.",
    )


def weights_panel(entries: Sequence[Entry]) -> Panel:
    """Log weights of every flow."""
    figure, axes = new_figure()
    centred = []
    for entry in entries:
        log_w = entry.run.log_weight
        finite = log_w[np.isfinite(log_w)]
        top = finite.max() if finite.size else 0.0
        centred.append(finite - top - np.log(np.exp(finite - top).sum() / log_w.size))
    low = max(-20.0, min(float(np.quantile(v, 0.005)) for v in centred))
    high = max(float(v.max()) for v in centred) + 0.5
    edges = np.linspace(low, high, 61)
    for entry, values in zip(entries, centred, strict=True):
        counts, _ = np.histogram(np.clip(values, low, None), edges)
        _stairs(axes, entry, counts / entry.run.log_weight.size / np.diff(edges), edges)
    axes.set_yscale("log")
    axes.set_xlabel("log(w / mean w)")
    axes.set_ylabel("probability density")
    legend(figure, axes)
    return Panel(
        "compare-weights",
        "Importance weights",
        to_svg(figure, "compare-weights", "Log weights of the flows"),
        "Narrower is better; the right tail decides.",
    )


def weight_share_panel(entries: Sequence[Entry]) -> Panel:
    """Cumulated weights of every flow."""
    figure, axes = new_figure()
    for entry in entries:
        w = np.sort(np.exp(entry.run.log_weight - entry.run.log_weight.max()))[::-1]
        axes.plot(
            np.arange(1, w.size + 1) / w.size,
            np.cumsum(w) / w.sum(),
            color=entry.colour,
            linestyle=entry.dash,
            label=entry.name,
        )
    axes.set_xscale("log")
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("share of the samples, largest weights first")
    axes.set_ylabel("share of the total weight")
    legend(figure, axes)
    return Panel(
        "compare-shares",
        "How few samples carry the weight",
        to_svg(figure, "compare-shares", "Cumulated share of the weight"),
        "Lower is better.",
    )


def training_panel(entries: Sequence[Entry]) -> Panel | None:
    """Draw the monitored ESS of every training; None if no run trained."""
    figure, axes = new_figure()
    drawn = False
    for entry in entries:
        history = entry.run.stages.get("train", {}).get("history") or []
        points = [
            (row["seconds"] / 60.0, row["relative_ess"])
            for row in history
            if row.get("relative_ess") is not None
        ]
        if points:
            minutes, ess = zip(*points, strict=True)
            axes.plot(
                minutes,
                ess,
                color=entry.colour,
                linestyle=entry.dash,
                marker=".",
                label=entry.name,
            )
            drawn = True
    if not drawn:
        return None
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("training time (min)")
    axes.set_ylabel("raw relative ESS (monitor)")
    legend(figure, axes)
    return Panel(
        "compare-training",
        "ESS during training",
        to_svg(figure, "compare-training", "Relative ESS against training time"),
        "Few samples and a coarse grid: a trend. The table has the final values.",
    )


def structure_panels(entries: Sequence[Entry]) -> list[Panel]:
    """Torsions of molecules, pair distances of anything else."""
    torsions = entries[0].run.chain.torsions
    if not torsions:
        x = [e.run.chain.x for e in entries]
        values = [pair_distances(v[:: max(1, len(v) // _MAX_FRAMES)]).ravel() for v in x]
        edges = np.linspace(
            min(float(v.min()) for v in values), max(float(v.max()) for v in values), 81
        )
        return [_overlay(entries, values, edges, "pairs", "pair distance", "nm")]
    panels = []
    for column, torsion in enumerate(torsions[:_MAX_TORSIONS]):
        half = 180.0 / torsion.fold
        values = [np.degrees(e.run.chain.angles[:, column]) for e in entries]
        edges = np.linspace(-half, half, 49 if torsion.fold == 1 else 25)
        name = f"torsion {torsion.name}"
        panels.append(_overlay(entries, values, edges, f"torsion-{column}", name, "°"))
    return panels


def _overlay(
    entries: Sequence[Entry],
    values: Sequence[FloatArray],
    edges: FloatArray,
    key: str,
    name: str,
    unit: str,
) -> Panel:
    figure, axes = new_figure()
    for entry, data in zip(entries, values, strict=True):
        counts, _ = np.histogram(data, edges)
        _stairs(axes, entry, counts / data.size / np.diff(edges), edges)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(f"{name} ({unit})")
    axes.set_ylabel(f"density (1/{unit})")
    legend(figure, axes)
    title = name[0].upper() + name[1:]
    svg = to_svg(figure, f"compare-{key}", f"Histograms of {name}")
    return Panel(f"compare-{key}", title, svg, "Markov chains.")
