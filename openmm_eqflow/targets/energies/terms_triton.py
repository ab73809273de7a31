r"""The standard terms of a System on a GPU, energies and forces: one program per atom.

The formulas of :mod:`.kernels_bonded` and :mod:`.kernels_gb` in Triton, float64. A program has one
atom of some configurations, a lane each; it goes through what the atom takes part in and keeps its
share of the energy and its own force: nothing is written twice, so no sum depends on an order, and
a configuration has the same bits in any batch. Arrays are (..., n), configurations last, so that
neighbouring lanes read neighbouring numbers: positions and forces (N, 3, n), energies (N, n), both
accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.terms import (
    AngleTerm,
    BondTerm,
    FourierTorsionTerm,
    GBSATerm,
    IndexArray,
    PairTerm,
)
from openmm_eqflow.targets.energies.vector_math_triton import angle, cross, dot, load

__all__ = [
    "Fused",
    "fuse",
]

#: ``fused(x, e, f)`` adds to e and f.
Fused = Callable[[Tensor, Tensor, Tensor], None]

_LANES = 64
_WARPS = 2


@triton.jit
def _add(e, f, k, at, n, there, energy, a, b, c):
    """Add to the share and the force of atom ``k``, which no other program touches."""
    share, here = e + k * n + at, f + 3 * k * n + at
    tl.store(share, tl.load(share, there, 0.0) + energy, there)
    tl.store(here, tl.load(here, there, 0.0) + a, there)
    tl.store(here + n, tl.load(here + n, there, 0.0) + b, there)
    tl.store(here + 2 * n, tl.load(here + 2 * n, there, 0.0) + c, there)


@triton.jit
def _lanes(LANES: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES), tl.program_id(1)


@triton.jit
def _bonds(x, e, f, n, start, entry, index, values, LANES: tl.constexpr):
    at, i = _lanes(LANES)
    there = at < n
    ax, ay, az = load(x, i, at, n, there)
    energy = tl.zeros(at.shape, tl.float64)
    fx, fy, fz = energy, energy, energy
    for m in range(tl.load(start + i), tl.load(start + i + 1)):
        t, slot = tl.load(entry + 2 * m), tl.load(entry + 2 * m + 1)
        length, k = tl.load(values + 2 * t), tl.load(values + 2 * t + 1)
        bx, by, bz = load(x, tl.load(index + 2 * t + 1 - slot), at, n, there)
        dx, dy, dz = ax - bx, ay - by, az - bz
        r = tl.sqrt(dx * dx + dy * dy + dz * dz)
        energy += 0.25 * k * (r - length) * (r - length)
        # A spring of zero rest length has a force at r = 0.
        slope = tl.where(length == 0.0, k, k * (r - length) / r)
        fx, fy, fz = fx - slope * dx, fy - slope * dy, fz - slope * dz
    _add(e, f, i, at, n, there, energy, fx, fy, fz)


@triton.jit
def _angles(x, e, f, n, start, entry, index, values, LANES: tl.constexpr):
    at, i = _lanes(LANES)
    there = at < n
    energy = tl.zeros(at.shape, tl.float64)
    fx, fy, fz = energy, energy, energy
    for m in range(tl.load(start + i), tl.load(start + i + 1)):
        t, slot = tl.load(entry + 2 * m), tl.load(entry + 2 * m + 1)
        px, py, pz = load(x, tl.load(index + 3 * t), at, n, there)
        qx, qy, qz = load(x, tl.load(index + 3 * t + 1), at, n, there)
        ox, oy, oz = load(x, tl.load(index + 3 * t + 2), at, n, there)
        ux, uy, uz = px - qx, py - qy, pz - qz
        vx, vy, vz = ox - qx, oy - qy, oz - qz
        wx, wy, wz = cross(ux, uy, uz, vx, vy, vz)
        uv = dot(ux, uy, uz, vx, vy, vz)
        a = uv / dot(ux, uy, uz, ux, uy, uz)
        b = uv / dot(vx, vy, vz, vx, vy, vz)
        # Finite where the three are exactly collinear, as OpenMM's.
        sine = tl.sqrt(tl.maximum(dot(wx, wy, wz, wx, wy, wz), 1e-30))
        bend = angle(sine, uv) - tl.load(values + 2 * t)
        k = tl.load(values + 2 * t + 1)
        energy += k * bend * bend / 6.0
        slope = k * bend / sine
        # The ends, and the middle, which takes what both lose.
        first = slope * tl.where(slot == 0, -1.0, tl.where(slot == 1, 1.0, 0.0))
        last = slope * tl.where(slot == 2, -1.0, tl.where(slot == 1, 1.0, 0.0))
        fx += first * (a * ux - vx) + last * (b * vx - ux)
        fy += first * (a * uy - vy) + last * (b * vy - uy)
        fz += first * (a * uz - vz) + last * (b * vz - uz)
    _add(e, f, i, at, n, there, energy, fx, fy, fz)


@triton.jit
def _torsions(
    x, e, f, n, start, entry, index, cosine, sine, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    at, i = _lanes(LANES)
    there = at < n
    energy = tl.zeros(at.shape, tl.float64)
    fx, fy, fz = energy, energy, energy
    for m in range(tl.load(start + i), tl.load(start + i + 1)):
        t, slot = tl.load(entry + 2 * m), tl.load(entry + 2 * m + 1)
        px, py, pz = load(x, tl.load(index + 4 * t), at, n, there)
        qx, qy, qz = load(x, tl.load(index + 4 * t + 1), at, n, there)
        ox, oy, oz = load(x, tl.load(index + 4 * t + 2), at, n, there)
        hx, hy, hz = load(x, tl.load(index + 4 * t + 3), at, n, there)
        ax, ay, az = qx - px, qy - py, qz - pz
        bx, by, bz = ox - qx, oy - qy, oz - qz
        cx, cy, cz = hx - ox, hy - oy, hz - oz
        ux, uy, uz = cross(ax, ay, az, bx, by, bz)
        vx, vy, vz = cross(bx, by, bz, cx, cy, cz)
        square = dot(bx, by, bz, bx, by, bz)
        length = tl.sqrt(square)
        c1, s1 = dot(ux, uy, uz, vx, vy, vz), length * dot(ax, ay, az, vx, vy, vz)
        scale = 1.0 / tl.sqrt(c1 * c1 + s1 * s1)
        c1, s1 = c1 * scale, s1 * scale
        c, s = c1, s1
        total, slope = tl.load(cosine + WIDTH * t) + (c1 - c1), tl.zeros(at.shape, tl.float64)
        for k in range(1, WIDTH):
            p, q = tl.load(cosine + WIDTH * t + k), tl.load(sine + WIDTH * t + k)
            total += p * c + q * s
            slope += k * (q * c - p * s)
            c, s = c * c1 - s * s1, s * c1 + c * s1
        energy += 0.25 * total
        # Blondel and Karplus 1996, J. Comput. Chem. 17, 1132.
        first = -slope * length / dot(ux, uy, uz, ux, uy, uz)
        last = slope * length / dot(vx, vy, vz, vx, vy, vz)
        one = dot(ax, ay, az, bx, by, bz) / square
        two = dot(cx, cy, cz, bx, by, bz) / square
        zero = tl.zeros(at.shape, tl.float64)
        on_first = tl.where(slot == 1, 1.0 + one, tl.where(slot == 2, -one, zero))
        on_first = first * tl.where(slot == 0, zero - 1.0, on_first)
        on_last = tl.where(slot == 1, -two, tl.where(slot == 2, 1.0 + two, zero))
        on_last = last * tl.where(slot == 3, zero - 1.0, on_last)
        fx += on_first * ux + on_last * vx
        fy += on_first * uy + on_last * vy
        fz += on_first * uz + on_last * vz
    _add(e, f, i, at, n, there, energy, fx, fy, fz)


@triton.jit
def _pairs(x, e, f, n, table, COUNT: tl.constexpr, LANES: tl.constexpr):
    at, i = _lanes(LANES)
    there = at < n
    ax, ay, az = load(x, i, at, n, there)
    energy = tl.zeros(at.shape, tl.float64)
    fx, fy, fz = energy, energy, energy
    for j in range(COUNT):
        row = table + 3 * (COUNT * i + j)
        q, a, b = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        bx, by, bz = load(x, j, at, n, there)
        dx, dy, dz = ax - bx, ay - by, az - bz
        # Of pairs without a term, the atom and itself, all three are zero.
        none = (q == 0.0) & (a == 0.0) & (b == 0.0)
        inverse = 1.0 / tl.where(none, 1.0, dx * dx + dy * dy + dz * dz)
        coulomb = q * tl.sqrt(inverse)
        six = inverse * inverse * inverse
        twelve = a * six * six
        six = b * six
        energy += 0.5 * (coulomb + twelve - six)
        slope = (coulomb + 12.0 * twelve - 6.0 * six) * inverse
        fx, fy, fz = fx + slope * dx, fy + slope * dy, fz + slope * dz
    _add(e, f, i, at, n, there, energy, fx, fy, fz)


@triton.jit
def _integral(r, near, reach):
    """Born integral of a particle in the field of another, and (dH/dr) / r; see kernels_gb."""
    inverse = 1.0 / r
    inner = tl.maximum(near, tl.abs(r - reach))
    outer = r + reach
    lower, upper = 1.0 / inner, 1.0 / outer
    log = tl.log(upper * inner)
    change = upper * upper - lower * lower
    ratio = reach * reach * inverse
    term = lower - upper + 0.25 * change * (r - ratio) + 0.5 * inverse * log
    term += tl.where(near < reach - r, 2.0 * (1.0 / near - lower), 0.0)
    grown = 0.25 * change * (1.0 + ratio * inverse) - 0.5 * log * inverse * inverse
    return tl.where(near < outer, term, 0.0), tl.where(near < outer, grown * inverse, 0.0)


@triton.jit
def _distance(ax, ay, az, bx, by, bz, same):
    dx, dy, dz = ax - bx, ay - by, az - bz
    square = tl.where(same, 1.0, dx * dx + dy * dy + dz * dz)
    return dx, dy, dz, square


@triton.jit
def _born(x, e, n, own, born, chain, pull, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Radius B, dB/dH and the slope of the particle's own energy by B."""
    at, i = _lanes(LANES)
    there = at < n
    ax, ay, az = load(x, i, at, n, there)
    near, radius = tl.load(own + 6 * i), tl.load(own + 6 * i + 2)
    psi = tl.zeros(at.shape, tl.float64)
    for j in range(COUNT):
        bx, by, bz = load(x, j, at, n, there)
        dx, dy, dz, square = _distance(ax, ay, az, bx, by, bz, i == j)
        term, slope = _integral(tl.sqrt(square), near, tl.load(own + 6 * j + 1))
        psi += tl.where(i == j, 0.0, term)
    y = 0.5 * near * psi
    argument = y * (1.0 - y * (0.8 - 4.85 * y))
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * argument) + 1.0)
    b = 1.0 / (1.0 / near - tanh / radius)
    slope = (1.0 - y * (1.6 - 14.55 * y)) * (1.0 - tanh * tanh)
    here = i * n + at
    tl.store(born + here, b, there)
    tl.store(chain + here, b * b * slope * 0.5 * near / radius, there)
    inverse = 1.0 / b
    cube = radius * inverse
    cube = cube * cube * cube
    polar = tl.load(own + 6 * i + 3) * inverse
    exposed = tl.load(own + 6 * i + 4) * cube * cube
    tl.store(pull + here, -(polar + 6.0 * exposed) * inverse, there)
    tl.store(e + here, tl.load(e + here, there, 0.0) + polar + exposed, there)


