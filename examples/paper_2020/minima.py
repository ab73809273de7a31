"""Local minima of a target: batched quenches, and which of them are the same.

Two minima are the same if their energies and their sorted pair distances agree: rotations,
reflections and relabellings change neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_eqflow.geometry import pair_vectors, remove_mean
from openmm_eqflow.targets.target import BoltzmannTarget

GRADIENT_TOLERANCE = 1e-5  # kT/nm, largest component
ENERGY_TOLERANCE = 1e-4  # kT
DISTANCE_TOLERANCE = 2e-3  # nm, largest difference of sorted pair distances
_MAX_MOVE = 0.05  # nm of any particle in one step
_LONGEST_STEP = 0.03  # the stiffest mode of a cluster turns at about 40 per unit of time
_COMPACT_EVERY = 50


class Quenched(NamedTuple):
    """Positions (n, N, D), energies (n,) in kT, and which rows converged (n,)."""

    x: Tensor
    u: Tensor
    converged: Tensor


def quench(target: BoltzmannTarget, x: Tensor, *, max_steps: int = 20_000) -> Quenched:
    """Minimise u from every row of ``x`` (n, N, D) by FIRE (Bitzek et al. 2006), batched.

    Every row has a time step of its own, so none depends on the others. Moves are capped, which
    makes overlapping particles harmless, and pairs too close for a finite energy are first pushed
    apart. Rows that are not finished after ``max_steps`` are not ``converged``.
    """
    final = remove_mean(x.double()).clone()
    u_final = torch.full((len(x),), torch.inf, dtype=torch.float64)
    converged = torch.zeros(len(x), dtype=torch.bool)
    rows, y = torch.arange(len(x)), final.clone()
    v = torch.zeros_like(y)
    dt = torch.full((len(y), 1, 1), 0.3 * _LONGEST_STEP, dtype=torch.float64)
    mixing, downhill = torch.full_like(dt, 0.1), torch.zeros_like(dt)
    for step in range(max_steps):
        u, gradient = target.reduced_potential_and_gradient(y)
        done = (gradient.abs().amax((1, 2)) < GRADIENT_TOLERANCE) & torch.isfinite(u)
        # Rows at rest stay in the batch until the next compaction and hardly move.
        if step % _COMPACT_EVERY == 0 or step == max_steps - 1:
            final[rows], u_final[rows], converged[rows] = y, u, done
            keep = ~done
            if not bool(keep.any()):
                break
            rows, y, v, u, gradient = rows[keep], y[keep], v[keep], u[keep], gradient[keep]
            dt, mixing, downhill = dt[keep], mixing[keep], downhill[keep]
        force = torch.where(torch.isfinite(u)[:, None, None], -gradient, _apart(y))
        power = (force * v).sum((1, 2), keepdim=True)
        forwards = power > 0
        norm = force.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-300)
        speed = v.flatten(1).norm(dim=1)[:, None, None]
        v = torch.where(forwards, (1 - mixing) * v + mixing * speed * (force / norm), 0.0)
        downhill = torch.where(forwards, downhill + 1, 0.0)
        faster = downhill > 5
        dt = torch.where(faster, (1.1 * dt).clamp_max(_LONGEST_STEP), dt)
        dt = torch.where(forwards, dt, 0.5 * dt).clamp_min(1e-3 * _LONGEST_STEP)
        mixing = torch.where(faster, 0.99 * mixing, mixing)
        mixing = torch.where(forwards, mixing, 0.1)
        v = v + dt * force
        longest = (dt * v).norm(dim=-1).amax(1)[:, None, None]
        v = v * (_MAX_MOVE / longest.clamp_min(_MAX_MOVE))
        y = remove_mean(y + dt * v)
    return Quenched(final, u_final, converged)


def _apart(x: Tensor) -> Tensor:
    """Return forces away from close neighbours, so large that moves are the longest allowed."""
    r = pair_vectors(x)
    return 1e9 * (r / r.square().sum(-1, keepdim=True).clamp_min(1e-12).square()).sum(-2)


def pair_fingerprint(x: Tensor) -> Tensor:
    """Sorted pair distances (n, N (N-1) / 2), the same for all images under the group."""
    row, column = torch.tril_indices(x.shape[1], x.shape[1], offset=-1)
    return (x[:, row] - x[:, column]).norm(dim=-1).sort(dim=-1).values


def label_minima(x: Tensor, u: Tensor) -> Tensor:
    """Give every row (n,) the number of its minimum, from the lowest energy up."""
    order = u.argsort()
    energies, prints = u[order], pair_fingerprint(x[order])
    found = torch.full((len(u),), -1)
    n_distinct = 0
    while len(free := (found < 0).nonzero()):  # a turn for every distinct minimum
        first = int(free[0])
        last = int(torch.searchsorted(energies, energies[first] + ENERGY_TOLERANCE, right=True))
        gap = (prints[first:last] - prints[first]).abs().amax(-1)
        same = (gap < DISTANCE_TOLERANCE) & (found[first:last] < 0)
        found[first:last][same] = n_distinct
        n_distinct += 1
    out = torch.empty_like(found)
    out[order] = found
    return out


def lowest_curvature(target: BoltzmannTarget, x: Tensor, *, step: float = 1e-4) -> Tensor:
    """Smallest Hessian eigenvalue (n,), rigid motions aside (kT/nm^2); negative at a saddle."""
    n, n_particles, n_dims = x.shape
    size = n_particles * n_dims
    shifts = step * torch.eye(size, dtype=torch.float64).view(1, size, n_particles, n_dims)
    both = torch.cat([x[:, None] + shifts, x[:, None] - shifts], 1)
    _, gradient = target.reduced_potential_and_gradient(both.flatten(0, 1))
    plus, minus = gradient.view(n, 2, size, size).unbind(1)
    hessian = (plus - minus) / (2 * step)
    values = torch.linalg.eigvalsh(0.5 * (hessian + hessian.mT))
    n_rigid = n_dims + n_dims * (n_dims - 1) // 2
    # Rigid motions have eigenvalue zero up to rounding: the smallest in absolute value.
    order = values.abs().argsort(-1)
    return values.gather(1, order[:, n_rigid:]).amin(-1)
