r"""What Cartesian fields share: pair classes, fitted pair statistics, radial and time features.

A field may be equivariant under the permutations of exchangeable atoms and under no others, so
every pair of atoms carries a *pair class*: the unordered pair of atom classes together with the
bond-graph distance. Distances are standardised by the fitted mean and spread of their pair class,
so that a stiff bond (spread 0.003 nm) and a soft contact (0.3 nm) fill the same range, and pass
through asinh, which keeps that resolution near the mean and becomes logarithmic far from it. In a
cluster the mean distance is across the cluster, where little happens; there the resolution can be
put on contacts instead (``resolve="contacts"``), whatever the number of particles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import pair_vectors

__all__ = [
    "PairBasis",
    "PairField",
    "TimeFeatures",
    "expand_time",
    "fit_pair_statistics",
    "pair_classes",
]

N_WIDE = 3
# In nearest-neighbour distances: wells and shells of simple liquids are about this wide.
_CONTACT_SPREAD = 0.23
_CONTACT_LENGTH = 0.4


def pair_classes(
    classes: Sequence[int], bond_distances: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Class index of every pair of atoms, ``(n_particles, n_particles)``, symmetric.

    Parameters
    ----------
    classes
        Class of each atom; only atoms of equal class are exchangeable.
    bond_distances
        Number of bonds between each two atoms (symmetric); None for unbonded clusters.
    """
    n = len(classes)
    if bond_distances is not None and [len(row) for row in bond_distances] != [n] * n:
        raise ConfigurationError(
            f"bond_distances must be a {n} x {n} matrix to match {n} atom classes"
        )
    index: dict[tuple[int, int, int], int] = {}
    table = torch.zeros(n, n, dtype=torch.long)
    for i in range(n):
        for j in range(i):
            low, high = sorted((classes[i], classes[j]))
            bonds = 0 if bond_distances is None else bond_distances[i][j]
            table[i, j] = table[j, i] = index.setdefault((low, high, bonds), len(index))
    return table


def fit_pair_statistics(
    x: Tensor,
    classes: Sequence[int],
    bond_distances: Sequence[Sequence[int]] | None = None,
    *,
    resolve: str = "distances",
) -> dict[str, Any]:
    """Mean and spread of the distances in each pair class, as JSON-able keyword arguments.

    Parameters
    ----------
    x
        Configurations ``(n_samples, n_particles, n_dims)`` in nm, at least two.
    classes, bond_distances
        As in :func:`pair_classes`.
    resolve
        ``distances``: mean and standard deviation of all distances of a class, and of all classes
        for ``length``. ``contacts``, for clusters: the mean distance of nearest neighbours stands
        for the mean, and fixed fractions of it for spread and length.
    """
    if resolve not in ("distances", "contacts"):
        raise ConfigurationError(f"resolve is {resolve!r}, expected 'distances' or 'contacts'")
    if resolve == "contacts" and bond_distances is not None:
        raise ConfigurationError("resolve: contacts is for clusters; bonded atoms have distances")
    if x.ndim != 3 or x.shape[0] < 2 or x.shape[1] != len(classes):
        raise ConfigurationError(
            f"expected at least two configurations of {len(classes)} particles, got shape "
            f"{tuple(x.shape)}; pass data of shape (n_samples, n_particles, n_dims)"
        )
    table = pair_classes(classes, bond_distances)
    n = len(classes)
    row, column = torch.tril_indices(n, n, offset=-1)
    distances = pair_vectors(x[:10_000].double())[:, row, column].norm(dim=-1)
    labels = table[row, column]
    count = int(labels.max()) + 1 if len(labels) else 1
    if resolve == "contacts":
        between = distances.new_full((len(distances), n, n), torch.inf)
        between[:, row, column] = between[:, column, row] = distances
        contact = float(between.amin(-1).mean())
        return {
            "pair_mean": [contact] * count,
            "pair_spread": [_CONTACT_SPREAD * contact] * count,
            "length": _CONTACT_LENGTH * contact,
        }
    mean, spread = [], []
    for k in range(count):
        values = distances[:, labels == k]
        mean.append(float(values.mean()))
        spread.append(float(values.std().clamp_min(1e-3 * values.mean())))
    return {"pair_mean": mean, "pair_spread": spread, "length": float(distances.std())}


