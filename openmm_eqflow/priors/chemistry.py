r"""A prior from chemistry: no simulation beyond a few picoseconds around the minima.

What a molecule's torsions do is known before any simulation. A torsion about a bond that is in no
ring and not double turns freely: its density is uniform (threefold for a methyl). An amide has two
basins, cis and trans, whatever the structure at hand. All else is stiff: one Gaussian around the
minimum, or one for every ring conformer (and every way a pyramidal nitrogen points), with weights
by energy and width,

.. math:: W_c \propto e^{-u_c} \sqrt{\det\Sigma_c}.

Stereocentres, double bonds and prochiral labels stay as in the structure. Constrained bonds are no
coordinates of the Gaussians, and the dynamics around the minima keeps them.

No barrier of a torsion outside rings is crossed in getting there, so the height of none matters.
Ring conformers are those that dynamics at 1,000 to 3,000 K finds: one behind a barrier that stands
even there is missing, and shows only in a start from it. The density is far from the
target's; levels of a path (:func:`~openmm_eqflow.flows.relaxed.anneal`) make up for it, and
:mod:`~openmm_eqflow.flows.adapt` lowers their number.
"""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.observables import Torsion, torsion_angles
from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.priors.fit import (
    controlled_covariance,
    nearly_linear,
    shrunk_covariance,
    stiff_score,
    whitened_mixture,
)
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity, TorsionGroup
from openmm_eqflow.priors.zmatrix import InternalCoordinates, ZMatrix
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.dynamics import Minimum, find_minima, langevin
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.symmetry import elements
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "chemical_prior",
]

_AMIDE_WIDTH = 0.25  # rad
_CELLS = 72  # of a torsion density's grid
_WALKERS = 64
_FLOOR = 0.05  # of the weights of components, shared out evenly


def chemical_prior(
    target: BoltzmannTarget, *, cis_share: float = 0.05, seed: int = 0
) -> InternalCoordinatePrior:
    """Make a prior of a molecule from its bonds and a few picoseconds around its minima.

    Parameters
    ----------
    target
        Of a bonded molecule, with reference positions.
    cis_share
        Of every secondary amide; a half where neither side of the nitrogen is preferred.
    seed
        Of hot dynamics and of that around the minima.

    Raises
    ------
    UnsupportedSystemError
        No positions, not one bonded molecule, a constraint that is no bond of the Z-matrix, or no
        minimum with the hands of the positions.
    """
    if target.positions is None or target.n_dims != 3:
        raise UnsupportedSystemError(
            "a prior from chemistry is for a bonded molecule with a structure in three "
            "dimensions; this System is none"
        )
    n, generator = target.n_particles, child(seed, "chemistry")
    masses = torch.tensor([target.system.getParticleMass(k)._value for k in range(n)])
    zmatrix = ZMatrix.from_bonds(n, target.symmetry.bonds, masses=masses.tolist())
    isomers = find_isomers(target.system, target.topology, target.positions)
    about = {frozenset(t.atoms[1:3]): t for t in isomers.torsions if t.ring < 0}
    graph = nx.Graph(target.symmetry.bonds)
    in_ring = {frozenset(e) for e in graph.edges} - {frozenset(e) for e in nx.bridges(graph)}
    bonds = [frozenset(row[1:3]) for row in zmatrix.rows[3:]]
    soft = [
        k
        for k, bond in enumerate(bonds)
        if zmatrix.lead[k] == k
        and bond not in in_ring
        and not (bond in about and about[bond].kind == "double")
    ]
    kinds = elements(target.system, target.topology)
    quads = _telling(isomers.torsions, graph, kinds)
    minima = find_minima(
        target,
        torch.from_numpy(target.positions),
        masses,
        quads,
        sides=[t.atoms for t in isomers.torsions if t.kind == "double"],
        generator=generator,
    )
    if not minima:
        raise UnsupportedSystemError(
            "no minimum with the stereocentres and double bonds of the structure was found: "
            "check positions and force field"
        )
    groups, tables = [], []
    for k, which in enumerate(soft):
        torsion = about.get(bonds[which])
        amide = torsion is not None and torsion.kind == "amide"
        table = torch.full((_CELLS,), 1 / _CELLS, dtype=torch.float64)
        if torsion is not None and amide:
            nitrogen = next(a for a in torsion.atoms[1:3] if kinds[a] == 7)
            secondary = sum(kinds[a] == 1 for a in graph[nitrogen]) == 1
            share = cis_share if secondary else 0.5
            table = _two_basins(zmatrix, which, torsion, minima[0], kinds, share)
        floor = 0.0 if amide else 1.0
        groups.append(TorsionGroup((k,), (zmatrix.fold[which],), _AMIDE_WIDTH, floor))
        tables.append(table)
    minima, frames = _around(target, minima, quads, masses, generator)
    stiff = [k for k in range(len(zmatrix.lead)) if k not in set(soft)]
    return _with_stiff(
        target, zmatrix, soft, stiff, TorsionDensity(groups, tables) if soft else None, minima,
        frames,
    )  # fmt: skip


def _telling(
    torsions: tuple[Torsion, ...], graph: nx.Graph, kinds: list[int]
) -> list[tuple[int, int, int, int]]:
    """Torsions of flexible rings, and of nitrogens out of the plane of their neighbours."""
    quads = [t.atoms for t in torsions if t.ring >= 0]
    flat = {a for t in torsions if t.kind == "amide" for a in t.atoms[1:3]}
    for k, kind in enumerate(kinds):
        if kind == 7 and graph.degree[k] == 3 and k not in flat:
            a, b, c = sorted(graph[k])
            quads.append((a, b, c, k))
    return quads


