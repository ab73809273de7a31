r"""Many short simulations of one molecule at once: dynamics, quenches, minima told apart.

What a prior from chemistry needs to know of a molecule is local: its minima and the motion around
each. Langevin dynamics in the BAOAB splitting (Leimkuhler and Matthews 2013) and the fast inertial
relaxation engine (FIRE: Bitzek et al. 2006) move all walkers together through a target's batched
energies, constrained bonds kept. Nothing here needs to be exact: a prior may be wrong, weights are
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.targets.constraints import Constraints

__all__ = [
    "Minimum",
    "find_minima",
    "langevin",
    "quench",
]

_FRICTION = 5.0  # 1/ps
# kJ/mol: 1,000 K, and up to 3,000 K for rings that picoseconds at 1,000 K do not turn over, as of
# dithianes. Minima with another hand are no minima of the target.
_HOT = (8.31, 24.94)
_APART = 0.35  # rad by which some torsion of two minima differs
_HIGHEST = 12.0  # kT above the lowest minimum
_MOST = 12


class _Target(Protocol):
    kT: float

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, 3)."""
        ...


class Minimum(NamedTuple):
    """Reduced energy, positions (N, 3) nm, and the torsions (n_quads,) it is known by."""

    u: float
    x: Tensor
    torsions: np.ndarray


def langevin(
    target: _Target,
    x: Tensor,
    masses: Tensor,
    *,
    n_steps: int,
    generator: torch.Generator,
    ratio: float | Tensor = 1.0,
    timestep: float = 0.001,
) -> Tensor:
    """Carry walkers (n, N, 3) through ``n_steps`` steps of dynamics from fresh velocities.

    Parameters
    ----------
    target
        Reduced potential with gradient; its ``constraints``, if it has any, are kept.
    x, masses
        Positions in nm, masses (N,) in dalton.
    n_steps, timestep
        Steps, and the length of one in ps.
    generator
        Random stream.
    ratio
        Temperature over that of the target, or one of every walker (n, 1, 1).
    """
    mass = masses.double()[:, None]
    thermal = torch.sqrt(ratio * target.kT / mass)  # nm/ps
    keep = math.exp(-_FRICTION * timestep)
    kick, half = math.sqrt(1 - keep * keep), 0.5 * timestep

    held: Constraints | None = getattr(target, "constraints", None)

    def normal() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def drift(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (x + half * v, v) if held is None else held.drift(x, v, half)

    x = x.double()
    v = thermal * normal()
    force = -target.kT * target.reduced_potential_and_gradient(x)[1] / mass
    for _ in range(n_steps):
        x, v = drift(x, v + half * force)
        x, v = drift(x, keep * v + kick * thermal * normal())
        force = -target.kT * target.reduced_potential_and_gradient(x)[1] / mass
        v = v + half * force
    return x


def quench(target: _Target, x: Tensor, *, n_steps: int = 800) -> tuple[Tensor, Tensor]:
    """Positions (n, N, 3) near the minima below ``x``, and their reduced energies (n,)."""
    x, v = x.double(), torch.zeros_like(x, dtype=torch.float64)
    held: Constraints | None = getattr(target, "constraints", None)
    if held is not None:  # masses of one, as everything here has
        held = Constraints(held.lengths, [1.0] * x.shape[1])

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        u, gradient = target.reduced_potential_and_gradient(x)
        return u, gradient if held is None else held.tangent(x, gradient)

    dt = torch.full((len(x), 1, 1), 2e-4, dtype=torch.float64)
    blend, since = torch.full_like(dt, 0.1), torch.zeros_like(dt)
    u, gradient = slope(x)
    for _ in range(n_steps):
        downhill = -(v * gradient).sum((1, 2), keepdim=True) > 0
        length = v.square().sum((1, 2), keepdim=True).sqrt()
        steep = gradient.square().sum((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        v = torch.where(downhill, (1 - blend) * v - blend * length * gradient / steep, 0.0)
        since = torch.where(downhill, since + 1, 0.0)
        late = since > 5
        dt = torch.where(late, (1.1 * dt).clamp(max=2e-3), torch.where(downhill, dt, 0.5 * dt))
        blend = torch.where(downhill, torch.where(late, 0.99 * blend, blend), 0.1)
        v = v - dt * gradient
        step = dt * v
        # No atom moves further than a hundredth of a nanometre.
        far = step.abs().amax((1, 2), keepdim=True)
        step = step * (0.01 / far.clamp(min=0.01))
        x = x + step if held is None else held.drift(x, step, 1.0)[0]
        u, gradient = slope(x)
    return x, u


def find_minima(
    target: _Target,
    x: Tensor,
    masses: Tensor,
    quads: Sequence[tuple[int, int, int, int]],
    *,
    sides: Sequence[tuple[int, int, int, int]] = (),
    generator: torch.Generator,
    n_walkers: int = 60,
    picoseconds: float = 3.0,
) -> list[Minimum]:
    """Minima that differ in given torsions, the lowest first, by quenches of hot dynamics.

    Parameters
    ----------
    target, masses
        As for :func:`langevin`.
    x
        Positions (N, 3) to start from.
    quads
        Torsions that tell minima apart, such as those of rings; without any there is one minimum.
    sides
        Torsions that stay on the side (cis or trans) they are on: double bonds.
    generator
        Random stream.
    n_walkers, picoseconds
        Walkers at 1,000 to 3,000 K, and how long each runs; they are quenched twice on the way.
    """
    hot = torch.from_numpy(np.geomspace(*_HOT, n_walkers))[:, None, None]
    start, u = quench(target, x[None])
    if not quads:
        return [Minimum(float(u[0]), start[0], np.empty(0))]
    walkers, found = start.expand(n_walkers, -1, -1), [(start, u)]
    for _ in range(2):
        walkers = langevin(
            target,
            walkers,
            masses,
            n_steps=round(500 * picoseconds),
            generator=generator,
            ratio=hot / target.kT,
        )
        lost = ~torch.isfinite(target.reduced_potential_and_gradient(walkers)[0])
        walkers = torch.where(lost[:, None, None], start, walkers)
        found.append(quench(target, walkers))
    x, u = (torch.cat(column) for column in zip(*found, strict=True))
    angles = torsion_angles(x.numpy(), list(quads))
    right = torch.isfinite(u).numpy()
    if sides:
        side = np.cos(torsion_angles(x.numpy(), list(sides))) > 0
        right &= (side == side[0]).all(1)
    minima: list[Minimum] = []
    for k in np.argsort(u.numpy(), kind="stable"):
        if not right[k] or float(u[k]) > float(u[right].min()) + _HIGHEST:
            continue
        if all(_distance(angles[k], m.torsions) > _APART for m in minima):
            minima.append(Minimum(float(u[k]), x[k], angles[k]))
    return minima[:_MOST]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.angle(np.exp(1j * (a - b)))).max())
