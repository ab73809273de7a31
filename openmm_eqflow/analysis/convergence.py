"""Has a reference run converged? Exchanges, round trips, autocorrelation, two walkers compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.analysis.chains import autocorrelation_ess, mean_with_error
from openmm_eqflow.analysis.observables import (
    Torsion,
    slow_coordinates,
    torsion_angles,
)

__all__ = [
    "assess",
    "features",
    "round_trips",
]

FloatArray = NDArray[np.float64]
_LEAST_FRAMES = 20


def features(
    x: NDArray[np.floating[Any]], energies: FloatArray, torsions: Sequence[Torsion]
) -> dict[str, FloatArray]:
    """Energy and :func:`~openmm_eqflow.analysis.observables.slow_coordinates` of ``(n, N, D)``."""
    named = slow_coordinates(x, torsion_angles(x, torsions), torsions)
    size = named.pop("squared radius of gyration")
    return {"potential_energy": energies, "squared_radius_of_gyration": size, **named}


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
    one_state: Sequence[str] = (),
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
    one_state
        Names of torsions and rings that the frames show in one state only.
    replica, attempts, accepted
        Ladder positions per walker and exchange counts summed over walkers.

    Returns
    -------
    dict
        JSON-able. ``walker_z`` is the difference of two walkers' means over its standard error,
        from each walker's own autocorrelation; ``effective_samples`` is the slowest observable's.
        ``mixed``: all ``|walker_z| < 4`` (the largest of some ten) and at least 100 effective
        samples. ``converged``: mixed, and ``one_state`` is empty; both walkers could still miss
        the same state.
    """
    usable = all(len(series["potential_energy"]) >= _LEAST_FRAMES for series in by_walker)
    result: dict[str, Any] = {
        "swap_rates": [float(a / max(n, 1)) for a, n in zip(accepted, attempts, strict=True)],
        "round_trips": [round_trips(walker) for walker in replica],
        "statistical_inefficiency_ps": {},
        "walker_z": {},
        "slowest": None,
        "effective_samples": 0.0,
        "one_state": list(one_state),
        "mixed": False,
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
        result["mixed"] = bool(
            moving[slowest] >= 100.0 and all(abs(z) < 4.0 for z in result["walker_z"].values())
        )
        result["converged"] = result["mixed"] and not one_state
    return result
