"""Tables and lines of text of the report."""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np

from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.analysis.weights import kish_ess
from openmm_eqflow.parallel import machine_name
from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.populations import Quantity, coordinate_sizes
from openmm_eqflow.report.verdict import Verdict, pm
from openmm_eqflow.units import positions_in_nm

__all__ = [
    "audit_rows",
    "costs",
    "provenance",
    "quantity_rows",
    "sector",
    "tiles",
]


def tiles(run: RunData, verdict: Verdict) -> list[tuple[str, str, str]]:
    """Headline numbers: value, name, note."""
    m, chain = run.metrics, run.metrics["chain"]
    k, error = m.get("pareto_k"), m.get("relative_ess_error")
    ess_error = "" if error is None else f"± {error:.3f}; "
    tiles = [
        (
            f"{m['relative_ess']:.3f}",
            "raw relative ESS",
            f"{ess_error}prior alone {m['prior_relative_ess']:.3f}; n = {m['n_samples']:,}",
        ),
        (
            "∞" if k is None else f"{k:.2f}",
            "Pareto k",
            f"largest weight {m['max_weight_share']:.1%} of all",
        ),
        (
            f"{chain['acceptance']:.0%}",
            "flow acceptance",
            f"best of {run.run.config.recipe.n_proposals} proposals; longest stuck "
            f"{chain['longest_stuck']}",
        ),
        (
            f"{chain['n_samples']:,}",
            "samples",
            f"{chain['n_chains']} chains of {chain['n_steps']} steps",
        ),
    ]
    if verdict.slowest_ess is not None:
        tiles.append((f"{verdict.slowest_ess:,.0f}", "effective samples", f"of {verdict.slowest}"))
    if m.get("log_z") is not None:
        value, _, error = pm(m["log_z"], m["log_z_error"] or 0.0).partition(" ± ")
        tiles.append((value, "log Z", f"± {error or 'unknown'}; mean-free, nm, see below"))
    return tiles


def quantity_rows(run: RunData, quantities: list[Quantity]) -> list[dict[str, Any]]:
    """Rows of the table of populations."""
    rows = []
    for quantity in quantities:
        z = None if quantity.versus is None else quantity.z(run.chain.label, quantity.versus)
        unit = f" ({quantity.unit})" if quantity.unit else ""
        rows.append(
            {
                "name": quantity.name,
                "definition": quantity.definition + unit,
                "values": [
                    pm(*quantity.estimates[e.label][0]) if e.label in quantity.estimates else "-"
                    for e in run.ensembles
                ],
                "exact": "" if quantity.exact is None else f"{quantity.exact:.4f}",
                "z": "-" if z is None else f"{z:+.1f}",
                "grade": "good" if z is None or abs(z) <= 3 else "fair" if abs(z) <= 4 else "poor",
            }
        )
    return rows


def costs(run: RunData, verdict: Verdict) -> list[dict[str, str]]:
    """Effective samples of the slowest coordinate per second and per energy evaluation."""
    name = verdict.slowest
    if name is None:
        return []
    rows, m = [], run.metrics
    seconds = run.stages.get("sample", {}).get("seconds")
    evaluations = run.accepted.size * run.energies_per_step
    rows.append(("Markov chain", verdict.slowest_ess, seconds, evaluations))
    if run.reference is not None and run.plan is not None:
        size = coordinate_sizes(run, run.reference).get(name)
        stage = run.dynamics
        evaluations = (
            stage.get("n_frames", len(run.reference.x))
            * run.plan.steps_per_swap
            * run.plan.swaps_per_frame
            * len(run.plan.temperatures)
        )
        rows.append(("reference MD", size, stage.get("wall_seconds"), evaluations))
    rows.append(
        (
            "independent flow samples",
            kish_ess(run.log_weight),
            m["seconds_per_sample"] * m["n_samples"],
            m["n_samples"] * run.energies_per_sample,
        )
    )
    return [
        {
            "name": label,
            "ess": "-" if ess is None else f"{ess:,.0f}",
            "seconds": "-" if wall is None else f"{wall:,.0f}",
            "rate": "-" if ess is None or not wall else _short(ess / wall),
            "evaluations": f"{evaluations:,.0f}",
            "per_million": "-" if ess is None else _short(1e6 * ess / evaluations),
        }
        for label, ess, wall, evaluations in rows
    ]


def _layers(run: RunData) -> tuple[str, str]:
    """Say what the flow consists of."""
    steps, layers = run.metrics["n_ode_steps"], run.flow_record.get("layers")
    if layers is None:
        return "ODE steps", f"{steps} (RK4, fixed grid)"
    if layers.get("kind") == "annealed":
        return "levels", f"{run.metrics.get('n_levels', len(layers['times'])):,} of Monte Carlo"
    return "levels", f"{steps + 1:,} (field steps and Monte Carlo in turn)"


def ways(run: RunData) -> list[dict[str, str]]:
    """Say what prior, levels, field and both cost, and which was taken."""
    return [
        {
            "name": row["name"],
            "ess": pm(row["relative_ess"], row["relative_ess_error"] or math.nan),
            "ms": f"{1e3 * row['seconds_per_sample']:.2g}",
            "rate": _short(row["effective_per_second"]),
            "chosen": "taken" if row["chosen"] else "",
        }
        for row in run.ways
    ]


