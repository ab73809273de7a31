"""Table and figure of the comparison of objectives, from its JSON alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from openmm_eqflow.atomic import atomic_path

__all__ = ["draw", "table"]

# Okabe and Ito (2008), without black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("-", "--", ":")
_FLOOR = 1e-4
_NONE = "-"


def _ess(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(rows: list[dict[str, Any]], time: float) -> str:
    """ESS at ``time`` seconds; with the true time if a step took much longer."""
    row = next((row for row in rows if row["seconds"] >= time), None)
    if row is None:
        return _NONE
    late = f" (at {_seconds(row['seconds'])} s)" if row["seconds"] > 1.25 * time else ""
    return _ess(row["relative_ess"]) + late


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per objective, a column per time, and why any of them ended early."""
    heads = ["objective", *(f"{_seconds(t)} s" for t in result["times"])]
    heads += ["Pareto k", "steps", "set-up"]
    prior = [_ess(result["prior"]["relative_ess"])] * len(result["times"])
    lines = [["prior alone", *prior, _pareto(result["prior"]), _NONE, _NONE]]
    notes = []
    for name, record in result["objectives"].items():
        rows = record["rows"]
        label = f"{name} (the recipe's)" if name == result["chosen"] else name
        cells = [_cell(rows, t) for t in result["times"]]
        last = [_pareto(rows[-1]), f"{rows[-1]['steps']:,}"] if rows else [_NONE, _NONE]
        lines.append([label, *cells, *last, f"{_seconds(record['setup_seconds'])} s"])
        if record["status"] != "done":
            notes.append(f"{name} ended early: {record['error']}.")
    text = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)]
    text += [
        "",
        f"{result['system']}: raw relative ESS of {result['n_samples']:,} independent samples "
        "after these seconds of training; seed "
        f"{result['seed']}; {_machines(result)}.",
    ]
    for note in notes:
        text += ["", note]
    return "\n".join(text) + "\n"


def _pareto(row: dict[str, Any]) -> str:
    return "∞" if row["pareto_k"] is None else f"{row['pareto_k']:.2f}"


def _machines(result: dict[str, Any]) -> str:
    found = {(r["machine"], r["n_threads"]) for r in result["objectives"].values()}
    words = [f"{machine}, {n} thread{'s'[: n != 1]}" for machine, n in sorted(found)]
    return "; ".join(words) or "nothing measured yet"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of ESS against seconds of training, drawn no lower than 1e-4."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = itertools.cycle(itertools.product(_DASHES, _COLOURS))
    shown = [result["prior"]["relative_ess"]]
    for (name, record), (dash, colour) in zip(result["objectives"].items(), styles, strict=False):
        rows = record["rows"]
        chosen = name == result["chosen"]
        label = name + (" (the recipe's)" if chosen else "")
        label += "" if record["status"] == "done" else " (aborted)"
        values = [max(row["relative_ess"], _FLOOR) for row in rows]
        shown += values
        axes.plot(
            [row["seconds"] for row in rows],
            values,
            linestyle=dash,
            color=colour,
            linewidth=2.4 if chosen else 1.4,
            marker="o" if record["status"] == "done" else "x",
            markersize=4,
            label=label,
        )
    axes.axhline(
        max(result["prior"]["relative_ess"], _FLOOR),
        color="0.4",
        linestyle=(0, (1, 2)),
        label="prior alone",
    )
    axes.set_xscale("log")
    axes.set_xticks(result["times"], [_seconds(t) for t in result["times"]])
    axes.minorticks_off()
    if min(shown) < 0.05:
        axes.set_yscale("log")
        axes.set_ylim(max(_FLOOR, min(shown)) / 1.3, 1.3)
    else:
        axes.set_ylim(0, 1)
    axes.set_xlabel("training, s")
    axes.set_ylabel(f"raw relative ESS (n = {result['n_samples']:,})")
    axes.set_title(result["system"])
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
