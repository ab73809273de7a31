r"""Compiled kernels of the internal-coordinate chart: placement, its reverse pass, torsion tables.

Float64, one configuration after the other: what a row gives does not depend on the others. Columns
of ``rows`` are atom, parent, grandparent, reference as in
:class:`~openmm_eqflow.priors.zmatrix.ZMatrix`; ``lead`` is its list of leading torsions.
"""

from __future__ import annotations

import math
from typing import Any

import numba

__all__ = [
    "n_cells",
    "place",
    "pull_back",
    "table_sums",
    "table_sums_of_two",
]

Array = Any
# No "nnan", "ninf": a point off the chart must be seen.
_jit = numba.njit(
    fastmath={"nsz", "arcp", "contract", "afn"}, error_model="numpy", nogil=True, cache=True
)
_inline = numba.njit(
    fastmath={"nsz", "arcp", "contract", "afn"}, error_model="numpy", nogil=True, inline="always"
)
_REACH = 7.0  # widths: the kernel there is 2e-11 of its height


@_inline
def _frame(x: Array, s: int, p: int, g: int, r: int) -> tuple[Any, ...]:
    """Return unit vectors e, n, f = n x e at a parent, 1/|g - p|, r - g, and 1/|e x (r - g)|."""
    dx, dy, dz = x[s, g, 0] - x[s, p, 0], x[s, g, 1] - x[s, p, 1], x[s, g, 2] - x[s, p, 2]
    u = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
    ex, ey, ez = dx * u, dy * u, dz * u
    rx, ry, rz = x[s, r, 0] - x[s, g, 0], x[s, r, 1] - x[s, g, 1], x[s, r, 2] - x[s, g, 2]
    mx, my, mz = ey * rz - ez * ry, ez * rx - ex * rz, ex * ry - ey * rx
    im = 1.0 / math.sqrt(mx * mx + my * my + mz * mz)
    nx, ny, nz = mx * im, my * im, mz * im
    fx, fy, fz = ny * ez - nz * ey, nz * ex - nx * ez, nx * ey - ny * ex
    return ex, ey, ez, nx, ny, nz, fx, fy, fz, u, rx, ry, rz, im


@_jit
def place(
    rows: Array, lead: Array, b: Array, th: Array, ta: Array, x: Array, log_volume: Array
) -> None:
    r"""Positions (n, N, 3), mean-free in the root frame, and their log volume element (n,).

    ``ta`` (n, N - 3) comes relative to the leading torsions and leaves absolute. The log volume is
    :math:`\sum 2 \log b + \log\sin\theta`, nan where a bond or an angle is off the chart.
    """
    n_atoms = rows.shape[0]
    for s in range(b.shape[0]):
        total, valid = 0.0, True
        for k in range(n_atoms - 1):
            valid = valid and b[s, k] > 0.0
            total += 2.0 * math.log(abs(b[s, k]))
        for k in range(n_atoms - 2):
            valid = valid and 0.0 < th[s, k] < math.pi
            total += math.log(abs(math.sin(th[s, k])))
        log_volume[s] = total if valid else math.nan
        for k in range(n_atoms - 3):
            if lead[k] >= 0 and lead[k] != k:
                ta[s, k] += ta[s, lead[k]]
        r0, r1, r2 = rows[0, 0], rows[1, 0], rows[2, 0]
        x[s, r0, :] = 0.0
        x[s, r1, 0], x[s, r1, 1], x[s, r1, 2] = b[s, 0], 0.0, 0.0
        x[s, r2, 0] = b[s, 1] * math.cos(th[s, 0])
        x[s, r2, 1] = b[s, 1] * math.sin(th[s, 0])
        x[s, r2, 2] = 0.0
        for k in range(3, n_atoms):
            a, p = rows[k, 0], rows[k, 1]
            ex, ey, ez, nx, ny, nz, fx, fy, fz, _, _, _, _, _ = _frame(
                x, s, p, rows[k, 2], rows[k, 3]
            )
            ct, st = math.cos(th[s, k - 2]), math.sin(th[s, k - 2])
            ca, sa = st * math.cos(ta[s, k - 3]), st * math.sin(ta[s, k - 3])
            q = b[s, k - 1]
            x[s, a, 0] = x[s, p, 0] + q * (ct * ex + ca * fx - sa * nx)
            x[s, a, 1] = x[s, p, 1] + q * (ct * ey + ca * fy - sa * ny)
            x[s, a, 2] = x[s, p, 2] + q * (ct * ez + ca * fz - sa * nz)
        for c in range(3):
            mean = 0.0
            for k in range(n_atoms):
                mean += x[s, k, c]
            mean /= n_atoms
            for k in range(n_atoms):
                x[s, k, c] -= mean


