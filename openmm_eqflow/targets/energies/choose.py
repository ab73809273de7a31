"""Which evaluator a System gets: TorchEnergy, or a ContextPool if TorchEnergy declines."""

from __future__ import annotations

import warnings

import openmm

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.base import EnergyEvaluator, FloatArray
from openmm_eqflow.targets.energies.contexts import ContextPool, probe_positions
from openmm_eqflow.targets.energies.implicit_solvent import with_compiled_solvent
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy

__all__ = [
    "choose_evaluator",
]


def choose_evaluator(
    system: openmm.System,
    *,
    platform: str = "auto",
    n_workers: int | None = None,
    positions: FloatArray | None = None,
) -> EnergyEvaluator:
    """Return TorchEnergy where it can read every force, else a ContextPool (told once).

    OBC2 solvent written as a formula is taken as the compiled model, where both are the same
    (:mod:`openmm_eqflow.targets.energies.implicit_solvent`).

    A rule, not a race: energies in double precision whose bits do not depend on how busy the
    machine was when the target was built. ``bench energies`` measures both.

    Parameters
    ----------
    system
        OpenMM System.
    platform, n_workers
        For the Contexts; a platform other than ``"auto"`` asks for OpenMM and gets a pool.
    positions
        ``(n_particles, 3)`` nm for checks.
    """
    probe = probe_positions(system.getNumParticles()) if positions is None else positions
    if platform == "auto":
        try:
            fast = with_compiled_solvent(system, probe)
            return TorchEnergy(fast, positions=probe, n_threads=n_workers)
        except UnsupportedSystemError as error:
            warnings.warn(f"falling back to OpenMM Contexts: {error}", stacklevel=2)
    return ContextPool(system, platform=platform, n_workers=n_workers, positions=probe)
