"""Which OpenMM platforms there are, and how fast."""

from __future__ import annotations

import time

import numpy as np
import openmm

from openmm_eqflow.energies.base import FloatArray
from openmm_eqflow.energies.process_worker import ProcessContext
from openmm_eqflow.energies.worker import LocalContext
from openmm_eqflow.errors import EnergyError

__all__ = ["available_platforms", "evaluation_rate", "fastest_platform", "probe_positions"]

_TIMING_SECONDS = 0.03
_GPU_PLATFORMS = ("CUDA", "HIP", "OpenCL")


def evaluation_rate(context: LocalContext | ProcessContext, probe: FloatArray) -> float:
    """Energy + force evaluations per second: the best of a few short blocks.

    The best, because other work on the machine can only make a block slower.
    """
    x = np.repeat(probe[None], 4, axis=0)
    context.compute(x[:1], True)
    best, end = np.inf, time.perf_counter() + _TIMING_SECONDS
    while (start := time.perf_counter()) < end or not np.isfinite(best):
        context.compute(x, True)
        best = min(best, time.perf_counter() - start)
    return len(x) / best


def probe_positions(n_particles: int, spacing: float = 0.25) -> FloatArray:
    """Positions ``(n_particles, 3)`` on a slightly disordered cubic lattice, in nm."""
    side = int(np.ceil(n_particles ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    jitter = np.random.default_rng(0).uniform(-0.1, 0.1, (n_particles, 3))
    positions: FloatArray = spacing * (grid[:n_particles] + jitter)
    return positions


def available_platforms() -> list[str]:
    """Names of the OpenMM platforms of this installation."""
    n = openmm.Platform.getNumPlatforms()
    return [openmm.Platform.getPlatform(i).getName() for i in range(n)]


def fastest_platform(system_xml: str, probe: FloatArray) -> str:
    """Platform with the highest rate of energies with forces, one Context, short timing.

    For small molecules that is often Reference, so the choice is measured, not made by name.

    Raises
    ------
    EnergyError
        No platform can run the System.
    """
    rates: dict[str, float] = {}
    reasons: list[str] = []
    candidates = ("Reference", "CPU", *_GPU_PLATFORMS)
    for name in [c for c in candidates if c in available_platforms()]:
        # A GPU platform may be installed without a device, or lack a force.
        try:
            rates[name] = evaluation_rate(LocalContext(system_xml, name), probe)
        except openmm.OpenMMException as error:
            reasons.append(f"{name}: {error}")
    if not rates:
        msg = f"no OpenMM platform can run this System ({'; '.join(reasons)})"
        raise EnergyError(msg)
    return max(rates, key=lambda name: rates[name])
