"""The fastest evaluator for a System, by a short timing; ContextPool where TorchEnergy declines."""

from __future__ import annotations

import time
import warnings

import numpy as np
import openmm

from openmm_eqflow.energies.base import EnergyEvaluator, FloatArray
from openmm_eqflow.energies.context_pool import ContextPool, fastest_platform, probe_positions
from openmm_eqflow.energies.torch_port import TorchEnergy
from openmm_eqflow.energies.worker import LocalContext
from openmm_eqflow.errors import UnsupportedSystemError

__all__ = ["fastest_evaluator"]

_BATCH = 512
_PROBES = 8


def fastest_evaluator(
    system: openmm.System,
    *,
    platform: str = "auto",
    n_workers: int | None = None,
    positions: FloatArray | None = None,
) -> EnergyEvaluator:
    """Return TorchEnergy or a ContextPool, whichever gives more energies with forces.

    TorchEnergy is timed at a batch of 512 against one Context times the number of workers, which
    is the most a pool can reach; a pool is built only if it may win.

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
    port.energies_and_forces(batch)
    start = time.perf_counter()
    port.energies_and_forces(batch)
    per_energy = (time.perf_counter() - start) / _BATCH
    port.n_invalid = 0
    xml = openmm.XmlSerializer.serialize(system)
    context = LocalContext(xml, fastest_platform(xml, probe))
    few = batch[:_PROBES]
    context.compute(few, True)
    start = time.perf_counter()
    context.compute(few, True)
    per_context = (time.perf_counter() - start) / _PROBES / port.n_threads
    if per_energy <= per_context:
        return port
    port.close()
    return pool()
