"""The fastest evaluator of a System, by a short timing; ContextPool if TorchEnergy declines."""

from __future__ import annotations

import time
import warnings

import numpy as np
import openmm

from openmm_eqflow.energies.base import EnergyEvaluator, FloatArray
from openmm_eqflow.energies.context_pool import ContextPool
from openmm_eqflow.energies.platforms import evaluation_rate, fastest_platform, probe_positions
from openmm_eqflow.energies.torch_port import TorchEnergy
from openmm_eqflow.energies.worker import LocalContext
from openmm_eqflow.errors import UnsupportedSystemError

__all__ = ["fastest_evaluator"]

_BATCH = 512
#: OpenMM's CPU and GPU platforms work in single or mixed precision; double is worth this factor.
_ADVANTAGE = 1.3


def fastest_evaluator(
    system: openmm.System,
    *,
    platform: str = "auto",
    n_workers: int | None = None,
    positions: FloatArray | None = None,
) -> EnergyEvaluator:
    """Return TorchEnergy or a ContextPool, whichever gives more energies with forces.

    TorchEnergy is timed on one thread at a batch of 512 against one Context of the fastest
    platform; a pool is built only if it wins.

    Parameters
    ----------
    system
        OpenMM System.
    platform, n_workers
        For the Contexts; a platform other than ``"auto"`` asks for OpenMM and gets a pool.
    positions
        ``(n_particles, 3)`` nm for timings and checks.
    """
    probe = probe_positions(system.getNumParticles()) if positions is None else positions

    def pool() -> ContextPool:
        return ContextPool(system, platform=platform, n_workers=n_workers, positions=probe)

    if platform != "auto":
        return pool()
    try:
        port = TorchEnergy(system, positions=probe, n_threads=n_workers)
    except UnsupportedSystemError as error:
        warnings.warn(f"falling back to OpenMM Contexts: {error}", stacklevel=2)
        return pool()
    batch = np.repeat(probe[None], _BATCH, axis=0)
    # One thread against one Context: both use as many cores as they get afterwards.
    threads, port.n_threads = port.n_threads, 1
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        port.energies_and_forces(batch)
        best = min(best, time.perf_counter() - start)
    port.n_threads, port.n_invalid = threads, 0
    xml = openmm.XmlSerializer.serialize(system)
    context = LocalContext(xml, fastest_platform(xml, probe))
    if _ADVANTAGE * _BATCH / best >= evaluation_rate(context, probe):
        return port
    port.close()
    return pool()