@_jit
def pull_back(
    rows: Array, lead: Array, b: Array, th: Array, ta: Array, x: Array, g: Array,
    gb: Array, gt: Array, ga: Array,
) -> None:  # fmt: skip
    r"""Gradient of log volume minus a function of x by bonds, angles and relative torsions.

    ``g`` (n, N, 3) is the function's gradient by x, overwritten; b, th, ta, x are those that
    :func:`place` left. The atoms hand on what acts on them, from the last placed to the first.
    """
    n_atoms = rows.shape[0]
    for s in range(b.shape[0]):
        for c in range(3):  # a common motion is none
            mean = 0.0
            for k in range(n_atoms):
                mean += g[s, k, c]
            mean /= n_atoms
            for k in range(n_atoms):
                g[s, k, c] -= mean
        for k in range(n_atoms - 1, 2, -1):
            a, p, gr, r = rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3]
            ex, ey, ez, nx, ny, nz, fx, fy, fz, u, rx, ry, rz, im = _frame(x, s, p, gr, r)
            ct, st = math.cos(th[s, k - 2]), math.sin(th[s, k - 2])
            ca, sa = math.cos(ta[s, k - 3]), math.sin(ta[s, k - 3])
            q = b[s, k - 1]
            wx, wy, wz = ca * fx - sa * nx, ca * fy - sa * ny, ca * fz - sa * nz
            gx, gy, gz = g[s, a, 0], g[s, a, 1], g[s, a, 2]
            on_e, on_w = gx * ex + gy * ey + gz * ez, gx * wx + gy * wy + gz * wz
            on_f, on_n = gx * fx + gy * fy + gz * fz, gx * nx + gy * ny + gz * nz
            gb[s, k - 1] = 2.0 / q - (ct * on_e + st * on_w)
            gt[s, k - 2] = ct / st - q * (ct * on_w - st * on_e)
            ga[s, k - 3] = q * st * (sa * on_f + ca * on_n)
            # By the frame: x = p + q (ct e + st (ca f - sa n)), f = n x e, n = m / |m|, m = e x r.
            hx, hy, hz = q * gx, q * gy, q * gz
            vx, vy, vz = st * ca * hx, st * ca * hy, st * ca * hz
            tnx = ey * vz - ez * vy - st * sa * hx
            tny = ez * vx - ex * vz - st * sa * hy
            tnz = ex * vy - ey * vx - st * sa * hz
            tex = ct * hx + vy * nz - vz * ny
            tey = ct * hy + vz * nx - vx * nz
            tez = ct * hz + vx * ny - vy * nx
            d = nx * tnx + ny * tny + nz * tnz
            mx, my, mz = (tnx - nx * d) * im, (tny - ny * d) * im, (tnz - nz * d) * im
            tex += ry * mz - rz * my
            tey += rz * mx - rx * mz
            tez += rx * my - ry * mx
            cx, cy, cz = my * ez - mz * ey, mz * ex - mx * ez, mx * ey - my * ex
            d = ex * tex + ey * tey + ez * tez
            dx, dy, dz = (tex - ex * d) * u, (tey - ey * d) * u, (tez - ez * d) * u
            g[s, p, 0] += gx - dx
            g[s, p, 1] += gy - dy
            g[s, p, 2] += gz - dz
            g[s, gr, 0] += dx - cx
            g[s, gr, 1] += dy - cy
            g[s, gr, 2] += dz - cz
            g[s, r, 0] += cx
            g[s, r, 1] += cy
            g[s, r, 2] += cz
        r1, r2 = rows[1, 0], rows[2, 0]
        ct, st = math.cos(th[s, 0]), math.sin(th[s, 0])
        gb[s, 0] = 2.0 / b[s, 0] - g[s, r1, 0]
        gb[s, 1] = 2.0 / b[s, 1] - (g[s, r2, 0] * ct + g[s, r2, 1] * st)
        gt[s, 0] = ct / st - b[s, 1] * (ct * g[s, r2, 1] - st * g[s, r2, 0])
        for k in range(n_atoms - 3):
            if lead[k] >= 0 and lead[k] != k:
                ga[s, lead[k]] += ga[s, k]


