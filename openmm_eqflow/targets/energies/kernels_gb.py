r"""Compiled GBSAOBCForce (OBC2 + ACE); arrays as in :mod:`.kernels_bonded`.

The Born integral of particle i in the field of j, with :math:`L = \max(o_i, |r - s_j|)`,
:math:`U = r + s_j`, has (Onufriev, Bashford and Case 2004; the dependence of L and U on r cancels)

.. math:: \frac{dH}{dr} = \tfrac14 (U^{-2} - L^{-2})(1 + s_j^2 / r^2)
          - \frac{\log(L / U)}{2 r^2}.
"""

from __future__ import annotations

import numba
import numpy as np

from openmm_eqflow.targets.energies.kernels_bonded import add_central, squared_distance
from openmm_eqflow.targets.energies.vector_math import JIT, LANES, vexp, vlog

__all__ = [
    "gbsa_kernel",
]

# ruff: noqa: ANN001, ANN201, ANN202, D103
# mypy: disable-error-code="no-untyped-def"


@numba.njit(**JIT)
def distances(square, r, inverse):
    for k in range(LANES):
        r[k] = np.sqrt(square[k])
        inverse[k] = 1.0 / r[k]


@numba.njit(**JIT)
def add_integral(distance, inverted, near, reach, psi, slope):
    """Add the Born integral to psi and store (dH/dr) / r."""
    most = 1.0 / near
    for k in range(LANES):
        r, inverse = distance[k], inverted[k]
        inner = max(near, abs(r - reach))
        outer = r + reach
        # One division for both reciprocals: divisions are what this loop waits for.
        both = 1.0 / (inner * outer)
        lower = both * outer
        upper = both * inner
        log = vlog(upper * inner)
        change = upper * upper - lower * lower
        ratio = reach * reach * inverse
        term = lower - upper + 0.25 * change * (r - ratio) + 0.5 * inverse * log
        term = term + (2.0 * (most - lower) if near < reach - r else 0.0)
        seen = 1.0 if near < outer else 0.0
        psi[k] += seen * term
        grown = 0.25 * change * (1.0 + ratio * inverse) - 0.5 * log * inverse * inverse
        slope[k] = seen * grown * inverse


@numba.njit(**JIT)
def born_radii(psi, offset, radius, born, chain):
    """Effective radius B and dB/dH of one particle."""
    for k in range(LANES):
        y = 0.5 * offset * psi[k]
        argument = y * (1.0 - y * (0.8 - 4.85 * y))
        # 1 - 2/(e^2z + 1) loses digits only where tanh is small against 1/offset.
        tanh = 1.0 - 2.0 / (vexp(2.0 * argument) + 1.0)
        b = 1.0 / (1.0 / offset - tanh / radius)
        slope = (1.0 - y * (1.6 - 14.55 * y)) * (1.0 - tanh * tanh)
        born[k] = b
        chain[k] = b * b * slope * 0.5 * offset / radius


@numba.njit(**JIT)
def still(square, first, second, qq, total, slope, product_slope):
    for k in range(LANES):
        product = first[k] * second[k]
        quarter = square[k] / (4.0 * product)
        decay = vexp(-quarter)
        inverse = 1.0 / (square[k] + product * decay)
        energy = qq * np.sqrt(inverse)
        total[k] += energy
        scaled = energy * inverse
        slope[k] = -scaled * (1.0 - 0.25 * decay)
        product_slope[k] = -0.5 * scaled * decay * (1.0 + quarter)


@numba.njit(**JIT)
def gbsa_kernel(x, e, f, forces, charge, radius, offset, scaled, prefactor, surface, probe):
    n = x.shape[2]
    n_pairs = n * (n - 1) // 2
    square, towards_j, towards_i, slope = (
        np.empty((n_pairs, LANES)),
        np.empty((n_pairs, LANES)),
        np.empty((n_pairs, LANES)),
        np.empty((n_pairs, LANES)),
    )
    psi, born, chain, pull = (
        np.empty((n, LANES)),
        np.empty((n, LANES)),
        np.empty((n, LANES)),
        np.empty((n, LANES)),
    )
    total, mixed = np.empty(LANES), np.empty(LANES)
    for b in range(x.shape[0]):
        psi[:] = 0.0
        p = 0
        for i in range(n):
            for j in range(i + 1, n):
                squared_distance(x, b, i, j, square[p])
                distances(square[p], total, mixed)
                add_integral(total, mixed, offset[i], scaled[j], psi[i], towards_j[p])
                add_integral(total, mixed, offset[j], scaled[i], psi[j], towards_i[p])
                p += 1
        total[:] = 0.0
        for i in range(n):
            born_radii(psi[i], offset[i], radius[i], born[i], chain[i])
            area = surface * (radius[i] + probe) ** 2
            polar = -0.5 * prefactor * charge[i] * charge[i]
            for k in range(LANES):
                inverse = 1.0 / born[i, k]
                ratio = radius[i] * inverse
                cube = ratio * ratio * ratio
                exposed = area * cube * cube
                total[k] += polar * inverse + exposed
                pull[i, k] = -(polar * inverse + 6.0 * exposed) * inverse
        p = 0
        for i in range(n):
            for j in range(i + 1, n):
                qq = -prefactor * charge[i] * charge[j]
                still(square[p], born[i], born[j], qq, total, slope[p], mixed)
                if forces:
                    for k in range(LANES):
                        pull[i, k] += mixed[k] * born[j, k]
                    for k in range(LANES):
                        pull[j, k] += mixed[k] * born[i, k]
                p += 1
        for k in range(LANES):
            e[b, k] += total[k]
        if not forces:
            continue
        for i in range(n):
            for k in range(LANES):
                pull[i, k] *= chain[i, k]
        p = 0
        for i in range(n):
            for j in range(i + 1, n):
                for k in range(LANES):
                    mixed[k] = pull[i, k] * towards_j[p, k] + pull[j, k] * towards_i[p, k]
                for k in range(LANES):
                    slope[p, k] += mixed[k]
                add_central(x, f, b, i, j, slope[p])
                p += 1
