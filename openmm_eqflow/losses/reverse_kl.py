r"""Reverse KL divergence: the flow's own samples against the energy, no data.

.. math:: L = E_{z \sim p_0}[\log q(T(z)) + u(T(z))] = KL(q \| p) - \log Z

(Noé, Olsson, Köhler, Wu 2019, "training by energy"), with reparameterised samples x = T(z): its
gradient takes forces. In the chart, where log q(y) = log p_0(z) - ladj and log p_1(y) = -u +
log_volume, no rotation is needed: both densities are invariant. The bound on the energy and what
becomes of invalid samples: :mod:`~openmm_eqflow.losses.chart_target`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_eqflow.losses.chart_target import ChartTarget
from openmm_eqflow.losses.likelihood import N_VALIDATION, VALIDATION_CHUNK, require_exact
from openmm_eqflow.losses.solve import solve, uniform_grid

__all__ = ["ReverseKLLoss"]


class ReverseKLLoss:
    """Mean of log q + u over samples of the flow, kT; see the module docstring.

    Parameters
    ----------
    field
        Vector field with an exact divergence (its weights are what is trained).
    target
        Target in the chart of the flow's prior.
    n_steps
        RK4 steps of a solve.
    """

    def __init__(self, field: nn.Module, target: ChartTarget, *, n_steps: int = 8) -> None:
        require_exact(field)
        self.field, self.target, self.prior = field, target, target.prior
        self.grid = uniform_grid(n_steps)

    def latents(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw (n, *event_shape) latent points, on the CPU whatever the device."""
        z = self.prior.sample_latent(n, generator=generator)
        return z.to(next(self.field.parameters()).device)

    def per_sample(self, z: Tensor) -> Tensor:
        """Return log q + u (n,) of the samples that ``z`` flows to; differentiable."""
        y, ladj = solve(self.field, z, self.grid)
        return self.prior.latent_log_prob(z) - ladj - self.target.log_prob(y)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of log q + u over a batch of fresh samples."""
        return self.per_sample(self.latents(batch_size, generator)).mean()

    @torch.no_grad()
    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Mean of log q + u over samples; the same generator state gives the same latents."""
        z = self.latents(min(n, N_VALIDATION), generator)
        parts = [ReverseKLLoss.per_sample(self, part) for part in z.split(VALIDATION_CHUNK)]
        return torch.cat(parts).mean()
