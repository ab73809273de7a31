r"""Stochastic flow of a cluster: steps of a radial field between levels, Monte Carlo on each.

A sample of the ideal gas is carried from level to level by one step of the field and relaxed on
each by Hamiltonian Monte Carlo (:mod:`~openmm_eqflow.flows.softcore`): a
:class:`~openmm_eqflow.flows.path.Path` with exact weights of paths (Wu, Köhler, Noé 2020,
arXiv:2002.06707).

Equivariance: prior, field, energies and momenta are invariant under O(3) and permutations, and so
is q.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.path import Layer, Path
from openmm_eqflow.flows.softcore import SoftCoreMap, SoftCorePath, SoftCoreTrajectory
from openmm_eqflow.flows.softcore_fit import FittedPath, spline_tables
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.vector_fields.radial import RadialSplineField

__all__ = [
    "StochasticFlow",
]

_MAX_KNOTS = 513
_PILOT = 32  # paths on which the error of the midpoint's determinants is measured
_TOLERANCE = 0.002  # kT, of the worst of them: far below what the audit allows
_LEVELS = 24  # measured of many


class StochasticFlow(Path):
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
        Configurations moved together on the CPU.
    exact_determinants
        Whether log determinants are those of the maps' Jacobians instead of the midpoint's
        divergence, which is enough on many levels only; by default measured on a few paths.

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
        exact_determinants: bool | None = None,
    ) -> None:
        super().__init__(prior, (), chunk_size=chunk_size)
        self.vector_field = vector_field
        self.grid = tuple(float(t) for t in grid)
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
        self._layers = self._made(exact=False)
        if exact_determinants is None:
            exact_determinants = self._midpoint_error() > _TOLERANCE
        if exact_determinants:
            self._layers = self._made(exact=True)
        self.exact_determinants = exact_determinants

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

    def _made(self, *, exact: bool) -> tuple[Layer, ...]:
        grid = np.array(self.grid)
        field: Any = self.vector_field
        with torch.no_grad():
            middles = torch.from_numpy(0.5 * (grid[1:] + grid[:-1])).float().to(self.device)
            weights = field.coefficients(middles)[:, :-3].double().cpu().numpy()
        tables = spline_tables(weights * np.diff(grid)[:, None])
        on = [torch.from_numpy(v).to(self.device) for v in (tables, self.path.levels(grid))]
        maps: list[Layer] = [SoftCoreMap(v, field.spacing, exact=exact) for v in on[0].unbind()]
        kernels: list[Layer] = [
            SoftCoreTrajectory(level, float(timestep), self.n_leapfrog)
            for level, timestep in zip(on[1].unbind(), self.timesteps, strict=True)
        ]
        # The first step, from the prior, has no map: there is next to nothing to move.
        pairs = zip(maps, kernels[1:], strict=True)
        return (kernels[0], *itertools.chain.from_iterable(pairs))

    @property
    def maps(self) -> StochasticFlow:
        """What stands in the files as prior, field and grid."""
        return self

    inverse_corrections = 0

    @property
    def module(self) -> nn.Module:
        """The field as a torch module."""
        return self.vector_field

    @property
    def n_ode_steps(self) -> int:
        """Number of maps."""
        return len(self.grid) - 1

    @property
    def device(self) -> torch.device:
        """Where the layers compute: that of the field's weights."""
        return self.vector_field.weight.device

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """As for any path; rounding of the layers, which are float32, moves the centroid."""
        y, change = super().forward(y, streams)
        return remove_mean(y.double()), change

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """As for any path, with the points of the prior in float64."""
        y, change = super().backward(y, streams)
        return y.double(), change

    def stored_layers(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able: what else than prior, field and grid defines the flow."""
        words = {
            "path": self.path.to_dict(),
            "timesteps": [float(step) for step in self.timesteps],
            "n_leapfrog": self.n_leapfrog,
        }
        # Files of before have no such entry: their determinants are the midpoint's.
        return words | ({"exact_determinants": True} if self.exact_determinants else {}), {}

    @classmethod
    def from_layers(
        cls,
        prior: MeanFreeGaussian,
        vector_field: RadialSplineField,
        record: dict[str, Any],
    ) -> StochasticFlow:
        """Rebuild from a record that holds :meth:`stored_layers`."""
        words = record["layers"]
        return cls(
            prior,
            vector_field,
            path=SoftCorePath(**words["path"]),
            grid=tuple(record["grid"]),
            timesteps=words["timesteps"],
            n_leapfrog=words["n_leapfrog"],
            chunk_size=record["chunk_size"],
            exact_determinants=words.get("exact_determinants", False),
        )

    def describe_layers(self) -> str:
        """Say what the layers are."""
        return (
            f"{len(self.grid):,} levels, on each a Hamiltonian trajectory of {self.n_leapfrog} "
            "leapfrog steps (stochastic normalizing flow)"
        )

    def map_errors(
        self, n: int, x: Tensor | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Errors of ``n`` paths, from evenly chosen levels, scaled to all; each (n,).

        Returns
        -------
        dict
            ``against_jacobian``: of the log determinants in kT; ``sampling_against_log_prob``:
            forwards against backwards, kT; ``round_trip_nm``: largest deviation of a coordinate
            after a map and its inverse.
        """
        y = self.prior.sample_latent(n, generator=generator).to(self.device)
        streams = RowStreams.drawn(n, generator, self.device)
        maps = [layer for layer in self.layers if isinstance(layer, SoftCoreMap)]
        places = np.linspace(0, len(maps) - 1, min(_LEVELS, len(maps))).round().astype(int)
        chosen = {id(maps[k]) for k in places}
        wrong, back, gap = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        for layer in self.layers:
            before = y
            y, change = layer.forward(y, streams)
            if id(layer) not in chosen:
                continue
            assert isinstance(layer, SoftCoreMap)
            again, change_back = layer.backward(y, streams)
            wrong += (-change - layer.log_determinant(before)).cpu()
            back += (change - change_back).cpu()
            gap = torch.maximum(gap, (again - before).abs().amax((1, 2)).double().cpu())
        scale = len(maps) / len(chosen)
        return {
            "against_jacobian": wrong.abs() * scale,
            "sampling_against_log_prob": back.abs() * scale,
            "round_trip_nm": gap,
        }

    def _midpoint_error(self) -> float:
        if not bool(self.vector_field.weight.any()):
            return 0.0  # the maps are the identity
        with torch.no_grad():
            errors = self.map_errors(_PILOT, None, torch.Generator().manual_seed(0))
        return float(torch.nan_to_num(errors["against_jacobian"], nan=torch.inf).max())
