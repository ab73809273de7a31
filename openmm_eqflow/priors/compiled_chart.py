r"""Value and score of both ends of a path in the internal-coordinate chart, without autograd.

.. math:: \log p_1(y) = -u(x(y)) + \mathrm{log\_volume}(y), \qquad
          \log p_0(y) = \log\rho(z) + \log p(\tau)

with s = F(tau) C + L z. Placement and reverse pass are compiled
(:mod:`openmm_eqflow.priors.chart_kernels`, on a GPU :mod:`openmm_eqflow.priors.chart_triton`),
whitening and mean are matrix products, torsion tables are summed where their kernels reach. Equal
to the same by autograd to rounding; for what is not covered (a GPU without Triton, other floats,
nearly linear angles, two atoms) :func:`covers` says no.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.parallel import triton_kernels
from openmm_eqflow.priors import chart_kernels
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity
from openmm_eqflow.priors.zmatrix import ZMatrix

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
        and (y.device.type == "cpu" or (y.is_cuda and _triton() is not None))
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
    n, count = len(y), prior.n_particles
    z, tau = prior.split(y.detach())
    phase = tau @ prior.modes.T
    cos, sin = torch.cos(phase), torch.sin(phase)
    mean, factor = prior.affine()
    s = torch.cat([y.new_ones(n, 1), cos, sin], 1) @ mean + z @ factor.T
    turns = s[:, 2 * count - 3 :]
    torsions = torch.cat([turns + prior.centre, tau], 1)[:, prior.back]
    placed = (_OnGPU if y.is_cuda else _OnCPU)(
        prior.zmatrix, s[:, : count - 1], s[:, count - 1 : 2 * count - 3], torsions
    )
    log_volume = placed.log_volume + prior.zmatrix.constant
    log_volume = log_volume + torch.log(torch.diagonal(prior.cholesky)).sum()
    log_volume = log_volume.masked_fill((turns.abs() >= math.pi).any(1), math.nan)
    u, gradient = evaluate(placed.x)
    if prior.constraints is not None:
        metric, slope = prior.constraints.half_log_det_and_gradient(placed.x)
        log_volume, gradient = log_volume + metric, gradient - slope
    by_b, by_th, by_torsion = placed.pull_back(gradient)
    by_s = torch.cat([by_b, by_th, by_torsion[:, prior.places[: turns.shape[1]]]], 1)
    half = 1 + len(prior.modes)
    by_feature = by_s @ mean.T
    by_phase = cos * by_feature[:, half:] - sin * by_feature[:, 1:half]
    by_tau = by_torsion[:, prior.places[turns.shape[1] :]] + by_phase @ prior.modes
    score = torch.cat([by_s @ factor, by_tau], 1)
    finite = torch.isfinite(log_volume)
    value = torch.where(finite, log_volume - u, -torch.inf)
    return value, torch.where(finite[:, None], score, 0.0)


class _OnCPU:
    """Configurations placed by compiled kernels, and the way back."""

    def __init__(self, chart: ZMatrix, b: Tensor, th: Tensor, torsions: Tensor) -> None:
        self.tables = np.array(chart.rows), np.array(chart.lead, dtype=np.int64)
        n, count = len(b), chart.n_particles
        self.x, self.log_volume = b.new_empty(n, count, 3), b.new_empty(n)
        self.inner = [v.contiguous().numpy() for v in (b, th, torsions)]
        kernels.place(*self.tables, *self.inner, self.x.numpy(), self.log_volume.numpy())

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        by = [np.empty_like(v) for v in self.inner]
        g = gradient.clone(memory_format=torch.contiguous_format).numpy()
        kernels.pull_back(*self.tables, *self.inner, self.x.numpy(), g, *by)
        return [torch.from_numpy(v) for v in by]


class _OnGPU:
    """The same by Triton."""

    def __init__(self, chart: ZMatrix, b: Tensor, th: Tensor, torsions: Tensor) -> None:
        self.kernels: Any = _triton()
        self.tables = chart.tables(b.device)
        self.inner = [v.T.contiguous() for v in (b, th, torsions)]
        self._x, self.log_volume = self.kernels.place(*self.tables, *self.inner)
        self.x = self._x.permute(2, 0, 1)

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        g = gradient.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        return [v.T for v in self.kernels.pull_back(*self.tables, *self.inner, self._x, g)]


def _triton() -> Any:
    return triton_kernels("openmm_eqflow.priors.chart_triton")


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
        if tau.is_cuda:
            total, slope = _sums_on_gpu(group, table, label, density.n_basins(g), tau)
        else:
            total, slope = _sums(group, table, label, tau)
        uniform = group.floor * (2 * math.pi) ** -len(group.members)

        def log_of(
            share: Tensor, by: Tensor, uniform: float = uniform, floor: float = group.floor
        ) -> tuple[Tensor, Tensor]:
            p = (1 - floor) * share + uniform
            return torch.log(p), (1 - floor) * by / p[..., None]

        free, by_free = log_of(total.sum(1), slope.sum(1))
        if label is None:
            value = value + free
            _put(gradient, group.members, by_free)
            continue
        mass = total.new_zeros(total.shape[1])
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
        by = on_seen[:, None] * pulled + on_apart[:, None] * by_free
        _put(gradient, density.groups[g].members, by)
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
    room = np.empty((2, 2, kernels.n_cells(group.width, len(table))))
    if len(group.members) == 1:
        kernels.table_sums(
            angles[:, 0], table.numpy(), cells, group.width, total, slope[:, :, 0], room
        )
    else:
        kernels.table_sums_of_two(
            angles, table.numpy(), cells, group.width, total, slope, room
        )
    return torch.from_numpy(total), torch.from_numpy(slope) * fold


def _put(gradient: Tensor, members: Sequence[int], by: Tensor) -> None:
    """Write columns without an index, which on a GPU would be sent there first."""
    for k, member in enumerate(members):
        gradient[:, member].copy_(by[:, k])


def _sums_on_gpu(
    group: Any, table: Tensor, label: Tensor | None, n_basins: int, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`_sums`."""
    angles = torch.stack([
        torch.remainder(fold * tau[:, k] + math.pi, 2 * math.pi) - math.pi
        for k, fold in zip(group.members, group.fold, strict=True)
    ])
    cells = torch.zeros_like(table, dtype=torch.int64) if label is None else label
    reach = kernels.n_cells(group.width, len(table)) // 2
    total, slope = _triton().table_sums(angles, table, cells, n_basins, group.width, reach)
    by = torch.stack([fold * slope[:, k] for k, fold in enumerate(group.fold)], 2)
    return total.T, by.transpose(0, 1)
