"""Has a reference run converged? Exchanges, round trips, autocorrelation, two walkers compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.analysis.chains import autocorrelation_ess, mean_with_error

__all__ = [
    "assess",
    "features",
    "round_trips",
    "torsion_angles",
]

FloatArray = NDArray[np.float64]
_LEAST_FRAMES = 20


def torsion_angles(x: FloatArray, torsions: Sequence[tuple[int, int, int, int]]) -> FloatArray:
    """Dihedral angles in (-pi, pi], IUPAC sign, ``(n_frames, n_torsions)``.

    ``x`` is ``(n_frames, n_particles, 3)``. The arctan2 form of Blondel and Karplus 1996
    (J. Comput. Chem. 17, 1132) is used because it has no singularity at 0 and pi.
    """
    index = np.asarray(torsions, dtype=np.int64)
    first = x[:, index[:, 1]] - x[:, index[:, 0]]
    axis = x[:, index[:, 2]] - x[:, index[:, 1]]
    last = x[:, index[:, 3]] - x[:, index[:, 2]]
    normal_a, normal_b = np.cross(first, axis), np.cross(axis, last)
    sine = np.linalg.norm(axis, axis=-1) * (first * normal_b).sum(axis=-1)
    angles: FloatArray = np.arctan2(sine, (normal_a * normal_b).sum(axis=-1))
    return angles


def features(
    x: NDArray[np.floating[Any]],
    energies: FloatArray,
    torsions: Sequence[tuple[int, int, int, int]],
) -> dict[str, FloatArray]:
    """Observables that tell slow modes: energy, size and every torsion of a rotatable bond.

    Invariant under exchange of identical particles, whose labels need not mix.
    """
    y = np.asarray(x, dtype=np.float64)
    y = y - y.mean(axis=1, keepdims=True)
    named = {
        "potential_energy": energies,
        "squared_radius_of_gyration": np.square(y).sum(axis=(1, 2)) / y.shape[1],
    }
    if torsions:
        angles = torsion_angles(y, torsions)
        for column, quad in enumerate(torsions):
            label = "-".join(str(index) for index in quad)
            named[f"cos_torsion_{label}"] = np.cos(angles[:, column])
            named[f"sin_torsion_{label}"] = np.sin(angles[:, column])
    return named


def round_trips(replica: NDArray[np.int64]) -> int:
    """Count journeys coldest -> hottest -> coldest, summed over the replicas of one walker.

    ``replica`` is ``(n_frames, n_temperatures)``: which replica was at each temperature.
    """
    n_frames, n_temperatures = replica.shape
    if n_temperatures < 2:
        return 0
    trips = 0
    for index in range(n_temperatures):
        ends = np.zeros(n_frames, dtype=np.int64)
        ends[replica[:, 0] == index] = -1
        ends[replica[:, -1] == index] = 1
        visits = ends[ends != 0]
        if visits.size:
            # From the first visit of the cold end on, every change from hot to cold closes a trip.
            cold = np.flatnonzero(visits == -1)
            if cold.size:
                visits = visits[cold[0] :]
                trips += int(((visits[1:] == -1) & (visits[:-1] == 1)).sum())
    return trips


def assess(
    by_walker: Sequence[Mapping[str, FloatArray]],
    *,
    replica: Sequence[NDArray[np.int64]],
    attempts: NDArray[np.int64],
    accepted: NDArray[np.int64],
    frame_interval_ps: float,
) -> dict[str, Any]:
    """Summarise convergence of the target temperature.

    Parameters
    ----------
    by_walker
        :func:`features` of each walker's frames.
    replica, attempts, accepted
        Ladder positions per walker and exchange counts summed over walkers.

    Returns
    -------
    dict
        JSON-able. ``walker_z`` is the difference of two walkers' means over its standard error,
        from each walker's own autocorrelation; ``effective_samples`` is the slowest observable's.
        ``converged``: all ``|walker_z| < 4`` (the largest of some ten) and at least 100 effective
        samples; both walkers could still miss the same state.
    """
    usable = all(len(series["potential_energy"]) >= _LEAST_FRAMES for series in by_walker)
    result: dict[str, Any] = {
        "swap_rates": [float(a / max(n, 1)) for a, n in zip(accepted, attempts, strict=True)],
        "round_trips": [round_trips(walker) for walker in replica],
        "statistical_inefficiency_ps": {},
        "walker_z": {},
        "slowest": None,
        "effective_samples": 0.0,
        "converged": False,
    }
    if not usable:
        return result
    effective: dict[str, float] = {}
    for name in by_walker[0]:
        chains = [np.asarray(series[name]) for series in by_walker]
        sizes = [autocorrelation_ess(chain) for chain in chains]
        total = sum(sizes)
        n_frames = sum(len(chain) for chain in chains)
        effective[name] = total
        if total > 0.0:
            result["statistical_inefficiency_ps"][name] = n_frames / total * frame_interval_ps
        estimates = [mean_with_error(chain) for chain in chains]
        if len(chains) == 2 and all(0.0 < size for size in sizes):
            error = float(np.hypot(estimates[0][1], estimates[1][1]))
            result["walker_z"][name] = (estimates[0][0] - estimates[1][0]) / error
    # An observable that is exactly constant has no size.
    moving = {name: size for name, size in effective.items() if size > 0.0}
    if moving:
        slowest = min(moving, key=lambda name: moving[name])
        result["slowest"] = slowest
        result["effective_samples"] = moving[slowest]
        result["converged"] = bool(
            moving[slowest] >= 100.0 and all(abs(z) < 4.0 for z in result["walker_z"].values())
        )
    return result
