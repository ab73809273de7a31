r"""The only unit conversion of the package: OpenMM quantities to nm, kJ/mol and kT.

Everywhere else positions are plain arrays in nm and energies are in kT at the target temperature
("reduced", :math:`u = U / RT`) or, where a name says so, in kJ/mol. Arrays without a unit are
refused here: OpenMM would accept them silently.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
from numpy.typing import ArrayLike, NDArray
from openmm import unit

__all__ = [
    "energy_in_kj_mol",
    "kelvin",
    "kt_in_kj_mol",
    "masses_in_dalton",
    "positions_in_nm",
    "positions_quantity",
    "reduced_energy",
    "temperature_quantity",
]

_KJ_MOL = unit.kilojoule_per_mole
_GAS_CONSTANT = float(
    unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
)


def _value(quantity: Any, target: unit.Unit, what: str) -> Any:
    if not unit.is_quantity(quantity):
        raise ValueError(
            f"{what} has no unit (got {type(quantity).__name__}); "
            f"multiply it by an openmm.unit that converts to {target}"
        )
    if not quantity.unit.is_compatible(target):
        raise ValueError(f"{what} is in {quantity.unit}, which does not convert to {target}")
    return quantity.value_in_unit(target)


def kelvin(temperature: unit.Quantity) -> float:
    """Temperature in kelvin; refuses anything not finite and positive."""
    value = float(_value(temperature, unit.kelvin, "temperature"))
    if not (np.isfinite(value) and value > 0.0):
        raise ValueError(f"temperature is {value} K, expected a finite positive number")
    return value


def temperature_quantity(value: float) -> unit.Quantity:
    """Kelvin to an OpenMM quantity."""
    return float(value) * unit.kelvin


def kt_in_kj_mol(temperature: unit.Quantity) -> float:
    r""":math:`RT` in kJ/mol, with OpenMM's own molar gas constant.

    >>> from openmm import unit
    >>> round(kt_in_kj_mol(300 * unit.kelvin), 6)
    2.494339
    """
    return _GAS_CONSTANT * kelvin(temperature)


def positions_in_nm(positions: unit.Quantity) -> NDArray[np.float64]:
    """Positions as a contiguous float64 array ``(..., n_particles, 3)`` in nm."""
    value = _value(positions, unit.nanometer, "positions")
    return np.ascontiguousarray(np.asarray(value, dtype=np.float64))


def positions_quantity(x: ArrayLike) -> unit.Quantity:
    """Attach nm to an array ``(n_particles, 3)``; contiguous numpy, as OpenMM needs it.

    Two columns (a planar model) are padded with z = 0.
    """
    array = np.asarray(x, dtype=np.float64)
    if array.shape[-1] == 2:
        array = np.concatenate([array, np.zeros((*array.shape[:-1], 1))], axis=-1)
    return unit.Quantity(np.ascontiguousarray(array), unit.nanometer)


def energy_in_kj_mol(energy: unit.Quantity) -> float:
    """Molar energy in kJ/mol."""
    return float(_value(energy, _KJ_MOL, "energy"))


def reduced_energy(energy: unit.Quantity, temperature: unit.Quantity) -> float:
    r"""Reduced potential :math:`u = U / RT` (dimensionless)."""
    return energy_in_kj_mol(energy) / kt_in_kj_mol(temperature)


def masses_in_dalton(system: openmm.System) -> NDArray[np.float64]:
    """Particle masses of an OpenMM System in dalton, ``(n_particles,)``."""
    return np.array(
        [
            _value(system.getParticleMass(i), unit.dalton, "mass")
            for i in range(system.getNumParticles())
        ],
        dtype=np.float64,
    )
