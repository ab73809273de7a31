r"""Placement and its reverse pass on a GPU: a lane for each configuration, one launch each.

The kernels of :mod:`~openmm_eqflow.priors.chart_kernels` in Triton, float64. Arrays of them are
(..., n), configurations last, so that neighbouring lanes read neighbouring numbers; a lane goes
from atom to atom and reads what it has written itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openmm_eqflow.targets.energies.vector_math_triton import cross, load

__all__ = [
    "place",
    "pull_back",
    "table_sums",
]

_LANES = 64
_WARPS = 2
_PI: tl.constexpr = tl.constexpr(math.pi)


@triton.jit
def _store(x, k, at, n, there, a, b, c):
    here = x + 3 * k * n + at
    tl.store(here, a, there)
    tl.store(here + n, b, there)
    tl.store(here + 2 * n, c, there)


@triton.jit
def _frame(px, py, pz, gx, gy, gz, rx, ry, rz):
    """Return unit vectors e, n, f = n x e at a parent, 1/|g - p|, r - g, and 1/|e x (r - g)|."""
    dx, dy, dz = gx - px, gy - py, gz - pz
    u = 1.0 / tl.sqrt(dx * dx + dy * dy + dz * dz)
    ex, ey, ez = dx * u, dy * u, dz * u
    rx, ry, rz = rx - gx, ry - gy, rz - gz
    mx, my, mz = cross(ex, ey, ez, rx, ry, rz)
    im = 1.0 / tl.sqrt(mx * mx + my * my + mz * mz)
    nx, ny, nz = mx * im, my * im, mz * im
    fx, fy, fz = cross(nx, ny, nz, ex, ey, ez)
    return ex, ey, ez, nx, ny, nz, fx, fy, fz, u, rx, ry, rz, im


@triton.jit
def _centre(x, at, n, there, COUNT: tl.constexpr):
    """Subtract the mean over atoms."""
    sx = tl.zeros(at.shape, tl.float64)
    sy, sz = sx, sx
    for k in range(COUNT):
        a, b, c = load(x, k, at, n, there)
        sx, sy, sz = sx + a, sy + b, sz + c
    sx, sy, sz = sx / COUNT, sy / COUNT, sz / COUNT
    for k in range(COUNT):
        a, b, c = load(x, k, at, n, there)
        _store(x, k, at, n, there, a - sx, b - sy, c - sz)


@triton.jit
def _place(rows, lead, b, th, ta, x, log_volume, n, COUNT: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = at < n
    total = tl.zeros(at.shape, tl.float64)
    off = tl.zeros(at.shape, tl.int32)
    for k in range(COUNT - 1):
        q = tl.load(b + k * n + at, there, 1.0)
        off += (q <= 0.0).to(tl.int32)
        total += 2.0 * tl.log(tl.abs(q))
    for k in range(COUNT - 2):
        q = tl.load(th + k * n + at, there, 1.0)
        off += ((q <= 0.0) | (q >= _PI)).to(tl.int32)
        total += tl.log(tl.abs(tl.sin(q)))
    tl.store(log_volume + at, tl.where(off == 0, total, float("nan")), there)
    for k in range(COUNT - 3):
        leader = tl.load(lead + k)
        if (leader >= 0) & (leader != k):
            q = tl.load(ta + k * n + at, there, 0.0) + tl.load(ta + leader * n + at, there, 0.0)
            tl.store(ta + k * n + at, q, there)
    tl.debug_barrier()
    zero = tl.zeros(at.shape, tl.float64)
    b0, b1 = tl.load(b + at, there, 1.0), tl.load(b + n + at, there, 1.0)
    t0 = tl.load(th + at, there, 1.0)
    _store(x, tl.load(rows), at, n, there, zero, zero, zero)
    _store(x, tl.load(rows + 4), at, n, there, b0, zero, zero)
    _store(x, tl.load(rows + 8), at, n, there, b1 * tl.cos(t0), b1 * tl.sin(t0), zero)
    for k in range(3, COUNT):
        tl.debug_barrier()
        px, py, pz = load(x, tl.load(rows + 4 * k + 1), at, n, there)
        gx, gy, gz = load(x, tl.load(rows + 4 * k + 2), at, n, there)
        rx, ry, rz = load(x, tl.load(rows + 4 * k + 3), at, n, there)
        ex, ey, ez, nx, ny, nz, fx, fy, fz, u, rx, ry, rz, im = _frame(
            px, py, pz, gx, gy, gz, rx, ry, rz
        )
        q = tl.load(b + (k - 1) * n + at, there, 1.0)
        angle = tl.load(th + (k - 2) * n + at, there, 1.0)
        turn = tl.load(ta + (k - 3) * n + at, there, 0.0)
        ct, st = tl.cos(angle), tl.sin(angle)
        ca, sa = st * tl.cos(turn), st * tl.sin(turn)
        _store(
            x, tl.load(rows + 4 * k), at, n, there,
            px + q * (ct * ex + ca * fx - sa * nx),
            py + q * (ct * ey + ca * fy - sa * ny),
            pz + q * (ct * ez + ca * fz - sa * nz),
        )  # fmt: skip
    tl.debug_barrier()
    _centre(x, at, n, there, COUNT)


@triton.jit
def _add(g, k, at, n, there, a, b, c):
    x, y, z = load(g, k, at, n, there)
    _store(g, k, at, n, there, x + a, y + b, z + c)
    tl.debug_barrier()


@triton.jit
def _pull_back(
    rows, lead, b, th, ta, x, g, gb, gt, ga, n, COUNT: tl.constexpr, LANES: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = at < n
    _centre(g, at, n, there, COUNT)  # a common motion is none
    tl.debug_barrier()
    for back in range(COUNT - 3):
        k = COUNT - 1 - back
        atom, p = tl.load(rows + 4 * k), tl.load(rows + 4 * k + 1)
        gr, r = tl.load(rows + 4 * k + 2), tl.load(rows + 4 * k + 3)
        px, py, pz = load(x, p, at, n, there)
        qx, qy, qz = load(x, gr, at, n, there)
        rx, ry, rz = load(x, r, at, n, there)
        ex, ey, ez, nx, ny, nz, fx, fy, fz, u, rx, ry, rz, im = _frame(
            px, py, pz, qx, qy, qz, rx, ry, rz
        )
        angle = tl.load(th + (k - 2) * n + at, there, 1.0)
        turn = tl.load(ta + (k - 3) * n + at, there, 0.0)
        q = tl.load(b + (k - 1) * n + at, there, 1.0)
        ct, st, ca, sa = tl.cos(angle), tl.sin(angle), tl.cos(turn), tl.sin(turn)
        wx, wy, wz = ca * fx - sa * nx, ca * fy - sa * ny, ca * fz - sa * nz
        gx, gy, gz = load(g, atom, at, n, there)
        on_e, on_w = gx * ex + gy * ey + gz * ez, gx * wx + gy * wy + gz * wz
        on_f, on_n = gx * fx + gy * fy + gz * fz, gx * nx + gy * ny + gz * nz
        tl.store(gb + (k - 1) * n + at, 2.0 / q - (ct * on_e + st * on_w), there)
        tl.store(gt + (k - 2) * n + at, ct / st - q * (ct * on_w - st * on_e), there)
        tl.store(ga + (k - 3) * n + at, q * st * (sa * on_f + ca * on_n), there)
        # By the frame: x = p + q (ct e + st (ca f - sa n)), f = n x e, n = m / |m|, m = e x r.
        hx, hy, hz = q * gx, q * gy, q * gz
        vx, vy, vz = st * ca * hx, st * ca * hy, st * ca * hz
        tnx, tny, tnz = cross(ex, ey, ez, vx, vy, vz)
        tnx, tny, tnz = tnx - st * sa * hx, tny - st * sa * hy, tnz - st * sa * hz
        tex, tey, tez = cross(vx, vy, vz, nx, ny, nz)
        tex, tey, tez = tex + ct * hx, tey + ct * hy, tez + ct * hz
        d = nx * tnx + ny * tny + nz * tnz
        mx, my, mz = (tnx - nx * d) * im, (tny - ny * d) * im, (tnz - nz * d) * im
        sx, sy, sz = cross(rx, ry, rz, mx, my, mz)
        tex, tey, tez = tex + sx, tey + sy, tez + sz
        cx, cy, cz = cross(mx, my, mz, ex, ey, ez)
        d = ex * tex + ey * tey + ez * tez
        dx, dy, dz = (tex - ex * d) * u, (tey - ey * d) * u, (tez - ez * d) * u
        _add(g, p, at, n, there, gx - dx, gy - dy, gz - dz)
        _add(g, gr, at, n, there, dx - cx, dy - cy, dz - cz)
        _add(g, r, at, n, there, cx, cy, cz)
    g1x, g1y, g1z = load(g, tl.load(rows + 4), at, n, there)
    g2x, g2y, g2z = load(g, tl.load(rows + 8), at, n, there)
    b0, b1 = tl.load(b + at, there, 1.0), tl.load(b + n + at, there, 1.0)
    t0 = tl.load(th + at, there, 1.0)
    ct, st = tl.cos(t0), tl.sin(t0)
    tl.store(gb + at, 2.0 / b0 - g1x, there)
    tl.store(gb + n + at, 2.0 / b1 - (g2x * ct + g2y * st), there)
    tl.store(gt + at, ct / st - b1 * (ct * g2y - st * g2x), there)
    for k in range(COUNT - 3):
        leader = tl.load(lead + k)
        if (leader >= 0) & (leader != k):
            q = tl.load(ga + k * n + at, there, 0.0)
            q += tl.load(ga + leader * n + at, there, 0.0)
            tl.store(ga + leader * n + at, q, there)
            tl.debug_barrier()


@triton.jit
def _cell(angle, shift, SIZE: tl.constexpr):
    """Cell ``shift`` further than that of an angle in [0, 2 pi), and the way from its centre."""
    cell = tl.floor(angle * (SIZE / (2.0 * _PI))) + shift
    way = angle - (cell + 0.5) * (2.0 * _PI / SIZE)
    return (cell - SIZE * tl.floor(cell / SIZE)).to(tl.int32), way


@triton.jit
def _table_sums(
    angles, table, label, total, slope, n,
    WIDTH: tl.constexpr, REACH: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there, basin = at < n, tl.program_id(1)
    angle = tl.load(angles + at, there, 0.0)
    # Not a number has no cell: any will do, what comes of it is none either.
    sum_ = angle - angle
    by = sum_
    angle = tl.where(angle == angle, angle, 0.0)
    for k in range(-REACH, REACH + 1):
        row, d = _cell(angle, k, SIZE)
        d = d / WIDTH
        own = tl.load(label + row, there, 0) == basin
        value = tl.where(own, tl.load(table + row, there, 0.0), 0.0) * tl.exp(-0.5 * d * d)
        sum_ += value
        by -= value * d
    tl.store(total + basin * n + at, sum_, there)
    tl.store(slope + basin * n + at, by / WIDTH, there)


@triton.jit
def _table_sums_of_two(
    angles, table, label, total, slope, n,
    WIDTH: tl.constexpr, REACH: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there, basin = at < n, tl.program_id(1)
    first, second = tl.load(angles + at, there, 0.0), tl.load(angles + n + at, there, 0.0)
    sum_ = (first - first) + (second - second)
    by_first, by_second = sum_, sum_
    first = tl.where(first == first, first, 0.0)
    second = tl.where(second == second, second, 0.0)
    for k in range(-REACH, REACH + 1):
        row, d = _cell(first, k, SIZE)
        d = d / WIDTH
        height = tl.exp(-0.5 * d * d)
        for m in range(-REACH, REACH + 1):
            column, c = _cell(second, m, SIZE)
            c = c / WIDTH
            cell = SIZE * row + column
            own = tl.load(label + cell, there, 0) == basin
            value = tl.where(own, tl.load(table + cell, there, 0.0), 0.0)
            value *= height * tl.exp(-0.5 * c * c)
            sum_ += value
            by_first -= value * d
            by_second -= value * c
    tl.store(total + basin * n + at, sum_, there)
    here = slope + 2 * basin * n + at
    tl.store(here, by_first / WIDTH, there)
    tl.store(here + n, by_second / WIDTH, there)


def table_sums(
    angles: Tensor, table: Tensor, label: Tensor, n_basins: int, width: float, reach: int
) -> tuple[Tensor, Tensor]:
    """Sum table entries times wrapped Gaussians, by label, and their slopes by the angles.

    Parameters
    ----------
    angles
        (k, n), of the folded torsions of one group in [-pi, pi), k 1 or 2.
    table, label
        Entries and labels below ``n_basins`` of cells, (size,) or (size, size).
    width, reach
        Of the kernels, rad; cells on each side that are counted.

    Returns
    -------
    Tensor, Tensor
        Sums (n_basins, n), slopes (n_basins, k, n).
    """
    k, n = angles.shape
    total, slope = angles.new_empty(n_basins, n), angles.new_empty(n_basins, k, n)
    if not n:
        return total, slope
    kernel, size = (_table_sums, _table_sums_of_two)[k - 1], len(table)
    height = (width * math.sqrt(2.0 * math.pi)) ** -k
    with torch.cuda.device_of(angles):
        kernel[(triton.cdiv(n, _LANES), n_basins)](
            angles + math.pi, table, label, total, slope, n,
            WIDTH=width, REACH=reach, SIZE=size, LANES=_LANES, num_warps=_WARPS,
        )  # fmt: skip
    return height * total, height * slope


def place(
    rows: Tensor, lead: Tensor, b: Tensor, th: Tensor, ta: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return positions (N, 3, n), mean-free in the root frame, and :math:`\log` volume (n,).

    b (N - 1, n), th (N - 2, n) and ta (N - 3, n), which comes relative and leaves absolute; rows
    (N, 4) and lead (N - 3,) are int64.
    """
    count, n = len(rows), b.shape[1]
    x, log_volume = b.new_empty(count, 3, n), b.new_empty(n)
    grid = (triton.cdiv(n, _LANES),)
    if not n:
        return x, log_volume
    with torch.cuda.device_of(x):  # a launch goes to the current device
        _place[grid](
            rows, lead, b, th, ta, x, log_volume, n, COUNT=count, LANES=_LANES, num_warps=_WARPS
        )
    return x, log_volume


def pull_back(
    rows: Tensor, lead: Tensor, b: Tensor, th: Tensor, ta: Tensor, x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of log volume minus a function of x by b, th and relative ta, each of their shape.

    ``g`` (N, 3, n) is the function's gradient by x, overwritten; the others are as :func:`place`
    left them.
    """
    count, n = len(rows), b.shape[1]
    gb, gt, ga = torch.empty_like(b), torch.empty_like(th), torch.empty_like(ta)
    grid = (triton.cdiv(n, _LANES),)
    if not n:
        return gb, gt, ga
    with torch.cuda.device_of(x):
        _pull_back[grid](
            rows, lead, b, th, ta, x, g, gb, gt, ga, n,
            COUNT=count, LANES=_LANES, num_warps=_WARPS,
        )  # fmt: skip
    return gb, gt, ga
