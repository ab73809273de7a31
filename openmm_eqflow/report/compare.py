"""Several runs side by side: one page of tables and overlays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_eqflow.analysis.weights import kish_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_text
from openmm_eqflow.report import figures_compare
from openmm_eqflow.report.build import render
from openmm_eqflow.report.data import load_run
from openmm_eqflow.report.figures_compare import DASHES, SERIES, Entry
from openmm_eqflow.report.populations import States, compare_ensembles, define_states
from openmm_eqflow.report.theme import COLOURS, style
from openmm_eqflow.report.verdict import judge, pm

__all__ = [
    "compare",
]


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
    entries: list[Entry] = []
    hashes: list[str] = []
    states: States | None = None
    for k, (folder, name) in enumerate(zip(folders, _names(folders), strict=True)):
        run = load_run(folder)
        hashes.append(run.run.config.system_hash)
        # The same cuts in every run of the same system, or populations would not compare.
        if hashes[0] == hashes[-1]:
            states = states or define_states(run)
            quantities = compare_ensembles(run, states)
        else:
            quantities = compare_ensembles(run)
        verdict = judge(run, quantities)
        colour = COLOURS[SERIES[k % len(SERIES)]]
        entries.append(Entry(name, run, quantities, verdict, colour, DASHES[k // len(SERIES) % 4]))
    alike = len(set(hashes)) == 1
    with style():
        panels = [
            figures_compare.weights_panel(entries),
            figures_compare.weight_share_panel(entries),
            figures_compare.training_panel(entries),
        ]
        if alike:
            panels.insert(0, figures_compare.energy_panel(entries))
            panels += figures_compare.structure_panels(entries)
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


def _rows(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
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
        ("its standard error", metric("relative_ess_error", ".3f")),
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


def _populations(entries: Sequence[Entry]) -> list[dict[str, Any]]:
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
