r"""Fresh points of every density between prior and target, for a training pool that is renewed.

Samples of the prior and reference frames alone are few where :math:`p_t` with t near 1 has its
mass, and a network that sees them again and again learns them by heart. New ones are cheap: points
of the pool, resampled for :math:`p_{t_l} \propto p_0^{1-t_l} p_1^{t_l}` by the balance heuristic
(:mod:`openmm_eqflow.balance`), are moved by Hamiltonian Monte Carlo (Duane et al. 1987) on

.. math:: H(y, v) = -(1-t_l)\,\log p_0(y) - t_l\,\log p_1(y) + \tfrac12 \sum_i v_i^2,
    \qquad \dot y_i = s_i v_i, \quad \dot v_i = s_i\, \partial_i \log p_{t_l}(y),

in the chart, where stiff coordinates are whitened. The scales :math:`s_i = \min_{t \in \{0,1\}}
E_{p_t}[(\partial_i \log p_t)^2]^{-1/2}` make one step size suit torsions too. Every state is
accepted with :math:`\min(1, e^{-\Delta H})`: that leaves every :math:`p_{t_l}` invariant, and the
scores, which the residual needs, come with the trajectories. Off the chart, and for the wrong
hand of a stereocentre, :math:`\log p_1 = -\infty`: rejected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_eqflow.balance import path_weights
from openmm_eqflow.losses.pool import (
    Pool,
    Target,
    build_pool,
    join_pools,
    latent_target,
    prior_score,
)
from openmm_eqflow.priors.base import Prior

__all__ = ["PathSampler", "PathState", "path_trajectory"]

_AIM = 0.85  # acceptance
_LONGEST = 2.0  # scale of a coordinate that feels no force, such as a free rotor
_TUNING_ROUNDS = 12
_TUNING_POINTS = 96  # of every level


class PathState(NamedTuple):
    """Points (n, d) float64 with log p0 and log p1 (n,) and the gradients of both (n, d)."""

    y: Tensor
    log_prior: Tensor
    log_target: Tensor
    score_prior: Tensor
    score_target: Tensor

    @classmethod
    def at(cls, prior: Prior, target: Target, y: Tensor) -> PathState:
        """Evaluate both densities; where there is no energy, log p1 is -inf and its score 0."""
        log_target, score_target = latent_target(prior, target, y)
        log_prior, score_prior = prior_score(prior, y)
        valid = torch.isfinite(log_target) & torch.isfinite(score_target).all(1)
        return cls(
            y,
            log_prior,
            torch.where(valid, log_target, -torch.inf),
            score_prior,
            torch.where(valid[:, None], score_target, 0.0),
        )

    def where(self, mask: Tensor, other: PathState) -> PathState:
        """Rows of ``self`` where ``mask``, else of ``other``."""
        wide = mask[:, None]
        return PathState(
            *(
                torch.where(wide if a.ndim == 2 else mask, a, b)
                for a, b in zip(self, other, strict=True)
            )
        )

    def log_prob(self, t: Tensor) -> Tensor:
        """Unnormalised log p_t (n,) for times (n,)."""
        return self.log_prior + t * (self.log_target - self.log_prior)

    def score(self, t: Tensor) -> Tensor:
        """Gradient of log p_t (n, d) for times (n,)."""
        return torch.lerp(self.score_prior, self.score_target, t[:, None])


def path_trajectory(
    prior: Prior,
    target: Target,
    state: PathState,
    t: Tensor,
    *,
    step: Tensor,
    n_steps: int,
    generator: torch.Generator,
) -> tuple[PathState, Tensor]:
    r"""One Metropolised trajectory of every point on its own level.

    Parameters
    ----------
    prior, target
        Both ends of the path.
    state
        Where the points are.
    t
        Levels, (n,), more than 0.
    step
        Leapfrog steps :math:`\epsilon s_i`, (n, d) in units of y.
    n_steps
        Leapfrog steps of the trajectory.
    generator
        Random stream.

    Returns
    -------
    tuple
        New states, rejected rows unchanged bit for bit, and acceptance probabilities (n,).
    """
    velocity = torch.randn(state.y.shape, generator=generator, dtype=state.y.dtype)
    start = state.log_prob(t) - 0.5 * velocity.square().sum(1)
    new = state
    for _ in range(n_steps):
        velocity = velocity + 0.5 * step * new.score(t)
        new = PathState.at(prior, target, new.y + step * velocity)
        velocity = velocity + 0.5 * step * new.score(t)
    log_ratio = new.log_prob(t) - 0.5 * velocity.square().sum(1) - start
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    level = torch.rand(len(t), generator=generator, dtype=state.y.dtype).log()
    return new.where(level < log_ratio, state), log_ratio.clamp(max=0).exp()


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
        target: Target,
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
        squares = torch.einsum("tn,tnd->td", weights, scores.square()).amax(0)
        return squares.rsqrt().clamp(max=_LONGEST)

    def _start(self, per_level: int, generator: torch.Generator) -> tuple[PathState, Tensor]:
        """Draw points resampled for the levels, and their number of level, level by level."""
        which = torch.arange(len(self.levels)).repeat_interleave(per_level)
        u = torch.rand(len(self.levels), per_level, generator=generator, dtype=torch.float64)
        rows = torch.searchsorted(self.cumulative, u * self.cumulative[:, -1:])
        index = rows.flatten().clamp(max=len(self.base.y) - 1)
        return PathState.at(self.prior, self.target, self.base.y[index].double()), which

    def _move(
        self, state: PathState, which: Tensor, sizes: Tensor, generator: torch.Generator
    ) -> tuple[PathState, Tensor]:
        return path_trajectory(
            self.prior,
            self.target,
            state,
            self.levels[which],
            step=sizes[which, None] * self.scales,
            n_steps=self.n_steps,
            generator=generator,
        )

    def _tune(self, generator: torch.Generator) -> Tensor:
        """Step size of every level at which the acceptance is about ``_AIM``, then frozen."""
        state, which = self._start(_TUNING_POINTS, generator)
        log_size = torch.full_like(self.levels, 0.3).log()
        history = []
        for k in range(_TUNING_ROUNDS):
            state, acceptance = self._move(state, which, log_size.exp(), generator)
            history.append(log_size)
            mean = acceptance.reshape(len(self.levels), -1).mean(1)
            log_size = log_size + (1.5 if k < _TUNING_ROUNDS // 2 else 0.5) * (mean - _AIM)
        return torch.stack(history[_TUNING_ROUNDS // 2 :]).mean(0).exp()

    def chunk(self, n: int, generator: torch.Generator) -> Pool:
        """Make about ``n`` points: samples of the prior, and states of all levels."""
        n_prior = round(self.prior_share * n)
        fresh = build_pool(self.prior, self.target, n_prior=n_prior, generator=generator)
        per_level = -(-(n - n_prior) // (self.n_trajectories * len(self.levels)))
        state, which = self._start(per_level, generator)
        made = [fresh]
        for _ in range(self.n_trajectories):
            state, _ = self._move(state, which, self.step_sizes, generator)
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
