r"""The mean-free Gaussian: the invariant prior of clusters.

.. math::
    \log p(x) = -\frac{|x|^2}{2 s^2} - \frac{(N-1) D}{2} \log 2 \pi s^2,
    \qquad \sum_i x_i = 0,

normalised with respect to Lebesgue measure on the mean-free subspace of dimension (N-1)D (Köhler,
Klein, Noé 2020, section 4: note N-1, not N). It is invariant under O(D) and every permutation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import remove_mean, where_drawn

__all__ = [
    "MeanFreeGaussian",
]


class MeanFreeGaussian:
    """Isotropic Gaussian on the mean-free subspace; implements ``Prior``.

    Parameters
    ----------
    n_particles, n_dims
        Shape of one configuration, at least two particles.
    scale
        Standard deviation s in nm of a coordinate before its mean is removed.
    """

    def __init__(self, n_particles: int, n_dims: int, scale: float) -> None:
        if n_particles < 2 or n_dims < 1:
            raise ConfigurationError(
                "a mean-free Gaussian needs at least two particles in one dimension, got "
                f"{n_particles} in {n_dims}"
            )
        if not (math.isfinite(scale) and scale > 0.0):
            raise ConfigurationError(f"the prior's scale must be positive and finite, got {scale}")
        self.n_particles = n_particles
        self.n_dims = n_dims
        self.scale = float(scale)
        self.event_shape = (n_particles, n_dims)

    @classmethod
    def fit(cls, x: Tensor) -> MeanFreeGaussian:
        r"""Maximum-likelihood scale from configurations ``x`` (n, N, D), centroids removed.

        .. math:: s^2 = \langle |x|^2 \rangle / (N - 1) D
        """
        if x.ndim != 3 or x.shape[0] < 1:
            raise ConfigurationError(
                "expected configurations of shape (n_samples, n_particles, n_dims), got "
                f"{tuple(x.shape)}"
            )
        _, n, n_dims = x.shape
        square = remove_mean(x.double()).square().sum(dim=(-2, -1)).mean()
        return cls(n, n_dims, float(square / ((n - 1) * n_dims)) ** 0.5)

    def to(self, device: torch.device | str) -> MeanFreeGaussian:
        """Return itself: there are no tensors."""
        return self

    def sample_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, N, D)`` mean-free points, float64."""
        noise = torch.randn(
            n,
            *self.event_shape,
            generator=generator,
            dtype=torch.float64,
            device=where_drawn(generator),
        )
        return remove_mean(noise) * self.scale

    def latent_log_prob(self, y: Tensor) -> Tensor:
        """Log density of mean-free points ``(n, N, D)``, shape ``(n,)``."""
        dimension = (self.n_particles - 1) * self.n_dims
        constant = 0.5 * dimension * math.log(2.0 * math.pi * self.scale**2)
        return -0.5 * (y / self.scale).square().sum(dim=(-2, -1)) - constant

    def to_cartesian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Identity, with ``log_volume`` 0."""
        return y, torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)

    def from_cartesian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the centroid; ``log_volume`` is 0."""
        return remove_mean(x), torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw mean-free positions; the Gaussian is isotropic, so their orientation is uniform."""
        return self.sample_latent(n, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalised log density on the mean-free subspace, ``(n,)``; any centroid."""
        return self.latent_log_prob(remove_mean(x))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the configuration for :meth:`from_state`; there are no tensors."""
        config = {
            "n_particles": self.n_particles,
            "n_dims": self.n_dims,
            "scale": self.scale,
        }
        return config, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> MeanFreeGaussian:
        """Rebuild from :meth:`state`."""
        if tensors:
            raise ConfigurationError(
                f"a mean-free Gaussian has no tensors, got {sorted(tensors)}; "
                "the file belongs to another prior"
            )
        return cls(**config)
