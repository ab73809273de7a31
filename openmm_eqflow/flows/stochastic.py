r"""Stochastic normalizing flow: layers of an equivariant field, layers of Monte Carlo in turn.

A sample of the prior is carried from level to level by one step of the field and relaxed on each
by Hamiltonian Monte Carlo (:mod:`~openmm_eqflow.flows.softcore`). The marginal density q(x)
of such a flow is an integral over paths; what is known exactly is the ratio of the densities of a
path forwards, Q, and backwards, p R:

.. math:: \log w = -u(x) - \log \hat q, \qquad
          \hat q = e^{-u(x)}\,\frac{Q(\mathrm{path})}{p(x)\,R(\mathrm{path}\,|\,x)} \Big/ Z,
          \qquad E_R[\hat q(x)] = q(x)

(Wu, Köhler, Noé 2020, arXiv:2002.06707). log w is therefore an exact importance
weight, E[w] = Z, on the space of paths. Where another flow has log q, this one has
:math:`\log\hat q` of one path, and all that follows stays exact: a Metropolis chain that accepts
by it is a chain over pairs of x and path with the marginal p, whether the path of the present
state is kept or drawn anew from R (both leave p R invariant).

Equivariance: prior, field, energies and momenta are invariant under O(3) and permutations, and so
is q. Densities are with respect to Lebesgue measure on the mean-free subspace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.softcore import Batch, Levels, SoftCorePath
from openmm_eqflow.flows.softcore_fit import FittedPath, spline_tables
from openmm_eqflow.parallel import map_chunks
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.vector_fields.radial import RadialSplineField

__all__ = [
    "StochasticFlow",
]

_MAX_KNOTS = 513


class StochasticFlow(EquivariantFlow):
    """See the module docstring. Made by :meth:`from_fit`.

    Parameters
    ----------
    prior
        The ideal gas of ``path``: scale 1.
    vector_field
        Carries between the levels.
    path
        Energies of the levels.
    grid
        Times of the levels, increasing; the last is 1.
    timesteps
        Leapfrog step on each level, as many as there are levels.
    n_leapfrog
        Leapfrog steps of one trajectory; one trajectory per level.
    chunk_size
        Configurations moved together.

    Raises
    ------
    ConfigurationError
        The parts do not belong together.
    """

    def __init__(
        self,
        prior: MeanFreeGaussian,
        vector_field: RadialSplineField,
        *,
        path: SoftCorePath,
        grid: tuple[float, ...],
        timesteps: Sequence[float],
        n_leapfrog: int,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(prior, vector_field, grid=grid, chunk_size=chunk_size)
        if prior.n_dims != 3 or prior.scale != 1.0:
            raise ConfigurationError(
                "the prior of a stochastic flow is the ideal gas in the trap, scale 1 in three "
                f"dimensions; got {prior.scale} in {prior.n_dims}"
            )
        if len(self.grid) < 2 or self.grid[-1] != 1.0 or min(np.diff(self.grid)) <= 0.0:
            raise ConfigurationError("levels of a stochastic flow must increase up to t = 1")
        if len(timesteps) != len(self.grid) or min(timesteps) <= 0.0 or n_leapfrog < 1:
            raise ConfigurationError(
                f"a stochastic flow of {len(self.grid)} levels needs as many positive timesteps "
                f"and at least one leapfrog step; got {len(timesteps)} and {n_leapfrog}"
            )
        self.path, self.n_leapfrog = path, n_leapfrog
        self.timesteps = np.asarray(timesteps, dtype=np.float32)
        self.levels = self._levels()

    @classmethod
    def from_fit(
        cls,
        path: SoftCorePath,
        fit: FittedPath,
        *,
        n_particles: int,
        reach: float,
        n_levels: int,
        n_leapfrog: int,
        chunk_size: int = 256,
    ) -> StochasticFlow:
        """Spread ``n_levels`` levels evenly over what the fit leaves for relaxation to do."""
        steps = fit.residual[:-1] * np.diff(fit.times)
        done = np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-6))])
        grid = np.interp(np.linspace(0.0, done[-1], n_levels), done, fit.times)
        grid[0], grid[-1] = 0.0, 1.0
        knots = np.unique(
            fit.times[np.linspace(0, len(fit.times) - 1, _MAX_KNOTS).round().astype(int)]
        )
        field = RadialSplineField(
            n_particles=n_particles,
            n_dims=3,
            reach=reach,
            n_splines=fit.weights.shape[1],
            times=knots.tolist(),
        )
        at = np.searchsorted(fit.times, knots)
        with torch.no_grad():
            field.weight.copy_(torch.from_numpy(fit.weights[at]))
        return cls(
            MeanFreeGaussian(n_particles, 3, 1.0),
            field.eval(),
            path=path,
            grid=tuple(grid.tolist()),
            timesteps=np.interp(grid, fit.times, fit.timesteps).tolist(),
            n_leapfrog=n_leapfrog,
            chunk_size=chunk_size,
        )

    def on_levels(self, n_levels: int) -> StochasticFlow:
        """Return the same flow on another number of levels: more cost more and leave less."""
        grid = np.array(self.grid)
        place = np.linspace(0, len(grid) - 1, n_levels)
        times = np.interp(place, np.arange(len(grid)), grid)
        steps = np.interp(place, np.arange(len(grid)), self.timesteps)
        return self._changed(self.vector_field, times.tolist(), steps.tolist())

    def without_field(self) -> StochasticFlow:
        """Return the same levels with nothing between them: annealed importance sampling."""
        field = RadialSplineField(**self.vector_field.config)
        return self._changed(field, list(self.grid), self.timesteps.tolist())

    def _changed(self, field: Any, grid: list[float], timesteps: list[float]) -> StochasticFlow:
        prior: Any = self.prior
        return StochasticFlow(
            prior,
            field,
            path=self.path,
            grid=tuple(grid),
            timesteps=timesteps,
            n_leapfrog=self.n_leapfrog,
            chunk_size=self.chunk_size,
        )

    def _levels(self) -> Levels:
        grid = np.array(self.grid)
        field: Any = self.vector_field
        with torch.no_grad():
            middles = torch.from_numpy(0.5 * (grid[1:] + grid[:-1])).float()
            weights = field.coefficients(middles)[:, :-3].double().numpy()
        return Levels(
            self.path.levels(grid),
            spline_tables(weights * np.diff(grid)[:, None]),
            field.spacing,
            self.timesteps,
            self.n_leapfrog,
        )

    @property
    def device(self) -> torch.device:
        """The layers are compiled for the CPU."""
        return torch.device("cpu")

    def layers(self) -> dict[str, Any]:
        """JSON-able: what else than prior, field and grid defines the flow."""
        return {
            "path": self.path.to_dict(),
            "timesteps": [float(step) for step in self.timesteps],
            "n_leapfrog": self.n_leapfrog,
        }

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draw mean-free samples (n, N, 3) and :math:`\log\hat q` of their paths, (n,)."""
        draws = []
        for start in range(0, n, self.chunk_size):
            z = self.prior.sample_latent(min(self.chunk_size, n - start), generator=generator)
            draws.append((z, _new_stream(generator)))

        def run(draw: tuple[Tensor, np.random.Generator]) -> tuple[Tensor, Tensor]:
            z, rng = draw
            batch = Batch(z.numpy(), rng)
            log_prior = self.prior.latent_log_prob(z)
            work = batch.forward(self.levels)
            x = batch.positions()
            x -= x.mean(1, keepdims=True)
            return torch.from_numpy(x), self._log_q(log_prior, work, batch.u, failed=torch.inf)

        xs, log_qs = zip(*map_chunks(run, draws), strict=True)
        return torch.cat(xs), torch.cat(log_qs)

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Estimate :math:`\log\hat q` of positions (n, N, 3) by one path backwards each, (n,).

        Unbiased for q, not for log q: its mean is a lower bound. A path that fails gives -inf: the
        weight of the state is then infinite, and a chain stays there until another path is drawn.
        The random stream follows from
        the positions, so that the same call gives the same numbers.
        """

        def run(part: Tensor) -> Tensor:
            frames = np.ascontiguousarray(part.numpy())
            digest = hashlib.sha256(frames.tobytes()).digest()
            rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
            batch = Batch(frames - frames.mean(1, keepdims=True), rng)
            batch.set_level(self.levels.parameters[-1])
            u = batch.u.copy()
            work = batch.backward(self.levels)
            z = torch.from_numpy(batch.positions())
            return self._log_q(self.prior.latent_log_prob(z), work, u, failed=-torch.inf)

        parts = x.detach().to("cpu", torch.float64).split(self.chunk_size)
        return torch.cat(map_chunks(run, parts))

    @staticmethod
    def _log_q(
        log_prior: Tensor, work: NDArray[Any], u: NDArray[Any], *, failed: float
    ) -> Tensor:
        """Where a path failed: +inf for a draw (no weight), -inf for a state (it is kept)."""
        log_q = log_prior + torch.from_numpy(work - u.astype(np.float64))
        return torch.where(torch.isfinite(log_q), log_q, failed)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigurationError(
            "a stochastic flow has no latent point and no gradient of log q; take a flow without "
            "Monte Carlo layers for latent and annealed moves and for path gradients"
        )

    transform = latent_and_log_prob = rsample_and_log_prob = rsample = inverse = _refuse
    calibrate = _refuse


def _new_stream(generator: torch.Generator | None) -> np.random.Generator:
    words = torch.randint(0, 2**32, (4,), generator=generator, dtype=torch.int64)
    return np.random.default_rng(words.numpy())
