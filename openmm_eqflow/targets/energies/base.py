r"""What an energy evaluator is, and when an energy counts as failed.

Evaluators work on batches ``(n, n_particles, 3)`` in nm and return kJ/mol. One rule, applied by
all of them alike, decides validity: an energy is *invalid* when the positions, the energy or a
force component are not finite, or when

.. math:: |U| \ge 10^{15}\ \mathrm{kJ/mol},

where one unit in the last place of a double is 0.1 kJ/mol, so the number no longer resolves kT.
Invalid energies become :math:`+\infty` with zero force, and are counted: a failed energy must
never be 0 nor the previous value, or Metropolis would accept it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "ENERGY_LIMIT",
    "EnergyEvaluator",
    "FloatArray",
    "check_batch",
    "count",
    "mask_invalid",
]

FloatArray = NDArray[np.float64]

#: kJ/mol; beyond it neighbouring doubles differ by more than 0.1 kJ/mol.
ENERGY_LIMIT = 1e15


@runtime_checkable
class EnergyEvaluator(Protocol):
    """Batched potential energies of one OpenMM System.

    Attributes
    ----------
    n_particles
        Particles of the System.
    n_invalid
        Invalid energies since construction (see the module docstring).
    """

    n_particles: int

    @property
    def n_invalid(self) -> int:
        """Invalid energies since construction."""
        ...

    def energies(self, x: FloatArray) -> FloatArray:
        """Energies ``(n,)`` in kJ/mol of positions ``(n, n_particles, 3)`` in nm."""
        ...

    def energies_and_forces(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies ``(n,)`` and forces ``(n, n_particles, 3)`` in kJ/mol/nm."""
        ...

    def close(self) -> None:
        """Release contexts, threads and processes; a second call does nothing."""
        ...


def check_batch(x: FloatArray, n_particles: int) -> FloatArray:
    """Return ``x`` as contiguous float64 of shape ``(n, n_particles, 3)``.

    Raises
    ------
    ValueError
        The shape differs.
    """
    array = np.ascontiguousarray(x, dtype=np.float64)
    if array.ndim != 3 or array.shape[1:] != (n_particles, 3):
        msg = (
            f"positions have shape {tuple(array.shape)}, expected (n, {n_particles}, 3) in nm: "
            "add the batch axis or check the particle count"
        )
        raise ValueError(msg)
    return array


def count(totals: dict[torch.device, Tensor], device: torch.device, n: Tensor | int) -> None:
    """Add ``n`` to the total of a device.

    On a GPU it stays there until it is asked for: no synchronisation, and always the same tensor,
    as a recording of the evaluation needs it.
    """
    if device not in totals:
        with torch.inference_mode(False):
            totals[device] = torch.zeros((), dtype=torch.int64, device=device)
    totals[device].add_(n)


def mask_invalid(
    x: FloatArray, energies: FloatArray, forces: FloatArray | None = None
) -> tuple[FloatArray, FloatArray | None, int]:
    """Replace invalid energies by +inf (zero force) and say how many there were."""
    with np.errstate(invalid="ignore", over="ignore"):
        valid = np.abs(energies) < ENERGY_LIMIT
        valid &= np.isfinite(x.sum(axis=(1, 2)))
        if forces is not None:
            valid &= np.isfinite(forces.sum(axis=(1, 2)))
    n_invalid = int(valid.size - np.count_nonzero(valid))
    if n_invalid:
        energies = np.where(valid, energies, np.inf)
        if forces is not None:
            forces = np.where(valid[:, None, None], forces, 0.0)
    return energies, forces, n_invalid
