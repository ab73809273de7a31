r"""A mixture of Gaussians of the whitened stiff residuals: one for every ring conformer.

.. math:: \rho(z) = \sum_c W_c\, |\det C_c|^{-1}\, \rho_0(C_c^{-1}(z - m_c))

with :math:`\rho_0` the spherical density of a prior without components
(:mod:`openmm_eqflow.priors.internal`). The chart does not know of it: z stays what the pooled
covariance within conformers whitens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "StiffMixture",
]


@dataclass(frozen=True)
class StiffMixture:
    """Components of the stiff density.

    Attributes
    ----------
    weights
        Positive, summing to one, (m,).
    means, factors
        Centres (m, n_stiff) and lower triangular factors of the covariances
        (m, n_stiff, n_stiff), in z.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def to(self, device: torch.device | str) -> StiffMixture:
        """Return the same with its tensors on ``device``."""
        return replace(
            self,
            weights=self.weights.to(device),
            means=self.means.to(device),
            factors=self.factors.to(device),
        )

    def place(self, noise: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Carry draws of :math:`\rho_0` (n, n_stiff) to components drawn at random."""
        weights = self.weights.to(noise)
        which = torch.multinomial(weights, len(noise), replacement=True, generator=generator)
        factors, means = self.factors.to(noise), self.means.to(noise)
        return means[which] + torch.einsum("nij,nj->ni", factors[which], noise)

    def log_components(self, z: Tensor, radial: Callable[[Tensor], Tensor]) -> Tensor:
        r"""Log of every term of the sum, (n, m).

        ``radial`` gives :math:`\log\rho_0` from half the squared length of its argument.
        """
        away = (z[:, None] - self.means.to(z)).permute(1, 2, 0)
        factors = self.factors.to(z)
        own = torch.linalg.solve_triangular(factors, away, upper=False)
        log_scale = torch.log(torch.diagonal(factors, dim1=1, dim2=2)).sum(1)
        return radial(0.5 * own.square().sum(1)).T + torch.log(self.weights.to(z)) - log_scale

    def state(self) -> dict[str, Tensor]:
        """Tensors."""
        return {
            "components.weights": self.weights,
            "components.means": self.means,
            "components.factors": self.factors,
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> StiffMixture | None:
        """Rebuild from :meth:`state`; None where there are no components."""
        if "components.weights" not in tensors:
            return None
        return cls(*(tensors[f"components.{k}"] for k in ("weights", "means", "factors")))
