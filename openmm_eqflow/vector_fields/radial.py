r"""The kernel field of Köhler, Klein, Noé 2020 on splines: cheap, linear in its weights.

.. math::
    v_i = \sum_{j \ne i} r_{ij}\, \phi(d_{ij}, t), \qquad
    \phi(d, t) = \sum_m c_m(t)\, B_m(d), \qquad
    \nabla \cdot v = \sum_{i \ne j} \bigl[D\,\phi(d_{ij}, t) + d_{ij}\,\phi'(d_{ij}, t)\bigr],

B uniform cubic B-splines up to ``reach``, where phi goes to zero smoothly; c piecewise linear in
t. As a flow of its own the field is weak; between levels of
:class:`~openmm_eqflow.flows.stochastic.StochasticFlow` it does most of the transport, and being
linear in c it is fitted there by regression instead of gradient descent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.features import expand_time

__all__ = [
    "RadialSplineField",
]


@register_vector_field
class RadialSplineField(nn.Module):
    """Radial spline field of identical particles; O(D), translation and permutation equivariant.

    Parameters
    ----------
    n_particles, n_dims
        Shape of one configuration.
    reach
        Distance in nm beyond which pairs do not push each other.
    n_splines
        Splines, and intervals of length ``reach / n_splines``.
    times
        Increasing knots of c(t), at least two.

    Attributes
    ----------
    weight
        c at the knots, ``(n_times, n_splines)``, per unit of flow time.
    """

    exact_divergence = True
    knots: Tensor
    row: Tensor
    column: Tensor

    def __init__(
        self,
        *,
        n_particles: int,
        n_dims: int,
        reach: float,
        n_splines: int,
        times: Sequence[float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if n_particles < 2 or n_splines < 1 or not reach > 0.0:
            raise ConfigurationError(
                "a radial field needs n_particles >= 2, n_splines >= 1 and reach > 0, got "
                f"{n_particles}, {n_splines} and {reach}"
            )
        times = [float(t) for t in times]
        if len(times) < 2 or any(b <= a for a, b in itertools.pairwise(times)):
            raise ConfigurationError("times of a radial field must increase, at least two of them")
        self.config: dict[str, Any] = {
            "n_particles": n_particles,
            "n_dims": n_dims,
            "reach": float(reach),
            "n_splines": n_splines,
            "times": times,
        }
        self.event_shape: tuple[int, ...] = (n_particles, n_dims)
        row, column = torch.tril_indices(n_particles, n_particles, offset=-1)
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("column", column, persistent=False)
        self.register_buffer("knots", torch.tensor(times), persistent=False)
        self.spacing = float(reach) / n_splines
        self.weight = nn.Parameter(torch.zeros(len(times), n_splines))

    def coefficients(self, t: Tensor) -> Tensor:
        """Return c(t), three zeros appended, for times ``(b,)``: ``(b, n_splines + 3)``."""
        knots = self.knots.to(t)
        low = (torch.searchsorted(knots, t, right=True) - 1).clamp(0, len(knots) - 2)
        share = ((t - knots[low]) / (knots[low + 1] - knots[low])).clamp(0.0, 1.0)
        c = torch.lerp(self.weight[low], self.weight[low + 1], share[:, None].to(self.weight))
        return nn.functional.pad(c, (0, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity (nm per unit of flow time), mean-free, ``(batch, N, D)``."""
        return self._evaluate(t, y, with_divergence=False)[0]

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its closed-form divergence ``(batch,)``."""
        return self._evaluate(t, y, with_divergence=True)

    def _evaluate(self, t: Tensor, y: Tensor, *, with_divergence: bool) -> tuple[Tensor, Tensor]:
        c = self.coefficients(expand_time(t, y).reshape(-1)).expand(len(y), -1)
        r = y[:, self.row] - y[:, self.column]  # (batch, n_pairs, D)
        d = r.norm(dim=-1)
        last = c.shape[1] - 4
        scaled = d / self.spacing
        # Beyond the reach s = 1 of the last interval, whose value and slopes are zero.
        interval = scaled.detach().floor().clamp(0, last)
        s = (scaled - interval).clamp(max=1.0)
        first = interval.long()
        around = torch.stack([c.gather(1, first + k) for k in range(4)], -1)
        basis = torch.stack(
            [(1 - s) ** 3, 3 * s**3 - 6 * s**2 + 4, -3 * s**3 + 3 * s**2 + 3 * s + 1, s**3], -1
        )
        phi = (around * basis).sum(-1) / 6.0
        pull = r * phi.unsqueeze(-1)
        velocity = torch.zeros_like(y).index_add(1, self.row, pull)
        velocity = velocity.index_add(1, self.column, -pull)
        if not with_divergence:
            return velocity, velocity
        slope = torch.stack(
            [-3 * (1 - s) ** 2, 9 * s**2 - 12 * s, -9 * s**2 + 6 * s + 3, 3 * s**2], -1
        )
        phi_slope = (around * slope).sum(-1) / (6.0 * self.spacing)
        return velocity, 2.0 * (self.event_shape[1] * phi + d * phi_slope).sum(-1)
