"""Assemble report.html from the files of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from openmm_eqflow.analysis.observables import ramachandran_pairs
from openmm_eqflow.files import write_json, write_text
from openmm_eqflow.report import figures, figures_chain, tables
from openmm_eqflow.report.data import RunData, load_run
from openmm_eqflow.report.figures_cluster import cluster_panels
from openmm_eqflow.report.figures_molecule import ramachandran_panels, torsion_panels
from openmm_eqflow.report.populations import Quantity, compare_ensembles
from openmm_eqflow.report.theme import Panel, style
from openmm_eqflow.report.verdict import Verdict, judge

__all__ = [
    "render",
    "write_report",
]

TEMPLATES = Path(__file__).parent / "templates"


def write_report(path: Path) -> Path:
    """Write ``path``/report.html, and the numbers behind its verdict into metrics.json.

    Parameters
    ----------
    path
        Run directory whose sample stage is complete.

    Returns
    -------
    Path
        The report: one file, no external request.
    """
    run = load_run(Path(path))
    quantities = compare_ensembles(run)
    verdict = judge(run, quantities)
    with style():
        context = _context(run, quantities, verdict)
    html = render("report.html", context)
    metrics = run.metrics | {
        "populations": [row.to_json() for row in quantities],
        "verdict": verdict.to_json(),
    }
    write_json(run.path / "metrics.json", metrics)
    write_text(run.path / "report.html", html)
    return run.path / "report.html"


def render(template: str, context: dict[str, Any]) -> str:
    """Fill a template; everything but the figures and the style sheet is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda panel: markupsafe.Markup(panel.svg)
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=markupsafe.Markup(css), **context)


def _context(run: RunData, quantities: list[Quantity], verdict: Verdict) -> dict[str, Any]:
    config = run.run.config
    sections: list[tuple[str, str, list[Panel]]] = []
    overlap = [
        figures.energy_panel(run),
        figures.log_weight_panel(run),
        figures.weight_share_panel(run),
    ]
    mixing = [figures_chain.acceptance_panel(run), figures_chain.streak_panel(run)]
    if verdict.slowest is not None:
        panel = figures_chain.autocorrelation_panel(run, verdict.slowest)
        mixing += [panel] if panel is not None else []
    sections.append(("Overlap of flow and target", "overlap", overlap))
    if run.kind == "molecule":
        for k, pair in enumerate(ramachandran_pairs(run.chain.torsions)):
            heading = f"Backbone of {pair.residue}" if pair.residue else "Backbone"
            sections.append((heading, f"backbone-{k}", ramachandran_panels(run, [pair])))
        sections.append(("Torsions", "torsions", torsion_panels(run)))
    else:
        sections.append(("Structure", "structure", cluster_panels(run)))
    sections.append(("Mixing of the chains", "mixing", mixing))
    training = figures_chain.training_panels(run)
    sections.append(("Training", "training", training))
    return {
        "title": run.system.name,
        "description": run.system.description,
        "budget": config.budget,
        "temperature": f"{config.temperature_kelvin:g} K",
        "verdict": verdict,
        "tiles": tables.tiles(run, verdict),
        "sections": [section for section in sections if section[2]],
        "quantities": tables.quantity_rows(run, quantities),
        "labels": [e.label for e in run.ensembles],
        "costs": tables.costs(run, verdict),
        "audit": tables.audit_rows(run),
        "sector": tables.sector(run),
        "stages": [
            (name, f"{run.stages[name]['seconds']:.0f} s")
            for name in ("reference", "train", "sample")
            if "seconds" in run.stages.get(name, {})
        ],
        "provenance": tables.provenance(run),
    }
