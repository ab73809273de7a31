"""Compiled interpreter of expression programs, with reverse-mode derivatives.

A program (:mod:`.expressions`) is a short list of operations. Each is carried out for all lanes
before the next, so decoding it costs little, and the same loops run for every custom force: new
expressions need no compilation. Arrays as in :mod:`.kernels_bonded`; ``v`` holds the results of
the operations, ``g`` the derivatives of the energy with respect to them.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from openmm_eqflow.targets.energies.kernels_bonded import (
    add_angle_force,
    add_central,
    add_dihedral_force,
    angle_values,
    dihedral_values,
    squared_distance,
)
from openmm_eqflow.targets.energies.kernels_tape import run_backward, run_forward
from openmm_eqflow.targets.energies.vector_math import JIT, LANES

__all__ = [
    "DISTANCE",
    "program_kernel",
    "stage_kernel",
]

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

#: Geometry codes; 3, 4, 5 are Cartesian coordinates.
DISTANCE, ANGLE, DIHEDRAL, CARTESIAN = 0, 1, 2, 3


@numba.njit(**JIT)
def load_constants(code, value, constant_rows, constants, t, v):
    for m in range(constant_rows.shape[0]):
        row, c = constant_rows[m], constants[m, t]
        for k in range(LANES):
            v[row, k] = c


@numba.njit(**JIT)
def program_kernel(
    x, e, f, forces, index, code, value, output, constant_rows, constants, geometry
):
    """One custom bonded or pair force; ``geometry`` rows: kind, row of v, four slots."""
    n_ops, n_geometry = code.shape[0], geometry.shape[0]
    v, g = np.empty((n_ops, LANES)), np.empty((n_ops, LANES))
    s, vectors = np.empty((n_geometry, 9, LANES)), np.empty((n_geometry, 5, 3, LANES))
    slope = np.empty(LANES)
    for row in range(n_ops):
        v[row] = value[row]
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            load_constants(code, value, constant_rows, constants, t, v)
            for m in range(n_geometry):
                kind, row = geometry[m, 0], geometry[m, 1]
                i = index[t, geometry[m, 2]]
                if kind >= CARTESIAN:
                    for k in range(LANES):
                        v[row, k] = x[b, kind - CARTESIAN, i, k]
                    continue
                j = index[t, geometry[m, 3]]
                if kind == DISTANCE:
                    squared_distance(x, b, i, j, s[m, 0])
                    for k in range(LANES):
                        v[row, k] = np.sqrt(s[m, 0, k])
                    continue
                l = index[t, geometry[m, 4]]  # noqa: E741
                if kind == ANGLE:
                    w = vectors[m]
                    angle_values(x, b, i, j, l, w[0], w[1], w[2], s[m])
                    for k in range(LANES):
                        v[row, k] = s[m, 4, k]
                    continue
                h = index[t, geometry[m, 5]]
                dihedral_values(x, b, i, j, l, h, vectors[m], s[m])
                for k in range(LANES):
                    v[row, k] = math.atan2(s[m, 1, k], s[m, 0, k])
            run_forward(code, v)
            for k in range(LANES):
                e[b, k] += v[output, k]
            if not forces:
                continue
            for row in range(n_ops):
                for k in range(LANES):
                    g[row, k] = 0.0
            for k in range(LANES):
                g[output, k] = 1.0
            run_backward(code, v, g)
            for m in range(n_geometry):
                kind, row = geometry[m, 0], geometry[m, 1]
                i = index[t, geometry[m, 2]]
                if kind >= CARTESIAN:
                    for k in range(LANES):
                        f[b, kind - CARTESIAN, i, k] -= g[row, k]
                    continue
                j = index[t, geometry[m, 3]]
                if kind == DISTANCE:
                    for k in range(LANES):
                        slope[k] = g[row, k] / v[row, k]
                    add_central(x, f, b, i, j, slope)
                    continue
                l = index[t, geometry[m, 4]]  # noqa: E741
                if kind == ANGLE:
                    w = vectors[m]
                    add_angle_force(f, b, i, j, l, w[0], w[1], s[m], g[row])
                    continue
                h = index[t, geometry[m, 5]]
                add_dihedral_force(f, b, i, j, l, h, vectors[m], s[m], g[row])


@numba.njit(**JIT)
def stage_kernel(
    x, e, f, backward, forces, particles, code, value, output, constant_rows, constants, r_row,
    uses, slot, values, adjoints, slopes
):  # fmt: skip
    """One stage of a CustomGBForce.

    ``particles`` is (terms, 2) for pairs and (terms, 1) for single particles; ``uses`` rows are
    row of v, which particle of the term, which computed value. A value (``slot`` >= 0) is
    accumulated forward and differentiated in a second pass (``backward``); an energy (``slot`` -1)
    does both at once. A value of r alone (the Born integral, most of the work) keeps its slopes
    ``(terms, LANES)`` from the first pass: x is then a single block.
    """
    n_ops = code.shape[0]
    v, g, slope = np.empty((n_ops, LANES)), np.empty((n_ops, LANES)), np.empty(LANES)
    for row in range(n_ops):
        v[row] = value[row]
    radial = slot >= 0 and r_row >= 0 and uses.shape[0] == 0
    for b in range(x.shape[0]):
        for t in range(particles.shape[0]):
            i = particles[t, 0]
            if radial and backward:
                for k in range(LANES):
                    slope[k] = slopes[t, k] * adjoints[b, slot, i, k]
                add_central(x, f, b, i, particles[t, 1], slope)
                continue
            load_constants(code, value, constant_rows, constants, t, v)
            if r_row >= 0:
                squared_distance(x, b, i, particles[t, 1], slope)
                for k in range(LANES):
                    v[r_row, k] = np.sqrt(slope[k])
            for m in range(uses.shape[0]):
                row, who, which = uses[m, 0], particles[t, uses[m, 1]], uses[m, 2]
                for k in range(LANES):
                    v[row, k] = values[b, which, who, k]
            run_forward(code, v)
            if slot < 0:
                for k in range(LANES):
                    e[b, k] += v[output, k]
            elif not backward:
                for k in range(LANES):
                    values[b, slot, i, k] += v[output, k]
            if not forces or (slot >= 0 and not (backward or radial)):
                continue
            for row in range(n_ops):
                for k in range(LANES):
                    g[row, k] = 0.0
            if slot < 0 or radial:
                for k in range(LANES):
                    g[output, k] = 1.0
            else:
                for k in range(LANES):
                    g[output, k] = adjoints[b, slot, i, k]
            run_backward(code, v, g)
            if radial:
                for k in range(LANES):
                    slopes[t, k] = g[r_row, k] / v[r_row, k]
                continue
            for m in range(uses.shape[0]):
                row, who, which = uses[m, 0], particles[t, uses[m, 1]], uses[m, 2]
                for k in range(LANES):
                    adjoints[b, which, who, k] += g[row, k]
            if r_row >= 0:
                for k in range(LANES):
                    slope[k] = g[r_row, k] / v[r_row, k]
                add_central(x, f, b, i, particles[t, 1], slope)
