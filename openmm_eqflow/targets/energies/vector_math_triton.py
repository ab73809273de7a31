r"""Vectors of configurations in lanes, in Triton: what kernels on a GPU have in common.

Arrays are (..., 3, n), configurations last; :mod:`.vector_math` is the same for compiled ones.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = [
    "angle",
    "cross",
    "dot",
    "load",
]

_PI: tl.constexpr = tl.constexpr(math.pi)


@triton.jit
def load(x, k, at, n, there):
    """Components of atom ``k``."""
    here = x + 3 * k * n + at
    a, b = tl.load(here, there, 0.0), tl.load(here + n, there, 0.0)
    return a, b, tl.load(here + 2 * n, there, 0.0)


@triton.jit
def cross(ax, ay, az, bx, by, bz):
    """Components of a x b."""
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


@triton.jit
def dot(ax, ay, az, bx, by, bz):
    """Return a . b."""
    return ax * bx + ay * by + az * bz


@triton.jit
def angle(s, c):
    """Angle in [0, pi] of a point (c, s), s > 0: three halvings, then the series of atan."""
    t = s / (tl.sqrt(s * s + c * c) + tl.abs(c))
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
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
    found = 8.0 * (t + t * p * z)
    return tl.where(c >= 0.0, found, _PI - found)
