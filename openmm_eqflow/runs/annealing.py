r"""From a structure to weighted samples without reference data: a path from chemistry, drawn from.

:func:`~openmm_eqflow.flows.adapt.path_from_chemistry` makes the path; independent samples of it
carry exact weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from openmm import unit

from openmm_eqflow.analysis.isomers import compare_isomers, isomer_populations
from openmm_eqflow.analysis.weights import (
    TAME,
    log_z,
    max_weight_share,
    pareto_k,
    relative_ess,
    relative_ess_with_error,
    systematic,
)
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import atomic_path, write_dcd, write_json, write_npz
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.relaxed import AnnealedPath
from openmm_eqflow.flows.temperatures import AtTemperature
from openmm_eqflow.geometry import align_rotations, rotate
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.runs.annealed_frames import path_and_samples
from openmm_eqflow.runs.evaluation import FlowSamples
from openmm_eqflow.runs.reference.data import ReferenceData, load_reference
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.forcefield import write_pdb
from openmm_eqflow.targets.isomers import Isomers, find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.objectives import thin
from openmm_eqflow.units import kt_in_kj_mol, positions_quantity

__all__ = [
    "anneal_system",
    "backwards",
    "describe_path",
    "write_weighted",
]

_LEAST = 50  # independent samples that a table of populations needs
_HEAVY = 0.7  # Pareto k above which the error of a mean is not to be believed
_SEEN = 1e-3  # share above which a conformer of a ring counts as sampled
_PATHS = 1000  # whose work is told level by level
_BACK = 500  # paths backwards
_TINY = 0.1  # of the mean weight
_BACK_APART = 0.05  # of log Z in kT, and of the ESS, below which a difference does not matter
_APART = 4.0  # standard errors between path and dynamics
_LOST = 0.3  # kT of log Z: what chance does not explain
Progress = Callable[[float, str], None]


def anneal_system(
    system: MolecularSystem,
    target: BoltzmannTarget,
    out: Path,
    *,
    ess: float = 0.9,
    n_samples: int = 10_000,
    n_points: int = 1000,
    seed: int = 0,
    device: str = "cpu",
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
    device
        Where points are carried: ``cpu`` or ``cuda``.
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
    dynamics = None if compare_with is None else _dynamics(compare_with, target)
    if not (out / "flow.json").is_file() and out.exists() and any(out.iterdir()):
        raise ConfigurationError(f"{out} holds other files and no path: choose another --out")
    path, samples = path_and_samples(
        target,
        out / "flow",
        n_samples,
        ess=ess,
        n_points=n_points,
        seed=seed,
        draw_seed=seed,
        device=device,
        progress=progress,
    )
    log_w = samples.log_weight.numpy()
    value, error = relative_ess_with_error(log_w)
    estimate, k = log_z(log_w), pareto_k(log_w)
    metrics: dict[str, Any] = {
        "system": system.name,
        "n_samples": n_samples,
        "seed": seed,
        "relative_ess": float(value),
        "relative_ess_error": float(error),
        "pareto_k": float(k) if np.isfinite(k) else None,
        "log_z": float(estimate.value),
        "log_z_error": float(estimate.error),
        "ess_asked": ess,
        "seconds_per_sample": samples.seconds / n_samples,
    }
    beside = None if dynamics is None else (str(compare_with), dynamics)
    metrics |= describe_path(path, system, target, samples, dynamics=beside, seed=seed)
    _write(out, system, samples, seed)
    write_json(out / "metrics.json", metrics)
    return metrics


def describe_path(
    path: FlowPath,
    system: MolecularSystem,
    target: BoltzmannTarget,
    samples: FlowSamples,
    *,
    dynamics: tuple[str, ReferenceData] | None = None,
    seed: int,
) -> dict[str, Any]:
    """Say what samples of a path from chemistry show, and what it may have missed.

    Parameters
    ----------
    path, samples
        A flow whose prior is that of an annealed path, with the record of
        :func:`~openmm_eqflow.flows.adapt.path_from_chemistry` in its metadata, and independent
        samples of it.
    system, target
        The molecule.
    dynamics
        Reference dynamics to compare with, and the name of their run.
    seed
        Of the paths whose work is told.

    Returns
    -------
    dict
        ``isomers``, ``warnings``, ``adaptation``, ``floor``, ``n_levels`` (of Monte Carlo),
        ``backwards`` (of paths: ESS and log Z of :func:`backwards` from frames drawn by weight; in
        ``dynamics`` from its frames), ``weights_of`` and ``proposed``, the torsions of which the
        prior proposes every state; of an annealed path ``levels`` with their work; with dynamics
        ``dynamics``.
    """
    log_w, x = samples.log_weight.numpy(), samples.x.numpy()
    adaptation = path.metadata["adaptation"]
    isomers = find_isomers(target.system, system.topology, target.positions)
    rows = isomer_populations(isomers.tabled, x, log_w, target.kT)
    effective = float(relative_ess(log_w)) * len(log_w)
    # A heavy tail of weights that are all nearly equal decides nothing.
    tame = len(log_w) * max_weight_share(log_w) < TAME
    k = -math.inf if tame else pareto_k(log_w)
    told = _warnings(effective, adaptation, k, float(log_z(log_w).value))
    found: dict[str, Any] = {
        "weights_of": "points" if path.has_density else "paths",
        "n_levels": sum(layer.n_energies > 0 for layer in path.layers),
        "adaptation": adaptation,
        "floor": _floor(path.prior, adaptation["floor"], isomers, system),
        "proposed": [t.name for t in isomers.torsions if set(t.atoms[1:3]) in _soft(path.prior)],
        "warnings": told + _single_conformers(isomers, rows),
        "isomers": rows,
    }
    if isinstance(path, AnnealedPath):
        found["levels"] = _levels(path, seed)
    if not path.has_density and effective >= _LEAST:
        u = float(torch.rand((), generator=child(seed, "backwards"), dtype=torch.float64))
        chosen = systematic(log_w, u, min(_BACK, max(1, int(effective))))
        found["backwards"] = backwards(
            path, target, samples.x[torch.from_numpy(chosen)], log_w
        )
        found["warnings"] += _one_way(found["backwards"], log_w)
    if dynamics is not None:
        run, data = dynamics
        by_md = isomer_populations(
            isomers.tabled, data.positions, None, target.kT, chain=data.walker
        )
        about = {"run": run, "n_frames": data.n_frames, "isomers": by_md}
        found["dynamics"] = about | compare_isomers(rows, by_md)
        if "backwards" in found:
            frames = thin(torch.from_numpy(data.positions), _BACK).double()
            by_frames = backwards(path, target, frames, log_w)
            found["dynamics"]["backwards"] = by_frames
            found["warnings"] += _one_way(by_frames, log_w, f" from frames of {run}")
        found["warnings"] += _disagreement(found["dynamics"])
    return found


def backwards(
    path: FlowPath, target: BoltzmannTarget, x: torch.Tensor, log_w: NDArray[np.float64]
) -> dict[str, float]:
    r"""ESS and log Z by paths that run backwards from points of the target.

    .. math:: \frac{E[w]^2}{E[w^2]} = \frac{Z}{E_p[w]}, \qquad
              Z = \frac{P(w > c)}{E_p\left[w^{-1}\, 1_{w > c}\right]}

    over the paths backwards from x, with P that of paths forwards: what those hardly ever meet and
    give much weight, paths backwards from there always meet. Of paths with next to no weight, c of
    a tenth of the mean, it is the other way round.

    Parameters
    ----------
    path, target
        The path and where it ends.
    x
        Points of the target (n, N, 3) in nm, taken as independent.
    log_w
        Log weights (m,) of paths forwards.

    Returns
    -------
    dict
        ``n``, ``relative_ess``, ``log_z`` and the error of each.
    """
    back = (-target.reduced_potential(x) - path.log_prob(x).cpu()).numpy()
    least = float(log_z(log_w).value) + math.log(_TINY)
    share = float((log_w > least).mean())
    inverse = log_z(np.where(back > least, -back, -np.inf))
    found = math.log(share) - float(inverse.value)
    error = math.hypot(float(inverse.error), math.sqrt((1 - share) / (share * len(log_w))))
    ess = apart = 0.0  # where a path backwards fails: its weight has no bound
    if not (back == np.inf).any():
        mean = log_z(back)
        ess, apart = math.exp(found - float(mean.value)), math.hypot(error, float(mean.error))
    return {
        "n": len(back),
        "relative_ess": ess,
        "relative_ess_error": ess * apart,
        "log_z": found,
        "log_z_error": error,
    }


def _one_way(
    back: dict[str, float], log_w: NDArray[np.float64], start: str = ""
) -> list[str]:
    """Say where paths backwards contradict those forwards."""
    ess, estimate = relative_ess_with_error(log_w), log_z(log_w)
    below = float(ess.value) - back["relative_ess"]
    off = abs(back["log_z"] - float(estimate.value))
    chance = _APART * math.hypot(float(ess.error), back["relative_ess_error"])
    moved = _APART * math.hypot(float(estimate.error), back["log_z_error"])
    if below > max(_BACK_APART, chance) or off > max(_BACK_APART, moved):
        return [
            f"paths backwards{start} say a relative ESS of {back['relative_ess']:.2f} and a log Z "
            f"of {back['log_z']:.2f}, those forwards {ess.value:.2f} and {estimate.value:.2f}: "
            "a few states carry far more weight than the samples show; ask for a higher --ess or "
            "raise n_points"
        ]
    return []


def _dynamics(run: Path, target: BoltzmannTarget) -> ReferenceData:
    """Frames of reference dynamics of the same System at the same temperature."""
    found = load_reference(run)
    if found.method != "tempering":
        raise ConfigurationError(
            f"{run} holds frames of a path, which are no dynamics: compare with a run made with "
            "--method tempering"
        )
    same = math.isclose(kt_in_kj_mol(found.temperatures[0] * unit.kelvin), target.kT, rel_tol=1e-6)
    if found.system_hash != target.system_hash or not same:
        raise ConfigurationError(
            f"the reference dynamics of {run} are of another System or temperature: compare with "
            "a run of this one"
        )
    return found


def _disagreement(dynamics: dict[str, Any]) -> list[str]:
    """Say where an independent answer is another one."""
    told, largest = [], dynamics["largest_z"]
    if dynamics["only_dynamics"]:
        told.append(
            f"{', '.join(dynamics['only_dynamics'])}: seen by the dynamics of {dynamics['run']} "
            "and not by the path; raise n_points, and compare another --seed"
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


def _soft(prior: Prior) -> list[set[int]]:
    """Bonds about which the prior proposes every turn that chemistry allows."""
    if not isinstance(prior, InternalCoordinatePrior):
        return []
    return [set(prior.zmatrix.rows[3 + k][1:3]) for k in prior.soft]


def _floor(
    prior: Prior, shares: dict[str, float], isomers: Isomers, system: MolecularSystem
) -> list[dict[str, Any]]:
    """Shares of :func:`~.flows.adapt.floor_weight`, with the names that the isomers have."""
    if not isinstance(prior, InternalCoordinatePrior):
        return []
    names = [atom.name for atom in system.topology.atoms()]
    known = {frozenset(t.atoms[1:3]): isomers.label([t]) for t in isomers.torsions}
    bonds = _soft(prior)
    torsions = [known.get(frozenset(b), "-".join(names[k] for k in sorted(b))) for b in bonds]
    named = []
    for key, share in shares.items():
        kind, members = key.split()
        turning = kind == "torsions"
        numbers = [int(k) for k in members.split("-")]
        what = ", ".join(torsions[k] if turning else f"ring conformer {k + 1}" for k in numbers)
        named.append({"of": what, "kind": kind, "share": share})
    return named


def _warnings(
    effective: float, adaptation: dict[str, Any], k: float, found: float
) -> list[str]:
    told = []
    if effective < _LEAST:
        told.append(
            f"only {effective:.0f} effective samples: populations are guesses; draw more, or "
            "raise n_points"
        )
    if k > _HEAVY:
        told.append(
            f"Pareto k is {k:.2f}: a few weights carry the averages, and errors are too small; "
            "ask for a higher --ess or raise n_points"
        )
    seen = [entry["log_z"] for entry in (*adaptation["rounds"], *adaptation["trials"])]
    highest = max(*seen, adaptation["second_log_z"])
    if highest > found + _LOST:
        told.append(
            f"another population of points found a log Z of {highest:.2f}, this path {found:.2f}: "
            "a state is probably missing; raise n_points, and compare another --seed"
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
    _write_frames(out, "samples.dcd", system, samples.x, log_w.numpy(), seed)


def write_weighted(
    out: Path, system: MolecularSystem, samples: AtTemperature, *, seed: int
) -> Path:
    """Write frames drawn by weight at a temperature, and topology.pdb; returns the trajectory.

    Parameters
    ----------
    out
        Folder; receives ``NAME-300K.dcd``.
    system, samples
        Whose samples, with their weights at the temperature of the frames.
    seed
        Of the draw.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = f"{system.name}-{samples.kelvin:.10g}K.dcd"
    _write_frames(out, name, system, samples.x, samples.log_weight.numpy(), seed)
    return out / name


def _write_frames(
    out: Path,
    name: str,
    system: MolecularSystem,
    x: torch.Tensor,
    log_weight: NDArray[np.float64],
    seed: int,
) -> None:
    """Write frames drawn by weight, molecules superposed, as many as the weights are worth."""
    u = float(torch.rand((), generator=child(seed, "frames"), dtype=torch.float64))
    chosen = x[torch.from_numpy(systematic(log_weight, u))].double()
    if system.kind == "molecule":
        chosen = rotate(chosen, align_rotations(chosen, chosen[:1]))
    write_dcd(out / name, chosen.numpy())
    with atomic_path(out / "topology.pdb") as temporary:
        write_pdb(temporary, system.topology, positions_quantity(chosen[0].numpy()))
