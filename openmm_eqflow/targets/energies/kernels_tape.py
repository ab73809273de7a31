"""The operations of compiled programs: forward values and reverse-mode derivatives, lane by lane.

``code`` rows are operation, three argument rows; the result of operation ``o`` is row ``o``.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from openmm_eqflow.targets.energies.vector_math import JIT, LANES, vexp, vlog

__all__ = [
    "CODES",
    "run_backward",
    "run_forward",
]

# ruff: noqa: ANN001, ANN201, ANN202, D103, E701
# mypy: disable-error-code="no-untyped-def"

_NAMES = (
    "input add sub mul div neg recip sqrt exp log min max step select abs tanh pow sin cos tan "
    "asin acos atan sinh cosh erf erfc atan2 floor ceil delta"
).split()
#: Operation numbers; ``input`` stands for inputs and constants, whose rows are filled beforehand.
CODES = {name: number for number, name in enumerate(_NAMES)} | {"constant": 0}
_TWO_OVER_ROOT_PI = 2.0 / math.sqrt(math.pi)


@numba.njit(inline="always", **JIT)
def safe_log(x):
    value = vlog(x if x > 0.0 else 1.0)
    return value if x > 0.0 else (-np.inf if x == 0.0 else np.nan)


@numba.njit(inline="always", **JIT)
def unary(op, x):
    """Operations rare enough to be carried out by the C library."""
    if op == 15:
        return math.tanh(x)
    if op == 17:
        return math.sin(x)
    if op == 18:
        return math.cos(x)
    if op == 19:
        return math.tan(x)
    if op == 20:
        return np.arcsin(x)
    if op == 21:
        return np.arccos(x)
    if op == 22:
        return math.atan(x)
    if op == 23:
        return np.sinh(x)
    if op == 24:
        return np.cosh(x)
    if op == 25:
        return math.erf(x)
    if op == 26:
        return math.erfc(x)
    if op == 28:
        return np.floor(x)
    if op == 29:
        return np.ceil(x)
    return 1.0 if x == 0.0 else 0.0  # fmt: skip


@numba.njit(inline="always", **JIT)
def unary_slope(op, x, y):
    """Return the derivative of ``unary``; ``y`` is its value."""
    if op == 15:
        return 1.0 - y * y
    if op == 17:
        return math.cos(x)
    if op == 18:
        return -math.sin(x)
    if op == 19:
        return 1.0 + y * y
    if op == 20:
        return 1.0 / np.sqrt(1.0 - x * x)
    if op == 21:
        return -1.0 / np.sqrt(1.0 - x * x)
    if op == 22:
        return 1.0 / (1.0 + x * x)
    if op == 23:
        return np.cosh(x)
    if op == 24:
        return np.sinh(x)
    if op == 25:
        return _TWO_OVER_ROOT_PI * np.exp(-x * x)
    if op == 26:
        return -_TWO_OVER_ROOT_PI * np.exp(-x * x)
    return 0.0  # fmt: skip


@numba.njit(**JIT)
def run_forward(code, v):
    for o in range(code.shape[0]):
        op, a, b, c = code[o, 0], code[o, 1], code[o, 2], code[o, 3]
        if op == 0:
            continue
        if op == 1:
            for k in range(LANES):
                v[o, k] = v[a, k] + v[b, k]
        elif op == 2:
            for k in range(LANES):
                v[o, k] = v[a, k] - v[b, k]
        elif op == 3:
            for k in range(LANES):
                v[o, k] = v[a, k] * v[b, k]
        elif op == 4:
            for k in range(LANES):
                v[o, k] = v[a, k] / v[b, k]
        elif op == 5:
            for k in range(LANES):
                v[o, k] = -v[a, k]
        elif op == 6:
            for k in range(LANES):
                v[o, k] = 1.0 / v[a, k]
        elif op == 7:
            for k in range(LANES):
                v[o, k] = np.sqrt(v[a, k])
        elif op == 8:
            for k in range(LANES):
                v[o, k] = vexp(v[a, k])
        elif op == 9:
            for k in range(LANES):
                v[o, k] = safe_log(v[a, k])
        elif op == 10:
            for k in range(LANES):
                v[o, k] = v[b, k] if v[b, k] < v[a, k] else v[a, k]
        elif op == 11:
            for k in range(LANES):
                v[o, k] = v[b, k] if v[b, k] > v[a, k] else v[a, k]
        elif op == 12:
            for k in range(LANES):
                v[o, k] = 1.0 if v[a, k] >= 0.0 else 0.0
        elif op == 13:
            for k in range(LANES):
                v[o, k] = v[b, k] if v[a, k] != 0.0 else v[c, k]
        elif op == 14:
            for k in range(LANES):
                v[o, k] = abs(v[a, k])
        elif op == 16:
            for k in range(LANES):
                v[o, k] = v[a, k] ** v[b, k]
        elif op == 27:
            for k in range(LANES):
                v[o, k] = math.atan2(v[a, k], v[b, k])
        else:
            for k in range(LANES): v[o, k] = unary(op, v[a, k])  # fmt: skip


@numba.njit(**JIT)
def run_backward(code, v, g):
    for reverse in range(code.shape[0]):
        o = code.shape[0] - 1 - reverse
        op, a, b, c = code[o, 0], code[o, 1], code[o, 2], code[o, 3]
        if op == 0:
            continue
        if op == 1:
            for k in range(LANES):
                g[a, k] += g[o, k]
            for k in range(LANES):
                g[b, k] += g[o, k]
        elif op == 2:
            for k in range(LANES):
                g[a, k] += g[o, k]
            for k in range(LANES):
                g[b, k] -= g[o, k]
        elif op == 3:
            for k in range(LANES):
                g[a, k] += g[o, k] * v[b, k]
            for k in range(LANES):
                g[b, k] += g[o, k] * v[a, k]
        elif op == 4:
            for k in range(LANES):
                g[a, k] += g[o, k] / v[b, k]
            for k in range(LANES):
                g[b, k] -= g[o, k] * v[o, k] / v[b, k]
        elif op == 5:
            for k in range(LANES):
                g[a, k] -= g[o, k]
        elif op == 6:
            for k in range(LANES):
                g[a, k] -= g[o, k] * v[o, k] * v[o, k]
        elif op == 7:
            for k in range(LANES):
                g[a, k] += 0.5 * g[o, k] / v[o, k]
        elif op == 8:
            for k in range(LANES):
                g[a, k] += g[o, k] * v[o, k]
        elif op == 9:
            for k in range(LANES):
                g[a, k] += g[o, k] / v[a, k]
        elif op == 10:
            for k in range(LANES):
                g[a, k] += 0.0 if v[b, k] < v[a, k] else g[o, k]
            for k in range(LANES):
                g[b, k] += g[o, k] if v[b, k] < v[a, k] else 0.0
        elif op == 11:
            for k in range(LANES):
                g[a, k] += 0.0 if v[b, k] > v[a, k] else g[o, k]
            for k in range(LANES):
                g[b, k] += g[o, k] if v[b, k] > v[a, k] else 0.0
        elif op == 13:
            for k in range(LANES):
                g[b, k] += g[o, k] if v[a, k] != 0.0 else 0.0
            for k in range(LANES):
                g[c, k] += 0.0 if v[a, k] != 0.0 else g[o, k]
        elif op == 14:
            for k in range(LANES):
                g[a, k] += g[o, k] if v[a, k] >= 0.0 else -g[o, k]
        elif op == 16:
            for k in range(LANES):
                g[a, k] += g[o, k] * v[b, k] * v[a, k] ** (v[b, k] - 1.0)
            for k in range(LANES):
                g[b, k] += g[o, k] * v[o, k] * safe_log(v[a, k]) if v[a, k] > 0.0 else 0.0
        elif op == 27:
            for k in range(LANES):
                scaled = g[o, k] / (v[a, k] * v[a, k] + v[b, k] * v[b, k])
                g[a, k] += scaled * v[b, k]
                g[b, k] -= scaled * v[a, k]
        elif op != 12:
            for k in range(LANES):
                g[a, k] += g[o, k] * unary_slope(op, v[a, k], v[o, k])  # fmt: skip
