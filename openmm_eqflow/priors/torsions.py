r"""Densities of soft torsions on the torus, and the conformers that couple them.

Which basins of the soft torsions go together: weights of conformers.

Torsion groups of neighbouring residues are not independent (a helix is cooperative). The basins of
every group's density partition its grid; a *conformer* is one basin of every group. With
:math:`p_g(\cdot\,|\,b)` the density of group g restricted to the kernels of basin b,

.. math:: p(\tau) = \eta \prod_g p_g(\tau_g) + (1-\eta) \sum_c W_c \prod_g p_g(\tau_g\,|\,c_g),

a mixture over the conformers seen, :math:`W_c` their weights, and a share :math:`\eta` of
independent groups, from which conformers never seen get theirs.

Densities of soft torsions on the torus: wrapped kernel densities with a defensive floor.

Torsions come in groups (one torsion, or two that are coupled, such as phi and psi). The density of
a group is a mixture of wrapped Gaussian kernels centred on a regular grid,

.. math:: p(\tau) = (1-\epsilon) \sum_c P_c \prod_a K_h(m_a \tau_a - c_a)
          + \epsilon (2\pi)^{-d},

with respect to Lebesgue measure on :math:`[-\pi,\pi)^d`. A torsion with m-fold rotational symmetry
(a methyl group: m = 3) enters as m times its angle, so p is exactly m-fold periodic. Groups are
independent, or coupled through their basins (:mod:`~openmm_eqflow.priors.torsions`). The density
is smooth, sampled exactly, and bounded below.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.geometry import where_drawn
from openmm_eqflow.priors.zmatrix import wrap_angle

__all__ = [
    "Conformers",
    "TorsionDensity",
    "TorsionGroup",
    "find_basins",
]

_MOST = 256
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)  # of independent groups
_UNIFORM = 0.004  # of the basins, among those that half of the frames has


@dataclass(frozen=True)
class Conformers:
    """Weighted combinations of basins.

    Attributes
    ----------
    groups
        Indices of the torsion groups that have more than one basin.
    basins
        Basin of every grid cell of those groups, shape of their tables, int64.
    members
        Basin of each of those groups in each conformer, ``(n_conformers, len(groups))``.
    weights
        Weight of every conformer, positive, summing to one.
    independent
        Share of independent groups.
    """

    groups: tuple[int, ...]
    basins: tuple[Tensor, ...]
    members: Tensor
    weights: Tensor
    independent: float

    @classmethod
    def count(
        cls,
        groups: tuple[int, ...],
        basins: tuple[Tensor, ...],
        cells: np.ndarray,
        mass: np.ndarray,
        n_extra: int = 0,
    ) -> Conformers:
        r"""Count conformers.

        The share a of independent groups is that at which conformers c of one half of the frames
        propose those of the other half best, by what weights of samples would spread,
        :math:`\sum_c p(c)^2 / q_a(c)`: a combination that is not counted is proposed by that share
        alone, and carries much weight where it is small.

        Parameters
        ----------
        groups, basins
            As the attributes.
        cells
            Flat index of the grid cell of every frame in each of the groups,
            ``(n_frames, len(groups))``.
        mass
            Weight of every frame.
        n_extra
            Of them, at the end, are in both halves.
        """
        label = np.stack(
            [b.reshape(-1).numpy()[cells[:, k]] for k, b in enumerate(basins)], axis=1
        )
        members, index = np.unique(label, axis=0, return_inverse=True)
        weights = np.bincount(index.reshape(-1), weights=mass)
        order = np.argsort(-weights, kind="stable")
        order = order[: min(_MOST, int((weights > 0).sum()))]
        weights = weights[order] / weights.sum()
        # What was not seen: about one effective count for every conformer that was.
        effective = mass.sum() ** 2 / (mass**2).sum()
        unseen = len(order) / (len(order) + effective)
        return cls(
            groups,
            basins,
            torch.from_numpy(members[order]),
            torch.from_numpy(weights / weights.sum()),
            float(max(unseen, _independent(label, mass, len(label) - n_extra))),
        )

    def to(self, device: torch.device | str) -> Conformers:
        """Return the same with its tensors on ``device``."""
        return replace(
            self,
            basins=tuple(b.to(device) for b in self.basins),
            members=self.members.to(device),
            weights=self.weights.to(device),
        )

    @cached_property
    def n_basins(self) -> tuple[int, ...]:
        """Basins of each of those groups."""
        return tuple(int(cells.max()) + 1 for cells in self.basins)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw basins ``(n, len(groups))``, -1 for any."""
        device = where_drawn(generator)
        weights = self.weights.to(device)
        index = torch.multinomial(weights, n, replacement=True, generator=generator)
        free = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        members = self.members.to(device)[index]
        return torch.where((free < self.independent)[:, None], -1, members)

    def log_mixture(self, log_free: list[Tensor], log_basin: list[Tensor]) -> Tensor:
        """Log of the mixture, ``(n,)``.

        Parameters
        ----------
        log_free, log_basin
            Of every group: log density ``(n,)`` and log densities given each basin
            ``(n, n_basins)``.
        """
        log_weights = torch.log(self.weights).to(log_free[0])
        terms = log_weights.expand(len(log_free[0]), -1)
        for column, log_p in zip(self.members.to(log_weights.device).T, log_basin, strict=True):
            terms = terms + log_p[:, column]
        seen = np.log1p(-self.independent) + torch.logsumexp(terms, 1)
        return torch.logaddexp(seen, np.log(self.independent) + sum(log_free[1:], log_free[0]))

    def state(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """JSON-able configuration and tensors."""
        tensors = {"conformers.members": self.members.to(torch.uint8)}
        tensors["conformers.weights"] = self.weights
        for k, basins in zip(self.groups, self.basins, strict=True):
            tensors[f"conformers.basins.{k}"] = basins.to(torch.uint8)
        return {"groups": list(self.groups), "independent": self.independent}, tensors

    @classmethod
    def from_state(cls, config: dict[str, object], tensors: dict[str, Tensor]) -> Conformers:
        """Rebuild from :meth:`state`."""
        groups = tuple(int(k) for k in config["groups"])  # type: ignore[attr-defined]
        return cls(
            groups,
            tuple(tensors[f"conformers.basins.{k}"].long() for k in groups),
            tensors["conformers.members"].long(),
            tensors["conformers.weights"],
            float(config["independent"]),  # type: ignore[arg-type]
        )


def find_basins(density: np.ndarray, *, least: float = 0.005) -> np.ndarray:
    """Basin of every cell of a density on a periodic grid: where steepest ascent ends.

    Parameters
    ----------
    density
        Non-negative, smooth on the scale of the cells.
    least
        Smaller basins, as a share of the whole, go to the one with the nearest peak.

    Returns
    -------
    Number of the basin of every cell, from 0, shape of ``density``.
    """
    index = np.arange(density.size).reshape(density.shape)
    highest, target = density.copy(), index.copy()
    for shift in itertools.product((-1, 0, 1), repeat=density.ndim):
        axes = tuple(range(density.ndim))
        value, source = np.roll(density, shift, axes), np.roll(index, shift, axes)
        # Equal neighbours: the higher index wins, so that a flat top is one basin.
        higher = (value > highest) | ((value == highest) & (source > target))
        highest, target = np.where(higher, value, highest), np.where(higher, source, target)
    peak = target.reshape(-1)
    while not np.array_equal(peak[peak], peak):
        peak = peak[peak]
    peaks, label = np.unique(peak, return_inverse=True)
    mass = np.bincount(label, weights=density.reshape(-1))
    large = peaks[mass >= min(least * mass.sum(), mass.max())]
    place = np.stack(np.unravel_index(peaks, density.shape), axis=1)
    goal = np.stack(np.unravel_index(large, density.shape), axis=1)
    size = np.array(density.shape)
    apart = np.abs(place[:, None] - goal)
    nearest = np.argmin((np.minimum(apart, size - apart) ** 2).sum(2), axis=1)
    return nearest[label].reshape(density.shape).astype(np.int64)

_GRID = 72
_BASIN_WIDTH = 0.3  # rad: structure of a density finer than this is no basin of its own


def _kernel(delta: Tensor, width: Tensor) -> Tensor:
    """Evaluate a wrapped Gaussian; three images are exact to float64 for widths below 1 rad."""
    delta = wrap_angle(delta)
    total = torch.zeros_like(delta)
    for image in (-1, 0, 1):
        total = total + torch.exp(-0.5 * ((delta + 2 * math.pi * image) / width) ** 2)
    return total / (width * math.sqrt(2 * math.pi))


def _smooth(histogram: np.ndarray, width: float) -> np.ndarray:
    """Circular convolution of a density histogram with a Gaussian of ``width`` radians."""
    axes = np.meshgrid(*(np.fft.fftfreq(s, 1 / s) for s in histogram.shape), indexing="ij")
    damping = np.exp(-0.5 * width**2 * sum(a**2 for a in axes))
    return np.clip(np.fft.ifftn(np.fft.fftn(histogram) * damping).real, 0.0, None)


def _cells(tau: np.ndarray) -> np.ndarray:
    """Flat index of the grid cell of every point ``(n, d)``."""
    turn = np.remainder(tau + np.pi, 2 * np.pi) / (2 * np.pi)
    index = np.minimum((turn * _GRID).astype(np.int64), _GRID - 1)
    return np.ravel_multi_index(tuple(index.T), (_GRID,) * tau.shape[1])


def _histogram(tau: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    wrapped = np.remainder(tau + np.pi, 2 * np.pi) - np.pi
    edges = [np.linspace(-np.pi, np.pi, _GRID + 1)] * tau.shape[1]
    counts, _ = np.histogramdd(wrapped, bins=edges, weights=weights)
    return counts / counts.sum()


def _best_width(tau: np.ndarray, weights: np.ndarray | None) -> float:
    """Kernel width maximising the held-out log likelihood (interleaved blocks of frames)."""
    block = np.arange(len(tau)) * 10 // max(len(tau), 1) % 2
    halves = [
        _histogram(tau[block == b], None if weights is None else weights[block == b])
        for b in (0, 1)
    ]
    cell = (2 * np.pi / _GRID) ** tau.shape[1]

    def score(width: float) -> float:
        total = 0.0
        for train, test in (halves, halves[::-1]):
            density = 0.99 * _smooth(train, width) + 0.01 / train.size
            total += float((test * np.log(density / cell)).sum())
        return total

    return max((0.06, 0.08, 0.11, 0.15, 0.2, 0.28, 0.4), key=score)


@dataclass(frozen=True)
class TorsionGroup:
    """One or two coupled torsions: member indices, folds, kernel width and grid weights."""

    members: tuple[int, ...]
    fold: tuple[int, ...]
    width: float
    floor: float


class TorsionDensity:
    """Density of ``n_torsions`` soft torsions (see the module docstring).

    Parameters
    ----------
    groups
        The groups; every torsion belongs to exactly one.
    tables
        Grid weights of every group, non-negative, summing to one, shape ``(72,) * len(members)``.
    conformers
        Which basins go together; None for independent groups.
    """

    def __init__(
        self,
        groups: Sequence[TorsionGroup],
        tables: Sequence[Tensor],
        conformers: Conformers | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.conformers = conformers
        self.tables = tuple(t.to(torch.float64) for t in tables)
        self.n_torsions = sum(len(g.members) for g in self.groups)
        self.centres = -math.pi + (torch.arange(_GRID, dtype=torch.float64) + 0.5) * (
            2 * math.pi / _GRID
        )
        coupled = (
            () if conformers is None else zip(conformers.groups, conformers.basins, strict=True)
        )
        self._given_basin = {g: _split_basins(self.tables[g], basins) for g, basins in coupled}

    @classmethod
    def fit(
        cls,
        tau: Tensor,
        *,
        fold: Sequence[int],
        coupled: Sequence[tuple[int, int]] = (),
        weights: Tensor | None = None,
        extra: Tensor | None = None,
        extra_share: float = 0.04,
        floor: float = 0.004,
    ) -> TorsionDensity:
        """Fit to torsions ``(n_frames, n_torsions)``.

        Parameters
        ----------
        fold
            Rotational symmetry of each torsion.
        coupled
            Pairs that may be described jointly; a maximum-weight matching by mutual information
            picks among them.
        weights
            Weight of every frame (n_frames,); equal by default.
        extra
            Torsions of hotter frames: mixed in with share ``extra_share`` so that regions a short
            reference run missed are still proposed.
        floor
            Share of the uniform density in every group (defensive).
        """
        data = tau.detach().numpy()
        mass = None if weights is None else weights.detach().numpy()
        hot = None if extra is None or not len(extra) else extra.detach().numpy()
        graph = nx.Graph()
        for i, j in coupled:
            if fold[i] == 1 and fold[j] == 1:
                graph.add_edge(i, j, weight=_mutual_information(data[:, [i, j]], mass))
        pairs = [tuple(sorted(e)) for e in nx.max_weight_matching(graph)]
        singles = sorted(set(range(data.shape[1])) - set(itertools.chain(*pairs)))
        groups, tables = [], []
        for members in sorted(pairs) + [(k,) for k in singles]:
            folds = tuple(int(fold[k]) for k in members)
            angles = data[:, members] * np.array(folds)
            width = _best_width(angles, mass)
            table = _histogram(angles, mass)
            if hot is not None:
                hot_table = _smooth(_histogram(hot[:, members] * np.array(folds), None), width)
                table = (1 - extra_share) * table + extra_share * hot_table / hot_table.sum()
            groups.append(TorsionGroup(tuple(members), folds, width, floor))
            tables.append(torch.from_numpy(table))
        share = 0.0 if hot is None else extra_share
        return cls(groups, tables, _conformers(groups, tables, data, mass, hot, share))

    def log_prob(self, tau: Tensor) -> Tensor:
        """Log density, ``(n,)``, of torsions ``(n, n_torsions)`` in radians; differentiable."""
        total = torch.zeros(tau.shape[0], dtype=tau.dtype, device=tau.device)
        log_free, log_basin = [], []
        for g, (group, table) in enumerate(zip(self.groups, self.tables, strict=True)):
            kernels = self._kernels(g, tau)
            log_p = self._log_mixture(group, kernels, table[None])[:, 0]
            if g not in self._given_basin:
                total = total + log_p
                continue
            log_free.append(log_p)
            log_basin.append(self._log_mixture(group, kernels, self._given_basin[g]))
        if self.conformers is not None:
            total = total + self.conformers.log_mixture(log_free, log_basin)
        return total

    def basin_of_cell(self, g: int) -> Tensor | None:
        """Basin of every grid cell of a group that conformers couple; None of others."""
        if self.conformers is None or g not in self.conformers.groups:
            return None
        return self.conformers.basins[self.conformers.groups.index(g)]

    def n_basins(self, g: int) -> int:
        """Basins of a group that conformers couple; 1 of others."""
        if self.conformers is None or g not in self.conformers.groups:
            return 1
        return self.conformers.n_basins[self.conformers.groups.index(g)]

    def log_groups(self, tau: Tensor) -> Tensor:
        """Log density of every group by itself, ``(n, n_groups)``."""
        columns = [
            self._log_mixture(group, self._kernels(g, tau), table[None])[:, 0]
            for g, (group, table) in enumerate(zip(self.groups, self.tables, strict=True))
        ]
        return torch.stack(columns, 1) if columns else tau.new_zeros(len(tau), 0)

    def _kernels(self, g: int, tau: Tensor) -> list[Tensor]:
        """Kernels of every centre, ``(n, 72)``, for each torsion of group ``g``."""
        group, centres = self.groups[g], self.centres.to(tau)
        width = torch.full((), group.width, dtype=tau.dtype, device=tau.device)
        return [
            _kernel(m * tau[:, k, None] - centres, width)
            for k, m in zip(group.members, group.fold, strict=True)
        ]

    @staticmethod
    def _log_mixture(group: TorsionGroup, kernels: list[Tensor], tables: Tensor) -> Tensor:
        """Log density of a group under each of ``tables`` (m, 72, ...): ``(n, m)``."""
        weights = tables.to(kernels[0])
        if len(kernels) == 1:
            density = kernels[0] @ weights.T
        else:
            inner = kernels[0] @ weights.transpose(0, 1).flatten(1)
            density = torch.einsum(
                "nmb,nb->nm", inner.unflatten(1, weights.shape[::2]), kernels[1]
            )
        uniform = (2 * math.pi) ** -len(group.members)
        return torch.log((1 - group.floor) * density + group.floor * uniform)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, n_torsions)`` torsions in [-pi, pi), float64."""
        place: Any = {"dtype": torch.float64, "device": where_drawn(generator)}
        on = place["device"]
        centres = self.centres.to(on)
        tau = torch.empty(n, self.n_torsions, **place)
        basins: dict[int, Tensor] = {}
        if self.conformers is not None:
            drawn = self.conformers.sample(n, generator=generator)
            basins = dict(zip(self.conformers.groups, drawn.T, strict=True))
        for g, (group, table) in enumerate(zip(self.groups, self.tables, strict=True)):
            d = len(group.members)
            flat = table.reshape(-1).to(on)
            cell = torch.multinomial(flat, n, replacement=True, generator=generator)
            for b, inside in enumerate(self._given_basin.get(g, ())):
                here = torch.nonzero(basins[g] == b)[:, 0]
                flat = inside.reshape(-1).to(on)
                cell[here] = torch.multinomial(
                    flat, max(len(here), 1), replacement=True, generator=generator
                )[: len(here)]
            noise = torch.randn(n, d, generator=generator, **place)
            uniform = (torch.rand(n, d, generator=generator, **place) - 0.5) * (2 * math.pi)
            defensive = torch.rand(n, generator=generator, **place) < group.floor
            index = (cell,) if d == 1 else (cell // _GRID, cell % _GRID)
            for a, (k, m) in enumerate(zip(group.members, group.fold, strict=True)):
                angle = centres[index[a]] + group.width * noise[:, a]
                angle = torch.where(defensive, uniform[:, a], angle)
                sheet = torch.randint(m, (n,), generator=generator, device=on)
                tau[:, k] = wrap_angle((wrap_angle(angle) + 2 * math.pi * sheet) / m)
        return tau

    def to(self, device: torch.device | str) -> TorsionDensity:
        """Return the same density with its tensors on ``device``."""
        made = copy.copy(self)
        made.tables = tuple(t.to(device) for t in self.tables)
        made.centres = self.centres.to(device)
        made.conformers = None if self.conformers is None else self.conformers.to(device)
        made._given_basin = {g: t.to(device) for g, t in self._given_basin.items()}
        return made


def _split_basins(table: Tensor, basins: Tensor) -> Tensor:
    """Grid weights of a group given each of its basins, ``(n_basins, 72, ...)``."""
    rest = [1] * basins.ndim
    inside = basins == torch.arange(int(basins.max()) + 1).reshape(-1, *rest)
    parts = table * inside
    return parts / parts.flatten(1).sum(1).reshape(-1, *rest)


def _conformers(
    groups: Sequence[TorsionGroup],
    tables: Sequence[Tensor],
    data: np.ndarray,
    mass: np.ndarray | None,
    hot: np.ndarray | None,
    hot_share: float,
) -> Conformers | None:
    """Count the conformers of frames and of hot frames; None if fewer than two groups have any."""
    found = []
    for g, (group, table) in enumerate(zip(groups, tables, strict=True)):
        # The basins of a symmetric rotor are the same state.
        if max(group.fold) == 1:
            basins = find_basins(_smooth(table.numpy(), _BASIN_WIDTH))
            carry = np.bincount(basins.reshape(-1), weights=table.numpy().reshape(-1))
            if len(carry) > 1 and bool((carry > 0).all()):
                found.append((g, torch.from_numpy(basins)))
    if len(found) < 2:
        return None
    frames, weight = data, np.full(len(data), 1 / len(data)) if mass is None else mass
    if hot is not None:
        frames = np.concatenate([data, hot])
        hot_mass = np.full(len(hot), hot_share / len(hot))
        weight = np.concatenate([(1 - hot_share) * weight / weight.sum(), hot_mass])
    cells = np.stack([_cells(frames[:, groups[g].members]) for g, _ in found], axis=1)
    coupled, cut = tuple(g for g, _ in found), tuple(b for _, b in found)
    return Conformers.count(coupled, cut, cells, weight, 0 if hot is None else len(hot))


def _independent(label: np.ndarray, mass: np.ndarray, n: int) -> float:
    """Share of independent groups at which halves of the first ``n`` frames propose each other."""
    seen, index = np.unique(label, axis=0, return_inverse=True)
    every = np.bincount(index.reshape(-1), weights=mass) / mass.sum()
    place, spread = np.arange(len(label)), np.zeros(len(_SHARES))
    # Frames that follow one another are much the same: halves are not taken by turns.
    for own in (place < n // 2, place >= n // 2):
        other = ~own & (place < n)
        own = own | (place >= n)
        if mass[own].sum() <= 0.0 or mass[other].sum() <= 0.0:
            return _SHARES[0]
        given, wanted = (
            np.bincount(index.reshape(-1)[half], weights=mass[half], minlength=len(seen))
            / mass[half].sum()
            for half in (own, other)
        )
        free = np.ones(len(seen))
        for k, basin in enumerate(label.T):
            share = np.bincount(basin[own], weights=mass[own], minlength=basin.max() + 1)
            share = (1 - _UNIFORM) * share / share.sum() + _UNIFORM / len(share)
            free *= share[seen[:, k]]
        spread += [float(wanted @ (every / ((1 - a) * given + a * free))) for a in _SHARES]
    return _SHARES[int(np.argmin(spread))]


def _mutual_information(tau: np.ndarray, weights: np.ndarray | None) -> float:
    joint = _smooth(_histogram(tau, weights), 0.3)
    joint = joint / joint.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    mask = joint > 1e-12
    return float((joint[mask] * np.log(joint[mask] / product[mask])).sum()) + 1e-3
