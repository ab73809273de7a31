r"""Value and score of both ends of a path in the internal-coordinate chart, without autograd.

.. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y), \qquad
          \log p_0(y) = \log\rho(z) + \log p(\tau)

with s = F(tau) C + L z. Placement and reverse pass are compiled
(:mod:`openmm_eqflow.priors.chart_kernels`), whitening and mean are matrix products, torsion tables
are summed where their kernels reach. Equal to the same by autograd to rounding; for what is not
covered (a GPU, other floats, nearly linear angles, two atoms) :func:`covers` says no.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.priors import chart_kernels
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity

__all__ = [
    "covers",
    "prior_value_and_score",
    "target_value_and_score",
]

kernels: Any = chart_kernels
_Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def covers(prior: object, y: Tensor) -> bool:
    """Whether the functions here serve this prior for points like ``y``."""
    return (
        isinstance(prior, InternalCoordinatePrior)
        and y.device.type == "cpu"
        and y.dtype == torch.float64
        and prior.n_particles > 2
        and not prior.bends
    )


def target_value_and_score(
    prior: InternalCoordinatePrior, evaluate: _Evaluate, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Log density of a target in the chart (n,) and its gradient (n, d), float64.

    Parameters
    ----------
    prior
        Whose chart.
    evaluate
        Positions (n, N, 3) to u (n,) and du/dx (n, N, 3), in nm and kT.
    y
        Points (n, d). Off the chart the value is -inf and the gradient zero.
    """
    chart, n, count = prior.zmatrix, len(y), prior.n_particles
    rows, lead = np.array(chart.rows), np.array(chart.lead, dtype=np.int64)
    z, tau = prior.split(y.detach())
    phase = tau @ prior.modes.T
    cos, sin = torch.cos(phase), torch.sin(phase)
    mean, factor = prior.affine()
    s = torch.cat([y.new_ones(n, 1), cos, sin], 1) @ mean + z @ factor.T
    turns = s[:, 2 * count - 3 :]
    torsions = y.new_empty(n, count - 3)
    torsions[:, prior.stiff] = turns + prior.centre
    torsions[:, prior.soft] = tau
    b, th = s[:, : count - 1].contiguous(), s[:, count - 1 : 2 * count - 3].contiguous()
    x, log_volume = y.new_empty(n, count, 3), y.new_empty(n)
    inner = [v.numpy() for v in (b, th, torsions, x)]
    kernels.place(rows, lead, *inner, log_volume.numpy())
    log_volume = log_volume + chart.constant + torch.log(torch.diagonal(prior.cholesky)).sum()
    log_volume[(turns.abs() >= math.pi).any(1)] = math.nan
    u, gradient = evaluate(x)
    gradient = gradient.clone()
    if prior.constraints is not None:
        metric, slope = prior.constraints.half_log_det_and_gradient(x)
        log_volume, gradient = log_volume + metric, gradient - slope
    by_s, by_torsion = torch.empty_like(s[:, : 2 * count - 3]), torch.empty_like(torsions)
    by_b, by_th = torch.empty_like(b), torch.empty_like(th)
    kernels.pull_back(
        rows, lead, *inner, gradient.numpy(), *(v.numpy() for v in (by_b, by_th, by_torsion))
    )
    by_s = torch.cat([by_b, by_th, by_torsion[:, prior.stiff]], 1)
    half = 1 + len(prior.modes)
    by_feature = by_s @ mean.T
    by_phase = cos * by_feature[:, half:] - sin * by_feature[:, 1:half]
    by_tau = by_torsion[:, prior.soft] + by_phase @ prior.modes
    score = torch.cat([by_s @ factor, by_tau], 1)
    finite = torch.isfinite(log_volume)
    value = torch.where(finite, log_volume - u, -torch.inf)
    return value, torch.where(finite[:, None], score, 0.0)


