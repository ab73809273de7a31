r"""Fit field and levels in one pass of a population along the path, without data or gradients.

On every level the field that would leave nothing to relax obeys

.. math:: \partial_t u - E[\partial_t u] = \nabla\cdot v - v\cdot\nabla u

(the Liouville residual of :mod:`~openmm_eqflow.training.liouville`), linear in its weights: ridge
regression over the population and the levels just passed gives them, and what it leaves, r, gives
the next step, :math:`\Delta t = \mathrm{stride} / \mathrm{std}(r)`. Levels are then equally far
apart in what relaxation has to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.errors import TrainingError
from openmm_eqflow.flows import softcore_kernels as kernels
from openmm_eqflow.flows.softcore import (
    SoftCoreMap,
    SoftCorePath,
    SoftCoreTrajectory,
    energy_and_force,
)
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.parallel import map_chunks

__all__ = [
    "FittedPath",
    "fit_path",
    "spline_tables",
]

Floats = NDArray[np.floating[Any]]
_ACCEPTANCE = 0.85
_MAX_STEP = 0.01
_RIDGE = 1e-3


class FittedPath(NamedTuple):
    """Columns over the levels of the fit; the last has t = 1.

    Attributes
    ----------
    times
        (n,), from 0 to 1.
    weights
        (n, n_splines): c(t) of :class:`~openmm_eqflow.vector_fields.radial.RadialSplineField`.
    timesteps
        (n,): leapfrog steps that were accepted about six times out of seven.
    spread, residual
        (n,): standard deviations of du/dt, and of what the field leaves of it in the batch that
        was held out of the regression, kT per unit t.
    acceptance
        (n,): of the Hamiltonian trajectories.
    """

    times: Floats
    weights: Floats
    timesteps: Floats
    spread: Floats
    residual: Floats
    acceptance: Floats


def spline_tables(weights: Floats) -> Floats:
    """Polynomials (..., n_splines, 4) of the splines with weights (..., n_splines), float32."""
    padded = np.concatenate([weights, np.zeros((*weights.shape[:-1], 3))], -1)
    n = weights.shape[-1]
    c = np.stack([padded[..., k : k + n] for k in range(4)], -1)
    to_polynomial = np.array(
        [[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]], dtype=float
    )
    return (c @ to_polynomial.T / 6.0).astype(np.float32)


def fit_path(
    path: SoftCorePath,
    batches: list[tuple[Tensor, RowStreams]],
    *,
    spacing: float,
    n_splines: int,
    stride: float,
    n_leapfrog: int,
    memory: float = 0.7,
    timestep: float = 0.1,
    progress: Callable[[float, str], None] | None = None,
) -> FittedPath:
    """Carry prior samples to t = 1 and fit on the way.

    Parameters
    ----------
    batches
        Samples of the ideal gas (n, N, 3) with their random streams, at least two batches; the
        last is held out of the regression.
    stride
        Standard deviation in kT of what relaxation has to do on each level.
    memory
        Weight of the levels just passed in the regression, per level.
    timestep
        First leapfrog step; adapted to an acceptance of about 0.85.

    Raises
    ------
    TrainingError
        Energies along the path are not finite.
    """
    t, step = 0.0, timestep
    rows: list[tuple[float, Floats, float, float, float, float]] = []
    gram, moment = np.zeros((n_splines, n_splines)), np.zeros(n_splines)
    table: Floats | None = None
    while True:
        level = path.levels(np.array([t]))[0]

        kernel = SoftCoreTrajectory(torch.from_numpy(level), step, n_leapfrog)
        carry = None if table is None else SoftCoreMap(torch.from_numpy(table), spacing)

        def advance(
            batch: tuple[Tensor, RowStreams],
            t: float = t,
            kernel: SoftCoreTrajectory = kernel,
            carry: SoftCoreMap | None = carry,
            level: Floats = level,
        ) -> tuple[Tensor, float, Floats, Floats]:
            y, streams = batch
            if carry is not None:
                y, _ = carry.forward(y)
            y, _, accepted = kernel.move(y, streams)
            return y, accepted, _slope(path, t, y), _design(y, level, spacing, n_splines)

        moved, shares, slopes, designs = zip(*map_chunks(advance, batches), strict=True)
        batches = [(y, streams) for y, (_, streams) in zip(moved, batches, strict=True)]
        accepted = float(np.mean(shares))
        slope, design = np.concatenate(slopes[:-1]), np.concatenate(designs[:-1])
        middle, centre = slope.mean(), design.mean(0)
        gram = memory * gram + (design - centre).T @ (design - centre) / len(slope)
        moment = memory * moment + (design - centre).T @ (slope - middle) / len(slope)
        if not (np.isfinite(gram).all() and np.isfinite(moment).all()):
            raise TrainingError(
                f"du/dt on level {len(rows)} (t = {t:.3f}) is not finite; choose a smaller stride"
            )
        weights = _solve(gram, moment)
        left = float((slopes[-1] - designs[-1] @ weights).std())
        rows.append((t, weights, step, float(slope.std()), left, accepted))
        if progress is not None:
            progress(t, f"level {len(rows)}, residual {left:.1f} of {slope.std():.1f} kT")
        if t >= 1.0:
            break
        t_next = min(1.0, t + min(_MAX_STEP, stride / left))
        table = spline_tables(weights * (t_next - t))
        t = t_next
        step *= float(np.clip((accepted / _ACCEPTANCE) ** 0.3, 0.8, 1.1))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return FittedPath(*columns)


def _solve(gram: Floats, moment: Floats) -> Floats:
    """Ridge regression in units of each regressor's own spread."""
    square = np.diag(gram)
    scale = np.sqrt(np.maximum(square, 1e-12 * square.max()))
    scaled = gram / np.outer(scale, scale) + _RIDGE * np.eye(len(gram))
    solution: Floats = np.linalg.solve(scaled, moment / scale) / scale
    return solution


def _slope(path: SoftCorePath, t: float, y: Tensor) -> Floats:
    """du/dt at points (n, N, 3), by a difference within [0, 1]."""
    ends = np.array([max(0.0, t - 5e-4), min(1.0, t + 5e-4)])
    low, high = (energy_and_force(y, level)[1][: len(y)] for level in path.levels(ends))
    difference: Floats = high.astype(float) - low
    return difference / (ends[1] - ends[0])


def _design(y: Tensor, level: Floats, spacing: float, n_splines: int) -> Floats:
    x, _, force = energy_and_force(y, level)
    out = np.empty((x.shape[-1], n_splines))
    kernels.regressors(x, force, spacing, n_splines, out)
    return out[: len(y)]
