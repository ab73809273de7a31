r"""Are the log determinants of a stochastic flow's maps right? Measured, in kT.

The weight of a path is exact if every map's determinant is, every map's inverse inverts it, and
every Monte Carlo layer is reversible. The last holds by construction (and is tested); the others
are measured on paths: at evenly chosen levels the log determinant the kernels report is compared
with that of the map's Jacobian in float64, and the map is inverted. Errors over a whole path are
the sum over the chosen levels, scaled to all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.stochastic.annealing import Batch
from openmm_eqflow.stochastic.flow import StochasticFlow
from openmm_eqflow.vector_fields.radial import RadialSplineField

__all__ = ["path_errors"]

_LEVELS = 24


def path_errors(
    flow: StochasticFlow, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of ``n`` paths.

    Returns
    -------
    Tensor, Tensor, Tensor
        (n,): error of the log determinants in kT, log determinants forwards against backwards in
        kT, and the largest deviation of a coordinate after a map and its inverse, nm.
    """
    z = flow.prior.sample_latent(n, generator=generator)
    seed = int(torch.randint(0, 2**62, (1,), generator=generator))
    batch, levels = Batch(z.numpy(), np.random.default_rng(seed)), flow.levels
    n_maps = len(levels.tables)
    chosen = set(np.linspace(0, n_maps - 1, min(_LEVELS, n_maps)).round().astype(int).tolist())
    wrong, back, gap = np.zeros(n), np.zeros(n), np.zeros(n)
    for k in range(n_maps):
        batch.set_level(levels.parameters[k])
        batch.relax(levels.parameters[k], levels.timesteps[k], levels.n_leapfrog)
        before = batch.x.copy()
        ladj = batch.transport(levels.tables[k], levels.spacing).astype(float)
        if k not in chosen:
            continue
        after = batch.x.copy()
        back += ladj - batch.transport_back(levels.tables[k], levels.spacing)
        gap = np.maximum(gap, np.abs(batch.x - before).max((0, 1)))
        batch.x[:] = after
        wrong += ladj - _log_determinant(flow, k, torch.from_numpy(np.moveaxis(before, -1, 0)))
    scale = n_maps / len(chosen)
    return (
        torch.from_numpy(np.abs(wrong) * scale),
        torch.from_numpy(np.abs(back) * scale),
        torch.from_numpy(gap),
    )


def _log_determinant(flow: StochasticFlow, k: int, x: Tensor) -> Any:
    """Log determinant of map k by autograd in float64, (n,)."""
    push = map_in_float64(flow, k)
    size = x[0].numel()
    found = []
    for point in x.double():
        rows = point.expand(size, *point.shape).clone().requires_grad_(True)
        with torch.enable_grad():
            image = push(rows).flatten(1)
            (jacobian,) = torch.autograd.grad(image.diagonal().sum(), rows)
        found.append(torch.linalg.slogdet(jacobian.flatten(1))[1])
    return torch.stack(found).numpy()


def map_in_float64(flow: StochasticFlow, k: int) -> Callable[[Tensor], Tensor]:
    """Map k of a flow, x + h v(x + h v(x) / 2) at the middle of its interval, without kernels."""
    low, high = flow.grid[k], flow.grid[k + 1]
    field = flow.vector_field
    assert isinstance(field, RadialSplineField)
    middle = torch.tensor(0.5 * (low + high))
    weights = field.coefficients(middle.reshape(1))[:, :-3].detach()
    frozen = RadialSplineField(**(field.config | {"times": [0.0, 1.0]})).double()
    with torch.no_grad():
        frozen.weight.copy_((high - low) * weights.double().expand(2, -1))
    frozen.requires_grad_(False)
    t = torch.tensor(0.0, dtype=torch.float64)
    return lambda x: x + frozen(t, x + 0.5 * frozen(t, x))