def prior_value_and_score(prior: InternalCoordinatePrior, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of the prior (n,) and its gradient (n, d), float64."""
    z, tau = prior.split(y.detach())
    value, by_z = _stiff(prior, z)
    if prior.torsions is None:
        return value, by_z
    more, by_tau = _torsions(prior.torsions, tau)
    return value + more, torch.cat([by_z, by_tau], 1)


def _stiff(prior: InternalCoordinatePrior, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log density (n,) and gradient of the stiff coordinates."""
    mixture = prior.mixture
    if mixture is None:
        value, pull = _radial(prior, 0.5 * z.square().sum(1))
        return value, -pull[:, None] * z
    away = (z[:, None] - mixture.means).permute(1, 2, 0)
    own = torch.linalg.solve_triangular(mixture.factors, away, upper=False)
    terms, pull = _radial(prior, 0.5 * own.square().sum(1))
    log_scale = torch.log(torch.diagonal(mixture.factors, dim1=1, dim2=2)).sum(1)
    terms = terms.T + torch.log(mixture.weights) - log_scale
    value = torch.logsumexp(terms, 1)
    share = torch.exp(terms - value[:, None]).T * pull
    by_own = torch.linalg.solve_triangular(
        mixture.factors.transpose(1, 2), share[:, None] * own, upper=True
    )
    return value, -by_own.sum(0).T


def _radial(prior: InternalCoordinatePrior, half: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the spherical density at half the squared radius, and minus its slope there."""
    constant = -0.5 * prior.n_stiff * math.log(2 * math.pi)
    share, scale = prior.tail_share, prior.tail_scale
    if share == 0.0:
        return constant - half, torch.ones_like(half)
    narrow = math.log1p(-share) - half
    wide = math.log(share) - half / scale**2 - prior.n_stiff * math.log(scale)
    both = torch.logaddexp(narrow, wide)
    return both + constant, torch.exp(narrow - both) + torch.exp(wide - both) / scale**2


def _torsions(density: TorsionDensity, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Log density (n,) and gradient (n, n_torsions)."""
    value, gradient = tau.new_zeros(len(tau)), torch.zeros_like(tau)
    coupled: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    for g, (group, table) in enumerate(zip(density.groups, density.tables, strict=True)):
        label = density.basin_of_cell(g)
        total, slope = _sums(group, table, label, tau)
        uniform = group.floor * (2 * math.pi) ** -len(group.members)

        def log_of(
            share: Tensor, by: Tensor, uniform: float = uniform, floor: float = group.floor
        ) -> tuple[Tensor, Tensor]:
            p = (1 - floor) * share + uniform
            return torch.log(p), (1 - floor) * by / p[..., None]

        free, by_free = log_of(total.sum(1), slope.sum(1))
        members = list(group.members)
        if label is None:
            value = value + free
            gradient[:, members] = by_free
            continue
        mass = torch.zeros(total.shape[1], dtype=total.dtype)
        mass = mass.index_add(0, label.reshape(-1), table.reshape(-1))
        given, by_given = log_of(total / mass, slope / mass[:, None])
        coupled.append((g, free, by_free, given, by_given))
    if density.conformers is None:
        return value, gradient
    conformers = density.conformers
    terms = torch.log(conformers.weights).expand(len(tau), -1)
    # Picking columns as a product with zeros and ones is several times faster than indexing.
    picks = [
        torch.nn.functional.one_hot(column, given.shape[1]).to(given)
        for column, (_, _, _, given, _) in zip(conformers.members.T, coupled, strict=True)
    ]
    terms = terms + torch.cat([c[3] for c in coupled], 1) @ torch.cat(picks, 1).T
    seen = torch.logsumexp(terms, 1)
    shares = torch.exp(terms - seen[:, None])
    seen = seen + math.log1p(-conformers.independent)
    apart = torch.stack([free for _, free, _, _, _ in coupled]).sum(0)
    apart = apart + math.log(conformers.independent)
    total = torch.logaddexp(seen, apart)
    on_seen, on_apart = torch.exp(seen - total), torch.exp(apart - total)
    for pick, (g, _, by_free, _, by_given) in zip(picks, coupled, strict=True):
        by_basin = shares @ pick
        pulled = (by_basin[:, :, None] * by_given).sum(1)
        members = list(density.groups[g].members)
        gradient[:, members] = on_seen[:, None] * pulled + on_apart[:, None] * by_free
    return value + total, gradient


def _sums(
    group: Any, table: Tensor, label: Tensor | None, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Kernel sums by basin (n, m) and their slopes by the group's torsions (n, m, k)."""
    fold = torch.tensor(group.fold, dtype=tau.dtype)
    angles = (tau[:, list(group.members)] * fold).numpy()
    cells = np.zeros(table.shape, dtype=np.int64) if label is None else label.numpy()
    m = int(cells.max()) + 1
    total, slope = np.empty((len(tau), m)), np.empty((len(tau), m, len(group.members)))
    if len(group.members) == 1:
        kernels.table_sums(
            angles[:, 0], table.numpy(), cells, group.width, total, slope[:, :, 0]
        )
    else:
        room = np.empty((2, 2, kernels.n_cells(group.width, len(table))))
        kernels.table_sums_of_two(
            angles, table.numpy(), cells, group.width, total, slope, room
        )
    return torch.from_numpy(total), torch.from_numpy(slope) * fold
