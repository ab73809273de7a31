r"""Constrained bonds: what density constrained dynamics samples.

With bonds s(x) held at lengths s_0, positions and velocities, the momenta live in the tangent
space of the mass metric, and the free coordinates q have the density (Fixman 1974, PNAS 71, 3050)

.. math:: p(q) \propto e^{-U/kT} \sqrt{\det G_q} \propto
          e^{-U/kT}\, J(q, s_0) \sqrt{\det H(q)}, \qquad
          H = C M^{-1} C^T, \quad C = \partial s/\partial x,

J being the volume element of all internal coordinates. So the density is :math:`e^{-U/kT}` with
respect to :math:`J \sqrt{\det H}\,dq`, and on the chart of
:class:`~openmm_eqflow.priors.internal.InternalCoordinatePrior` a constrained bond is a number and
:math:`\tfrac12 \log\det H` is added to the log volume, whatever the temperature. Two constraints
couple where they share an atom i: :math:`H_{jk} = \cos(\text{angle}) / m_i`. Masses enter. Divided
by its diagonal H has no unit and is 1 for bonds that share no atom.

Dynamics that keeps the bonds (:meth:`Constraints.drift`) goes straight along velocities projected
on the tangent space, then back by impulses along the bonds where it began (SHAKE: Ryckaert,
Ciccotti, Berendsen 1977), which the velocities take too.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import networkx as nx
import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.energies.base import FloatArray

__all__ = [
    "Constraints",
    "constrained",
    "constraint_lengths",
    "hold_bonds",
    "repartition",
]

logger = logging.getLogger(__name__)
_OFF = 1e-3  # share of its length by which a bond may be off; integrators allow 1e-5
_EXACT = 1e-9  # nm by which a bond may be off after a step here
_TRIES = 50


def constraint_lengths(system: openmm.System) -> dict[tuple[int, int], float]:
    """Length in nm of every constraint, by its pair of atoms."""
    listed = map(system.getConstraintParameters, range(system.getNumConstraints()))
    return {(min(a, b), max(a, b)): float(length._value) for a, b, length in listed}


def constrained(system: openmm.System, positions: unit.Quantity) -> unit.Quantity:
    """Move atoms as little as the constraints ask for (a PDB file has three digits)."""
    integrator = openmm.VerletIntegrator(1e-3)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    context.applyConstraints(1e-9)
    return context.getState(positions=True).getPositions()


def hold_bonds(system: openmm.System, topology: app.Topology, which: str) -> None:
    """Constrain bonds in place as ``createSystem`` does, at the lengths of their springs.

    Parameters
    ----------
    which
        ``"hbonds"``, those of hydrogen, or ``"allbonds"``.

    Raises
    ------
    UnsupportedSystemError
        A bond has no spring to take its length from.
    """
    springs = [
        (force, k, force.getBondParameters(k))
        for force in system.getForces()
        if isinstance(force, openmm.HarmonicBondForce)
        for k in range(force.getNumBonds())
    ]
    terms = {frozenset(term[:2]): (force, k, term) for force, k, term in springs}
    held = {frozenset(pair) for pair in constraint_lengths(system)}
    for bond in topology.bonds():
        pair = frozenset((bond[0].index, bond[1].index))
        hydrogen = any(a.element is not None and a.element.atomic_number == 1 for a in bond)
        if pair in held or (which == "hbonds" and not hydrogen):
            continue
        if pair not in terms:
            a, b = (atom.index + 1 for atom in bond)
            raise UnsupportedSystemError(
                f"the System has no harmonic bond between atoms {a} and {b} to take a length "
                "from: make the System with its constraints and give it with --system"
            )
        force, k, (i, j, length, _) = terms[pair]
        system.addConstraint(i, j, length)
        force.setBondParameters(k, i, j, length, 0.0)


def repartition(system: openmm.System, topology: app.Topology, mass: float) -> None:
    """Give hydrogens ``mass`` (dalton) in place, taken from the atoms they are bonded to.

    Warns of an atom that is lighter then than they are.

    Raises
    ------
    ConfigurationError
        ``mass`` is below 1 or no number.
    UnsupportedSystemError
        Nothing would be left of an atom.
    """
    if not 1.0 <= mass < math.inf:
        raise ConfigurationError(
            f"hydrogens of {mass:g} u are none: --hydrogen-mass is 1 or more, such as 3"
        )
    lightest: tuple[float, int] | None = None
    for bond in topology.bonds():
        light = [a for a in bond if a.element is not None and a.element.atomic_number == 1]
        if len(light) != 1:
            continue
        heavy = next(a for a in bond if a is not light[0])
        gained = mass - system.getParticleMass(light[0].index)._value
        left = system.getParticleMass(heavy.index)._value - gained
        if left <= 0.0:
            raise UnsupportedSystemError(
                f"hydrogens of {mass:g} u leave atom {heavy.index + 1} with {left:.3g} u: ask for "
                "less, such as --hydrogen-mass 3"
            )
        system.setParticleMass(light[0].index, mass)
        system.setParticleMass(heavy.index, left)
        lightest = min(lightest or (left, heavy.index), (left, heavy.index))
    if lightest is not None and lightest[0] < mass:
        logger.warning(
            "hydrogens of %g u leave atom %d with %.3g u, less than theirs: dynamics then needs a "
            "shorter step, not a longer one; take a smaller --hydrogen-mass",
            mass,
            lightest[1] + 1,
            lightest[0],
        )


class Constraints:
    r"""The constrained bonds of a System, and :math:`\tfrac12 \log\det H`.

    Parameters
    ----------
    lengths
        Length in nm of every constraint, by its pair of atoms.
    masses
        (n_particles,), in any unit.

    Attributes
    ----------
    lengths, masses
        As given.

    Raises
    ------
    UnsupportedSystemError
        The constraints close a ring, three atoms of a rigid angle included.

    Examples
    --------
    >>> import torch
    >>> three = Constraints({(0, 1): 0.1, (1, 2): 0.1}, [12.0, 2.0, 12.0])
    >>> x = torch.tensor([[[0.1, 0, 0], [0, 0, 0], [0, 0.1, 0]]], dtype=torch.float64)
    >>> three.half_log_det(x)  # a right angle: nothing couples
    tensor([0.], dtype=torch.float64)
    """

    def __init__(
        self, lengths: dict[tuple[int, int], float], masses: FloatArray | list[float]
    ) -> None:
        graph = nx.Graph(list(lengths))
        try:
            ring = [edge[0] for edge in nx.find_cycle(graph)]
        except nx.NetworkXNoCycle:
            ring = []
        if ring:
            atoms = "-".join(str(k + 1) for k in ring)
            raise UnsupportedSystemError(
                f"the constraints of atoms {atoms} close a ring (a rigid angle or a rigid ring): "
                "rebuild the System with constraints=HBonds, rigidWater=False"
            )
        if len(lengths) >= len(masses) - 1 and len(masses) < 3:
            raise UnsupportedSystemError(
                "the constraints leave nothing that moves: rebuild the System with "
                "constraints=None"
            )
        self.lengths, self.masses = dict(lengths), [float(m) for m in masses]
        sign = torch.zeros(len(lengths), len(masses), dtype=torch.float64)
        for k, (a, b) in enumerate(lengths):
            sign[k, a], sign[k, b] = 1.0, -1.0
        self._first, self._second = (
            torch.tensor([pair[end] for pair in lengths], dtype=torch.int64) for end in (0, 1)
        )
        weight = (sign / torch.as_tensor(np.array(masses), dtype=torch.float64)) @ sign.T
        scale = torch.diagonal(weight).rsqrt()
        self._sign, self._weight = sign, scale[:, None] * weight * scale
        self._scale = scale
        self._mobility = sign.T / torch.as_tensor(np.array(masses), dtype=torch.float64)[:, None]
        self._nominal = torch.tensor(list(lengths.values()), dtype=torch.float64)

    @classmethod
    def of(cls, system: openmm.System) -> Constraints | None:
        """Those of a System, or None."""
        lengths = constraint_lengths(system)
        if not lengths:
            return None
        n = system.getNumParticles()
        return cls(lengths, [system.getParticleMass(i)._value for i in range(n)])

    def half_log_det(self, x: Tensor) -> Tensor:
        r"""Return :math:`\tfrac12 \log\det H` (n,) of (n, N, 3) nm, differentiable."""
        return self._factor(x)[0]

    def half_log_det_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :meth:`half_log_det` and its gradient (n, N, 3) in 1/nm, without a graph.

        With A the inverse of H and w its constant factors the derivative by the unit vector u_j
        of a bond is :math:`\sum_k A_{jk} w_{jk} u_k`.
        """
        value, factor, u, r = self._factor(x.detach())
        # Only neighbours have a weight: the inverse is needed there alone, but is cheap as it is.
        by_unit = (torch.cholesky_inverse(factor) * self._weight.to(x)) @ u
        across = (by_unit - (by_unit * u).sum(-1, keepdim=True) * u) / r
        return value, torch.einsum("mi,nmd->nid", self._sign.to(x), across)

    def _factor(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, Cholesky factor of H, unit vectors and lengths of the bonds."""
        v = self._vectors(x)
        r = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        u = v / r
        factor, failed = torch.linalg.cholesky_ex(self._weight.to(x) * (u @ u.transpose(1, 2)))
        value = torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
        return torch.where(failed == 0, value, torch.nan), factor, u, r

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        return {"lengths": [[*pair, r] for pair, r in self.lengths.items()], "masses": self.masses}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Constraints:
        """Rebuild from :meth:`config`."""
        return cls({(int(a), int(b)): float(r) for a, b, r in config["lengths"]}, config["masses"])

    def check(self, x: Tensor) -> None:
        """Refuse positions (n, N, 3) that do not keep the constraints.

        Raises
        ------
        ConfigurationError
            They were made for another System, most likely one without constraints.
        """
        nominal = self._nominal.to(x)
        off = (torch.linalg.vector_norm(self._vectors(x), dim=-1) / nominal - 1).abs()
        worst = float(torch.nan_to_num(off, nan=0.0, posinf=0.0).max()) if len(x) else 0.0
        if worst > _OFF:
            raise ConfigurationError(
                f"positions miss the System's constraints by up to {worst:.1%} of a bond: they, "
                "or the flow that proposed them, were made for other constraints; train a flow "
                "for this System, or remove its constraints"
            )

    def velocities(self, x: FloatArray, kt: float, generator: torch.Generator) -> FloatArray:
        r"""Draw velocities (N, 3) in nm/ps of the Maxwell-Boltzmann density that keep them.

        :math:`v = \xi - M^{-1} C^T H^{-1} C\, \xi` for free velocities :math:`\xi`: the projection
        that is orthogonal in the mass metric. ``kt`` in kJ/mol, x (N, 3) nm.
        """
        inverse = 1.0 / torch.tensor(self.masses, dtype=torch.float64)
        noise = torch.randn(len(x), 3, generator=generator, dtype=torch.float64)
        v = noise * (kt * inverse).sqrt()[:, None]
        kept: FloatArray = self.tangent(torch.as_tensor(x)[None], v[None])[0].numpy()
        return kept

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Project velocities (n, N, 3) at x (n, N, 3) so that no bond changes its length."""
        _, factor, u, _ = self._factor(x)
        return v - self._impulse(factor, u, (u * self._vectors(v)).sum(-1))

    def drift(self, x: Tensor, v: Tensor, duration: float | Tensor) -> tuple[Tensor, Tensor]:
        """Move freely for a time, bonds kept; see the module docstring.

        Parameters
        ----------
        x, v
            Positions (n, N, 3) that keep the bonds, velocities.
        duration
            A time, or one of every configuration (n, 1, 1).

        Returns
        -------
        x, v
            Where it got to; nan where bonds turn too far at once to be kept.
        """
        _, factor, u, _ = self._factor(x)
        v = v - self._impulse(factor, u, (u * self._vectors(v)).sum(-1))
        y = straight = x + duration * v
        for _ in range(_TRIES):
            off = torch.linalg.vector_norm(self._vectors(y), dim=-1) - self._nominal.to(y)
            far = off.abs().amax(1)
            if not bool((far > _EXACT).any()):
                break
            y = y - self._impulse(factor, u, off)
        y = torch.where((far <= _EXACT)[:, None, None], y, torch.nan)
        return y, v + (y - straight) / duration

    def _impulse(self, factor: Tensor, u: Tensor, rate: Tensor) -> Tensor:
        r"""Return :math:`M^{-1} C^T H^{-1}` times the change (n, m) of every bond, (n, N, 3)."""
        scale = self._scale.to(u)
        tension = scale * torch.cholesky_solve((scale * rate)[..., None], factor)[..., 0]
        return torch.einsum("im,nmd->nid", self._mobility.to(u), tension[..., None] * u)

    def _vectors(self, x: Tensor) -> Tensor:
        return x[:, self._first.to(x.device)] - x[:, self._second.to(x.device)]
