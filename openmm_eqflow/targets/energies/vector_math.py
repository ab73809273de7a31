r"""Branch-free exp, log and atan that LLVM turns into vector instructions (numba).

The C library's are calls, which keep a loop scalar. Errors are below 3 ulp on the stated ranges:
polynomials are truncated where the next term is under :math:`2^{-54}` of the result.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = [
    "JIT",
    "LANES",
    "atan_half_plane",
    "vexp",
    "vlog",
]

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

#: Configurations per block: innermost, contiguous axis of every array a kernel touches.
LANES = 32

#: No reassociation and no assumption about nan or inf: an invalid energy must come out invalid.
JIT: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}


@numba.njit(inline="always", **JIT)
def vexp(x):
    r"""Exponential: :math:`2^n e^r`, :math:`|r| \le \tfrac12 \log 2`; saturates at 700."""
    y = min(max(x, -700.0), 700.0)
    n = np.floor(y * 1.4426950408889634 + 0.5)
    r = y - n * 6.93147180369123816490e-01
    r = r - n * 1.90821492927058770002e-10
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * np.int64((np.int64(n) + 1023) << 52).view(np.float64) + (x - x)


@numba.njit(inline="always", **JIT)
def vlog(x):
    r"""Return log m 2^e = :math:`2\,\mathrm{artanh}\frac{m-1}{m+1} + e\log 2`."""
    bits = np.float64(x).view(np.int64)
    # Shifts the mantissa's range to [sqrt(1/2), sqrt(2)).
    shifted = bits - 0x3FE6A09E667F3BCD
    e = np.float64(shifted >> 52)
    m = np.int64(bits - (shifted & -4503599627370496)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1.0 / 21.0
    p = p * z + 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    p = p * z
    return e * 6.93147180559945286227e-01 + 2.0 * (s + s * p) + (x - x)


@numba.njit(inline="always", **JIT)
def atan_half_plane(s, c):
    r"""Angle in :math:`[0, \pi]` of a point (c, s) with :math:`s \ge 0`, not both zero.

    :math:`\tan(\theta/2)`, then two more halvings, bring the argument under 0.2.
    """
    t = s / (np.sqrt(s * s + c * c) + abs(c))
    t = t / (1.0 + np.sqrt(1.0 + t * t))
    t = t / (1.0 + np.sqrt(1.0 + t * t))
    z = t * t
    p = -1.0 / 23.0
    p = p * z + 1.0 / 21.0
    p = p * z - 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z - 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z - 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z - 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z - 1.0 / 3.0
    p = p * z
    angle = 8.0 * (t + t * p)
    return angle if c >= 0.0 else np.pi - angle
