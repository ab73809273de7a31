r"""The kernels of a cluster's path in torch: any device, any particle number.

Points are (n, N, 3), float32; ``level`` and ``table`` as in
:mod:`~openmm_eqflow.flows.softcore_kernels`. On a GPU with a compiler
:mod:`~openmm_eqflow.flows.softcore_triton` takes their place. The numbers are those of the
compiled kernels to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import triton_kernels

__all__ = [
    "field_jacobian",
    "trajectory",
    "transport",
    "transport_back",
]


def _differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Components of x_i - x_j and their square, each (n, N, N)."""
    dx, dy, dz = (x[:, :, None, m] - x[:, None, :, m] for m in range(3))
    return dx, dy, dz, dx * dx + dy * dy + dz * dz


def _pushed(factor: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    return torch.stack([(factor * d).sum(2) for d in (dx, dy, dz)], -1)


def energy_and_force(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (n,) in kT and forces (n, N, 3)."""
    trap, soft, attraction = level[0], level[1], level[2]
    dx, dy, dz, square = _differences(x)
    n = x.shape[1]
    index = torch.arange(n, device=x.device)
    other = index[:, None] != index[None]
    s = torch.where(other, 1.0 / torch.where(other, square + soft, 1.0), 0.0)
    s3 = s * s * s
    pairs = (s3 * (s3 - 2.0 * attraction)).sum((1, 2))
    off = x - x.mean(1, keepdim=True)
    u = pairs + 0.5 * trap * off.square().sum((1, 2))
    return u, _pushed(24.0 * s * s3 * (s3 - attraction), dx, dy, dz) - trap * off


def _leapfrog(
    x: Tensor, v: Tensor, force: Tensor, level: Tensor, step: Tensor, kick: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drift by ``step``, then kick by ``kick``."""
    x = x + step * v
    u, force = energy_and_force(x, level)
    return x, v + kick * force, u, force


def _phi(d: Tensor, table: Tensor, per_length: float) -> tuple[Tensor, Tensor]:
    """Value of h phi(d) and its slope per interval."""
    q = (d * per_length).clamp(max=float(len(table)))
    k = torch.nan_to_num(q).floor().clamp(0, len(table) - 1)
    s = q - k
    p0, p1, p2, p3 = (table[:, m][k.long()] for m in range(4))
    return p0 + s * (p1 + s * (p2 + s * p3)), p1 + s * (2.0 * p2 + 3.0 * s * p3)


def _push(x: Tensor, table: Tensor, per_length: float) -> tuple[Tensor, Tensor]:
    """Return h v (n, N, 3) and h div v (n,)."""
    dx, dy, dz, square = _differences(x)
    d = square.sqrt()
    phi, slope = _phi(d, table, per_length)
    index = torch.arange(x.shape[1], device=x.device)
    other = index[:, None] != index[None]
    divergence = torch.where(other, 3.0 * phi + d * per_length * slope, 0.0).sum((1, 2))
    return _pushed(phi, dx, dy, dz), divergence


def _midpoint(x: Tensor, table: Tensor, per_length: float) -> tuple[Tensor, Tensor]:
    first, _ = _push(x, table, per_length)
    return _push(x + 0.5 * first, table, per_length)


def _fused(y: Tensor) -> Any:
    """Kernels in Triton for points on a GPU, if there is a compiler for them."""
    return triton_kernels("openmm_eqflow.flows.softcore_triton") if y.is_cuda else None


def trajectory(
    y: Tensor, level: Tensor, timestep: float, n_leapfrog: int, streams: RowStreams
) -> tuple[Tensor, Tensor, float]:
    """Return new points, u(y) - u(y') (n,) float64, and the share accepted."""
    if (fused := _fused(y)) is not None:
        draw = streams.skip()
        streams.skip()
        moved, change = fused.trajectory(y, level, timestep, n_leapfrog, streams.keys, draw)
        return moved, change, float("nan")
    x = y.float()
    v = streams.normal(*x.shape[1:], dtype=torch.float32)
    uniform = streams.uniform()
    v = v - v.mean(1, keepdim=True)
    u, force = energy_and_force(x, level)
    before = u.double() + 0.5 * v.double().square().sum((1, 2))
    step = torch.full((), timestep, device=x.device)
    half = 0.5 * step
    new, velocity, new_u = x, v + half * force, u
    for k in range(n_leapfrog):
        kick = step if k < n_leapfrog - 1 else half
        new, velocity, new_u, force = _leapfrog(new, velocity, force, level, step, kick)
    after = new_u.double() + 0.5 * velocity.double().square().sum((1, 2))
    # A trajectory that overflowed compares false and is rejected.
    keep = torch.log(uniform) < before - after
    moved = torch.where(keep[:, None, None], new, x)
    change = torch.where(keep, u.double() - new_u.double(), 0.0)
    return moved, change, float("nan") if x.is_cuda else float(keep.double().mean())


def transport(y: Tensor, table: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    """Apply the midpoint step; also its log determinant (n,), float64."""
    if (fused := _fused(y)) is not None:
        return fused.transport(y, table, spacing)
    x = y.float()
    velocity, divergence = _midpoint(x, table, 1.0 / spacing)
    return x + velocity, divergence.double()


def transport_back(
    y: Tensor, table: Tensor, spacing: float, tolerance: float, most: int
) -> tuple[Tensor, Tensor]:
    """Invert by fixed-point iteration, row by row; also the log determinant of the map."""
    if (fused := _fused(y)) is not None:
        return fused.transport_back(y, table, spacing, tolerance, most)
    y = y.float()
    x, moving = y, torch.ones(len(y), dtype=torch.bool, device=y.device)
    found = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for _ in range(most):
        velocity, divergence = _midpoint(x, table, 1.0 / spacing)
        change = (x - (y - velocity)).abs().amax((1, 2))
        x = torch.where(moving[:, None, None], y - velocity, x)
        found = torch.where(moving, divergence.double(), found)
        moving = moving & ~(change <= tolerance)
        if not bool(moving.any()):
            break
    return x, found


def field_jacobian(x: Tensor, table: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    r"""Return h v (n, N, 3) and its Jacobian (n, 3 N, 3 N).

    .. math:: \partial v_i / \partial x_j = -(\phi\, 1 + \phi'\, \hat r \hat r^T d), \quad
              \partial v_i / \partial x_i = -\sum_{j \ne i} \partial v_i / \partial x_j
    """
    n, size = x.shape[:2]
    r = x[:, :, None] - x[:, None]
    d = torch.linalg.vector_norm(r, dim=-1)
    phi, slope = _phi(d, table, 1.0 / spacing)
    eye = torch.eye(size, dtype=torch.bool, device=x.device)
    phi, slope = phi.masked_fill(eye, 0.0), slope.masked_fill(eye, 0.0) / spacing
    unit = r / d.masked_fill(eye, 1.0)[..., None]
    one = torch.eye(3, dtype=x.dtype, device=x.device)
    block = phi[..., None, None] * one + (slope * d)[..., None, None] * (
        unit[..., :, None] * unit[..., None, :]
    )
    jacobian = torch.diag_embed(block.sum(2).permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2)
    jacobian = jacobian - block.permute(0, 1, 3, 2, 4)
    return (phi[..., None] * r).sum(2), jacobian.reshape(n, 3 * size, 3 * size)
