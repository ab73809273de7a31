r"""Which basins of the soft torsions go together: weights of conformers.

Torsion groups of neighbouring residues are not independent (a helix is cooperative). The basins of
every group's density partition its grid; a *conformer* is one basin of every group. With
:math:`p_g(\cdot\,|\,b)` the density of group g restricted to the kernels of basin b,

.. math:: p(\tau) = \eta \prod_g p_g(\tau_g) + (1-\eta) \sum_c W_c \prod_g p_g(\tau_g\,|\,c_g),

a mixture over the conformers seen, :math:`W_c` their weights, and a share :math:`\eta` of
independent groups, from which conformers never seen get theirs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Conformers", "find_basins"]

_MOST = 256
_LEAST_INDEPENDENT = 0.05


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
    ) -> Conformers:
        """Count conformers.

        Parameters
        ----------
        groups, basins
            As the attributes.
        cells
            Flat index of the grid cell of every frame in each of the groups,
            ``(n_frames, len(groups))``.
        mass
            Weight of every frame.
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
            float(max(unseen, _LEAST_INDEPENDENT)),
        )

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw basins ``(n, len(groups))``, -1 for any."""
        index = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        free = torch.rand(n, generator=generator, dtype=torch.float64) < self.independent
        return torch.where(free[:, None], -1, self.members[index])

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
