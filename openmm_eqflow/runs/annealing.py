r"""From a structure to weighted samples without reference data: a path from chemistry, drawn from.

:func:`~openmm_eqflow.flows.adapt.path_from_chemistry` makes the path; independent samples of it
carry exact weights. What they say of isomers and conformers is a population p of every state and
:math:`\Delta F = -kT \log(p / p_{\max})` against the commonest state of the same torsion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from openmm import unit

from openmm_eqflow.analysis.chains import population
from openmm_eqflow.analysis.observables import Torsion, torsion_angles
from openmm_eqflow.analysis.weights import (
    log_z,
    pareto_k,
    relative_ess,
    relative_ess_with_error,
)
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import atomic_path, write_json, write_npz
from openmm_eqflow.flows.adapt import path_from_chemistry
from openmm_eqflow.flows.relaxed import AnnealedPath
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.geometry import align_rotations, rotate
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.runs.evaluation import FlowSamples, draw_weighted
from openmm_eqflow.runs.reference.data import ReferenceData, load_reference
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.forcefield import write_pdb
from openmm_eqflow.targets.isomers import Isomers, find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import kt_in_kj_mol, positions_quantity

__all__ = [
    "anneal_system",
    "isomer_populations",
]

_KCAL = 4.184
_LEAST = 50  # independent samples that a table of populations needs
_HEAVY = 0.7  # Pareto k above which the error of a mean is not to be believed
_SEEN = 1e-3  # share above which a conformer of a ring counts as sampled
_PATHS = 1000  # whose work is told level by level
_APART = 4.0  # standard errors between path and dynamics
_LOST = 0.3  # kT of log Z: what chance does not explain
Progress = Callable[[float, str], None]


def isomer_populations(
    torsions: tuple[Torsion, ...],
    x: NDArray[Any],
    log_weights: ArrayLike | None,
    kt: float,
    *,
    chain: ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """Give populations and free energies of the states of every torsion that tells isomers apart.

    Amides and double bonds are cis or trans, single bonds gauche+, anti or gauche-, bonds of rings
    plus or minus. Torsions whose turns look alike, and bonds of rings whose states differ in
    labels only, have no states.

    Parameters
    ----------
    torsions
        Of :func:`~openmm_eqflow.targets.isomers.find_isomers`.
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
    if torsion.kind == "ring":
        return {"plus": angle > 0.0, "minus": angle <= 0.0}
    third = 2 * math.pi / 3
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