class PairField(nn.Module):
    """Base of fields whose inputs are standardised by :func:`fit_pair_statistics`."""

    @classmethod
    def fit(
        cls,
        x: Tensor,
        *,
        classes: Sequence[int],
        bond_distances: Sequence[Sequence[int]] | None = None,
        resolve: str = "distances",
        **sizes: Any,
    ) -> Self:
        """Build an untrained field whose inputs are normalised by the spread of data ``x``.

        ``resolve`` as in :func:`fit_pair_statistics`.
        """
        statistics = fit_pair_statistics(x, classes, bond_distances, resolve=resolve)
        return cls(
            classes=classes,
            n_dims=x.shape[-1],
            bond_distances=bond_distances,
            **statistics,
            **sizes,
        )

    @staticmethod
    def pair_config(
        classes: Sequence[int],
        n_dims: int,
        pair_mean: Sequence[float],
        pair_spread: Sequence[float],
        length: float,
        bond_distances: Sequence[Sequence[int]] | None,
    ) -> dict[str, Any]:
        """Entries of ``config`` that every such field has."""
        return {
            "classes": list(classes),
            "n_dims": n_dims,
            "pair_mean": list(pair_mean),
            "pair_spread": list(pair_spread),
            "length": length,
            "bond_distances": bond_distances and [list(row) for row in bond_distances],
        }


def expand_time(t: Tensor, y: Tensor) -> Tensor:
    """Shape time as ``(1,)`` (one time for the whole batch) or ``(batch,)``, in y's dtype."""
    t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
    if t.ndim == 0:
        return t.reshape(1)
    if t.ndim == 1 and t.shape[0] in (1, y.shape[0]):
        return t
    raise ValueError(
        f"time must be a scalar or ({y.shape[0]},) for a batch of {y.shape[0]}, "
        f"got shape {tuple(t.shape)}"
    )


class TimeFeatures(nn.Module):
    r"""Embed t in [0, 1]: :math:`\cos \pi k t, \sin \pi k t`, then a two-layer perceptron."""

    frequency: Tensor

    def __init__(self, width: int, n_frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequency", math.pi * torch.arange(1, n_frequencies + 1).float())
        self.network = nn.Sequential(
            nn.Linear(2 * n_frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Tensor) -> Tensor:
        """Map times ``(batch,)`` to features ``(batch, width)``."""
        phase = t[:, None] * self.frequency
        features: Tensor = self.network(torch.cat([phase.cos(), phase.sin()], dim=-1))
        return features


class PairBasis(nn.Module):
    r"""Radial basis of pair distances.

    With :math:`s = \operatorname{asinh}((d - \mu_p)/\sigma_p)` for a pair of class p, the basis
    is a comb of Gaussians :math:`\exp(-(s - s_k)^2 / 2 w_k^2)` plus ``N_WIDE`` broad ones that
    still tell distances apart far in the tails. The derivative with respect to d is exact
    everywhere.
    """

    mean: Tensor
    inverse_spread: Tensor
    centers: Tensor
    inverse_width: Tensor

    def __init__(
        self, table: Tensor, mean: Sequence[float], spread: Sequence[float], n_rbf: int
    ) -> None:
        super().__init__()
        n_classes = int(table.max()) + 1
        if len(mean) != n_classes or len(spread) != n_classes:
            raise ConfigurationError(
                f"{n_classes} pair classes need as many pair_mean and pair_spread values, got "
                f"{len(mean)} and {len(spread)}; fit them with fit_pair_statistics"
            )
        if n_rbf < 2:
            raise ConfigurationError(f"n_rbf must be at least 2, got {n_rbf}")
        mean_tensor = torch.tensor(mean, dtype=torch.float64)
        spread_tensor = torch.tensor(spread, dtype=torch.float64)
        low = float(torch.asinh(-mean_tensor / spread_tensor).max().clamp(-4.0, -2.0))
        centers = torch.linspace(low, 2.5, n_rbf)
        width = torch.full_like(centers, float(centers[1] - centers[0]))
        centers = torch.cat([centers, torch.tensor([-6.0, 0.0, 6.0])])
        width = torch.cat([width, torch.full((N_WIDE,), 6.0)])
        self.n_features = n_rbf + N_WIDE
        self.register_buffer("mean", mean_tensor[table].float())
        self.register_buffer("inverse_spread", spread_tensor[table].reciprocal().float())
        self.register_buffer("centers", (centers / width)[:, None, None])
        self.register_buffer("inverse_width", width.reciprocal()[:, None, None])

    def forward(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features ``(batch, n_features, N, N)`` and what ``derivative`` needs."""
        u = (d - self.mean) * self.inverse_spread
        z = torch.asinh(u).unsqueeze(-3) * self.inverse_width - self.centers
        return torch.exp(-0.5 * z * z), z, self.inverse_spread * torch.rsqrt(1.0 + u * u)

    def derivative(self, features: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        """Differentiate every feature by its distance."""
        return features * z * (slope.unsqueeze(-3) * -self.inverse_width)
