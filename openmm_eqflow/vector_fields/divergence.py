r"""Divergences of vector fields that bring none of their own.

:func:`exact_divergence` sums :math:`e_k \cdot J e_k` over an orthonormal basis of the mean-free
subspace with batched forward-mode tangents (one shared primal pass, chunked for memory): exact
for any field whose velocity is mean-free, at (N-1)D tangents. Estimates
(Hutchinson's, Grathwohl et al. 2019, arXiv:1810.01367) are unbiased for log q but not for q: a
field with ``exact_divergence = False`` is refused wherever a weight or an acceptance ratio is
formed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vmap

from openmm_eqflow.geometry import mean_free_basis

__all__ = [
    "exact_divergence",
    "mean_free_directions",
]


# Levels of forward-mode differentiation belong to the process, not to the thread: one that another
# thread closes is gone. Chunks of a flow run on several threads.
_FORWARD_MODE = threading.RLock()


@contextmanager
def _forward_mode() -> Iterator[None]:
    # torch scripts its forward-mode decompositions on first use and warns about doing so
    with _FORWARD_MODE, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch.jit.script", DeprecationWarning)
        yield


def _jvp(
    function: Callable[[Tensor], Tensor], y: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", jvp(function, (y,), (tangent,)))


def mean_free_directions(n_particles: int, n_dims: int, *, like: Tensor) -> Tensor:
    """Orthonormal basis of the mean-free subspace, ``((N-1) D, N, D)``, in ``like``'s dtype."""
    columns = mean_free_basis(n_particles).T  # (N-1, N)
    axes = torch.eye(n_dims, dtype=columns.dtype)
    basis = columns[:, None, :, None] * axes[None, :, None, :]
    return basis.reshape(-1, n_particles, n_dims).to(dtype=like.dtype, device=like.device)


def exact_divergence(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    directions: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Value of ``function`` and :math:`\sum_k e_k \cdot J e_k`, differentiable.

    Parameters
    ----------
    function
        Maps ``(batch, *event)`` to the same shape, sample by sample.
    y
        Points ``(batch, *event)``.
    directions
        Orthonormal :math:`e_k`, ``(n_directions, *event)``: a full basis, or one of a subspace
        that contains every velocity and whose complement does not change it.
    chunk_size
        Tangents carried at once; None for all.

    Returns
    -------
    tuple of Tensor
        Velocity ``(batch, *event)`` and divergence ``(batch,)``.
    """
    if directions.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"directions of shape {tuple(directions.shape[1:])} do not match points of shape "
            f"{tuple(y.shape[1:])}"
        )

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        value, tangent = _jvp(function, y, direction.expand_as(y))
        return value, (tangent * direction).flatten(1).sum(-1)

    chunk = len(directions) if chunk_size is None else chunk_size
    divergence = torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)
    value = torch.empty(0)
    for part in torch.split(directions, chunk):
        # the primal does not depend on the direction, so vmap computes it once per chunk
        with _forward_mode():
            value, terms = vmap(along, out_dims=cast(Any, (None, 0)))(part)
        divergence = divergence + terms.sum(0)
    return value, divergence
