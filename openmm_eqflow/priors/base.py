r"""What a prior is: an invariant density with an exact chart to Cartesian coordinates.

The flow runs in the prior's *latent coordinates* y (the identity for a Gaussian, whitened internal
coordinates for a molecule); ``to_cartesian`` maps them to mean-free positions. Densities of y are
with respect to Lebesgue measure on ``event_shape`` (for a Cartesian Gaussian: on its mean-free
subspace); ``log_volume`` converts them:

.. math:: \log p(x) = \log p(y) - \mathrm{log\_volume}(y),

where p(x) is normalised on the mean-free subspace of :math:`R^{N D}`, the uniform (Haar)
distribution of orientations included.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "Prior",
    "check_space",
]


@runtime_checkable
class Prior(Protocol):
    """An invariant prior; see the module docstring for measures."""

    n_particles: int
    n_dims: int

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one latent point."""
        ...

    def to(self, device: torch.device | str) -> Prior:
        """Return the same density with its tensors on ``device``."""
        ...

    def sample_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, *event_shape)`` latent points, float64."""
        ...

    def latent_log_prob(self, y: Tensor) -> Tensor:
        """Log density of latent points, ``(n,)``, differentiable."""
        ...

    def to_cartesian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to mean-free positions (n, N, D) and ``log_volume`` (n,), differentiable."""
        ...

    def from_cartesian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (any centroid, any orientation) to latent points and ``log_volume``."""
        ...

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw mean-free positions, randomly oriented, ``(n, n_particles, n_dims)``."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalised log density on the mean-free subspace, ``(n,)``."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able configuration and tensors from which ``from_state`` rebuilds the prior."""
        ...


def check_space(prior: Prior, target: object) -> None:
    """Refuse a target whose constraints are not those of the chart: the spaces differ.

    Raises
    ------
    ConfigurationError
        Naming the atoms of a bond that is free in one and held in the other.
    """
    mine, other = (getattr(end, "constraints", None) for end in (prior, target))
    lengths = [{} if held is None else held.lengths for held in (mine, other)]
    for pair in sorted({*lengths[0], *lengths[1]}):
        if abs(lengths[0].get(pair, math.inf) - lengths[1].get(pair, math.inf)) < 1e-6:
            continue
        first, second = (f"{c[pair]:.5f} nm" if pair in c else "free" for c in lengths)
        raise ConfigurationError(
            f"the bond of atoms {pair[0] + 1} and {pair[1] + 1} is {first} in the flow and "
            f"{second} in the System: train a flow for this System's constraints"
        )
    if mine is None or other is None:
        return
    for k, (a, b) in enumerate(zip(mine.masses, other.masses, strict=True)):
        if abs(a - b) > 1e-3:
            raise ConfigurationError(
                f"atom {k + 1} has a mass of {a:.3f} u in the flow and {b:.3f} u in the System, "
                "and with constraints masses enter the density: train a flow for these masses"
            )
