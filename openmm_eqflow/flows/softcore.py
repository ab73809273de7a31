r"""From an ideal gas in a trap to a Lennard-Jones cluster without a jump: levels, maps, kernels.

.. math::
    u_t(x) = \tfrac{1}{2} \sum_i |x_i - \bar x|^2
             + 2 \sum_{i<j} \bigl[s_{ij}^{-6} - 2\, b(t)\, s_{ij}^{-3}\bigr],
    \qquad s_{ij} = d_{ij}^2 + a(t),

in kT, lengths in units of the pair distance of lowest energy. The cores are soft at first
(a(0) = 3: no pair feels more than 0.003 kT) and hard at the end (a(1) = 0); the attraction b sets
in when they exclude each other. At t = 1 it is the ``lennard-jones`` model of
:mod:`~openmm_eqflow.targets.model_systems`, at t < 0 by convention the ideal gas.

The layers of a path (:mod:`~openmm_eqflow.flows.path`) through these levels are midpoint steps of
a radial field and Hamiltonian trajectories, in float32: compiled kernels on the CPU
(:mod:`~openmm_eqflow.flows.softcore_kernels`) and on a GPU
(:mod:`~openmm_eqflow.flows.softcore_triton`), else torch
(:mod:`~openmm_eqflow.flows.softcore_torch`). Without a map between them they are annealed
importance sampling (Neal 2001), with maps escorted free energy simulations (Vaikuntanathan &
Jarzynski 2008).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.flows import softcore_kernels as kernels
from openmm_eqflow.flows import softcore_torch as on_gpu
from openmm_eqflow.flows.streams import RowStreams

__all__ = [
    "SoftCoreMap",
    "SoftCorePath",
    "SoftCoreTrajectory",
    "energy_and_force",
    "lanes",
    "rows",
]

Floats = NDArray[np.floating[Any]]
_SAME = 1e-3  # nm: there and back
_BACK_TOLERANCE, _BACK_ITERATIONS = 3e-7, 12  # nm; float32 resolves 2e-7 at 3 nm


@dataclass(frozen=True)
class SoftCorePath:
    """Soft core a(t) = ``softness`` (1 - t)^``power``; attraction b(t) from 0 at ``onset`` to 1.

    Examples
    --------
    >>> SoftCorePath().levels(np.array([0.0, 1.0]))
    array([[1., 3., 0.],
           [1., 0., 1.]], dtype=float32)
    """

    softness: float = 3.0
    power: float = 2.0
    onset: float = 0.3

    def levels(self, t: Floats) -> Floats:
        """(trap, soft, attraction) at times ``t``: (n, 3), float32."""
        soft = self.softness * (1.0 - t) ** self.power
        attraction = np.clip((t - self.onset) / (1.0 - self.onset), 0.0, 1.0)
        return np.stack([np.ones_like(t), soft, attraction], 1).astype(np.float32)

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)


def lanes(y: Tensor) -> Floats:
    """Copy of points (n, N, 3) as the kernels want them: (N, 3, n rounded up), float32.

    The last point fills what is left over.
    """
    n = len(y)
    columns = y.detach().permute(1, 2, 0)
    missing = -n % kernels.LANES
    if missing:
        columns = torch.cat([columns, columns[..., -1:].expand(-1, -1, missing)], -1)
    array: Floats = columns.to(torch.float32, copy=True).contiguous().numpy()
    return array


def rows(x: Floats, n: int) -> Tensor:
    """First ``n`` points (n, N, 3) of what :func:`lanes` made; shares its memory."""
    return torch.from_numpy(x).permute(2, 0, 1)[:n]


def _keys(streams: RowStreams, width: int) -> NDArray[np.uint64]:
    keys = np.zeros(width, np.uint64)
    keys[: len(streams.keys)] = streams.keys.numpy().view(np.uint64)
    return keys


def energy_and_force(y: Tensor, level: Floats) -> tuple[Floats, Floats, Floats]:
    """Lanes of points (n, N, 3), their energies (lanes,) and forces of one level, float32."""
    x = lanes(y)
    u, force = np.empty(x.shape[-1], np.float32), np.empty_like(x)
    kernels.energy_and_force(x, level, u, force, np.empty((3, x.shape[-1]), np.float32))
    return x, u, force


class SoftCoreTrajectory:
    """Layer of a path: a Hamiltonian trajectory on one level, unit mass, kT = 1.

    Parameters
    ----------
    level
        (trap, soft, attraction), float32, on the device of the points.
    timestep, n_leapfrog
        Of the leapfrog.
    """

    def __init__(self, level: Tensor, timestep: float, n_leapfrog: int) -> None:
        self.level, self.timestep, self.n_leapfrog = level, timestep, n_leapfrog
        self.n_energies = n_leapfrog

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        r"""Return new points, and :math:`u(y) - u(y')`, (n,)."""
        y, change, _ = self.move(y, streams)
        return y, change

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Run the kernel, its own reversal; the change is that of the path forwards."""
        y, change, _ = self.move(y, streams)
        return y, -change

    def move(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor, float]:
        """Return new points, change and share accepted."""
        if y.device.type != "cpu":
            return on_gpu.trajectory(y, self.level, self.timestep, self.n_leapfrog, streams)
        n, level = len(y), self.level.numpy()
        x, u, force = energy_and_force(y, level)
        before = u.copy()
        width = x.shape[-1]
        keys = _keys(streams, width)
        v, uniform = np.empty_like(x), np.empty(width)
        kernels.fill_normal(v, keys, streams.skip())
        kernels.fill_uniform(uniform, keys, streams.skip())
        accepted = kernels.hmc_step(
            x, u, force, level, self.timestep, self.n_leapfrog, v, uniform,
            np.empty_like(x), np.empty_like(x),
            np.empty((3, width), np.float32), np.empty((3, width), np.float32),
        )  # fmt: skip
        change = torch.from_numpy(before.astype(np.float64) - u)[:n]
        return rows(x, n), change, float(accepted)