def _big(number: int) -> str:
    """Write a group order; factorials overflow a float."""
    return f"{number:,}" if number < 10**6 else f"10^{math.log10(number):.1f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.2g}"


def audit_rows(run: RunData) -> list[tuple[str, str, str, str]]:
    """Quantiles of every audited difference."""
    report = run.audit or {}
    names = {
        "grid_and_precision": "twice finer grid, float64 (kT)",
        "sampling_against_log_prob": "sampling against log_prob (kT)",
        "against_jacobian": "log determinant of the Jacobian (kT)",
        "round_trip": "round trip of the latent (latent units)",
        "round_trip_nm": "round trip of the positions (nm)",
    }
    return [
        (
            label,
            f"{report[key]['median']:.1e}",
            f"{report[key]['p99']:.1e}",
            f"{report[key]['max']:.1e}",
        )
        for key, label in names.items()
        if key in report
    ]


def sector(run: RunData) -> list[str]:
    """State which labels and mirror images are sampled, and what log Z means."""
    symmetry, topology = run.symmetry, run.chain.topology
    lines = []
    if run.system.n_dims == 3 and symmetry.stereocentres:
        named = ", ".join(str(topology.atom(s.centre)) for s in symmetry.stereocentres)
        lines.append(
            f"Chirality is that of the starting structure at {named}: mirror images have the same "
            "energy, so proposals of the other hand get weight zero."
        )
    else:
        lines.append("No stereocentre: nothing is restricted.")
    internal = run.flow_record.get("prior", {}).get("kind") == "InternalCoordinatePrior"
    n = symmetry.n_sectors * _amide_labels(run)
    if internal:
        extra = (
            f" Labels of like atoms that dynamics cannot exchange make {_big(n)} of them (group "
            f"order over the relabellings within one); log Z of all is larger by log {_big(n)} = "
            f"{math.log(n):.3f}."
            if n > 1
            else ""
        )
        lines.append("The internal-coordinate chart covers one labelling sector." + extra)
    else:
        lines.append(
            "The field treats equal particles alike (symmetry group of order "
            f"{_big(symmetry.order)}); log Z counts every labelling."
        )
    lines.append(
        "log Z is the log of the integral of exp(-u) over the mean-free subspace, in nm to the "
        f"power {(run.system.n_particles - 1) * run.system.n_dims}; with internal coordinates the "
        "orientation volume 8π² is included."
        if internal
        else "log Z is the log of the integral of exp(-u) over the mean-free subspace, in nm to "
        f"the power {(run.system.n_particles - 1) * run.system.n_dims}."
    )
    if run.kind == "molecule":
        lines += run.isomers.lines(
            run.system.topology,
            positions_in_nm(run.system.positions),
            annealed=run.run.config.recipe.method == "annealing",
        )
        if run.one_state:
            lines.append(f"Seen in one state only: {', '.join(run.one_state)}.")
    return lines


def _amide_labels(run: RunData) -> int:
    """Labellings of amides whose two groups on nitrogen are alike and were never exchanged."""
    n = 1
    for torsion in run.isomers.torsions:
        if torsion.kind == "amide" and torsion.fold % 2 == 0:
            side = np.cos(torsion_angles(run.chain.x, [torsion.atoms])) > 0.0
            n *= 2 if side.all() or not side.any() else 1
    return n


def provenance(run: RunData) -> list[tuple[str, str]]:
    """Where the numbers come from: seeds, hardware, versions."""
    config, stages = run.run.config, run.stages
    rows = [
        ("system hash", config.system_hash[:16] + "…"),
        ("budget, seed", f"{config.budget}, {config.seed}"),
        ("seeds", f"evaluation {run.metrics['seed']}, chains {config.seed}"),
        ("device", f"{run.metrics['device']}, {run.metrics['n_threads']} thread(s)"),
        ("report written on", f"{machine_name()}, {platform.system()}"),
        _layers(run),
        ("time per flow sample", f"{1e3 * run.metrics['seconds_per_sample']:.2f} ms"),
        ("invalid proposals", f"{run.metrics['n_invalid']:,} of {run.metrics['n_samples']:,}"),
    ]
    reference = stages.get("reference")
    if run.run.config.recipe.method == "annealing" and reference:
        adapted = reference["adaptation"]
        rows.append(
            (
                "reference",
                f"an annealed path of {reference['n_levels']} levels, {len(adapted['rounds'])} "
                f"adaptive rounds, {adapted['seconds']:.0f} s; {reference['n_frames']:,} frames "
                "drawn by weight",
            )
        )
        reference = reference.get("check")
    if reference and run.reference is not None:
        kelvins = reference.get("temperatures_kelvin", [])
        rows.append(
            (
                "reference MD" if "check" in stages["reference"] else "reference",
                f"{reference.get('n_frames', 0):,} frames every "
                f"{reference.get('frame_interval_ps', 0.0):.2f} ps (sampling masses), "
                f"{len(kelvins)} temperature(s) up to {max(kelvins, default=0.0):.0f} K, OpenMM "
                f"{reference.get('platform')} platform",
            )
        )
    elif not stages.get("reference"):
        rows.append(("reference", "none: the flow was adopted, not trained here"))
    if run.metrics.get("test_nll") is not None:
        rows.append(
            (
                "test NLL",
                f"{pm(run.metrics['test_nll'], run.metrics.get('test_nll_error') or 0.0)} "
                "(naive error)",
            )
        )
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items())))
    return rows
