from __future__ import annotations

import numpy as np
import pytest
from openmm import unit

from openmm_eqflow import units as thermo


def test_reduced_energy_is_energy_over_rt():
    # 1 kcal/mol at 300 K from CODATA R = 8.314462618 J/(mol K).
    expected = 4184.0 / (8.314462618 * 300.0)
    value = thermo.reduced_energy(1.0 * unit.kilocalorie_per_mole, 300.0 * unit.kelvin)
    assert value == pytest.approx(expected, rel=1e-9)


def test_positions_round_trip_in_angstrom():
    x = np.arange(6.0).reshape(2, 3)
    nm = thermo.positions_in_nm(unit.Quantity(10.0 * x, unit.angstrom))
    assert nm.dtype == np.float64
    assert nm.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(nm, x, rtol=1e-15)
    np.testing.assert_allclose(thermo.positions_in_nm(thermo.positions_quantity(x)), x)


def test_planar_positions_get_a_zero_column():
    quantity = thermo.positions_quantity(np.ones((4, 2)))
    np.testing.assert_array_equal(thermo.positions_in_nm(quantity)[:, 2], 0.0)


@pytest.mark.parametrize("value", [np.zeros((2, 3)), 300.0])
def test_numbers_without_unit_are_refused(value):
    with pytest.raises(ValueError, match="no unit"):
        thermo.positions_in_nm(value)
    with pytest.raises(ValueError, match="no unit"):
        thermo.kelvin(value)


def test_wrong_dimension_is_refused():
    with pytest.raises(ValueError, match="does not convert"):
        thermo.energy_in_kj_mol(1.0 * unit.kelvin)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="temperature is"):
        thermo.kelvin(value * unit.kelvin)