def _two_basins(
    zmatrix: ZMatrix,
    which: int,
    torsion: Torsion,
    minimum: Minimum,
    kinds: list[int],
    share: float,
) -> Tensor:
    """Grid weights of an amide's torsion ``which``: cis gets ``share``."""
    here = float(zmatrix.to_internal(minimum.x[None]).torsions[0, which])
    cosine = math.cos(torsion_angles(minimum.x[None].numpy(), [torsion])[0, 0])
    ends = [torsion.atoms[0], torsion.atoms[3]]
    # Measured from the carbonyl oxygen cis and trans change places.
    trans = (cosine < 0) != any(kinds[a] == 8 for a in ends)
    table = torch.zeros(_CELLS, dtype=torch.float64)
    for angle, weight in ((here, 1 - share), (here + math.pi, share)):
        turn = math.remainder(angle if trans else angle + math.pi, 2 * math.pi) / (2 * math.pi)
        place = (turn + 0.5) * _CELLS - 0.5  # the two nearest kernels share the weight
        low = math.floor(place)
        table[low % _CELLS] += weight * (low + 1 - place)
        table[(low + 1) % _CELLS] += weight * (place - low)
    return table


def _around(
    target: BoltzmannTarget,
    minima: list[Minimum],
    quads: list[tuple[int, int, int, int]],
    masses: Tensor,
    generator: torch.Generator,
) -> tuple[list[Minimum], list[Tensor]]:
    """Frames around every minimum that are nearer to it than to any other; none, no minimum."""
    kept, frames = [], []
    for k, minimum in enumerate(minima):
        x = _local_frames(target, minimum, masses, generator)
        if quads and len(minima) > 1:
            angles = torsion_angles(x.numpy(), quads)
            apart = [np.cos(angles - m.torsions).sum(1) for m in minima]
            x = x[torch.from_numpy(np.argmax(apart, 0) == k)]
        if len(x) > 4 * target.n_particles or k == 0:
            kept.append(minimum)
            frames.append(x)
    return kept, frames


def _local_frames(
    target: BoltzmannTarget, minimum: Minimum, masses: Tensor, generator: torch.Generator
) -> Tensor:
    """Frames (n, N, 3) of dynamics from a minimum: a picosecond, then every fifth of one."""
    x = minimum.x.expand(_WALKERS, -1, -1)
    x = langevin(target, x, masses, n_steps=1000, generator=generator)
    frames = []
    for _ in range(max(8, -(-12 * target.n_particles // _WALKERS))):
        x = langevin(target, x, masses, n_steps=150, generator=generator)
        frames.append(x)
    return torch.cat(frames)


def _with_stiff(
    target: BoltzmannTarget,
    zmatrix: ZMatrix,
    soft: list[int],
    stiff: list[int],
    torsions: TorsionDensity | None,
    minima: list[Minimum],
    frames: list[Tensor],
) -> InternalCoordinatePrior:
    """Put Gaussians around the minima beside a density of soft torsions."""
    inside = [zmatrix.to_internal(x) for x in frames]
    pooled = InternalCoordinates(*(torch.cat(v) for v in zip(*inside, strict=True)))
    # Between the extremes of what the minima have: the chart ends half a turn away from it.
    centre = torch.angle(torch.polar(torch.ones_like(pooled.torsions), pooled.torsions).mean(0))
    n_held = 0 if target.constraints is None else len(target.constraints.lengths)
    n_stiff = 2 * target.n_particles - 3 + len(stiff) - n_held
    prior = InternalCoordinatePrior(
        zmatrix,
        soft=soft,
        centre=centre[stiff],
        modes=torch.zeros(0, len(soft)),
        coefficients=torch.zeros(1, n_stiff),
        cholesky=torch.eye(n_stiff),
        torsions=torsions,
        constraints=target.constraints,
    )
    prior.bends = nearly_linear(pooled.angles)
    means, covariances, log_weights = [], [], []
    for minimum, x, internal in zip(minima, frames, inside, strict=True):
        s, tau = prior.stiff_vector(internal), internal.torsions[:, soft]
        u, gradient = target.reduced_potential_and_gradient(x)
        usable = torch.isfinite(u) & torch.isfinite(s).all(1)
        s, tau, x, gradient = s[usable], tau[usable], x[usable], gradient[usable]
        residual, weights = s - s.mean(0), torch.full_like(s[:, 0], 1 / len(s))
        score = stiff_score(prior, s, tau, gradient, x)
        covariance = (
            controlled_covariance(residual, score, weights)
            if len(s) > 2 * n_stiff
            else shrunk_covariance(residual, 1)
        )
        means.append(s.mean(0))
        covariances.append(covariance)
        log_weights.append(-minimum.u + 0.5 * float(torch.logdet(covariance)))
    weights = torch.softmax(torch.tensor(log_weights, dtype=torch.float64), 0)
    weights = (1 - _FLOOR) * weights + _FLOOR / len(weights)
    mean = (weights[:, None] * torch.stack(means)).sum(0)
    prior.coefficients = mean[None]
    prior.cholesky = torch.linalg.cholesky(
        torch.einsum("c,cij->ij", weights, torch.stack(covariances))
    )
    if len(minima) > 1:
        prior.mixture = whitened_mixture(
            prior.cholesky, weights, torch.stack(means) - mean, torch.stack(covariances)
        )
    return prior
