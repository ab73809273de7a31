r"""Training pools: points of the chart with scores of prior and target.

Energies and forces dominate the cost of a pool, and OpenMM and numba release the interpreter lock,
so a feeder thread makes fresh chunks on one core while the network trains on the other. Chunk k
depends
on the seed and on k only, and is consumed at a fixed step: a resumed run sees the same data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.distributed import rank, share_tensors, world_size
from openmm_eqflow.priors.base import Prior

__all__ = [
    "ChunkSource",
    "Pool",
    "PoolFeeder",
    "Target",
    "build_pool",
    "join_pools",
    "latent_target",
    "prior_score",
    "share_pool",
]


class Target(Protocol):
    """What the loss needs of a Boltzmann target."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        ...


class Pool(NamedTuple):
    """Points with scores: y, grad log p0, grad log p1 (n, d); log w (n,); level t (n,).

    Level 0 is a sample of the prior, level 1 a reference frame; others lie on the path between.
    """

    y: Tensor
    score_prior: Tensor
    score_target: Tensor
    log_weight: Tensor
    level: Tensor


def latent_target(
    prior: Prior,
    target: Target,
    y: Tensor,
    *,
    bound: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log density of the target in the chart and its gradient.

    .. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y)

    ``bound`` may replace u (n,) and du/dx (n, N, D) before they are used.
    """
    point = y.detach().requires_grad_(True)
    with torch.enable_grad():
        x, log_volume = prior.to_cartesian(point)
        finite = torch.isfinite(log_volume.detach())
        u, du = target.reduced_potential_and_gradient(x.detach())
        if bound is not None:
            u, du = bound(u, du)
        inner = (x * du).sum((1, 2))
        log_p = torch.where(finite, log_volume - inner, torch.zeros_like(inner)).sum()
        gradient = torch.autograd.grad(log_p, point)[0]
    value = torch.where(finite, log_volume.detach() - u, torch.full_like(u, -torch.inf))
    return value, gradient


def prior_score(prior: Prior, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of the prior (n,) and its gradient in the chart, without a graph."""
    with torch.enable_grad():
        point = y.detach().requires_grad_(True)
        log_p = prior.latent_log_prob(point)
        (gradient,) = torch.autograd.grad(log_p.sum(), point)
    return log_p.detach(), gradient


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
    sources: list[tuple[Tensor, float]] = []
    if n_prior:
        sources.append((prior.sample_latent(n_prior, generator=generator), 0.0))
    if frames is not None and len(frames):
        sources.append((prior.from_cartesian(frames.double())[0], 1.0))
    rows = []
    for y_all, level in sources:
        for y in y_all.split(chunk):
            log_p1, g1 = latent_target(prior, target, y)
            log_p0, g0 = prior_score(prior, y)
            rows.append((y, g0, g1, log_p1 - log_p0, torch.full_like(log_p0, level)))
    y, g0, g1, log_w, levels = (torch.cat(column) for column in zip(*rows, strict=True))
    keep = torch.isfinite(log_w) & torch.isfinite(g1).all(1) & torch.isfinite(g0).all(1)
    median = log_w[keep].median()
    keep &= (log_w > median + window[0]) & (log_w < median + window[1])
    return Pool(
        y[keep].float(), g0[keep].float(), g1[keep].float(), log_w[keep].double(), levels[keep]
    )


def join_pools(*pools: Pool) -> Pool:
    """Concatenate pools."""
    return Pool(*(torch.cat(columns) for columns in zip(*pools, strict=True)))


def share_pool(pool: Pool | None, source: int = 0) -> Pool:
    """Return the pool of process ``source`` in every process."""
    return Pool(**share_tensors(None if pool is None else pool._asdict(), source))


class ChunkSource(Protocol):
    """What makes a chunk of fresh points."""

    def chunk(self, n: int, generator: torch.Generator) -> Pool:
        """About ``n`` points that depend on the random stream only."""
        ...


class PoolFeeder:
    """Makes chunks of fresh points ahead of their use, in one background thread.

    Processes that train together take turns in making chunks and share them.

    Parameters
    ----------
    prior, target
        As for :func:`build_pool`.
    chunk
        Points per chunk.
    n_chunks
        How many chunks there will be in all.
    seed
        Chunk k uses the stream ``seed + k``.
    source
        What makes them, such as :class:`~openmm_eqflow.losses.annealed.PathSampler`; samples of
        the prior by default.
    """

    def __init__(
        self,
        prior: Prior,
        target: Target,
        *,
        chunk: int,
        n_chunks: int,
        seed: int,
        source: ChunkSource | None = None,
    ) -> None:
        self.prior, self.target, self.source = prior, target, source
        self.chunk, self.n_chunks, self.seed = chunk, n_chunks, seed
        self._executor = ThreadPoolExecutor(
            1, "pool-feeder", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._stop = threading.Event()
        self._pending: dict[int, Future[Pool]] = {}
        self._next = 0

    def _make(self, k: int) -> Pool:
        generator = torch.Generator().manual_seed(self.seed + k)
        if self.source is not None:
            return self.source.chunk(self.chunk, generator)
        return build_pool(self.prior, self.target, n_prior=self.chunk, generator=generator)

    def next(self) -> Pool | None:
        """Return the next chunk (waiting for it if need be), or None when all were handed out."""
        if self._next >= self.n_chunks:
            return None
        self.prefetch()
        owner = self._next % world_size()
        pool = self._pending.pop(self._next).result() if owner == rank() else None
        self._next += 1
        self.prefetch()
        return share_pool(pool, owner)

    def take(self, stop: int, capacity: int = 0) -> list[Pool]:
        """Return the chunks before number ``stop`` that were not handed out yet, in order.

        Of these a pool of ``capacity`` points (0: any number) keeps the newest only; those that it
        would drop are not made, which is what makes a late resume quick.
        """
        stop = min(stop, self.n_chunks)
        if not capacity or stop - self._next < 2:
            made = [self.next() for _ in range(self._next, stop)]
            return [pool for pool in made if pool is not None]
        taken: list[Pool] = []
        k = stop
        while k > self._next and sum(len(pool.y) for pool in taken) < capacity:
            k -= 1
            for coming in range(k, max(k - 3, self._next - 1), -1):
                self._submit(coming)
            owner = k % world_size()
            pool = self._pending.pop(k).result() if owner == rank() else None
            taken.insert(0, share_pool(pool, owner))
        for skipped in [k for k in self._pending if k < stop]:
            self._pending.pop(skipped).cancel()
        self._next = stop
        self.prefetch()
        return taken

    def prefetch(self, ahead: int = 3) -> None:
        """Start making the coming chunks."""
        for k in range(self._next, min(self._next + ahead, self.n_chunks)):
            self._submit(k)

    def _submit(self, k: int) -> None:
        mine = k % world_size() == rank()
        if mine and k not in self._pending and not self._stop.is_set():
            self._pending[k] = self._executor.submit(self._make, k)

    def close(self) -> None:
        """Stop the thread; a chunk under way is finished first."""
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