def anneal_system(
    system: MolecularSystem,
    target: BoltzmannTarget,
    out: Path,
    *,
    ess: float = 0.9,
    n_samples: int = 10_000,
    n_points: int = 1000,
    seed: int = 0,
    compare_with: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a path without reference data, draw from it, and write what it says.

    Parameters
    ----------
    system, target
        The molecule, and its Boltzmann distribution.
    out
        Folder of the results: ``flow.json`` and ``flow.safetensors`` (the path, for
        ``load_flow``, ``FlowMove`` and ``evaluate``), ``samples.npz`` (positions in nm, log
        weights, reduced potentials), ``samples.dcd`` and ``topology.pdb`` (resampled by weight)
        and ``metrics.json``.
        A folder with a path of the same System, seed and ``ess`` is gone on with.
    ess
        Relative ESS asked for; the number of levels follows.
    n_samples
        Independent samples.
    n_points
        Points of an adaptive round.
    seed
        Of all random streams, children of it by name.
    compare_with
        Run directory of the same System whose reference dynamics are an independent check.
    progress
        Called with the share done and a line.

    Returns
    -------
    dict
        What ``metrics.json`` holds: relative ESS, log Z, Pareto k, populations and free energies
        of isomers, rounds, levels with their work, seconds; where there is a comparison, isomers
        by dynamics and z of every population.

    Raises
    ------
    ConfigurationError
        ``out`` belongs to something else, or ``compare_with`` to another System.
    CheckpointError
        ``compare_with`` has no reference dynamics.
    UnsupportedSystemError
        No prior can be made of the molecule.
    """
    if not 0.0 < ess < 1.0:
        raise ConfigurationError(f"ess is {ess:g}, expected a number above 0 and below 1")
    tell = progress or (lambda share, text: None)
    dynamics = None if compare_with is None else _dynamics(compare_with, target)
    asked = {
        "system_hash": target.system_hash,
        "temperature_K": target.kT,
        "ess": ess,
        "n_points": n_points,
        "seed": seed,
    }
    path = _known(out, asked)
    if path is None:
        tell(0.0, "adapting the prior to paths of its own")
        made = path_from_chemistry(target, ess=ess, seed=seed, n_points=n_points)
        out.mkdir(parents=True, exist_ok=True)
        made.path.metadata |= {"asked": asked, "system_hash": target.system_hash}
        save_flow(made.path, out / "flow", made.path.metadata)
        path = made.path
    adaptation = path.metadata["adaptation"]
    samples = draw_weighted(
        path,
        target,
        n_samples,
        seed=seed,
        folder=out / "drawn",
        progress=lambda share, text: tell(0.3 + 0.7 * share, text),
    )
    log_w = samples.log_weight.numpy()
    value, error = relative_ess_with_error(log_w)
    estimate = log_z(log_w)
    x = samples.x.numpy()
    isomers = find_isomers(target.system, system.topology, target.positions)
    rows = isomer_populations(isomers.torsions, x, log_w, target.kT)
    k = pareto_k(log_w)
    told = _warnings(float(value) * n_samples, adaptation, k, float(estimate.value))
    metrics: dict[str, Any] = {
        "system": system.name,
        "n_samples": n_samples,
        "seed": seed,
        "relative_ess": float(value),
        "relative_ess_error": float(error),
        "pareto_k": float(k) if np.isfinite(k) else None,
        "log_z": float(estimate.value),
        "log_z_error": float(estimate.error),
        "weights_of": "paths",
        "n_levels": len(path.layers),
        "ess_asked": ess,
        "seconds_per_sample": samples.seconds / n_samples,
        "adaptation": adaptation,
        "floor": _floor(path.prior, adaptation["floor"], isomers, system),
        "warnings": told + _single_conformers(isomers, rows),
        "isomers": rows,
        "levels": _levels(path, seed),
    }
    if dynamics is not None:
        frames, walker = dynamics.positions, dynamics.walker
        by_md = isomer_populations(isomers.torsions, frames, None, target.kT, chain=walker)
        about = {"run": str(compare_with), "n_frames": len(frames), "isomers": by_md}
        metrics["dynamics"] = about | _compared(rows, by_md)
        metrics["warnings"] += _disagreement(metrics["dynamics"])
    _write(out, system, samples, seed)
    write_json(out / "metrics.json", metrics)
    return metrics


def _dynamics(run: Path, target: BoltzmannTarget) -> ReferenceData:
    """Frames of reference dynamics of the same System at the same temperature."""
    found = load_reference(run)
    same = math.isclose(kt_in_kj_mol(found.temperatures[0] * unit.kelvin), target.kT, rel_tol=1e-6)
    if found.system_hash != target.system_hash or not same:
        raise ConfigurationError(
            f"the reference dynamics of {run} are of another System or temperature: compare with "
            "a run of this one"
        )
    return found


def _compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of the populations over their standard errors; states that only one has seen."""
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


def _disagreement(dynamics: dict[str, Any]) -> list[str]:
    """Say where an independent answer is another one."""
    told, largest = [], dynamics["largest_z"]
    if dynamics["only_dynamics"]:
        told.append(
            f"{', '.join(dynamics['only_dynamics'])}: seen by the dynamics of {dynamics['run']} "
            "and not by the path; raise --n-points, and compare another --seed"
        )
    if largest is not None and largest > _APART:
        told.append(
            f"a population differs from that of {dynamics['run']} by {largest:.1f} standard "
            "errors: the path has missed something, or the dynamics have not crossed a barrier"
        )
    return told


def _levels(path: AnnealedPath, seed: int) -> dict[str, list[float]]:
    """Spread of the work on every level, and the ESS of what has been gathered up to it."""
    works = path.works(_PATHS, generator=child(seed, "works")).cpu()
    return {
        "time": list(path.levels.times),
        "work_spread": [float(w[torch.isfinite(w)].std()) for w in works],
        "relative_ess": [float(relative_ess(total.numpy())) for total in works.cumsum(0)],
    }


def _floor(
    prior: Prior, shares: dict[str, float], isomers: Isomers, system: MolecularSystem
) -> list[dict[str, Any]]:
    """Shares of :func:`~.flows.adapt.floor_weight`, with the names that the isomers have."""
    if not isinstance(prior, InternalCoordinatePrior):
        return []
    names = [atom.name for atom in system.topology.atoms()]
    known = {frozenset(t.atoms[1:3]): isomers.label([t]) for t in isomers.torsions}
    bonds = [prior.zmatrix.rows[3 + k][1:3] for k in prior.soft]
    torsions = [known.get(frozenset(b), "-".join(names[k] for k in sorted(b))) for b in bonds]
    named = []
    for key, share in shares.items():
        kind, members = key.split()
        what = f"ring conformer {int(members) + 1}"
        if kind == "torsions":
            what = ", ".join(torsions[int(k)] for k in members.split("-"))
        named.append({"of": what, "kind": kind, "share": share})
    return named


def _known(out: Path, asked: dict[str, Any]) -> AnnealedPath | None:
    """Path that ``out`` holds already."""
    if not (out / "flow.json").is_file():
        if out.exists() and any(out.iterdir()):
            raise ConfigurationError(f"{out} holds other files and no path: choose another --out")
        return None
    path = load_flow(out / "flow")
    if not isinstance(path, AnnealedPath) or path.metadata.get("asked") != asked:
        raise ConfigurationError(
            f"{out} holds a flow made with other settings or for another System: choose another "
            "--out, or remove it"
        )
    return path


def _warnings(
    effective: float, adaptation: dict[str, Any], k: float, found: float
) -> list[str]:
    told = []
    if effective < _LEAST:
        told.append(
            f"only {effective:.0f} effective samples: populations are guesses; draw more, or "
            "raise --n-points"
        )
    if k > _HEAVY:
        told.append(
            f"Pareto k is {k:.2f}: a few weights carry the averages, and errors are too small; "
            "ask for a higher --ess or raise --n-points"
        )
    seen = [entry["log_z"] for entry in (*adaptation["rounds"], *adaptation["trials"])]
    highest = max(*seen, adaptation["second_log_z"])
    if highest > found + _LOST:
        told.append(
            f"another population of points found a log Z of {highest:.2f}, this path {found:.2f}: "
            "a state is probably missing; raise --n-points, and compare another --seed"
        )
    return told


def _single_conformers(isomers: Isomers, rows: list[dict[str, Any]]) -> list[str]:
    """Name the rings of which one conformer has all the weight."""
    most: dict[str, float] = {}
    for row in rows:
        most[row["torsion"]] = max(most.get(row["torsion"], 0.0), row["population"])
    alone = [
        name
        for k, name in enumerate(isomers.rings)
        if (seen := [most[t.name] for t in isomers.torsions if t.ring == k and t.name in most])
        and min(seen) > 1.0 - _SEEN
    ]
    if not alone:
        return []
    return [
        f"{', '.join(alone)} was found in one conformer only: either the others are rare, or the "
        "quenches missed them; anneal once more from another conformer (init --pdb), log Z tells"
    ]


def _write(out: Path, system: MolecularSystem, samples: FlowSamples, seed: int) -> None:
    """Weighted samples as they are, and frames drawn by weight for a viewer."""
    x, log_w = samples.x.numpy(), samples.log_weight
    write_npz(
        out / "samples.npz",
        {
            "positions": x.astype(np.float32),
            "log_weight": log_w.numpy(),
            "u": samples.u.numpy(),
        },
    )
    weights = torch.softmax(log_w, 0)
    effective = int(max(1.0, float(1 / weights.square().sum())))
    generator = child(seed, "frames")
    u = torch.rand((), generator=generator, dtype=torch.float64)
    places = (torch.arange(effective, dtype=torch.float64) + u) / effective
    index = torch.searchsorted(weights.cumsum(0), places).clamp(max=len(weights) - 1)
    chosen = torch.from_numpy(x[index.numpy()]).double()
    frames = rotate(chosen, align_rotations(chosen, chosen[:1])).float().numpy()
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(system.topology))
    with atomic_path(out / "samples.dcd") as temporary:
        trajectory.save_dcd(str(temporary))
    with atomic_path(out / "topology.pdb") as temporary:
        write_pdb(temporary, system.topology, positions_quantity(frames[0]))
