r"""Training pools: points of the chart with scores, and fresh ones of every level between.

Training pools: points of the chart with scores of prior and target.

Energies and forces dominate the cost of a pool, and OpenMM and numba release the interpreter lock,
so a feeder thread makes fresh chunks on one core while the network trains on the other. Chunk k
depends
on the seed and on k only, and is consumed at a fixed step: a resumed run sees the same data.

Fresh points of every density between prior and target, for a training pool that is renewed.

Samples of the prior and reference frames alone are few where :math:`p_t` with t near 1 has its
mass, and a network that sees them again and again learns them by heart. New ones are cheap: points
of the pool, resampled for :math:`p_{t_l} \propto p_0^{1-t_l} p_1^{t_l}` by the balance heuristic
(:mod:`openmm_eqflow.analysis.balance`), are moved by Hamiltonian Monte Carlo (Duane et al. 1987)
on

.. math:: H(y, v) = -(1-t_l)\,\log p_0(y) - t_l\,\log p_1(y) + \tfrac12 \sum_i v_i^2,
    \qquad \dot y_i = s_i v_i, \quad \dot v_i = s_i\, \partial_i \log p_{t_l}(y),

in the chart, where stiff coordinates are whitened. The scales :math:`s_i = \min_{t \in \{0,1\}}
E_{p_t}[(\partial_i \log p_t)^2]^{-1/2}` make one step size suit torsions too. Every state is
accepted with :math:`\min(1, e^{-\Delta H})`: that leaves every :math:`p_{t_l}` invariant, and the
scores, which the residual needs, come with the trajectories. Off the chart, and for the wrong
hand of a stereocentre, :math:`\log p_1 = -\infty`: rejected.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.analysis.balance import path_weights
from openmm_eqflow.flows.kernels import (
    Bridge,
    DifferentiablePotential,
    LevelState,
    latent_target,
    prior_score,
    tuned,
)
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import rank, share_tensors, world_size
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.seeds import child

__all__ = [
    "ChunkSource",
    "PathSampler",
    "Pool",
    "PoolFeeder",
    "build_pool",
    "join_pools",
    "share_pool",
]


class Pool(NamedTuple):
    """Points with scores: y, grad log p0, grad log p1 (n, d); log w (n,); level t (n,).

    Level 0 is a sample of the prior, level 1 a reference frame; others lie on the path between.
    """

    y: Tensor
    score_prior: Tensor
    score_target: Tensor
    log_weight: Tensor
    level: Tensor


#: Points evaluated at once, and coordinates (28 atoms) beyond which they get fewer.
_POINTS, _COORDINATES = 4096, 78


def build_pool(
    prior: Prior,
    target: DifferentiablePotential,
    *,
    n_prior: int,
    frames: Tensor | None = None,
    generator: torch.Generator | None = None,
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
        # The graph of a large molecule's chart is large too.
        for y in y_all.split(max(1, min(_POINTS, _POINTS * _COORDINATES // y_all.shape[1]))):
            log_p1, g1 = latent_target(prior, target, y)
            log_p0, g0 = prior_score(prior, y)
            rows.append((y, g0, g1, log_p1 - log_p0, torch.full_like(log_p0, level)))
    y, g0, g1, log_w, levels = (torch.cat(column) for column in zip(*rows, strict=True))
    keep = torch.isfinite(log_w) & torch.isfinite(g1).all(1) & torch.isfinite(g0).all(1)
    median = log_w[keep].median() if bool(keep.any()) else torch.zeros(())
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
        What makes them, such as :class:`~openmm_eqflow.training.pool.PathSampler`; samples of
        the prior by default.
    """

    def __init__(
        self,
        prior: Prior,
        target: DifferentiablePotential,
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
        generator = child(self.seed, "pool chunks", k)
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

_TUNING_POINTS = 96  # of every level


class PathSampler:
    """Makes chunks of fresh points of all levels; see the module docstring.

    Parameters
    ----------
    prior, target
        Both ends of the path.
    base
        Pool of prior samples and reference frames that trajectories start from.
    levels
        Number of levels besides 0, evenly spaced up to 1.
    prior_share
        Part of a chunk that is fresh samples of the prior.
    n_trajectories
        Trajectories from every start; the state after each is a point of the chunk.
    n_steps
        Leapfrog steps per trajectory.
    generator
        Random stream of the tuning of step sizes.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    #: Arguments a recipe may set.
    OPTIONS = ("levels", "prior_share", "n_trajectories", "n_steps")

    def __init__(
        self,
        prior: Prior,
        target: DifferentiablePotential,
        base: Pool,
        *,
        levels: int = 8,
        prior_share: float = 0.2,
        n_trajectories: int = 8,
        n_steps: int = 5,
        generator: torch.Generator,
    ) -> None:
        if min(levels, n_trajectories, n_steps) < 1 or not 0 < prior_share < 1:
            raise ValueError(
                f"levels {levels}, n_trajectories {n_trajectories}, n_steps {n_steps}, "
                f"prior_share {prior_share}: expected at least 1 each and a share between 0 and 1"
            )
        self.prior, self.target, self.base = prior, target, base
        self.bridge = Bridge(prior, target)
        self.prior_share, self.n_trajectories, self.n_steps = prior_share, n_trajectories, n_steps
        self.levels = torch.arange(1, levels + 1, dtype=torch.float64) / levels
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        _, weights = path_weights(base.log_weight, base.level, torch.cat([ends, self.levels]))
        self.scales = self._scales(weights[:2])
        self.cumulative = weights[2:].cumsum(1)
        self.step_sizes = self._tune(generator)

    def _scales(self, weights: Tensor) -> Tensor:
        """Scale of every coordinate from the scores at both ends, (d,)."""
        scores = torch.stack([self.base.score_prior, self.base.score_target]).double()
        return self.bridge.scales(torch.einsum("tn,tnd->td", weights, scores.square()).amax(0))

    def _start(
        self, per_level: int, generator: torch.Generator
    ) -> tuple[LevelState, Tensor, RowStreams]:
        """Draw points resampled for the levels, their number of level, and their streams."""
        which = torch.arange(len(self.levels)).repeat_interleave(per_level)
        u = torch.rand(len(self.levels), per_level, generator=generator, dtype=torch.float64)
        rows = torch.searchsorted(self.cumulative, u * self.cumulative[:, -1:])
        index = rows.flatten().clamp(max=len(self.base.y) - 1)
        streams = RowStreams.drawn(len(which), generator)
        return self.bridge.at(self.base.y[index].double()), which, streams

    def _move(
        self, state: LevelState, which: Tensor, sizes: Tensor, streams: RowStreams
    ) -> tuple[LevelState, Tensor]:
        return self.bridge.move(
            state,
            self.levels[which],
            step=sizes[which, None] * self.scales,
            n_steps=self.n_steps,
            streams=streams,
        )

    def _tune(self, generator: torch.Generator) -> Tensor:
        """Step size of every level, then frozen."""
        state, which, streams = self._start(_TUNING_POINTS, generator)

        def move(sizes: Tensor) -> Tensor:
            nonlocal state
            state, acceptance = self._move(state, which, sizes, streams)
            return acceptance.reshape(len(self.levels), -1).mean(1)

        return tuned(move, torch.full_like(self.levels, 0.3))

    def chunk(self, n: int, generator: torch.Generator) -> Pool:
        """Make about ``n`` points: samples of the prior, and states of all levels."""
        n_prior = round(self.prior_share * n)
        fresh = build_pool(self.prior, self.target, n_prior=n_prior, generator=generator)
        per_level = -(-(n - n_prior) // (self.n_trajectories * len(self.levels)))
        state, which, streams = self._start(per_level, generator)
        made = [fresh]
        for _ in range(self.n_trajectories):
            state, _ = self._move(state, which, self.step_sizes, streams)
            made.append(
                Pool(
                    state.y.float(),
                    state.score_prior.float(),
                    state.score_target.float(),
                    state.log_target - state.log_prior,
                    self.levels[which],
                )
            )
        pool = join_pools(*made)
        finite = torch.isfinite(pool.log_weight)  # a start may lie off the chart by round-off
        return Pool(*(v[finite] for v in pool))
