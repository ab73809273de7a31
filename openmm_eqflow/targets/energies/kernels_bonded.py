r"""Compiled energies and forces of bonds, angles, torsions and pairs.

Arrays: positions and forces ``(blocks, 3, n_particles, LANES)``, energies ``(blocks, LANES)``,
both accumulated. The innermost loops run over the lanes (configurations) and read and write few
arrays each: LLVM vectorises a loop only if it can afford to check that they do not overlap.
"""

from __future__ import annotations

import numba
import numpy as np

from openmm_eqflow.targets.energies.vector_math import JIT, LANES, atan_half_plane

__all__ = [
    "angle_kernel",
    "bond_kernel",
    "pair_kernel",
    "torsion_kernel",
]

# ruff: noqa: ANN001, ANN201, ANN202, D103
# mypy: disable-error-code="no-untyped-def"


@numba.njit(**JIT)
def squared_distance(x, b, i, j, out):
    for k in range(LANES):
        dx = x[b, 0, i, k] - x[b, 0, j, k]
        dy = x[b, 1, i, k] - x[b, 1, j, k]
        dz = x[b, 2, i, k] - x[b, 2, j, k]
        out[k] = dx * dx + dy * dy + dz * dz


@numba.njit(**JIT)
def add_central(x, f, b, i, j, slope):
    """Add the forces of a pair whose energy has derivative ``slope`` with respect to r^2 / 2."""
    for d in range(3):
        for k in range(LANES):
            g = slope[k] * (x[b, d, i, k] - x[b, d, j, k])
            f[b, d, i, k] -= g
            f[b, d, j, k] += g


@numba.njit(**JIT)
def bond_kernel(x, e, f, forces, index, length, stiffness):
    square, slope = np.empty(LANES), np.empty(LANES)
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            i, j = index[t, 0], index[t, 1]
            r0, c = length[t], stiffness[t]
            squared_distance(x, b, i, j, square)
            for k in range(LANES):
                r = np.sqrt(square[k])
                e[b, k] += 0.5 * c * (r - r0) * (r - r0)
                # A spring of zero rest length has a force at r = 0.
                slope[k] = c if r0 == 0.0 else c * (r - r0) / r
            if forces:
                add_central(x, f, b, i, j, slope)


@numba.njit(**JIT)
def pair_kernel(x, e, f, forces, index, charge, a, c):
    square, slope = np.empty(LANES), np.empty(LANES)
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            i, j = index[t, 0], index[t, 1]
            q, a12, b6 = charge[t], a[t], c[t]
            squared_distance(x, b, i, j, square)
            for k in range(LANES):
                inverse = 1.0 / square[k]
                coulomb = q * np.sqrt(inverse)
                six = inverse * inverse * inverse
                twelve = a12 * six * six
                six = b6 * six
                e[b, k] += coulomb + twelve - six
                slope[k] = -(coulomb + 12.0 * twelve - 6.0 * six) * inverse
            if forces:
                add_central(x, f, b, i, j, slope)


@numba.njit(**JIT)
def difference(x, b, i, j, out):
    for d in range(3):
        for k in range(LANES):
            out[d, k] = x[b, d, i, k] - x[b, d, j, k]


@numba.njit(**JIT)
def dot(u, v, out):
    for k in range(LANES):
        out[k] = u[0, k] * v[0, k] + u[1, k] * v[1, k] + u[2, k] * v[2, k]


@numba.njit(**JIT)
def cross(u, v, out):
    for d in range(3):
        m, n = (d + 1) % 3, (d + 2) % 3
        for k in range(LANES):
            out[d, k] = u[m, k] * v[n, k] - u[n, k] * v[m, k]


@numba.njit(**JIT)
def angle_values(x, b, i, j, l, u, v, w, s):  # noqa: E741
    """Arms u, v and rows s: u.v, |u|^2, |v|^2, |u x v|, theta."""
    difference(x, b, i, j, u)
    difference(x, b, l, j, v)
    cross(u, v, w)
    dot(u, v, s[0])
    dot(u, u, s[1])
    dot(v, v, s[2])
    for k in range(LANES):
        square = w[0, k] * w[0, k] + w[1, k] * w[1, k] + w[2, k] * w[2, k]
        s[3, k] = np.sqrt(max(square, 1e-30) + (square - square))
    for k in range(LANES):
        s[4, k] = atan_half_plane(s[3, k], s[0, k])


