r"""ODE solves of a flow: frozen grids, classical Runge-Kutta, adaptive calibration. No particles.

A global-norm adaptive step couples the samples of a batch, so log q would depend on batch-mates.
The grid is therefore frozen per flow: found once by an adaptive solve (torchdiffeq's dopri5) on a
calibration batch and stored with the weights. State and log determinant are float64; the field
runs in the dtype of its weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torchdiffeq
from torch import Tensor

__all__ = ["calibrate_grid", "odeint_adaptive", "rk4", "rk4_inverse"]

FieldWithDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor, Tensor], Tensor]


def rk4(
    field: FieldWithDivergence, y: Tensor, grid: Sequence[float], *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Integrate :math:`(y, \ell)' = (v, \nabla\cdot v)` over a fixed grid, fourth order.

    Parameters
    ----------
    field
        ``(t, y) -> (v, divergence)``.
    y
        Initial state (n, ...).
    grid
        Increasing times from 0 to 1.
    reverse
        Integrate from the last time to the first; the returned log determinant is then that of the
        *forward* map along the retraced trajectory (so that signs never change).

    Returns
    -------
    y, ladj
        Final state and :math:`\int \nabla\cdot v\,dt` from 0 to 1, shape (n,).
    """
    times = list(reversed(grid)) if reverse else list(grid)
    ladj = torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)
    for start, stop in itertools.pairwise(times):
        h = stop - start
        t0, tm, t1 = (torch.tensor(t, dtype=y.dtype, device=y.device) for t in
                      (start, start + 0.5 * h, stop))
        k1, d1 = field(t0, y)
        k2, d2 = field(tm, y + 0.5 * h * k1)
        k3, d3 = field(tm, y + 0.5 * h * k2)
        k4, d4 = field(t1, y + h * k3)
        y = y + (h / 6) * (k1 + 2 * (k2 + k3) + k4)
        ladj = ladj + (h / 6) * (d1 + 2 * (d2 + d3) + d4)
    return y, (-ladj if reverse else ladj)


def rk4_inverse(
    field: FieldWithDivergence,
    velocity: Velocity,
    y: Tensor,
    grid: Sequence[float],
    *,
    corrections: int,
) -> tuple[Tensor, Tensor]:
    r"""Invert the discrete map :func:`rk4` itself, not only the flow it approximates.

    A backward step :math:`\psi` undoes the forward step :math:`\phi` up to
    :math:`O(h^5)`, so that a density evaluated by backward steps is not quite that of the samples.
    Each correction

    .. math:: y \leftarrow y + \psi(x) - \psi(\phi(y))

    is a quasi-Newton step for :math:`\phi(y) = x` whose error shrinks by :math:`O(h^5)`. The log
    determinant is collected along :math:`\phi(y)`: it is the one that sampling finds, and the
    residual of that evaluation takes the last of the error away.

    Parameters
    ----------
    field, velocity
        ``(t, y) -> (v, divergence)`` and ``(t, y) -> v``: most evaluations need no divergence.
    y
        Final state (n, ...).
    grid
        Increasing times from 0 to 1.
    corrections
        Per step, the same for every row: a row's result never depends on its batch-mates. With 0
        the solve is :func:`rk4` in reverse.

    Returns
    -------
    z, ladj
        Initial state, and :math:`\int \nabla\cdot v\,dt` from 0 to 1 along its forward path.
    """
    if corrections == 0:
        return rk4(field, y, grid, reverse=True)

    def without_divergence(t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        v = velocity(t, state)
        return v, v.new_zeros(len(v))

    ladj = torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)
    for interval in reversed(list(itertools.pairwise(grid))):
        guess, _ = rk4(without_divergence, y, interval, reverse=True)
        before = guess
        for _ in range(corrections):
            reached, _ = rk4(without_divergence, before, interval)
            before = before + guess - rk4(without_divergence, reached, interval, reverse=True)[0]
        reached, increment = rk4(field, before, interval)
        ladj = ladj + increment
        y = before - (reached - y)
    return y, ladj


def odeint_adaptive(
    field: FieldWithDivergence, y: Tensor, *, rtol: float = 1e-9, atol: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """Solve accurately from 0 to 1 by torchdiffeq's dopri5 (Dormand, Prince 1980)."""
    shape = y.shape

    def joint(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return field(t, state[0].reshape(shape))

    start = (y, torch.zeros(shape[0], dtype=y.dtype, device=y.device))
    times = torch.tensor([0.0, 1.0], dtype=y.dtype, device=y.device)
    path, ladj = torchdiffeq.odeint(joint, start, times, rtol=rtol, atol=atol, method="dopri5")
    return path[-1], ladj[-1]


def calibrate_grid(
    field: FieldWithDivergence,
    y: Tensor,
    *,
    tolerance: float,
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64),
) -> tuple[tuple[float, ...], float]:
    r"""Coarsest uniform RK4 grid whose log determinant is right on a calibration batch.

    Returns the grid and the 99th percentile of :math:`|\ell_{grid} - \ell_{adaptive}|` in kT.
    The finest candidate is returned if none meets ``tolerance``; the error tells.
    """
    accuracy = min(1e-6, 1e-2 * tolerance)
    _, reference = odeint_adaptive(field, y, rtol=accuracy, atol=0.1 * accuracy)
    error = float("inf")
    grid: tuple[float, ...] = (0.0, 1.0)
    for n in candidates:
        grid = tuple(k / n for k in range(n + 1))
        _, ladj = rk4(field, y, grid)
        error = float(torch.quantile((ladj - reference).abs(), 0.99))
        if error <= tolerance:
            break
    return grid, error
