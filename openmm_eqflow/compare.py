"""Several runs side by side: one page of tables and overlays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.atomic import write_text
from openmm_eqflow.diagnostics import kish_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.observables import pair_distances
from openmm_eqflow.report.build import render
from openmm_eqflow.report.checks import pm
from openmm_eqflow.report.data import RunData, load_run
from openmm_eqflow.report.populations import Quantity, compare_ensembles
from openmm_eqflow.report.theme import COLOURS, Panel, legend, new_figure, style, to_svg
from openmm_eqflow.report.verdict import Verdict, judge

__all__ = ["compare"]

FloatArray = NDArray[np.float64]
_SERIES = ("chain", "flow", "prior", "alert", "raw", "sky", "reference")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_MAX_TORSIONS = 6


@dataclass(frozen=True, eq=False)
class _Entry:
    name: str
    run: RunData
    quantities: list[Quantity]
    verdict: Verdict
    colour: str
    dash: Any


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page that compares runs.

    Parameters
    ----------
    paths
        Run directories whose sample stages are complete, two or more. Structure is overlaid
        where all are runs of one system (equal hash); weights and costs always are.
    out
        The HTML file.

    Raises
    ------
    ConfigurationError
        Fewer than two different runs.
    CheckpointError
        A run without samples (named).
    """
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    if len(folders) < 2:
        raise ConfigurationError(
            f"got {len(folders)} run director{'y' if len(folders) == 1 else 'ies'}, expected two "
            "or more different ones: openmm-eqflow compare RUN_A RUN_B"
        )
    entries = []
    for k, (folder, name) in enumerate(zip(folders, _names(folders), strict=True)):
        run = load_run(folder)
        quantities = compare_ensembles(run)
        verdict = judge(run, quantities)
        colour = COLOURS[_SERIES[k % len(_SERIES)]]
        entries.append(
            _Entry(name, run, quantities, verdict, colour, _DASHES[k // len(_SERIES) % 4])
        )
    alike = len({entry.run.run.config.system_hash for entry in entries}) == 1
    with style():
        panels = [_weights(entries), _weight_shares(entries), _training(entries)]
        if alike:
            panels = [_energies(entries), *panels, *_structure(entries)]
    html = render(
        "compare.html",
        {
            "title": "Runs compared",
            "names": [entry.name for entry in entries],
            "systems": [entry.run.system.name for entry in entries],
            "verdicts": [entry.verdict for entry in entries],
            "rows": _rows(entries),
            "populations": _populations(entries) if alike else [],
            "alike": alike,
            "panels": [panel for panel in panels if panel is not None],
        },
    )
    write_text(Path(out), html)
    return Path(out)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _rows(entries: Sequence[_Entry]) -> list[tuple[str, list[str]]]:
    def metric(key: str, form: str) -> list[str]:
        values = [e.run.metrics.get(key) for e in entries]
        return ["-" if v is None else format(v, form) for v in values]

    def chain(key: str, form: str) -> list[str]:
        return [format(e.run.metrics["chain"][key], form) for e in entries]

    def seconds(stage: str) -> list[str]:
        values = [e.run.stages.get(stage, {}).get("seconds") for e in entries]
        return ["-" if v is None else f"{v:.0f} s" for v in values]

    return [
        ("system", [e.run.system.name for e in entries]),
        ("budget, seed", [f"{e.run.run.config.budget}, {e.run.run.config.seed}" for e in entries]),
        ("independent samples n", metric("n_samples", ",")),
        ("raw relative ESS", metric("relative_ess", ".3f")),
        ("prior alone", metric("prior_relative_ess", ".3f")),
        ("effective samples", [f"{kish_ess(e.run.log_weight):,.0f}" for e in entries]),
        ("Pareto k", metric("pareto_k", ".2f")),
        ("largest weight share", metric("max_weight_share", ".1%")),
        (
            "log Z",
            [
                "-"
                if e.run.metrics.get("log_z") is None
                else pm(e.run.metrics["log_z"], e.run.metrics["log_z_error"] or math.inf)
                for e in entries
            ],
        ),
        ("test NLL", metric("test_nll", ".2f")),
        ("time per flow sample (s)", metric("seconds_per_sample", ".2g")),
        ("error of log q, 99 % (kT)", metric("log_q_error_p99", ".1e")),
        ("flow acceptance", chain("acceptance", ".0%")),
        ("longest stuck (steps)", chain("longest_stuck", ",")),
        ("chain samples", chain("n_samples", ",")),
        (
            "effective, slowest coordinate",
            [
                "-"
                if e.verdict.slowest_ess is None
                else f"{e.verdict.slowest_ess:,.0f} ({e.verdict.slowest})"
                for e in entries
            ],
        ),
        ("reference stage", seconds("reference")),
        ("training stage", seconds("train")),
        ("sampling stage", seconds("sample")),
        ("device", metric("device", "")),
    ]


def _populations(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    """Chain estimates of the quantities that all runs define alike, and their largest |z|."""
    rows = []
    for first in entries[0].quantities:
        label = entries[0].run.chain.label
        found = [
            next((q for q in e.quantities if q.definition == first.definition), None)
            for e in entries
        ]
        estimates = [q.estimates[label][0] for q in found if q and label in q.estimates]
        if len(estimates) != len(entries):
            continue
        values = np.array([float(e.value) for e in estimates])
        errors = np.array([float(e.error) for e in estimates])
        spread = np.abs(values[:, None] - values[None])
        scale = np.hypot(errors[:, None], errors[None])
        usable = np.isfinite(scale) & (scale > 0.0)
        z = float((spread[usable] / scale[usable]).max()) if usable.any() else 0.0
        rows.append(
            {
                "name": first.name,
                "definition": first.definition + (f" ({first.unit})" if first.unit else ""),
                "values": [pm(v, e) for v, e in zip(values, errors, strict=True)],
                "z": f"{z:.1f}",
                "grade": "good" if z <= 3 else "fair" if z <= 4 else "poor",
            }
        )
    return rows


def _stairs(axes: Any, entry: _Entry, density: FloatArray, edges: FloatArray) -> None:
    axes.stairs(
        density,
        edges,
        color=entry.colour,
        linestyle=entry.dash,
        linewidth=1.4,
        label=entry.name,
    )


def _energies(entries: Sequence[_Entry]) -> Panel:
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


def _weights(entries: Sequence[_Entry]) -> Panel:
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


def _weight_shares(entries: Sequence[_Entry]) -> Panel:
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


def _training(entries: Sequence[_Entry]) -> Panel | None:
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


def _structure(entries: Sequence[_Entry]) -> list[Panel]:
    """Torsions of molecules, pair distances of anything else."""
    torsions = entries[0].run.chain.torsions
    if not torsions:
        values = [pair_distances(e.run.chain.x[::2]).ravel() for e in entries]
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
    entries: Sequence[_Entry],
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
