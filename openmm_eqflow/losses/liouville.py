r"""Liouville residual: train a flow between two overlapping densities without simulating it.

Along :math:`\log p_t = (1-t)\log p_0 + t\log p_1 - F(t)` the field that transports p_0 to p_1 obeys

.. math:: r_t(y) = \nabla\cdot v + v\cdot\nabla\log p_t + (\log w(y) - E_{p_t}[\log w]) = 0,
          \qquad \log w = \log p_1 - \log p_0

(Máté, Fleuret 2023, arXiv:2301.07388; NETS, arXiv:2410.02711). The residual vanishes *pointwise* for
the exact field: no irreducible noise, one field evaluation per sample, no ODE in training. The
points come from a pool: prior samples and reference frames, weighted by the balance heuristic
(Veach, Guibas 1995)

.. math:: \omega_t \propto \frac{p_t}{\alpha p_0 + (1-\alpha) p_1}
          \propto \frac{w^t}{\alpha + (1-\alpha) w / Z},

which is bounded wherever the prior is too thin. The pool only decides where the residual is made
small; it never biases the field it converges to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_eqflow.losses.pool import Pool, PoolFeeder, join_pools
from openmm_eqflow.vector_fields.base import VectorField

__all__ = ["LiouvilleLoss"]

_N_TIMES = 33


def _log_z(log_weight: Tensor, from_prior: Tensor) -> Tensor:
    """Bennett acceptance ratio between prior samples and frames: log Z (fixed-point iteration)."""
    forward, backward = log_weight[from_prior], log_weight[~from_prior]
    log_z = torch.logsumexp(forward, 0) - torch.log(torch.tensor(float(len(forward))))
    if not len(backward):
        return log_z
    # A frame counts as one sample: autocorrelation only makes this conservative.
    shift = torch.log(torch.tensor(len(backward) / len(forward), dtype=torch.float64))
    for _ in range(200):
        a = torch.nn.functional.logsigmoid(forward - log_z + shift)
        b = torch.nn.functional.logsigmoid(-(backward - log_z + shift))
        step = torch.logsumexp(a, 0) - torch.logsumexp(b, 0)
        log_z = log_z + 0.5 * step
        if abs(float(step)) < 1e-10:
            break
    return log_z


class LiouvilleLoss:
    """Mean Huber-damped squared residual over a growing pool; see the module docstring.

    Parameters
    ----------
    field
        Chart field (weights are what is trained).
    pool
        From :func:`~openmm_eqflow.losses.pool.build_pool`.
    held_out
        A pool of other points, for :meth:`validation`.
    feeder
        Source of fresh chunks; one is taken every ``grow_every`` steps.
    damping
        Residuals beyond this many kT count linearly.
    breadth
        Share of every batch drawn uniformly from the pool, for the tails.
    """

    def __init__(
        self,
        field: VectorField,
        pool: Pool,
        *,
        held_out: Pool | None = None,
        feeder: PoolFeeder | None = None,
        grow_every: int = 100,
        damping: float = 4.0,
        breadth: float = 0.1,
    ) -> None:
        self.field, self.damping, self.breadth = field, damping, breadth
        self.feeder, self.grow_every, self.n_grown = feeder, grow_every, 0
        self.held_out = None if held_out is None else LiouvilleLoss(field, held_out, breadth=0.0)
        self.set_pool(pool)

    def grow(self, step: int) -> None:
        """Take the chunks that are due at ``step`` (all earlier ones too, after a resume)."""
        fresh = []
        while self.feeder is not None and self.n_grown < step // self.grow_every:
            chunk = self.feeder.next()
            self.n_grown += 1
            if chunk is not None:
                fresh.append(chunk)
        if fresh:
            self.set_pool(join_pools(self.pool, *fresh))

    def set_pool(self, pool: Pool) -> None:
        """Replace the pool and its time-dependent weights."""
        self.pool = pool
        n0 = int(pool.from_prior.sum())
        alpha = n0 / len(pool.y)
        relative = pool.log_weight - _log_z(pool.log_weight, pool.from_prior)
        self.relative = relative.float()
        if alpha < 1:
            log_mixture = torch.logaddexp(
                torch.full_like(relative, alpha).log(), (relative + torch.tensor(1 - alpha).log())
            )
        else:
            log_mixture = torch.zeros_like(relative)
        self.times = torch.linspace(0, 1, _N_TIMES, dtype=torch.float64)
        weights = torch.softmax(self.times[:, None] * relative - log_mixture, dim=1)
        self.mean_log_weight = (weights @ relative).float()
        # One increasing table for all times: row k holds k + (cumulative weights), so that a single
        # searchsorted serves a batch of mixed times.
        cumulative = torch.cumsum(weights, 1)
        offset = torch.arange(_N_TIMES, dtype=torch.float64)[:, None]
        self.cumulative = (cumulative / cumulative[:, -1:] + offset).flatten()

    def to(self, device: torch.device | str) -> LiouvilleLoss:
        """Move pool and tables."""
        self.pool = Pool(*(v.to(device) for v in self.pool))
        for name in ("relative", "times", "mean_log_weight", "cumulative"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Indices into the pool and times, stratified over t in [0, 1]."""
        device = self.relative.device
        u = torch.rand(n, generator=generator, device=device)
        t = (torch.arange(n, device=device) + u) / n
        row = (t * (_N_TIMES - 1)).round().long()
        level = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        size = len(self.relative)
        index = torch.searchsorted(self.cumulative, level + row) - row * size
        index = index.clamp(0, size - 1)
        uniform = torch.randint(size, (n,), generator=generator, device=device)
        wide = torch.rand(n, generator=generator, device=device) < self.breadth
        return torch.where(wide, uniform, index), t

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
