"""Assemble report.html from the files of a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from openmm_eqflow.analysis.observables import ramachandran_pairs
from openmm_eqflow.files import write_json, write_text
from openmm_eqflow.report import figures, figures_chain, tables
from openmm_eqflow.report.data import RunData, Shown, load_run
from openmm_eqflow.report.figures_cluster import cluster_panels
from openmm_eqflow.report.figures_drawing import drawing_panel
from openmm_eqflow.report.figures_molecule import (
    MAX_TORSIONS,
    ramachandran_panels,
    torsion_panels,
)
from openmm_eqflow.report.figures_path import path_panels
from openmm_eqflow.report.isomers import coverage, isomer_rows, round_rows
from openmm_eqflow.report.populations import Quantity, States, compare_ensembles, define_states
from openmm_eqflow.report.structures import (
    Basin,
    basin_grid,
    find_basins,
    model_atoms,
    pdb_text,
)
from openmm_eqflow.report.theme import Panel, style
from openmm_eqflow.report.verdict import Verdict, judge, pm

__all__ = [
    "molecule_view",
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
    states = define_states(run)
    quantities = compare_ensembles(run, states)
    verdict = judge(run, quantities)
    basins = find_basins(run, states)
    with style():
        context = _context(run, quantities, verdict, basins) | molecule_view(run, states, basins)
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
    css = _template("style.css")
    return environment.get_template(template).render(css=markupsafe.Markup(css), **context)


def molecule_view(run: Shown, states: States, basins: list[Basin]) -> dict[str, Any]:
    """Collect what the 3D view needs, and the drawing beside it."""
    torsions = run.chain.torsions
    maps = [
        {
            "key": f"rama-{pair.phi.atoms[1]}",
            "grid": basin_grid(
                run, states, basins, (torsions.index(pair.phi), torsions.index(pair.psi))
            ),
        }
        for pair in ramachandran_pairs(torsions)
    ]
    maps += [
        {"key": f"torsion-{k}", "grid": basin_grid(run, states, basins, (k,))}
        for k in range(min(len(torsions), MAX_TORSIONS))
        if torsions[k].name in states.arcs
    ]
    rows = [{"name": b.name, "share": _share(run, b, len(basins))} for b in basins]
    data = {
        "name": run.system.name,
        "atoms": model_atoms(run),
        "basins": [
            row | {"x": (10.0 * b.x.astype(float)).round(3).tolist()}
            for row, b in zip(rows, basins, strict=True)
        ],
        "maps": maps,
        "bonded": run.kind == "molecule",
        "pdb": pdb_text(run, basins),
    }
    caption = (
        "One structure per combination of torsion states, nearest to the middle of its basin; "
        f"populations and errors are those of the {run.chain.label}. "
        + ("Click a torsion map, or a torsion with two states, to see the basin. " if maps else "")
        if torsions
        else "The sampled frame of lowest energy. "
    )
    if len(basins) > 1:
        caption += "Thin: the other basins, superposed by heavy atoms. "
    return {
        "drawing": drawing_panel(run) if run.kind == "molecule" else None,
        "basins": rows,
        "basins_caption": caption + "Drag to turn; pinch, or hold Ctrl and scroll, to zoom.",
        # "<" in a script could end it.
        "structures": markupsafe.Markup(
            json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        ),
        "viewer_library": markupsafe.Markup(
            f"/*\n{_template('3Dmol-LICENSE.txt')}*/\n{_template('3Dmol-min.js')}"
        ),
        "viewer": markupsafe.Markup(_template("viewer.js")),
    }


def _share(run: Shown, basin: Basin, n: int) -> str:
    """Write the population with its error; of a single structure its energy."""
    if n == 1:
        return f"u = {run.chain.u[basin.frame]:.1f} kT"
    return pm(float(basin.share.value), float(basin.share.error))


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _context(
    run: RunData, quantities: list[Quantity], verdict: Verdict, basins: list[Basin]
) -> dict[str, Any]:
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
            sections.append((heading, f"backbone-{k}", ramachandran_panels(run, [pair], basins)))
        sections.append(("Torsions", "torsions", torsion_panels(run, basins)))
    else:
        sections.append(("Structure", "structure", cluster_panels(run)))
    sections.append(("Mixing of the chains", "mixing", mixing))
    if "levels" in run.metrics:
        sections.append(("The path", "path", path_panels(run.metrics)))
    training = figures_chain.training_panels(run)
    sections.append(("Training", "training", training))
    return {
        "title": run.system.name,
        "description": run.system.description.rstrip(". ") + ".",
        "budget": config.budget,
        "temperature": f"{config.temperature_kelvin:g} K",
        "verdict": verdict,
        "tiles": tables.tiles(run, verdict),
        "sections": [section for section in sections if section[2]],
        "quantities": tables.quantity_rows(run, quantities),
        "labels": [e.label for e in run.ensembles],
        "isomers": isomer_rows(run.metrics) if run.metrics.get("isomers") else [],
        "compared": run.metrics.get("dynamics") and "of this run",
        "coverage": coverage(run.metrics),
        "ways": tables.ways(run),
        "ways_n": f"{run.ways[0]['n']:,}" if run.ways else "",
        "pointwise": config.recipe.density == "pointwise",
        "rounds": round_rows(run.metrics) if "adaptation" in run.metrics else [],
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
