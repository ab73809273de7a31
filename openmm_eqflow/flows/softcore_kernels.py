r"""Compiled kernels for batches of identical particles; x is (N, 3, batch), float32.

The batch is the innermost axis, so that every loop over it becomes vector instructions. Each of
the small functions touches few arrays: beyond that the compiler gives up proving that they do not
overlap, and runs one lane at a time.

The batch is a multiple of :data:`LANES`: then no loop over it has a remainder, which would round
in another way, and a lane gives the same bits in any batch.

``level`` is (trap, soft, attraction) of :class:`~openmm_eqflow.flows.softcore.SoftCorePath`;
``table`` is (n_intervals, 4), the polynomials of h phi(d) on intervals of length ``spacing``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = [
    "energy_and_force",
    "fill_normal",
    "fill_uniform",
    "hmc_step",
    "push",
    "regressors",
    "transport",
    "transport_back",
]

Array = Any
#: Lanes of one vector instruction times those the compiler interleaves, at most.
LANES = 64
# No "nnan", "ninf": a trajectory that overflowed must be seen.
_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}
_jit = numba.njit(fastmath=_FAST, error_model="numpy", nogil=True, cache=True)
_inline = numba.njit(fastmath=_FAST, error_model="numpy", nogil=True)
_ONE, _TWO, _HALF, _THREE = np.float32(1), np.float32(2), np.float32(0.5), np.float32(3)
_TWELVE = np.float32(12)


@_inline
def _add(total: Array, values: Array) -> None:
    for b in range(total.shape[0]):
        total[b] += values[b]


@_inline
def _axpy(y: Array, factor: Any, x: Array) -> None:
    for b in range(y.shape[0]):
        y[b] += factor * x[b]


@_inline
def _pair(
    e: Array, g: Array, xi: Array, yi: Array, zi: Array, xj: Array, yj: Array, zj: Array,
    soft: Any, attraction: Any,
) -> None:  # fmt: skip
    for b in range(g.shape[0]):
        dx, dy, dz = xi[b] - xj[b], yi[b] - yj[b], zi[b] - zj[b]
        s = _ONE / (dx * dx + dy * dy + dz * dz + soft)
        s3 = s * s * s
        e[b] = _TWO * s3 * (s3 - _TWO * attraction)
        g[b] = _TWO * _TWELVE * s * s3 * (s3 - attraction)


@_inline
def _act(fi: Array, fj: Array, xi: Array, xj: Array, g: Array) -> None:
    for b in range(g.shape[0]):
        p = g[b] * (xi[b] - xj[b])
        fi[b] += p
        fj[b] -= p


@_inline
def _trap(u: Array, f: Array, x: Array, mean: Array, trap: Any) -> None:
    for b in range(u.shape[0]):
        d = x[b] - mean[b]
        u[b] += _HALF * trap * d * d
        f[b] = -trap * d


@_inline
def _mean(mean: Array, x: Array, m: int) -> None:
    n = x.shape[0]
    mean[:] = 0
    for i in range(n):
        _add(mean, x[i, m])
    for b in range(mean.shape[0]):
        mean[b] *= _ONE / np.float32(n)


@_jit
def energy_and_force(x: Array, level: Array, u: Array, f: Array, work: Array) -> None:
    """Write u (batch,) in kT and minus its gradient (N, 3, batch); ``work`` is (3, batch)."""
    n = x.shape[0]
    u[:] = 0
    for m in range(3):
        _mean(work[0], x, m)
        for i in range(n):
            _trap(u, f[i, m], x[i, m], work[0], level[0])
    for i in range(1, n):
        for j in range(i):
            _pair(
                work[0], work[1], x[i, 0], x[i, 1], x[i, 2], x[j, 0], x[j, 1], x[j, 2],
                level[1], level[2],
            )  # fmt: skip
            _add(u, work[0])
            for m in range(3):
                _act(f[i, m], f[j, m], x[i, m], x[j, m], work[1])


@_inline
def _distance(
    d: Array, xi: Array, yi: Array, zi: Array, xj: Array, yj: Array, zj: Array
) -> None:  # fmt: skip
    for b in range(d.shape[0]):
        dx, dy, dz = xi[b] - xj[b], yi[b] - yj[b], zi[b] - zj[b]
        d[b] = np.sqrt(dx * dx + dy * dy + dz * dz)


@_inline
def _phi(g: Array, d: Array, table: Array, per_length: Any) -> None:
    top = np.float32(table.shape[0])
    for b in range(d.shape[0]):
        q = min(d[b] * per_length, top)
        k = max(0, min(np.int32(q), table.shape[0] - 1))  # 0 if q is nan
        s = q - np.float32(k)
        g[b] = table[k, 0] + s * (table[k, 1] + s * (table[k, 2] + s * table[k, 3]))


@_inline
def _phi_and_divergence(
    g: Array, div: Array, d: Array, table: Array, per_length: Any
) -> None:
    top = np.float32(table.shape[0])
    for b in range(d.shape[0]):
        q = min(d[b] * per_length, top)
        k = max(0, min(np.int32(q), table.shape[0] - 1))  # 0 if q is nan
        s = q - np.float32(k)
        p0, p1, p2, p3 = table[k, 0], table[k, 1], table[k, 2], table[k, 3]
        phi = p0 + s * (p1 + s * (p2 + s * p3))
        slope = p1 + s * (_TWO * p2 + _THREE * s * p3)
        g[b] = phi
        div[b] += _TWO * (_THREE * phi + d[b] * per_length * slope)


@_jit
def push(
    x: Array, table: Array, spacing: float, v: Array, div: Array, work: Array, divergence: bool
) -> None:
    """Write v = h * field at x (N, 3, batch) and, if asked, h * divergence (batch,)."""
    n = x.shape[0]
    per_length = np.float32(1.0 / spacing)
    v[:] = 0
    div[:] = 0
    for i in range(1, n):
        for j in range(i):
            _distance(work[0], x[i, 0], x[i, 1], x[i, 2], x[j, 0], x[j, 1], x[j, 2])
            if divergence:
                _phi_and_divergence(work[1], div, work[0], table, per_length)
            else:
                _phi(work[1], work[0], table, per_length)
            for m in range(3):
                _act(v[i, m], v[j, m], x[i, m], x[j, m], work[1])


@_jit
def transport(
    x: Array, table: Array, spacing: float, ladj: Array, v: Array, middle: Array, work: Array
) -> None:
    """One midpoint step of the field, in place: x + h v(x + h v(x) / 2); ladj is h div there."""
    push(x, table, spacing, v, ladj, work, False)
    middle[:] = x
    _axpy(middle.reshape(-1), _HALF, v.reshape(-1))
    push(middle, table, spacing, v, ladj, work, True)
    _axpy(x.reshape(-1), _ONE, v.reshape(-1))


@_inline
def _change(change: Array, x: Array, y: Array, v: Array) -> None:
    for b in range(x.shape[0]):
        change[b] = max(change[b], abs(x[b] - (y[b] - v[b])))


@_inline
def _step_back(x: Array, y: Array, v: Array, moving: Array) -> None:
    for b in range(x.shape[0]):
        x[b] = y[b] - v[b] if moving[b] else x[b]


@_jit
def transport_back(
    y: Array, table: Array, spacing: float, ladj: Array, v: Array, middle: Array, work: Array,
    tolerance: float, most: int,
) -> None:  # fmt: skip
    """Invert :func:`transport` by fixed-point iteration, in place; ladj is that of transport.

    A lane stops when none of its coordinates changes by more than ``tolerance`` nm, whatever the
    others do; all after ``most`` iterations.
    """
    x = y.copy()
    batch = x.shape[2]
    moving, change = np.ones(batch, np.bool_), np.empty(batch, np.float32)
    found = np.empty(batch, np.float32)
    n_moving = batch
    for _ in range(most):
        push(x, table, spacing, v, ladj, work, False)
        middle[:] = x
        _axpy(middle.reshape(-1), _HALF, v.reshape(-1))
        push(middle, table, spacing, v, ladj, work, True)
        change[:] = 0
        for i in range(x.shape[0]):
            for m in range(3):
                _change(change, x[i, m], y[i, m], v[i, m])
                _step_back(x[i, m], y[i, m], v[i, m], moving)
        n_moving = 0
        for b in range(batch):
            if moving[b]:
                found[b] = ladj[b]
                moving[b] = not change[b] <= tolerance
                n_moving += moving[b]
        if n_moving == 0:
            break
    ladj[:] = found
    y[:] = x


@_inline
def _square(total: Array, v: Array) -> None:
    for b in range(total.shape[0]):
        total[b] += _HALF * v[b] * v[b]


@_inline
def _kinetic(k: Array, v: Array) -> None:
    k[:] = 0
    for i in range(v.shape[0]):
        for m in range(3):
            _square(k, v[i, m])


@_inline
def _restore(x: Array, old: Array, keep: Array) -> None:
    for b in range(x.shape[0]):
        x[b] = x[b] if keep[b] else old[b]


@_jit
def hmc_step(
    x: Array, u: Array, f: Array, level: Array, step: float, n_leapfrog: int,
    v: Array, uniform: Array, old_x: Array, old_f: Array, scratch: Array, work: Array,
) -> float:  # fmt: skip
    """One Hamiltonian Monte Carlo transition of every lane; returns the mean acceptance.

    ``v`` holds standard normals and is overwritten; ``u`` and ``f`` belong to x before and after.
    Unit masses; momenta without their mean, so the centroid stays. ``scratch`` is (3, batch).
    """
    n, _, batch = x.shape
    h, half = np.float32(step), np.float32(0.5 * step)
    for m in range(3):
        _mean(work[0], v, m)
        for i in range(n):
            _axpy(v[i, m], -_ONE, work[0])
    before, after, new_u = scratch[0], scratch[1], scratch[2]
    _kinetic(before, v)
    old_x[:] = x
    old_f[:] = f
    flat_x, flat_v, flat_f = x.reshape(-1), v.reshape(-1), f.reshape(-1)
    _axpy(flat_v, half, flat_f)
    for k in range(n_leapfrog):
        _axpy(flat_x, h, flat_v)
        energy_and_force(x, level, new_u, f, work)
        _axpy(flat_v, h if k < n_leapfrog - 1 else half, flat_f)
    _kinetic(after, v)
    keep = np.empty(batch, np.bool_)
    accepted = 0
    for b in range(batch):
        # A trajectory that overflowed compares false and is rejected.
        keep[b] = np.log(uniform[b]) < u[b] + before[b] - new_u[b] - after[b]
        accepted += keep[b]
        if keep[b]:
            u[b] = new_u[b]
    for i in range(n):
        for m in range(3):
            _restore(x[i, m], old_x[i, m], keep)
            _restore(f[i, m], old_f[i, m], keep)
    return accepted / batch


_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = 2.0**-32


@numba.njit(nogil=True)
def _philox(c0: Any, c1: Any, key: Any) -> Any:
    """Words of :func:`~openmm_eqflow.flows.streams.philox` at the counter (c0, c1, 0, 0)."""
    c2 = c3 = np.uint64(0)
    k0, k1 = key & _MASK, key >> _SHIFT
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK,
        )  # fmt: skip
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@numba.njit(nogil=True, cache=True)
def fill_normal(v: Array, keys: Array, draw: int) -> None:
    """Write draw number ``draw`` of :class:`~openmm_eqflow.flows.streams.RowStreams`.

    v is (N, 3, batch), float32; keys (batch,), uint64.
    """
    flat = v.reshape(-1, v.shape[2])
    size = flat.shape[0]
    for b in range(v.shape[2]):
        for block in range((size + 3) // 4):
            words = _philox(np.uint64(block), np.uint64(draw), keys[b])
            for half in range(2):
                radius = np.sqrt(-2.0 * np.log((np.float64(words[2 * half]) + 1.0) * _UNIT))
                turn = np.float64(words[2 * half + 1]) * (2.0 * np.pi * _UNIT)
                at = 4 * block + 2 * half
                if at < size:
                    flat[at, b] = radius * np.cos(turn)
                if at + 1 < size:
                    flat[at + 1, b] = radius * np.sin(turn)


@numba.njit(nogil=True, cache=True)
def fill_uniform(u: Array, keys: Array, draw: int) -> None:
    """Write uniform numbers of draw number ``draw``, (batch,), float64."""
    for b in range(len(u)):
        w0, w1, _, _ = _philox(np.uint64(0), np.uint64(draw), keys[b])
        high = (w0 >> np.uint64(5)) << np.uint64(26)
        u[b] = (np.float64(high | (w1 >> np.uint64(6))) + 0.5) * 2.0**-53


@_jit
def regressors(x: Array, f: Array, spacing: float, n_splines: int, out: Array) -> None:
    r"""Write (batch, n_splines): :math:`\nabla\cdot v_m - v_m\cdot\nabla u` of every spline."""
    n, _, batch = x.shape
    out[:] = 0
    for b in range(batch):
        for i in range(1, n):
            for j in range(i):
                dx = x[i, 0, b] - x[j, 0, b]
                dy = x[i, 1, b] - x[j, 1, b]
                dz = x[i, 2, b] - x[j, 2, b]
                d = np.sqrt(dx * dx + dy * dy + dz * dz)
                if not d < n_splines * spacing:  # nor if d is nan
                    continue
                k = min(int(d / spacing), n_splines - 1)
                pull = (
                    (f[i, 0, b] - f[j, 0, b]) * dx
                    + (f[i, 1, b] - f[j, 1, b]) * dy
                    + (f[i, 2, b] - f[j, 2, b]) * dz
                )
                s = d / spacing - k
                t = 1.0 - s
                weights = (
                    t * t * t / 6, (3 * s * s * s - 6 * s * s + 4) / 6,
                    (-3 * s * s * s + 3 * s * s + 3 * s + 1) / 6, s * s * s / 6,
                )  # fmt: skip
                slopes = (
                    -t * t / 2, (3 * s * s - 4 * s) / 2, (-3 * s * s + 2 * s + 1) / 2, s * s / 2
                )
                for q in range(4):
                    if k + q < n_splines:
                        out[b, k + q] += (
                            2 * (3 * weights[q] + d / spacing * slopes[q]) + weights[q] * pull
                        )