@_inline
def _gaussians(angle: Any, first: int, n: int, step: Any, width: Any, e: Array, d: Array) -> None:
    r"""Kernels e (n,) at cells first, first + 1, ... and by how many widths an angle is off, d.

    :math:`e_{j+1} = e_j r_j`, :math:`r_{j+1} = r_j e^{-h^2}` for cells h widths apart (the
    exponent is a parabola in j): two products each, outwards from the middle.
    """
    h = step / width
    middle = n // 2
    start = (angle + math.pi - (first + middle + 0.5) * step) / width
    bend = math.exp(-h * h)
    top = math.exp(-0.5 * start * start)
    value, ratio = top, math.exp(start * h - 0.5 * h * h)
    e[middle], d[middle] = top, start
    for k in range(middle + 1, n):
        value *= ratio
        ratio *= bend
        e[k], d[k] = value, start - (k - middle) * h
    value, ratio = top, math.exp(-start * h - 0.5 * h * h)
    for k in range(middle - 1, -1, -1):
        value *= ratio
        ratio *= bend
        e[k], d[k] = value, start + (middle - k) * h


@_inline
def _wrapped(t: Any) -> Any:
    return t - 2.0 * math.pi * math.floor((t + math.pi) / (2.0 * math.pi))


@_jit
def n_cells(width: float, size: int) -> int:
    """Cells that a kernel reaches, of a turn in ``size``."""
    return 2 * math.ceil(_REACH * width * size / (2.0 * math.pi)) + 1


@_jit
def table_sums(
    t: Array, table: Array, label: Array, width: float, total: Array, slope: Array, room: Array
) -> None:
    """Sum table entries times kernels, by label (n, m), and their slopes, at angles t (n,).

    Angles come multiplied by their fold. Kernels are wrapped Gaussians: cells are counted beyond
    a turn, so that every image within reach is there. ``room`` is (2, 2, k), k of :func:`n_cells`.
    """
    size = table.shape[0]
    step = 2.0 * math.pi / size
    reach = n_cells(width, size) // 2
    height = 1.0 / (width * math.sqrt(2.0 * math.pi))
    for i in range(t.shape[0]):
        total[i, :] = 0.0
        slope[i, :] = 0.0
        angle = _wrapped(t[i])
        first = math.floor((angle + math.pi) / step) - reach
        _gaussians(angle, first, 2 * reach + 1, step, width, room[0, 0], room[0, 1])
        cell = first % size
        m, sum_, by = label[cell], 0.0, 0.0  # of a run of cells of one label
        for k in range(2 * reach + 1):
            if label[cell] != m:
                total[i, m] += height * sum_
                slope[i, m] -= height / width * by
                m, sum_, by = label[cell], 0.0, 0.0
            value = table[cell] * room[0, 0, k]
            sum_ += value
            by += value * room[0, 1, k]
            cell += 1
            if cell == size:
                cell = 0
        total[i, m] += height * sum_
        slope[i, m] -= height / width * by


@_jit
def table_sums_of_two(
    t: Array, table: Array, label: Array, width: float, total: Array, slope: Array, room: Array
) -> None:
    """As :func:`table_sums` of two angles t (n, 2); slopes are (n, m, 2)."""
    size = table.shape[0]
    step = 2.0 * math.pi / size
    reach = n_cells(width, size) // 2
    height = 1.0 / (width * math.sqrt(2.0 * math.pi))
    for i in range(t.shape[0]):
        total[i, :] = 0.0
        slope[i, :, :] = 0.0
        first0, first1 = 0, 0
        for axis in range(2):
            angle = _wrapped(t[i, axis])
            first = math.floor((angle + math.pi) / step) - reach
            if axis == 0:
                first0 = first
            else:
                first1 = first
            _gaussians(angle, first, 2 * reach + 1, step, width, room[axis, 0], room[axis, 1])
            for k in range(2 * reach + 1):
                room[axis, 0, k] *= height
                room[axis, 1, k] *= -room[axis, 0, k] / width
        for k in range(2 * reach + 1):
            row = (first0 + k) % size
            column = first1 % size
            ek, dk = room[0, 0, k], room[0, 1, k]
            m, along, across = label[row, column], 0.0, 0.0  # of a run of cells of one label
            for j in range(2 * reach + 1):
                if label[row, column] != m:
                    total[i, m] += ek * along
                    slope[i, m, 0] += dk * along
                    slope[i, m, 1] += ek * across
                    m, along, across = label[row, column], 0.0, 0.0
                value = table[row, column]
                along += value * room[1, 0, j]
                across += value * room[1, 1, j]
                column += 1
                if column == size:
                    column = 0
            total[i, m] += ek * along
            slope[i, m, 0] += dk * along
            slope[i, m, 1] += ek * across
