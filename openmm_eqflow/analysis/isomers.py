r"""Populations and free energies of isomers and conformers, torsion by torsion.

A state of population p has :math:`\Delta F = -kT \log(p / p_{\max})` against the commonest state
of the same torsion.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.analysis.chains import population
from openmm_eqflow.analysis.observables import Torsion, torsion_angles

__all__ = [
    "compare_isomers",
    "isomer_populations",
]

_KCAL = 4.184


def isomer_populations(
    torsions: tuple[Torsion, ...],
    x: NDArray[Any],
    log_weights: ArrayLike | None,
    kt: float,
    *,
    chain: ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """Give populations and free energies of the states of every torsion that tells isomers apart.

    Amides and double bonds are cis or trans, esters and acids Z or E (Z: what the oxygen carries
    is on the side of the carbonyl), single bonds gauche+, anti or gauche-, bonds of rings plus or
    minus, substituents of saturated six-membered rings equatorial (anti to the ring) or axial.
    Torsions whose turns look alike, and bonds of rings whose states differ in labels only, have no
    states.

    Parameters
    ----------
    torsions
        ``tabled`` of :func:`~openmm_eqflow.targets.isomers.find_isomers`.
    x, log_weights
        Independent samples (n, N, 3) in nm and their log weights (n,), or frames of a chain.
    kt
        Thermal energy in kJ/mol.
    chain
        Which chain made each frame (n,), where they are correlated.

    Returns
    -------
    list of dict
        ``torsion``, ``state``, ``population`` and ``population_error``; ``free_energy_kj_mol`` and
        ``free_energy_kcal_mol`` with errors, against the commonest state of the torsion (None
        where a state was not seen).
    """
    rows: list[dict[str, Any]] = []
    angles = torsion_angles(x, torsions)
    for torsion, angle in zip(torsions, angles.T, strict=True):
        if torsion.fold > 1 or torsion.even:
            continue
        states = _states(torsion, angle)
        found: dict[str, tuple[float, float]] = {}
        for name, inside in states.items():
            estimate, _ = population(inside, log_weights=log_weights, chain=chain)
            found[name] = float(estimate.value), float(estimate.error)
        most = max(found, key=lambda name: found[name][0])
        for name, (p, error) in found.items():
            free, uncertain = _free_energy(p, error, *found[most], kt, same=name == most)
            rows.append(
                {
                    "torsion": torsion.name,
                    "state": name,
                    "population": p,
                    "population_error": error,
                    "free_energy_kj_mol": free,
                    "free_energy_kj_mol_error": uncertain,
                    "free_energy_kcal_mol": None if free is None else free / _KCAL,
                    "free_energy_kcal_mol_error": None if uncertain is None else uncertain / _KCAL,
                }
            )
    return rows


def _states(torsion: Torsion, angle: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    if torsion.kind in ("amide", "double"):
        return {"cis": np.cos(angle) > 0.0, "trans": np.cos(angle) <= 0.0}
    if torsion.kind == "ester":  # measured from the carbon's other substituent
        return {"Z": np.cos(angle) <= 0.0, "E": np.cos(angle) > 0.0}
    if torsion.kind == "ring":
        return {"plus": angle > 0.0, "minus": angle <= 0.0}
    third = 2 * math.pi / 3
    if torsion.kind == "side":
        return {"equatorial": np.abs(angle) >= third, "axial": np.abs(angle) < third}
    return {
        "gauche+": (angle >= 0.0) & (angle < third),
        "anti": np.abs(angle) >= third,
        "gauche-": (angle < 0.0) & (angle > -third),
    }


def _free_energy(
    p: float, error: float, most: float, most_error: float, kt: float, *, same: bool
) -> tuple[float | None, float | None]:
    """Free energy against the commonest state and its error, in kJ/mol."""
    if same:
        return 0.0, 0.0
    if p <= 0.0:
        return None, None
    return -kt * math.log(p / most), kt * math.hypot(error / p, most_error / most)


def compare_isomers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the populations that a path and dynamics give, state by state.

    Parameters
    ----------
    ours, theirs
        Of :func:`isomer_populations`, of the same torsions.

    Returns
    -------
    dict
        ``z`` of every state (difference over combined standard error, None where neither has
        one), ``largest_z``, and the states that ``only_path`` or ``only_dynamics`` has seen.
    """
    scores: list[float | None] = []
    only: dict[str, list[str]] = {"path": [], "dynamics": []}
    for a, b in zip(ours, theirs, strict=True):
        error = math.hypot(a["population_error"], b["population_error"])
        known = math.isfinite(error) and error > 0.0
        scores.append((a["population"] - b["population"]) / error if known else None)
        if (a["population"] > 0.0) != (b["population"] > 0.0):
            seen_by = "path" if a["population"] > 0.0 else "dynamics"
            only[seen_by].append(f"{a['torsion']} {a['state']}")
    sizes = [abs(z) for z in scores if z is not None]
    return {
        "z": scores,
        "largest_z": max(sizes, default=None),
        "only_path": only["path"],
        "only_dynamics": only["dynamics"],
    }