@triton.jit
def _still(x, e, f, n, own, charge, born, chain, pull, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Polarisation of pairs; leaves the slope of all by H in ``pull``."""
    at, i = _lanes(LANES)
    there = at < n
    ax, ay, az = load(x, i, at, n, there)
    mine, q = tl.load(born + i * n + at, there, 1.0), tl.load(own + 6 * i + 5)
    energy = tl.zeros(at.shape, tl.float64)
    fx, fy, fz, by_born = energy, energy, energy, energy
    for j in range(COUNT):
        bx, by, bz = load(x, j, at, n, there)
        dx, dy, dz, square = _distance(ax, ay, az, bx, by, bz, i == j)
        other = tl.load(born + j * n + at, there, 1.0)
        product = mine * other
        quarter = square / (4.0 * product)
        decay = tl.exp(-quarter)
        inverse = 1.0 / (square + product * decay)
        both = tl.where(i == j, 0.0, q * tl.load(charge + j)) * tl.sqrt(inverse)
        scaled = both * inverse
        energy += 0.5 * both
        slope = scaled * (1.0 - 0.25 * decay)
        fx, fy, fz = fx + slope * dx, fy + slope * dy, fz + slope * dz
        by_born -= 0.5 * scaled * decay * (1.0 + quarter) * other
    here = i * n + at
    whole = tl.load(pull + here, there, 0.0) + by_born
    tl.store(pull + here, whole * tl.load(chain + here, there, 0.0), there)
    _add(e, f, i, at, n, there, energy, fx, fy, fz)


@triton.jit
def _chain(x, e, f, n, own, pull, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Forces by way of the radii."""
    at, i = _lanes(LANES)
    there = at < n
    ax, ay, az = load(x, i, at, n, there)
    near, reach = tl.load(own + 6 * i), tl.load(own + 6 * i + 1)
    mine = tl.load(pull + i * n + at, there, 0.0)
    zero = tl.zeros(at.shape, tl.float64)
    fx, fy, fz = zero, zero, zero
    for j in range(COUNT):
        bx, by, bz = load(x, j, at, n, there)
        dx, dy, dz, square = _distance(ax, ay, az, bx, by, bz, i == j)
        r = tl.sqrt(square)
        term, one = _integral(r, near, tl.load(own + 6 * j + 1))
        term, two = _integral(r, tl.load(own + 6 * j), reach)
        slope = mine * one + tl.load(pull + j * n + at, there, 0.0) * two
        fx, fy, fz = fx - slope * dx, fy - slope * dy, fz - slope * dz
    _add(e, f, i, at, n, there, zero, fx, fy, fz)


def fuse(term: object, n_particles: int, device: torch.device) -> Fused | None:
    """Kernels of a term with their tables on a device; None if there are none."""

    def put(values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    def launch(kernel: Any, x: Tensor, *rest: Any, **sizes: int) -> None:
        n = x.shape[2]
        if n:
            with torch.cuda.device_of(x):  # a launch goes to the current device
                kernel[(triton.cdiv(n, _LANES), n_particles)](
                    x, *rest, LANES=_LANES, num_warps=_WARPS, **sizes
                )

    if isinstance(term, BondTerm | AngleTerm):
        kernel, origin = _bonds, getattr(term, "length", None)
        if origin is None:
            kernel, origin = _angles, term.angle  # type: ignore[union-attr]
        bonded = [*map(put, _by_atom(term.index, n_particles)), put(term.index.astype(np.int32))]
        values = put(np.stack([origin, term.k], 1))
        return lambda x, e, f: launch(kernel, x, e, f, x.shape[2], *bonded, values)
    if isinstance(term, FourierTorsionTerm):
        bonded = [*map(put, _by_atom(term.index, n_particles)), put(term.index.astype(np.int32))]
        series, width = [put(term.cosine), put(term.sine)], term.cosine.shape[1]
        return lambda x, e, f: launch(
            _torsions, x, e, f, x.shape[2], *bonded, *series, WIDTH=width
        )
    if isinstance(term, PairTerm):
        dense = put(_dense(term, n_particles))
        return lambda x, e, f: launch(_pairs, x, e, f, x.shape[2], dense, COUNT=n_particles)
    if isinstance(term, GBSATerm):
        own, charge = put(_particles(term)), put(term.charge)

        def gbsa(x: Tensor, e: Tensor, f: Tensor) -> None:
            n, count = x.shape[2], {"COUNT": n_particles}
            born, chain, pull = x.new_empty(3, n_particles, n)
            launch(_born, x, e, n, own, born, chain, pull, **count)
            launch(_still, x, e, f, n, own, charge, born, chain, pull, **count)
            launch(_chain, x, e, f, n, own, pull, **count)

        return gbsa
    return None


def _by_atom(index: IndexArray, n_particles: int) -> tuple[IndexArray, IndexArray]:
    """Where the entries of every atom begin, (N + 1,); entries: a term and the place in it."""
    atoms = index.reshape(-1)
    order = np.argsort(atoms, kind="stable")
    start = np.searchsorted(atoms[order], np.arange(n_particles + 1))
    entry = np.stack([order // index.shape[1], order % index.shape[1]], 1)
    return start.astype(np.int32), entry.astype(np.int32)


def _dense(term: PairTerm, n_particles: int) -> FloatArray:
    """Charge, A and B of every ordered pair, (N, N, 3); zero where there is no term."""
    table = np.zeros((n_particles, n_particles, 3))
    for i, j in (term.index.T, term.index.T[::-1]):
        table[i, j] = np.stack([term.charge, term.a, term.b], 1)
    return table


def _particles(term: GBSATerm) -> FloatArray:
    """Of every particle, (N, 6).

    Offset, scaled and plain radius; own energies, polar times B and of the surface at B of the
    radius; the charge that a pair's other charge is multiplied by.
    """
    polar = -0.5 * term.prefactor * term.charge**2
    area = term.surface * (term.radius + term.probe) ** 2
    columns: Sequence[FloatArray] = (
        term.offset_radius, term.scaled_radius, term.radius, polar, area,
        -term.prefactor * term.charge,
    )  # fmt: skip
    return np.stack(columns, 1)
