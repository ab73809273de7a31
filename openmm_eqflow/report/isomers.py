"""What samples show of isomers, and what a path from chemistry has looked at, for a page."""

from __future__ import annotations

import math
from typing import Any

from openmm_eqflow.report.verdict import pm

__all__ = [
    "coverage",
    "isomer_rows",
    "round_rows",
]

_LOST = 0.3  # kT of log Z: what chance does not explain


def isomer_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of isomers; with dynamics to compare, theirs beside."""
    dynamics = metrics.get("dynamics", {})
    rows = []
    for k, row in enumerate(metrics["isomers"]):
        made = {
            "torsion": row["torsion"],
            "state": row["state"],
            "population": pm(row["population"], row["population_error"]),
            "kj": _free(row, "free_energy_kj_mol"),
            "kcal": _free(row, "free_energy_kcal_mol"),
            "md": "",
            "z": "",
            "grade": "good",
        }
        if dynamics:
            other, z = dynamics["isomers"][k], dynamics["z"][k]
            made["md"] = pm(other["population"], other["population_error"])
            made["z"] = "-" if z is None else f"{z:+.1f}"
            if z is not None and abs(z) > 3:
                made["grade"] = "poor" if abs(z) > 4 else "fair"
        rows.append(made)
    return rows


def _free(row: dict[str, Any], key: str) -> str:
    """Of a population below its error a free energy says nothing."""
    if row[key] is None or row["population"] < row["population_error"]:
        return "-"
    return pm(row[key], row[f"{key}_error"])


def coverage(metrics: dict[str, Any]) -> list[str]:
    """Say in sentences what was looked at, so that nothing is missing in silence."""
    found: list[str] = []
    if "adaptation" in metrics:
        other = metrics["adaptation"]["second_log_z"]
        found.append(
            f"log Z is {metrics['log_z']:.2f}; a second population of points, carried from the "
            f"first prior, found {other:.2f}"
            + (
                ", which is more: the path may lack a state."
                if other > metrics["log_z"] + _LOST
                else ", which is no more: no sign of a state that the path lacks."
            )
        )
    floor = [row for row in metrics.get("floor", []) if row["kind"] == "torsions"]
    if floor:
        words = "; ".join(f"{row['of']} {row['share']:.2g}" for row in floor)
        own = metrics["adaptation"].get("floor_share", 0.02)  # that of earlier versions
        found.append(
            "Share of the weight where only the prior's floor, what chemistry allows, reaches "
            f"(far above the floor's own {own:.2g} a state was lost by the fit): {words}."
        )
    components = [row for row in metrics.get("floor", []) if row["kind"] == "component"]
    if components:
        words = "; ".join(f"{row['of']} {row['share']:.2g}" for row in components)
        found.append(f"Weight of ring conformers over their share in the prior: {words}.")
    seen: list[str] = []
    hardly: list[str] = []
    never: list[str] = []
    for row in metrics.get("isomers", []):
        share = row["population"]
        kind = never if share <= 0.0 else hardly if share < row["population_error"] else seen
        kind.append(f"{row['torsion']} {row['state']}")
    if hardly:
        found.append(f"Hardly seen, a population below its error: {', '.join(hardly)}.")
    if never:
        found.append(f"Never seen among {metrics['n_samples']:,} samples: {', '.join(never)}.")
    elif seen and not hardly:
        found.append("Every state in the table was seen.")
    found += _backwards(metrics)
    dynamics = metrics.get("dynamics")
    if dynamics:
        if dynamics["only_path"]:
            found.append(
                f"Seen by the path and not by dynamics: {', '.join(dynamics['only_path'])}."
            )
        if dynamics["only_dynamics"]:
            found.append(
                f"Seen by dynamics and not by the path: {', '.join(dynamics['only_dynamics'])}."
            )
        z = [v for v in dynamics["z"] if v is not None]
        if z:
            found.append(
                f"Populations differ from those of {dynamics['n_frames']:,} frames of dynamics by "
                f"at most {dynamics['largest_z']:.1f} standard errors (root mean square "
                f"{math.sqrt(sum(v * v for v in z) / len(z)):.1f})."
            )
    return found


def _backwards(metrics: dict[str, Any]) -> list[str]:
    """Tell what paths run backwards say of the ESS and of log Z."""
    rows = [
        ("frames drawn by weight", metrics.get("backwards")),
        ("frames of dynamics", metrics.get("dynamics", {}).get("backwards")),
    ]
    return [
        f"Paths backwards from {row['n']:,} {name}: relative ESS "
        f"{pm(row['relative_ess'], row['relative_ess_error'])}, log Z "
        f"{pm(row['log_z'], row['log_z_error'])}."
        for name, row in rows
        if row
    ]


def round_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Adaptive rounds of the prior, one row each."""
    return [
        (
            str(number),
            f"{r['n']:,}",
            str(r["n_levels"]),
            f"{r['length']:.2f}",
            f"{r['prior_ess']:.3f}",
            f"{r['log_z']:.2f}",
            "kept" if r["kept"] else "dropped",
        )
        for number, r in enumerate(metrics["adaptation"]["rounds"], 1)
    ]
