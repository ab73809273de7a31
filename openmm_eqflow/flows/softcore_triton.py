r"""A cluster's layers on a GPU: one kernel each, one warp for each configuration.

A lane holds one or two particles and goes through all others, whose positions it reads from where
the warp has just written them; what a trajectory needs besides stays in registers from its first
leapfrog step to its last, and a layer is one launch. Random numbers are those of
:class:`~openmm_eqflow.flows.streams.RowStreams`. The same mathematics in torch is
:mod:`~openmm_eqflow.flows.softcore_torch`, which takes these kernels where Triton is installed (it
comes with torch for CUDA); the numbers are equal to rounding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "trajectory",
    "transport",
    "transport_back",
]

_WARPS = 1
_TWO_PI: tl.constexpr = tl.constexpr(2.0 * math.pi)
_UNIT: tl.constexpr = tl.constexpr(2.0**-32)
_SMALL: tl.constexpr = tl.constexpr(2.0**-53)


@triton.jit
def _load(at, i, n):
    """Components of the positions of one configuration; zeros beyond its last particle."""
    there = i < n
    x, y = tl.load(at + 3 * i, there, 0.0), tl.load(at + 3 * i + 1, there, 0.0)
    return x, y, tl.load(at + 3 * i + 2, there, 0.0)


@triton.jit
def _store(at, i, n, x, y, z):
    """Write them, once everyone has read what was there, and wait until everyone has written."""
    tl.debug_barrier()
    tl.store(at + 3 * i, x, i < n)
    tl.store(at + 3 * i + 1, y, i < n)
    tl.store(at + 3 * i + 2, z, i < n)
    tl.debug_barrier()


@triton.jit
def _centred(x, i, n):
    return tl.where(i < n, x - tl.sum(x, 0) / n, 0.0)


@triton.jit
def _energy_and_force(x, y, z, at, i, trap, soft, attraction, COUNT: tl.constexpr):
    """Of the positions (x, y, z), which are also at ``at``."""
    pairs = tl.zeros_like(x)
    ox, oy, oz = _centred(x, i, COUNT), _centred(y, i, COUNT), _centred(z, i, COUNT)
    fx, fy, fz = -trap * ox, -trap * oy, -trap * oz
    for j in tl.range(0, COUNT, loop_unroll_factor=5):
        dx, dy = x - tl.load(at + 3 * j), y - tl.load(at + 3 * j + 1)
        dz = z - tl.load(at + 3 * j + 2)
        s = tl.where(i != j, 1.0 / (dx * dx + dy * dy + dz * dz + soft), 0.0)
        s3 = s * s * s
        pairs += s3 * (s3 - 2.0 * attraction)
        f = 24.0 * s * s3 * (s3 - attraction)
        fx, fy, fz = fx + f * dx, fy + f * dy, fz + f * dz
    there = i < COUNT
    u = tl.where(there, pairs + 0.5 * trap * (ox * ox + oy * oy + oz * oz), 0.0)
    fx, fy, fz = tl.where(there, fx, 0.0), tl.where(there, fy, 0.0), tl.where(there, fz, 0.0)
    return tl.sum(u, 0), fx, fy, fz


@triton.jit
def _normal(key, draw, at):
    """Number ``at`` of a draw: Box and Muller's, of two of the four words of its block."""
    zero = tl.zeros_like(at)
    w0, w1, w2, w3 = tl.philox(key, at // 4, zero + draw, zero, zero)
    first = (at % 4) < 2
    u, v = tl.where(first, w0, w2).to(tl.float64), tl.where(first, w1, w3).to(tl.float64)
    radius, turn = tl.sqrt(-2.0 * tl.log((u + 1.0) * _UNIT)), v * (_TWO_PI * _UNIT)
    return (radius * tl.where(at % 2 == 0, tl.cos(turn), tl.sin(turn))).to(tl.float32)


@triton.jit
def _uniform(key, draw):
    zero = tl.zeros((1,), tl.int32)
    w0, w1, w2, w3 = tl.philox(key, zero, zero + draw, zero, zero)
    word = (tl.sum(w0, 0).to(tl.int64) >> 5) << 26 | (tl.sum(w1, 0).to(tl.int64) >> 6)
    return (word.to(tl.float64) + 0.5) * _SMALL


@triton.jit
def _draws(velocity, keys, draw, size, WIDTH: tl.constexpr):
    """Standard normals (n, size): a kernel of its own, for its registers."""
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    numbers = _normal(tl.load(keys + row), draw, at)
    tl.store(velocity + row.to(tl.int64) * size + at, numbers, at < size)


@triton.jit
def _kinetic(vx, vy, vz):
    a, b, c = vx.to(tl.float64), vy.to(tl.float64), vz.to(tl.float64)
    return 0.5 * tl.sum(a * a + b * b + c * c, 0)


@triton.jit
def _trajectory(
    start, velocity, end, change, keys, level, step, draw,
    STEPS: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, N)
    offset = row.to(tl.int64) * 3 * COUNT
    at = end + offset
    trap, soft, attraction = tl.load(level), tl.load(level + 1), tl.load(level + 2)
    x, y, z = _load(start + offset, i, COUNT)
    vx, vy, vz = _load(velocity + offset, i, COUNT)
    vx, vy, vz = _centred(vx, i, COUNT), _centred(vy, i, COUNT), _centred(vz, i, COUNT)
    _store(at, i, COUNT, x, y, z)
    u, fx, fy, fz = _energy_and_force(x, y, z, at, i, trap, soft, attraction, COUNT)
    before = u.to(tl.float64) + _kinetic(vx, vy, vz)
    new = u
    kick = 0.5 * step
    for _k in range(STEPS):
        vx, vy, vz = vx + kick * fx, vy + kick * fy, vz + kick * fz
        x, y, z = x + step * vx, y + step * vy, z + step * vz
        _store(at, i, COUNT, x, y, z)
        new, fx, fy, fz = _energy_and_force(x, y, z, at, i, trap, soft, attraction, COUNT)
        kick = step
    vx, vy, vz = vx + 0.5 * step * fx, vy + 0.5 * step * fy, vz + 0.5 * step * fz
    after = new.to(tl.float64) + _kinetic(vx, vy, vz)
    # A trajectory that overflowed compares false and is rejected.
    keep = tl.log(_uniform(tl.load(keys + row), draw)) < before - after
    x0, y0, z0 = _load(start + offset, i, COUNT)
    _store(at, i, COUNT, tl.where(keep, x, x0), tl.where(keep, y, y0), tl.where(keep, z, z0))
    tl.store(change + row, tl.where(keep, u.to(tl.float64) - new.to(tl.float64), 0.0))


@triton.jit
def _push(x, y, z, at, i, table, per_length, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Components of h v and h div v, of the positions (x, y, z), which are also at ``at``."""
    rate = tl.zeros_like(x)
    vx, vy, vz = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for j in range(COUNT):
        dx, dy = x - tl.load(at + 3 * j), y - tl.load(at + 3 * j + 1)
        dz = z - tl.load(at + 3 * j + 2)
        q = tl.sqrt(dx * dx + dy * dy + dz * dz) * per_length
        q = tl.minimum(q, 1.0 * SIZE, propagate_nan=tl.PropagateNan.ALL)
        # Not a number has no interval; any will do, what comes of it is none either.
        k = tl.minimum(tl.maximum(q.to(tl.int32), 0), SIZE - 1)
        s = q - k.to(tl.float32)
        p1, p2 = tl.load(table + 4 * k + 1), tl.load(table + 4 * k + 2)
        p3 = tl.load(table + 4 * k + 3)
        phi = tl.where(i != j, tl.load(table + 4 * k) + s * (p1 + s * (p2 + s * p3)), 0.0)
        slope = tl.where(i != j, p1 + s * (2.0 * p2 + 3.0 * s * p3), 0.0)
        rate += 3.0 * phi + q * slope
        vx, vy, vz = vx + phi * dx, vy + phi * dy, vz + phi * dz
    return vx, vy, vz, tl.sum(tl.where(i < COUNT, rate, 0.0), 0)


@triton.jit
def _midpoint(x, y, z, at, i, table, per_length, SIZE: tl.constexpr, COUNT: tl.constexpr):
    _store(at, i, COUNT, x, y, z)
    vx, vy, vz, divergence = _push(x, y, z, at, i, table, per_length, SIZE, COUNT)
    x, y, z = x + 0.5 * vx, y + 0.5 * vy, z + 0.5 * vz
    _store(at, i, COUNT, x, y, z)
    return _push(x, y, z, at, i, table, per_length, SIZE, COUNT)


@triton.jit
def _transport(
    start, end, ladj, table, per_length,
    SIZE: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, N)
    offset = row.to(tl.int64) * 3 * COUNT
    at = end + offset
    x, y, z = _load(start + offset, i, COUNT)
    vx, vy, vz, divergence = _midpoint(x, y, z, at, i, table, per_length, SIZE, COUNT)
    _store(at, i, COUNT, x + vx, y + vy, z + vz)
    tl.store(ladj + row, divergence.to(tl.float64))


@triton.jit
def _transport_back(
    start, end, ladj, table, per_length, tolerance,
    MOST: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, N)
    offset = row.to(tl.int64) * 3 * COUNT
    at = end + offset
    x0, y0, z0 = _load(start + offset, i, COUNT)
    x, y, z, found = x0, y0, z0, tl.sum(x0, 0) * 0.0
    moving = 1
    for _k in range(MOST):
        if moving != 0:
            vx, vy, vz, divergence = _midpoint(x, y, z, at, i, table, per_length, SIZE, COUNT)
            nx, ny, nz = x0 - vx, y0 - vy, z0 - vz
            off = tl.maximum(tl.maximum(tl.abs(x - nx), tl.abs(y - ny)), tl.abs(z - nz))
            x, y, z, found = nx, ny, nz, divergence
            moving = 1 - (tl.max(tl.where(i < COUNT, off, 0.0), 0) <= tolerance).to(tl.int32)
    _store(at, i, COUNT, x, y, z)
    tl.store(ladj + row, found.to(tl.float64))


def _made(y: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """Positions, room for new ones and for a number each, and what the kernels are made for."""
    x = y.float().contiguous()
    number = torch.empty(len(x), dtype=torch.float64, device=x.device)
    count = x.shape[1]
    made = {"COUNT": count, "N": max(32, triton.next_power_of_2(count)), "num_warps": _WARPS}
    return x, torch.empty_like(x), number, made


def trajectory(
    y: Tensor, level: Tensor, timestep: float, n_leapfrog: int, keys: Tensor, draw: int
) -> tuple[Tensor, Tensor]:
    """Return new points (n, N, 3) and u(y) - u(y') (n,) float64.

    Velocities are draw number ``draw`` of the streams of ``keys``, decisions the next one.
    """
    x, end, change, made = _made(y)
    velocity, size = torch.empty_like(x), 3 * x.shape[1]
    if not len(x):
        return end, change
    grid = (len(x),)
    with torch.cuda.device_of(x):  # a launch goes to the current device
        _draws[grid](velocity, keys, draw, size, WIDTH=triton.next_power_of_2(size))
        _trajectory[grid](
            x, velocity, end, change, keys, level, timestep, draw + 1, STEPS=n_leapfrog, **made
        )
    return end, change


def transport(y: Tensor, table: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    """Apply the midpoint step; also its log determinant (n,), float64."""
    x, end, ladj, made = _made(y)
    if not len(x):
        return end, ladj
    with torch.cuda.device_of(x):
        _transport[(len(x),)](x, end, ladj, table, 1.0 / spacing, SIZE=len(table), **made)
    return end, ladj


def transport_back(
    y: Tensor, table: Tensor, spacing: float, tolerance: float, most: int
) -> tuple[Tensor, Tensor]:
    """Invert by fixed-point iteration, row by row; also the log determinant of the map."""
    x, end, ladj, made = _made(y)
    if not len(x):
        return end, ladj
    with torch.cuda.device_of(x):
        _transport_back[(len(x),)](
            x, end, ladj, table, 1.0 / spacing, tolerance, MOST=most, SIZE=len(table), **made
        )
    return end, ladj