@numba.njit(**JIT)
def add_angle_force(f, b, i, j, l, u, v, s, slope):  # noqa: E741
    """Add the forces of an angle whose energy has derivative ``slope`` with respect to theta."""
    for k in range(LANES):
        s[5, k] = slope[k] / s[3, k]
    for d in range(3):
        for k in range(LANES):
            g = s[5, k] * (u[d, k] * (s[0, k] / s[1, k]) - v[d, k])
            f[b, d, i, k] -= g
            f[b, d, j, k] += g
        for k in range(LANES):
            g = s[5, k] * (v[d, k] * (s[0, k] / s[2, k]) - u[d, k])
            f[b, d, l, k] -= g
            f[b, d, j, k] += g


@numba.njit(**JIT)
def angle_kernel(x, e, f, forces, index, angle, stiffness):
    u, v, w = np.empty((3, LANES)), np.empty((3, LANES)), np.empty((3, LANES))
    s, slope = np.empty((6, LANES)), np.empty(LANES)
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            i, j, l = index[t, 0], index[t, 1], index[t, 2]  # noqa: E741
            theta0, c = angle[t], stiffness[t]
            angle_values(x, b, i, j, l, u, v, w, s)
            for k in range(LANES):
                bend = s[4, k] - theta0
                e[b, k] += 0.5 * c * bend * bend
                slope[k] = c * bend
            if forces:
                add_angle_force(f, b, i, j, l, u, v, s, slope)


@numba.njit(**JIT)
def dihedral_values(x, b, p, q, o, h, g, s):
    r"""Rows s: cos phi, sin phi, |b2|^2, |n1|^2, |n2|^2, b1.b2, b3.b2 (IUPAC sign).

    g holds b1, b2, b3, n1, n2.
    """
    difference(x, b, q, p, g[0])
    difference(x, b, o, q, g[1])
    difference(x, b, h, o, g[2])
    cross(g[0], g[1], g[3])
    cross(g[1], g[2], g[4])
    dot(g[1], g[1], s[2])
    dot(g[3], g[3], s[3])
    dot(g[4], g[4], s[4])
    dot(g[0], g[1], s[5])
    dot(g[2], g[1], s[6])
    dot(g[3], g[4], s[0])
    dot(g[0], g[4], s[1])
    for k in range(LANES):
        y = s[1, k] * np.sqrt(s[2, k])
        scale = 1.0 / np.sqrt(s[0, k] * s[0, k] + y * y)
        s[0, k] *= scale
        s[1, k] = y * scale


@numba.njit(**JIT)
def add_dihedral_force(f, b, p, q, o, h, g, s, slope):
    """Add the forces of a dihedral whose energy has derivative ``slope``.

    Blondel and Karplus 1996, J. Comput. Chem. 17, 1132.
    """
    for k in range(LANES):
        c = slope[k] * np.sqrt(s[2, k])
        s[3, k] = -c / s[3, k]
        s[4, k] = c / s[4, k]
        inverse = 1.0 / s[2, k]
        s[5, k] *= inverse
        s[6, k] *= inverse
    for d in range(3):
        for k in range(LANES):
            first = s[3, k] * g[3, d, k]
            f[b, d, p, k] -= first
            g[3, d, k] = first
        for k in range(LANES):
            last = s[4, k] * g[4, d, k]
            f[b, d, h, k] -= last
            g[4, d, k] = last
        for k in range(LANES):
            twist = s[5, k] * g[3, d, k] - s[6, k] * g[4, d, k]
            f[b, d, q, k] += g[3, d, k] + twist
            f[b, d, o, k] += g[4, d, k] - twist


@numba.njit(**JIT)
def torsion_kernel(x, e, f, forces, index, cosine, sine):
    g, s = np.empty((5, 3, LANES)), np.empty((9, LANES))
    slope, total = np.empty(LANES), np.empty(LANES)
    for b in range(x.shape[0]):
        for t in range(index.shape[0]):
            p, q, o, h = index[t, 0], index[t, 1], index[t, 2], index[t, 3]
            dihedral_values(x, b, p, q, o, h, g, s)
            for k in range(LANES):
                s[7, k] = s[0, k]
                s[8, k] = s[1, k]
                total[k] = cosine[t, 0] + (s[0, k] - s[0, k])
                slope[k] = 0.0
            for n in range(1, cosine.shape[1]):
                a, c = cosine[t, n], sine[t, n]
                if a != 0.0 or c != 0.0:
                    for k in range(LANES):
                        total[k] += a * s[7, k] + c * s[8, k]
                        slope[k] += n * (c * s[7, k] - a * s[8, k])
                for k in range(LANES):
                    turned = s[7, k] * s[0, k] - s[8, k] * s[1, k]
                    s[8, k] = s[8, k] * s[0, k] + s[7, k] * s[1, k]
                    s[7, k] = turned
            for k in range(LANES):
                e[b, k] += total[k]
            if forces:
                add_dihedral_force(f, b, p, q, o, h, g, s, slope)
