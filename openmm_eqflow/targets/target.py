r"""The Boltzmann density of an OpenMM System as a target for flows.

One name for one potential: SHA-256 of the serialised System.

.. math:: p(x) \propto e^{-u(x)}\,\mathbb 1[x \in \text{sector}], \qquad u(x) = U(x) / kT,

a density on the mean-free subspace (an OpenMM potential without external field is invariant under
rigid motions, so it is normalisable only there; Köhler, Klein, Noé 2020). The *sector* is that of
the reference positions: every stereocentre has their sign. With constrained bonds the density is
with respect to the volume element of :mod:`openmm_eqflow.targets.constraints`. Mirror images have
the same energy, so without the indicator a Metropolis test would accept the wrong enantiomer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.constraints import Constraints
from openmm_eqflow.targets.energies.base import EnergyEvaluator, FloatArray, count
from openmm_eqflow.targets.energies.choose import choose_evaluator
from openmm_eqflow.targets.energies.contexts import probe_positions
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.forcefield import one_line, refuse_code
from openmm_eqflow.targets.support import check_invariance, check_system
from openmm_eqflow.targets.symmetry import Symmetry, chirality_signs, find_symmetry
from openmm_eqflow.targets.topology_record import topology_from_record, topology_record
from openmm_eqflow.units import kt_in_kj_mol

__all__ = [
    "BoltzmannTarget",
    "system_sha256",
]


_COUNTING = threading.Lock()


def system_sha256(system: openmm.System) -> str:
    """SHA-256 of the System's XML, the version of OpenMM that wrote it left out.

    A flow trained with one version must be recognised by the next.
    """
    xml = openmm.XmlSerializer.serialize(system)
    return hashlib.sha256(re.sub(r' openmmVersion="[^"]*"', "", xml).encode()).hexdigest()


def _serialised(system: openmm.System) -> str:
    try:
        return str(openmm.XmlSerializer.serialize(system))
    except Exception as error:  # of the pickle of a function in Python, of any kind
        raise UnsupportedSystemError(
            f"the System cannot be stored ({one_line(error)}): make the function of a PythonForce "
            "one at the top level of a module, neither a lambda nor inside another"
        ) from error


class BoltzmannTarget:
    r"""Batched reduced potential of a System at a temperature.

    Parameters
    ----------
    system
        OpenMM System without box, barostat, virtual sites, Drude particles or external force, its
        constraints bonds; anything else is refused by name.
    topology
        Its topology (for the bond graph).
    temperature
        Quantity.
    positions
        Reference ``(n_particles, n_dims or 3)``, nm or Quantity: fixes the chirality sector.
    n_dims
        2 for planar systems: z = 0 is inserted for the energies and never seen outside.
    evaluator
        ``"auto"`` for TorchEnergy where it can read every force and Contexts where not, or any
        :class:`EnergyEvaluator`.
    platform, n_workers
        For the Contexts; see :class:`~openmm_eqflow.targets.energies.contexts.ContextPool`.
    check_chirality
        False lets every enantiomer count.

    Raises
    ------
    UnsupportedSystemError
        The System has no density on the mean-free subspace; the message says what to change.
    ValueError
        Stereocentres but no reference positions, or an argument of the wrong shape or kind.

    Examples
    --------
    >>> target = BoltzmannTarget(system, topology, 300 * unit.kelvin, positions)  # doctest: +SKIP
    >>> u, du_dx = target.reduced_potential_and_gradient(x)                       # doctest: +SKIP
    """

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology,
        temperature: unit.Quantity,
        positions: Any = None,
        n_dims: int = 3,
        evaluator: str | EnergyEvaluator = "auto",
        platform: str = "auto",
        n_workers: int | None = None,
        check_chirality: bool = True,
    ) -> None:
        if n_dims not in (2, 3):
            msg = f"n_dims is {n_dims}, expected 2 or 3"
            raise ValueError(msg)
        if isinstance(evaluator, str) and evaluator != "auto":
            msg = f"evaluator is {evaluator!r}, expected 'auto' or an EnergyEvaluator object"
            raise ValueError(msg)
        if topology is not None and topology.getNumAtoms() != system.getNumParticles():
            msg = (
                f"the topology has {topology.getNumAtoms()} atoms, the System "
                f"{system.getNumParticles()} particles: pass the topology it was made from"
            )
            raise ValueError(msg)
        check_system(system)
        self.constraints = Constraints.of(system)
        if self.constraints is not None and n_dims == 2:
            raise UnsupportedSystemError(
                "constraints are for molecules in space: rebuild the planar System without"
            )
        self.system = system
        self.topology = topology
        self.n_particles: int = system.getNumParticles()
        self.n_dims = n_dims
        self._system_xml: str = _serialised(system)
        self.system_hash: str = system_sha256(system)
        self._set_temperature(temperature)
        self.positions = self._reference(positions)
        self.symmetry: Symmetry = find_symmetry(system, topology, self.positions)
        self._signs = self._reference_signs(check_chirality)
        self._signs_on: dict[torch.device, Tensor] = {}
        probe = self._probe()
        check_invariance(system, probe, n_dims)
        if isinstance(evaluator, str):
            evaluator = choose_evaluator(
                system, platform=platform, n_workers=n_workers, positions=probe
            )
        self.evaluator: EnergyEvaluator = evaluator
        self._evaluated: dict[torch.device, Tensor] = {}
        self._invalid: dict[torch.device, Tensor] = {}

    @property
    def n_evaluated(self) -> int:
        """Configurations evaluated since construction."""
        return sum(int(total) for total in self._evaluated.values())

    @property
    def n_invalid(self) -> int:
        """Configurations of infinite reduced potential since construction."""
        return sum(int(total) for total in self._invalid.values())

    @property
    def replayable(self) -> bool:
        """Whether an evaluation on a GPU may be recorded and replayed."""
        # Constraints are checked, which asks for a number; a class derived from this one may read
        # what a recording does not see.
        plain = type(self) is BoltzmannTarget and self.constraints is None
        return plain and isinstance(self.evaluator, TorchEnergy) and self.evaluator.replayable

    @property
    def concurrent(self) -> bool:
        """Whether several threads may ask for energies side by side."""
        return isinstance(self.evaluator, TorchEnergy) and self.evaluator.concurrent

    @property
    def check_chirality(self) -> bool:
        """Whether a sector is enforced."""
        return self._signs is not None

    def reduced_potential(self, x: Tensor) -> Tensor:
        r"""Return :math:`u(x)`, float64 ``(n,)``, of ``(n, n_particles, n_dims)`` nm.

        +inf where the energy is invalid or the chirality is not that of the reference; both are
        counted in ``n_invalid``. Differentiable: the gradient is minus the force over kT.
        """
        if x.requires_grad and torch.is_grad_enabled():
            u: Tensor = _ReducedPotential.apply(x, self)
            return u
        return self._evaluate(x, gradient=False)[0]

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return u and :math:`\partial u / \partial x` (1/nm, zero where u is +inf), float64."""
        u, gradient = self._evaluate(x, gradient=True)
        if gradient is None:
            msg = "the evaluator returned no forces"
            raise ValueError(msg)
        return u, gradient

    def log_prob(self, x: Tensor) -> Tensor:
        """Unnormalised log density -u on the mean-free subspace."""
        return -self.reduced_potential(x)

    def in_sector(self, x: Tensor) -> Tensor:
        """Whether every stereocentre has the reference's sign, bool ``(n,)``."""
        if self._signs is None:
            return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        signs = chirality_signs(x.detach(), self.symmetry.stereocentres)
        if signs.device not in self._signs_on:
            self._signs_on[signs.device] = self._signs.to(signs)
        return (signs == self._signs_on[signs.device]).all(dim=-1)

    def at_temperature(self, temperature: unit.Quantity) -> BoltzmannTarget:
        """Return the same target at another temperature, sharing the evaluator."""
        other = copy.copy(self)
        other._set_temperature(temperature)
        other._evaluated, other._invalid = {}, {}
        return other

    def record(self) -> dict[str, Any]:
        """System, topology, temperature and reference positions, JSON-able."""
        return {
            "format": "openmm_eqflow.target/1",
            "system": self._system_xml,
            "system_hash": self.system_hash,
            "topology": topology_record(self.topology),
            "temperature_K": self.temperature.value_in_unit(unit.kelvin),
            "positions_nm": None if self.positions is None else self.positions.tolist(),
            "n_dims": self.n_dims,
            "check_chirality": self.check_chirality,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], **options: Any) -> BoltzmannTarget:
        """Rebuild from :meth:`record`; ``options`` are evaluator, platform and n_workers.

        Raises ConfigurationError for a System that holds code (a PythonForce), unless that is
        allowed.
        """
        refuse_code(Path("the record of the target"), record["system"])
        return cls(
            openmm.XmlSerializer.deserialize(record["system"]),
            topology_from_record(record["topology"]),
            record["temperature_K"] * unit.kelvin,
            record["positions_nm"],
            n_dims=record["n_dims"],
            check_chirality=record["check_chirality"],
            **options,
        )

    def save(self, path: str | Path) -> None:
        """Write :meth:`record` as one JSON file."""
        Path(path).write_text(json.dumps(self.record()))

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> BoltzmannTarget:
        """Rebuild a saved target; ``options`` as in :meth:`from_record`."""
        return cls.from_record(json.loads(Path(path).read_text()), **options)

    def close(self) -> None:
        """Release the evaluator (shared by ``at_temperature``)."""
        self.evaluator.close()

    def __enter__(self) -> BoltzmannTarget:
        """Return the target."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the target."""
        self.close()

    def _set_temperature(self, temperature: unit.Quantity) -> None:
        self.kT: float = kt_in_kj_mol(temperature)
        self.temperature = temperature

    def _reference(self, positions: Any) -> FloatArray | None:
        if positions is None:
            return None
        if unit.is_quantity(positions):
            positions = positions.value_in_unit(unit.nanometer)
        array = np.array([[float(c) for c in p] for p in positions])
        if array.ndim != 2 or array.shape[0] != self.n_particles or array.shape[1] < self.n_dims:
            msg = (
                f"positions have shape {array.shape}, expected ({self.n_particles}, {self.n_dims})"
            )
            raise ValueError(msg)
        return array[:, : self.n_dims].copy()

    def _reference_signs(self, check_chirality: bool) -> Tensor | None:
        centres = self.symmetry.stereocentres
        if not check_chirality or not centres or self.n_dims == 2:
            return None
        if self.positions is None:
            msg = (
                f"the System has {len(centres)} stereocentre(s) (atoms "
                f"{[c.centre + 1 for c in centres]}) and no reference positions: pass positions, "
                "or check_chirality=False to let every enantiomer count"
            )
            raise ValueError(msg)
        return chirality_signs(torch.from_numpy(self.positions)[None], centres)[0]

    def _probe(self) -> FloatArray:
        probe = probe_positions(self.n_particles)
        if self.positions is not None:
            probe = np.zeros((self.n_particles, 3))
            probe[:, : self.n_dims] = self.positions
        elif self.n_dims == 2:
            probe[:, 2] = 0.0
        return probe

    def _evaluate(self, x: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        if x.ndim != 3 or x.shape[1:] != (self.n_particles, self.n_dims):
            expected = f"(n, {self.n_particles}, {self.n_dims})"
            msg = f"x has shape {tuple(x.shape)}, expected {expected}"
            raise ValueError(msg)
        x = x.detach().to(torch.float64)
        if self.constraints is not None:
            self.constraints.check(x)
        full = torch.nn.functional.pad(x, (0, 3 - self.n_dims))
        energies, forces = self._energies(full, gradient=gradient)
        u = energies / self.kT
        right = self.in_sector(x)
        u = torch.where(right, u, torch.inf)
        with _COUNTING:
            count(self._evaluated, u.device, len(u))
            count(self._invalid, u.device, torch.isinf(u).sum())
        if forces is None:
            return u, None
        du_dx = forces[..., : self.n_dims] / -self.kT
        return u, torch.where(right[:, None, None], du_dx, 0.0)

    def _energies(self, x: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Energies and forces in kJ/mol on the device of x."""
        if x.device.type != "cpu" and isinstance(self.evaluator, TorchEnergy):
            return self.evaluator.energies_and_forces_tensor(x, forces=gradient)
        array = x.cpu().numpy()
        if gradient:
            energies, forces = self.evaluator.energies_and_forces(array)
            return torch.from_numpy(energies).to(x.device), torch.from_numpy(forces).to(x.device)
        return torch.from_numpy(self.evaluator.energies(array)).to(x.device), None


class _ReducedPotential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: BoltzmannTarget) -> Tensor:
        u, gradient = target.reduced_potential_and_gradient(x)
        ctx.save_for_backward(gradient.to(x.dtype))
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_u[:, None, None].to(gradient) * gradient, None
