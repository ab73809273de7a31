r"""Differentiable RK4 solves for objectives that simulate the flow.

:func:`solve` differentiates through the discrete map itself (discretise, then optimise), so its
gradients are those of the log q that is reported, not of a continuous limit. Only the state at
each grid point is kept; a step's graph is rebuilt when its gradient is due (checkpointing, Chen
et al. 2016, arXiv:1604.06174), so the memory of a solve is that of one step whatever their
number.

:func:`transport_score` carries the score :math:`s_t = \nabla \log p_t` of a density along the
flow,

.. math:: \dot y = v, \qquad \dot s = -\nabla_y \left(v \cdot s + \nabla\cdot v\right)

(Vaitl, Nicoli, Nakajima, Kessel 2022, "Path-gradient estimators for continuous normalizing
flows"), in either direction of time and without a graph over the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_eqflow.flows.flow import rk4
from openmm_eqflow.geometry import remove_mean

__all__ = [
    "Carried",
    "follow",
    "solve",
    "transport_score",
    "uniform_grid",
]

Dynamics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def uniform_grid(n_steps: int) -> tuple[float, ...]:
    """Return the times of ``n_steps`` equal steps from 0 to 1."""
    return tuple(k / n_steps for k in range(n_steps + 1))


def _dynamics(field: nn.Module, *, with_divergence: bool) -> Dynamics:
    """Velocity and divergence in the precision of the state, network in that of its weights.

    As :class:`~openmm_eqflow.flows.flow.EquivariantFlow` evaluates its field.
    """
    dtype = next(field.parameters()).dtype
    both: Callable[..., tuple[Tensor, Tensor]] = field.with_divergence  # type: ignore[assignment]

    def dynamics(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if with_divergence:
            v, div = both(t.to(dtype), y.to(dtype))
        else:
            v = field(t.to(dtype), y.to(dtype))
            div = v.new_zeros(len(y))
        v = v.to(y.dtype)
        return (remove_mean(v) if v.ndim == 3 else v), div.to(y.dtype)

    return dynamics


def _intervals(grid: Sequence[float], reverse: bool) -> list[tuple[float, float]]:
    """Return the steps of the grid in the order they are taken."""
    intervals = list(itertools.pairwise(grid))
    return intervals[::-1] if reverse else intervals


class _Solve(torch.autograd.Function):
    """RK4 over a grid that keeps states only; see the module docstring.

    ``known`` (n_steps + 1, n, ...) are the states of a solve already made; empty for none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        dynamics: Dynamics,
        intervals: list[tuple[float, float]],
        reverse: bool,
        known: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ladj = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        states = list(known[:-1])
        if states:
            y = known[-1].clone()
        else:
            for interval in intervals:
                states.append(y)
                y, increment = rk4(dynamics, y, interval, reverse=reverse)
                ladj = ladj + increment
        ctx.save_for_backward(*states)
        ctx.plan = dynamics, intervals, reverse, parameters
        return y, ladj

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        dynamics, intervals, reverse, parameters = ctx.plan
        total: list[Tensor | None] = [None] * len(parameters)
        for state, interval in zip(
            reversed(ctx.saved_tensors), reversed(intervals), strict=True
        ):
            with torch.enable_grad():
                y = state.detach().requires_grad_(True)
                end, increment = rk4(dynamics, y, interval, reverse=reverse)
                value = (end * grad_y).sum() + (increment * grad_ladj).sum()
                found = torch.autograd.grad(value, (y, *parameters), allow_unused=True)
            grad_y = found[0]
            for k, part in enumerate(found[1:]):
                before = total[k]
                total[k] = part if before is None or part is None else before + part
        return grad_y, None, None, None, None, *total


def solve(
    field: nn.Module,
    y: Tensor,
    grid: Sequence[float],
    *,
    reverse: bool = False,
    with_divergence: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Integrate the flow, differentiable in ``y`` and in the weights of ``field``.

    Parameters
    ----------
    field
        Vector field.
    y
        Initial state (n, *event_shape), float64.
    grid
        Increasing times from 0 to 1.
    reverse
        From the last time to the first; the log determinant stays that of the forward map.
    with_divergence
        False leaves the divergence out (it returns zeros).

    Returns
    -------
    y, ladj
        Final state and :math:`\int \nabla\cdot v\,dt`, (n,), as
        :func:`~openmm_eqflow.flows.flow.rk4` gives them.
    """
    intervals = _intervals(grid, reverse)
    weights = [p for p in field.parameters() if p.requires_grad]
    dynamics = _dynamics(field, with_divergence=with_divergence)
    end, ladj = _Solve.apply(y, dynamics, intervals, reverse, y.new_empty(0), *weights)
    return end, ladj


def follow(
    field: nn.Module, states: Tensor, grid: Sequence[float], *, reverse: bool = False
) -> Tensor:
    r"""End of a trajectory that is known, differentiable in the weights as that of :func:`solve`.

    Parameters
    ----------
    field, grid, reverse
        As they were when ``states`` were found.
    states
        From :func:`transport_score`, (n_steps + 1, n, *event_shape). Nothing is solved again until
        the gradient is due. The start, ``states[0]``, gets no gradient.

    Returns
    -------
    y
        ``states[-1]``.
    """
    weights = [p for p in field.parameters() if p.requires_grad]
    dynamics = _dynamics(field, with_divergence=False)
    start = states[0].detach()
    end, _ = _Solve.apply(start, dynamics, _intervals(grid, reverse), reverse, states, *weights)
    return end


class Carried(NamedTuple):
    """What :func:`transport_score` returns."""

    y: Tensor
    score: Tensor
    ladj: Tensor
    states: Tensor


def transport_score(
    field: nn.Module,
    y: Tensor,
    score: Tensor,
    grid: Sequence[float],
    *,
    reverse: bool = False,
) -> Carried:
    r"""Carry points and the score of a density along the flow; nothing is differentiable.

    Parameters
    ----------
    field, grid, reverse
        As for :func:`solve`.
    y, score
        Points (n, *event_shape) and :math:`\nabla \log p` there, float64.

    Returns
    -------
    y, score, ladj
        At the other end of the grid; with p_0 the prior and ``reverse=False``, ``score`` is
        :math:`\nabla_y \log q`.
    states
        Points at all times of the grid, in the order they were passed (n_steps + 1, n, ...), for
        :func:`follow`.
    """
    dynamics = _dynamics(field, with_divergence=True)

    def augmented(t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = state[:, 0].detach().requires_grad_(True)
            v, div = dynamics(t, point)
            (pull,) = torch.autograd.grad((v * state[:, 1]).sum() + div.sum(), point)
        return torch.stack([v.detach(), -pull], 1), div.detach()

    state, states = torch.stack([y, score], 1), [y]
    ladj = torch.zeros(len(y), dtype=y.dtype, device=y.device)
    with torch.no_grad():
        for interval in _intervals(grid, reverse):
            state, increment = rk4(augmented, state, interval, reverse=reverse)
            ladj = ladj + increment
            states.append(state[:, 0])
    return Carried(state[:, 0], state[:, 1], ladj, torch.stack(states))