class SoftCoreMap:
    r"""Layer of a path: one midpoint step of a radial field, x + h v(x + h v(x) / 2).

    Its log determinant is h div v at the midpoint, right to second order in h, or that of the
    Jacobian :math:`1 + J(x + h v / 2)(1 + J(x) / 2)`, J that of h v, for steps so long that this
    is not enough.

    Parameters
    ----------
    table
        (n_intervals, 4): polynomials of h phi(d) on intervals of length ``spacing``, float32, on
        the device of the points.
    spacing
        nm.
    exact
        Whether determinants are those of the Jacobian.
    """

    n_energies = 0

    def __init__(self, table: Tensor, spacing: float, *, exact: bool = False) -> None:
        self.table, self.spacing, self.exact = table, spacing, exact

    def forward(self, y: Tensor, streams: RowStreams | None = None) -> tuple[Tensor, Tensor]:
        """Apply the map; also minus its log determinant (n,), NaN where it is not one to one."""
        image, ladj = self._forward(y)
        if self.exact:
            ladj = self._one_to_one(y, self._backward(image)[0], self.log_determinant(y))
        return image, -ladj

    def backward(self, y: Tensor, streams: RowStreams | None = None) -> tuple[Tensor, Tensor]:
        """Apply the inverse; also minus the log determinant of the map (n,), NaN as forwards."""
        before, ladj = self._backward(y)
        if self.exact:
            ladj = self._one_to_one(y, self._forward(before)[0], self.log_determinant(before))
        return before, -ladj

    @staticmethod
    def _one_to_one(y: Tensor, again: Tensor, ladj: Tensor) -> Tensor:
        """Long steps fold space: where there and back ends elsewhere, the path has failed."""
        off = (again.double() - y.double()).abs().amax((1, 2))
        return torch.where(off < _SAME, ladj, torch.nan)

    def _forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.device.type != "cpu":
            image, ladj = on_gpu.transport(y, self.table, self.spacing)
        else:
            x = lanes(y)
            found, v, middle, work = self._space(x)
            kernels.transport(x, self.table.numpy(), self.spacing, found, v, middle, work)
            image, ladj = rows(x, len(y)), torch.from_numpy(found)[: len(y)].double()
        return image, ladj

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.device.type != "cpu":
            before, ladj = on_gpu.transport_back(
                y, self.table, self.spacing, _BACK_TOLERANCE, _BACK_ITERATIONS
            )
        else:
            x = lanes(y)
            found, v, middle, work = self._space(x)
            kernels.transport_back(
                x, self.table.numpy(), self.spacing, found, v, middle, work,
                _BACK_TOLERANCE, _BACK_ITERATIONS,
            )  # fmt: skip
            before, ladj = rows(x, len(y)), torch.from_numpy(found)[: len(y)].double()
        return before, ladj

    def log_determinant(self, y: Tensor) -> Tensor:
        """Return that of the Jacobian at points (n, N, 3), float64, (n,)."""
        table = self.table.double()
        found = []
        for part in y.double().split(1024 if y.is_cuda else 64):
            velocity, first = on_gpu.field_jacobian(part, table, self.spacing)
            _, second = on_gpu.field_jacobian(part + 0.5 * velocity, table, self.spacing)
            one = torch.eye(first.shape[-1], dtype=torch.float64, device=y.device)
            found.append(torch.linalg.slogdet(one + second @ (one + 0.5 * first))[1])
        return torch.cat(found)

    @staticmethod
    def _space(x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        width = x.shape[-1]
        return (
            np.empty(width, np.float32),
            np.empty_like(x),
            np.empty_like(x),
            np.empty((3, width), np.float32),
        )
