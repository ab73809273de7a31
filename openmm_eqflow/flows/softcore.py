r"""The path of soft-core potentials of a cluster, and a batch that walks it both ways.

From an ideal gas in a trap to a Lennard-Jones cluster without a jump.

.. math::
    u_t(x) = \tfrac{1}{2} \sum_i |x_i - \bar x|^2
             + 2 \sum_{i<j} \bigl[s_{ij}^{-6} - 2\, b(t)\, s_{ij}^{-3}\bigr],
    \qquad s_{ij} = d_{ij}^2 + a(t),

in kT, lengths in units of the pair distance of lowest energy. The cores are soft at first
(a(0) = 3: no pair feels more than 0.003 kT) and hard at the end (a(1) = 0); the attraction b sets
in when they exclude each other. At t = 1 it is the ``lennard-jones`` model of
:mod:`~openmm_eqflow.targets.model_systems`, at t < 0 by convention the ideal gas.

A batch through the levels of a stochastic normalizing flow, forwards or backwards.

Between two levels a deterministic map M (one midpoint step of the field) carries the batch, then
Hamiltonian Monte Carlo, reversible with respect to the new level, relaxes it. With levels
:math:`u_0 = -\log p_0, u_1, \dots, u_K` the log weight of a path is

.. math:: \log w = -\sum_k \bigl[u_{k+1}(M_k x_k) - u_k(x_k) - \log|\det DM_k(x_k)|\bigr]

(annealed importance sampling, Neal 2001, with maps: escorted free energy simulations,
Vaikuntanathan & Jarzynski 2008; stochastic normalizing flows, Wu, Köhler, Noé 2020).
E[w] = Z exactly, however few the levels and however poor the field. The reverse of a path from x
under p_K runs the same kernels in the opposite order, because each is its own reversal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.flows import softcore_kernels as kernels

__all__ = [
    "Batch",
    "Levels",
    "SoftCorePath",
]

Floats = NDArray[np.floating[Any]]


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
_BACK_TOLERANCE, _BACK_ITERATIONS = 3e-7, 12  # nm; float32 resolves 2e-7 at 3 nm


class Levels(NamedTuple):
    """What happens between and on the levels.

    Attributes
    ----------
    parameters
        (K, 3): trap, soft core and attraction of levels 1 to K; level 0 is the prior.
    tables
        (K - 1, n_intervals, 4): the field from level k to k + 1, times the step in t. The first
        step, from the prior, has none: there is next to nothing to move.
    spacing
        Length of the tables' intervals, nm.
    timesteps
        (K,): of the leapfrog on each level; unit mass, kT = 1.
    n_leapfrog
        Steps of one trajectory.
    """

    parameters: Floats
    tables: Floats
    spacing: float
    timesteps: Floats
    n_leapfrog: int


class Batch:
    """Positions (N, 3, batch) with energies and forces of one level, and space to work in.

    Parameters
    ----------
    x
        Mean-free positions (batch, N, 3), nm.
    rng
        Of the momenta and the acceptance.
    """

    def __init__(self, x: Floats, rng: np.random.Generator) -> None:
        self.x = np.ascontiguousarray(np.moveaxis(x, 0, -1), dtype=np.float32)
        self.rng = rng
        batch = self.x.shape[-1]
        self.u = np.empty(batch, np.float32)
        self.force = np.empty_like(self.x)
        self.ladj = np.empty(batch, np.float32)
        self._a, self._b, self._v = (np.empty_like(self.x) for _ in range(3))
        self._scratch = np.empty((3, batch), np.float32)
        self._work = np.empty((3, batch), np.float32)

    def positions(self) -> Floats:
        """(batch, N, 3), float64."""
        return np.ascontiguousarray(np.moveaxis(self.x, -1, 0), dtype=np.float64)

    def set_level(self, level: Floats) -> None:
        """Energies and forces of ``level`` at the positions."""
        kernels.energy_and_force(self.x, level, self.u, self.force, self._work)

    def energy(self, level: Floats) -> Floats:
        """Energy (batch,) of another level; the batch stays on its own."""
        u = np.empty_like(self.u)
        kernels.energy_and_force(self.x, level, u, self._a, self._work)
        return u

    def transport(self, table: Floats, spacing: float) -> Floats:
        """Carry the batch by the map; return its log determinant. Energies are then stale."""
        kernels.transport(self.x, table, spacing, self.ladj, self._v, self._a, self._work)
        return self.ladj

    def transport_back(self, table: Floats, spacing: float) -> Floats:
        """Carry the batch by the inverse map; return the log determinant of the *forward* map."""
        kernels.transport_back(
            self.x, table, spacing, self.ladj, self._v, self._a, self._work,
            _BACK_TOLERANCE, _BACK_ITERATIONS,
        )  # fmt: skip
        return self.ladj

    def relax(self, level: Floats, timestep: float, n_leapfrog: int) -> float:
        """One trajectory on the level the batch is on; return the share accepted."""
        shape, batch = self.x.shape, self.x.shape[-1]
        return float(
            kernels.hmc_step(
                self.x, self.u, self.force, level, timestep, n_leapfrog,
                self.rng.standard_normal(shape, dtype=np.float32),
                self.rng.random(batch, dtype=np.float32),
                self._a, self._b, self._scratch, self._work,
            )
        )  # fmt: skip

    def forward(self, levels: Levels) -> Floats:
        """From prior samples through all levels; return -log w - log p_0(x_0), (batch,)."""
        work = np.zeros(self.x.shape[-1])
        for k in range(len(levels.parameters)):
            if k > 0:
                work -= self.u
                work -= self.transport(levels.tables[k - 1], levels.spacing)
            self.set_level(levels.parameters[k])
            work += self.u
            self.relax(levels.parameters[k], levels.timesteps[k], levels.n_leapfrog)
        return work

    def backward(self, levels: Levels) -> Floats:
        """From configurations of the last level to the prior; return what forward would."""
        work = np.zeros(self.x.shape[-1])
        self.set_level(levels.parameters[-1])
        for k in reversed(range(len(levels.parameters))):
            self.relax(levels.parameters[k], levels.timesteps[k], levels.n_leapfrog)
            work += self.u
            if k > 0:
                work -= self.transport_back(levels.tables[k - 1], levels.spacing)
                self.set_level(levels.parameters[k - 1])
                work -= self.u
        return work
