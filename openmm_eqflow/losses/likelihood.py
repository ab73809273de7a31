r"""Negative log likelihood with the exact divergence.

.. math:: L = -E_{x \sim data}[\log q(x)], \qquad
          \log q(x) = \log p_0(z) - \mathrm{ladj} - \mathrm{log\_volume}(y), \quad z = T^{-1}(y)

(Köhler, Klein, Noé 2020; Chen et al. 2018, arXiv:1806.07366), up to the entropy of the data the
forward KL divergence. Any field with an exact divergence and any prior: the flow runs backwards
from the data in the prior's chart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.losses.solve import solve, uniform_grid
from openmm_eqflow.priors.base import Prior

__all__ = ["ChartData", "LikelihoodLoss", "require_exact"]

#: Validation points at most, and how many are integrated at once: every one is a whole solve.
N_VALIDATION = 512
VALIDATION_CHUNK = 128


def require_exact(field: nn.Module) -> None:
    """Refuse a field whose divergence is an estimate."""
    if not getattr(field, "exact_divergence", False):
        raise ConfigurationError(
            f"{type(field).__name__} estimates its divergence: its likelihood is not exact; use "
            "a field with an exact divergence"
        )


class ChartData:
    """Configurations in the chart of a prior: y (n, *event_shape) and log_volume (n,), float64.

    Raises
    ------
    ConfigurationError
        A configuration does not lie in the chart.
    """

    def __init__(self, prior: Prior, data: Tensor) -> None:
        self.y, self.log_volume = prior.from_cartesian(data.detach().double().cpu())
        finite = torch.isfinite(self.log_volume) & torch.isfinite(self.y).flatten(1).all(1)
        if not bool(finite.all()) or not len(data):
            raise ConfigurationError(
                f"{int((~finite).sum())} of {len(data)} configurations are outside the chart of "
                "the prior, expected none (and at least one configuration): fit the prior to "
                "these data"
            )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return ``n`` indices, drawn with replacement on the CPU."""
        return torch.randint(len(self.y), (n,), generator=generator)

    def spread(self, n: int) -> Tensor:
        """Return at most ``n`` indices, evenly spread over the data."""
        return torch.arange(0, len(self.y), max(1, -(-len(self.y) // n)))


class LikelihoodLoss:
    """Mean of -log q over batches of data; see the module docstring.

    Parameters
    ----------
    field
        Vector field with an exact divergence (its weights are what is trained).
    prior
        Prior with the field's ``event_shape``.
    data
        Equilibrium configurations (n, n_particles, n_dims), nm.
    held_out
        Configurations for :meth:`validation`; ``data`` if None.
    n_steps
        RK4 steps of a solve.
    """

    def __init__(
        self,
        field: nn.Module,
        prior: Prior,
        data: Tensor,
        *,
        held_out: Tensor | None = None,
        n_steps: int = 8,
    ) -> None:
        require_exact(field)
        self.field, self.prior = field, prior
        self.data = ChartData(prior, data)
        self.held_out = self.data if held_out is None else ChartData(prior, held_out)
        self.grid = uniform_grid(n_steps)

    def log_prob(self, y: Tensor, log_volume: Tensor) -> Tensor:
        """Log density (n,) of configurations with chart points ``y``; differentiable."""
        device = next(self.field.parameters()).device
        z, ladj = solve(self.field, y.to(device), self.grid, reverse=True)
        return self.prior.latent_log_prob(z) - ladj - log_volume.to(device)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q, in kT, over a batch of data."""
        index = self.data.draw(batch_size, generator)
        return -self.log_prob(self.data.y[index], self.data.log_volume[index]).mean()

    @torch.no_grad()
    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q over held-out data: the same configurations every time."""
        data = self.held_out
        index = data.spread(min(n, N_VALIDATION))
        return -torch.cat(
            [
                self.log_prob(data.y[part], data.log_volume[part])
                for part in index.split(VALIDATION_CHUNK)
            ]
        ).mean()
