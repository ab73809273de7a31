r"""Liouville residual: train a flow between two overlapping densities without simulating it.

Along :math:`\log p_t = (1-t)\log p_0 + t\log p_1 - F(t)` the field that transports p_0 to p_1
obeys

.. math:: r_t(y) = \nabla\cdot v + v\cdot\nabla\log p_t + (\log w(y) - E_{p_t}[\log w]) = 0,
          \qquad \log w = \log p_1 - \log p_0

(Máté, Fleuret 2023, arXiv:2301.07388; NETS, arXiv:2410.02711). The residual vanishes *pointwise*
for the exact field: no irreducible noise, one field evaluation per sample, no ODE in training. The
points come from a pool of prior samples and reference frames, and of whatever levels of the path
between them (:mod:`~openmm_eqflow.training.pool`), weighted for every t by the balance
heuristic (:mod:`openmm_eqflow.analysis.balance`). The pool only decides where the residual is made
small; it never biases the field it converges to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.analysis.balance import path_weights
from openmm_eqflow.training.pool import Pool, PoolFeeder, join_pools

__all__ = [
    "LiouvilleLoss",
]

_N_TIMES = 33


class LiouvilleLoss:
    """Mean Huber-damped squared residual over a growing pool; see the module docstring.

    Parameters
    ----------
    field
        Chart field (weights are what is trained).
    pool
        From :func:`~openmm_eqflow.training.pool.build_pool`.
    held_out
        A pool of other points, for :meth:`validation`.
    feeder
        Source of fresh chunks; one is taken every ``grow_every`` steps.
    capacity
        Points kept at most, the newest ones; 0 for all.
    damping
        Residuals beyond this many kT count linearly.
    breadth
        Share of every batch drawn uniformly from the pool, for the tails.
    """

    def __init__(
        self,
        field: nn.Module,
        pool: Pool,
        *,
        held_out: Pool | None = None,
        feeder: PoolFeeder | None = None,
        grow_every: int = 100,
        capacity: int = 0,
        damping: float = 4.0,
        breadth: float = 0.1,
    ) -> None:
        self.field: Any = field
        self.damping, self.breadth = damping, breadth
        self.feeder, self.grow_every, self.n_grown = feeder, grow_every, 0
        self.capacity = capacity
        self.held_out = None if held_out is None else LiouvilleLoss(field, held_out, breadth=0.0)
        self.set_pool(pool)

    def grow(self, step: int) -> None:
        """Take the chunks due at ``step`` (after a resume all that the pool still has)."""
        due = step // self.grow_every
        if self.feeder is None or due <= self.n_grown:
            return
        fresh = self.feeder.take(due, self.capacity)
        self.n_grown = due
        if fresh:
            device = self.pool.y.device
            here = [Pool(*(v.to(device) for v in pool)) for pool in fresh]
            joined = join_pools(self.pool, *here)
            self.set_pool(Pool(*(v[-self.capacity :] for v in joined)))

    def set_pool(self, pool: Pool) -> None:
        """Replace the pool and its time-dependent weights; moved to the device of the field."""
        device = next(self.field.parameters()).device
        pool = Pool(*(v.to(device) for v in pool))
        self.pool = pool
        times = torch.linspace(0, 1, _N_TIMES, dtype=torch.float64, device=device)
        relative, weights = path_weights(pool.log_weight, pool.level, times)
        self.relative = relative.float()
        self.mean_log_weight = (weights @ relative).float()
        # One increasing table for all times: row k holds k + (cumulative weights), so that a
        # single searchsorted serves a batch of mixed times.
        cumulative = torch.cumsum(weights, 1)
        offset = torch.arange(_N_TIMES, dtype=torch.float64, device=device)[:, None]
        self.cumulative = (cumulative / cumulative[:, -1:] + offset).flatten()

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw indices into the pool and times, stratified over t in [0, 1]."""
        # Drawn on the CPU whatever the device, so that a seed means the same everywhere.
        t = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        level = torch.rand(n, generator=generator, dtype=torch.float64)
        size = len(self.relative)
        uniform = torch.randint(size, (n,), generator=generator)
        wide = torch.rand(n, generator=generator) < self.breadth
        device = self.relative.device
        t, level, uniform, wide = (v.to(device) for v in (t, level, uniform, wide))
        row = (t * (_N_TIMES - 1)).round().long()
        index = torch.searchsorted(self.cumulative, level + row) - row * size
        return torch.where(wide, uniform, index.clamp(0, size - 1)), t

    def residual(self, index: Tensor, t: Tensor) -> Tensor:
        """Residual in kT at pool points ``index`` and times ``t``, (n,)."""
        score = torch.lerp(
            self.pool.score_prior[index], self.pool.score_target[index], t[:, None]
        )
        v, div = self.field.with_divergence(t, self.pool.y[index])
        position = t * (_N_TIMES - 1)
        low = position.floor().long().clamp(max=_N_TIMES - 2)
        mean = torch.lerp(
            self.mean_log_weight[low], self.mean_log_weight[low + 1], position - low
        )
        return div + (v * score).sum(1) + self.relative[index] - mean

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Scalar loss."""
        r = self.residual(*self.draw(batch_size, generator))
        return 2 * torch.nn.functional.huber_loss(r, torch.zeros_like(r), delta=self.damping)

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Undamped mean squared residual over ``n`` draws from the held-out pool."""
        held_out = self.held_out
        if held_out is None:
            return self(n, generator)
        r = held_out.residual(*held_out.draw(n, generator))
        return r.square().mean()
