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

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.priors.base import Prior
from openmm_eqflow.vector_fields.base import VectorField

__all__ = ["LiouvilleLoss", "Pool", "Target", "build_pool", "latent_target"]

_N_TIMES = 33


class Target(Protocol):
    """What the loss needs of a Boltzmann target."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        ...


class Pool(NamedTuple):
    """Points with scores: y, grad log p0, grad log p1 (n, d); log w (n,); from the prior? (n,)."""

    y: Tensor
    score_prior: Tensor
    score_target: Tensor
    log_weight: Tensor
    from_prior: Tensor


def latent_target(prior: Prior, target: Target, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log density of the target in the chart and its gradient.

    .. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y)
    """
    point = y.detach().requires_grad_(True)
    with torch.enable_grad():
        x, log_volume = prior.to_cartesian(point)
        finite = torch.isfinite(log_volume.detach())
        u, du = target.reduced_potential_and_gradient(x.detach())
        inner = (x * du).sum((1, 2))
        log_p = torch.where(finite, log_volume - inner, torch.zeros_like(inner)).sum()
        gradient = torch.autograd.grad(log_p, point)[0]
    value = torch.where(finite, log_volume.detach() - u, torch.full_like(u, -torch.inf))
    return value, gradient


def build_pool(
    prior: Prior,
    target: Target,
    *,
    n_prior: int,
    frames: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 4096,
    window: tuple[float, float] = (-30.0, 30.0),
) -> Pool:
    """Evaluate a training pool: ``n_prior`` fresh prior samples and reference ``frames``.

    Points whose log weight lies outside ``window`` around the median (clashes: their gradients are
    astronomically large) are left out of the *training* pool; no weight is ever left out of an
    estimate.
    """
    sources: list[tuple[Tensor, bool]] = []
    if n_prior:
        sources.append((prior.sample_latent(n_prior, generator=generator), True))
    if frames is not None and len(frames):
        sources.append((prior.from_cartesian(frames.double())[0], False))
    rows = []
    for y_all, is_prior in sources:
        for y in y_all.split(chunk):
            log_p1, g1 = latent_target(prior, target, y)
            point = y.detach().requires_grad_(True)
            with torch.enable_grad():
                log_p0 = prior.latent_log_prob(point)
                g0 = torch.autograd.grad(log_p0.sum(), point)[0]
            log_w = log_p1 - log_p0.detach()
            rows.append((y, g0, g1, log_w, torch.full((len(y),), is_prior)))
    y, g0, g1, log_w, origin = (torch.cat(column) for column in zip(*rows, strict=True))
    keep = torch.isfinite(log_w) & torch.isfinite(g1).all(1) & torch.isfinite(g0).all(1)
    median = log_w[keep].median()
    keep &= (log_w > median + window[0]) & (log_w < median + window[1])
    return Pool(
        y[keep].float(), g0[keep].float(), g1[keep].float(), log_w[keep].double(), origin[keep]
    )


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
    """Mean Huber-damped squared residual over a pool; see the module docstring.

    Parameters
    ----------
    field
        Chart field (weights are what is trained).
    pool
        From :func:`build_pool`.
    damping
        Residuals beyond this many kT count linearly.
    breadth
        Share of every batch drawn uniformly from the pool, for the tails.
    """

    def __init__(
        self, field: VectorField, pool: Pool, *, damping: float = 4.0, breadth: float = 0.1
    ) -> None:
        self.field, self.damping, self.breadth = field, damping, breadth
        self.set_pool(pool)

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

    def __call__(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss."""
        r = self.residual(*self.draw(batch_size, generator))
        return 2 * torch.nn.functional.huber_loss(r, torch.zeros_like(r), delta=self.damping)
