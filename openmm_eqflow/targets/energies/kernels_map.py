"""Compiled CMAPTorsionForce; arrays as in :mod:`.kernels_bonded`, patches as in ``MapTerm``."""

from __future__ import annotations

import math

import numba
import numpy as np

from openmm_eqflow.targets.energies.kernels_bonded import add_dihedral_force, dihedral_values
from openmm_eqflow.targets.energies.vector_math import JIT, LANES

__all__ = [
    "map_kernel",
]

# ruff: noqa: ANN001, ANN201, ANN202, D103
# mypy: disable-error-code="no-untyped-def"


@numba.njit(**JIT)
def patch(table, first, second):
    """Energy and slopes in the angles of one map at one point."""
    size = table.shape[0]
    scale = size / (2.0 * math.pi)
    s, t = first * scale, second * scale
    if not (abs(s) < 1e9 and abs(t) < 1e9):
        return np.nan, np.nan, np.nan
    i, j = math.floor(s), math.floor(t)
    s, t = s - i, t - j
    c = table[i % size, j % size]
    energy, by_s, by_t = 0.0, 0.0, 0.0
    for m in range(3, -1, -1):
        row = ((c[m, 3] * t + c[m, 2]) * t + c[m, 1]) * t + c[m, 0]
        slope = (3.0 * c[m, 3] * t + 2.0 * c[m, 2]) * t + c[m, 1]
        by_s = by_s * s + energy
        energy = energy * s + row
        by_t = by_t * s + slope
    return energy, by_s * scale, by_t * scale


@numba.njit(**JIT)
def map_kernel(x, e, f, forces, index, coefficients):
    s, g = np.empty((2, 9, LANES)), np.empty((2, 5, 3, LANES))
    slope = np.empty((2, LANES))
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            q = index[t]
            dihedral_values(x, b, q[0], q[1], q[2], q[3], g[0], s[0])
            dihedral_values(x, b, q[4], q[5], q[6], q[7], g[1], s[1])
            for k in range(LANES):
                phi = math.atan2(s[0, 1, k], s[0, 0, k])
                psi = math.atan2(s[1, 1, k], s[1, 0, k])
                energy, slope[0, k], slope[1, k] = patch(coefficients[t], phi, psi)
                e[b, k] += energy
            if forces:
                add_dihedral_force(f, b, q[0], q[1], q[2], q[3], g[0], s[0], slope[0])
                add_dihedral_force(f, b, q[4], q[5], q[6], q[7], g[1], s[1], slope[1])
