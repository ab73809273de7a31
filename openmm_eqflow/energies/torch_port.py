"""A System's forces in batches: torch modules everywhere, compiled kernels for float64 on the CPU.

OpenMM evaluates one configuration at a time; here every term is vectorised over the batch. The
torch modules are differentiable in any precision and on any device. Where numba is installed, the
float64 CPU path runs compiled kernels with analytic forces instead. Both are checked against
OpenMM's Reference platform, force by force, when the object is made.

The same batch gives the same bits, whatever the number of threads; the compiled path gives a
configuration the same bits in any batch.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_eqflow.energies.base import ENERGY_LIMIT, FloatArray, check_batch, mask_invalid
from openmm_eqflow.energies.compiled import Kernel, compile_term, run_kernels
from openmm_eqflow.energies.custom_terms import read_custom
from openmm_eqflow.energies.platforms import probe_positions
from openmm_eqflow.energies.terms import read_standard
from openmm_eqflow.energies.torch_terms import torch_term
from openmm_eqflow.errors import UnsupportedSystemError

__all__ = ["TorchEnergy"]

_WITHOUT_ENERGY = (openmm.CMMotionRemover, openmm.AndersenThermostat)
_TOLERANCE = 1e-8
#: Configurations per pass over the kernels: positions and forces stay in the second-level cache.
_CHUNK = 256
_MAX_GROUPS = 32


class _Part(NamedTuple):
    """One force of the System."""

    name: str
    position: int
    kernel: Kernel | None


class TorchEnergy(nn.Module):
    """Batched, differentiable potential energy of a System.

    Parameters
    ----------
    system
        OpenMM System whose forces are all covered: HarmonicBond, HarmonicAngle, PeriodicTorsion,
        RBTorsion, CMAPTorsion, Nonbonded (NoCutoff), GBSAOBC, CustomBond, CustomAngle,
        CustomTorsion, CustomNonbonded, CustomCompoundBond, CustomGB. Global parameters take their
        default values.
    positions
        ``(n_particles, 3)`` nm around which agreement with OpenMM is checked; default a lattice.
    compiled
        Use compiled kernels on the CPU where numba has them.
    n_threads
        Threads of the compiled path; default one per core.

    Raises
    ------
    UnsupportedSystemError
        Naming the force that is not covered or disagrees with OpenMM.

    Examples
    --------
    >>> energy = TorchEnergy(system)                          # doctest: +SKIP
    >>> u = energy(x)               # torch, differentiable     # doctest: +SKIP
    >>> e, f = energy.energies_and_forces(x.numpy())            # doctest: +SKIP
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        positions: FloatArray | None = None,
        compiled: bool = True,
        n_threads: int | None = None,
    ) -> None:
        super().__init__()
        self.n_particles: int = system.getNumParticles()
        self.n_invalid = 0
        self.n_threads = n_threads or os.cpu_count() or 1
        self._executor: ThreadPoolExecutor | None = None
        self._parts: list[_Part] = []
        self.terms = nn.ModuleList()
        for index, force in enumerate(system.getForces()):
            if not isinstance(force, _WITHOUT_ENERGY):
                self._add(index, force, compiled)
        self._kernels = [p.kernel for p in self._parts if p.kernel is not None]
        self._eager = [m for m, p in zip(self.terms, self._parts, strict=True) if p.kernel is None]
        self._check(system, probe_positions(self.n_particles) if positions is None else positions)

    @property
    def compiled_forces(self) -> tuple[str, ...]:
        """Names of the forces the compiled path covers."""
        return tuple(p.name for p in self._parts if p.kernel is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Energies ``(n,)`` in kJ/mol of ``(n, n_particles, 3)`` nm; no masking."""
        energy = x.new_zeros(len(x))
        for term in self.terms:
            energy = energy + term(x)
        return energy

    def energies_and_forces_tensor(
        self, x: Tensor, *, forces: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Masked energies and forces by torch, on the device and in the precision of ``x``."""
        energy, force = _differentiate(list(self.terms), x.detach(), forces=forces)
        valid = (energy.abs() < ENERGY_LIMIT) & torch.isfinite(x.detach()).all(-1).all(-1)
        if force is not None:
            valid = valid & torch.isfinite(force).all(-1).all(-1)
            force = torch.where(valid[:, None, None], force, 0.0)
        self.n_invalid += int((~valid).sum())
        return torch.where(valid, energy, torch.inf), force

    def energies(self, x: FloatArray) -> FloatArray:
        """Energies ``(n,)`` in kJ/mol; +inf where invalid."""
        return self._evaluate(x, forces=False)[0]

    def energies_and_forces(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies ``(n,)`` and forces ``(n, n_particles, 3)``; +inf and 0 where invalid."""
        energy, force = self._evaluate(x, forces=True)
        return energy, cast(FloatArray, force)

    def close(self) -> None:
        """Stop the threads; they start again if needed."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def _add(self, index: int, force: openmm.Force, compiled: bool) -> None:
        name = f"{type(force).__name__} (force {index})"
        try:
            term = read_standard(force) or read_custom(force)
        except UnsupportedSystemError as error:
            msg = f"{name} is not covered: {error}"
            raise UnsupportedSystemError(msg) from error
        if term is None:
            msg = f"{name} is not covered: use ContextPool"
            raise UnsupportedSystemError(msg)
        self._parts.append(_Part(name, index, compile_term(term) if compiled else None))
        self.terms.append(torch_term(term))

    def _evaluate(self, x: FloatArray, *, forces: bool) -> tuple[FloatArray, FloatArray | None]:
        x = check_batch(x, self.n_particles)
        # Torch rounds the end of an array in another way than its middle: where it takes part, the
        # cuts must not depend on the number of threads.
        wanted = 1 if self._eager else min(self.n_threads, len(x) // 64)
        n_chunks = max(-(-len(x) // _CHUNK), wanted, 1)
        chunks = np.array_split(x, n_chunks)
        if not len(x):
            results = [(np.zeros(0), np.zeros(x.shape) if forces else None)]
        elif n_chunks == 1 or self.n_threads == 1 or not self._kernels:
            results = [self._chunk(c, forces) for c in chunks]
        else:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.n_threads)
            results = list(self._executor.map(lambda c: self._chunk(c, forces), chunks))
        energy = np.concatenate([e for e, _ in results])
        force = np.concatenate([f for _, f in results if f is not None]) if forces else None
        energy, force, n_invalid = mask_invalid(x, energy, force)
        self.n_invalid += n_invalid
        return energy, force

    def _chunk(self, x: FloatArray, forces: bool) -> tuple[FloatArray, FloatArray | None]:
        energy, force = run_kernels(self._kernels, x, forces) if self._kernels else (None, None)
        if self._eager:
            e, f = _differentiate(self._eager, torch.from_numpy(x), forces=forces)
            energy = e.numpy() if energy is None else energy + e.numpy()
            if f is not None:
                force = f.numpy() if force is None else force + f.numpy()
        if energy is None:
            energy, force = np.zeros(len(x)), np.zeros(x.shape) if forces else None
        return energy, force

    def _check(self, system: openmm.System, positions: FloatArray) -> None:
        """Compare every force, by every path, with the Reference platform."""
        rng = np.random.default_rng(0)
        noise = np.array([0.003, 0.01, 0.03])[:, None, None]
        x = positions + noise * rng.normal(size=(3, self.n_particles, 3))
        # All forces beyond the 31st share a group: they are compared as a sum.
        groups = [min(k, _MAX_GROUPS - 1) for k in range(len(self._parts))]
        references = _reference(system, [p.position for p in self._parts], groups, x)
        for group, (u, f) in references.items():
            members = [k for k, g in enumerate(groups) if g == group]
            paths = [self._torch_parts(members, x)]
            if all(self._parts[k].kernel is not None for k in members):
                paths.append(self._compiled_parts(members, x))
            for energy, force in paths:
                off = np.abs(energy - u).max() / max(1.0, np.abs(u).max())
                off_force = np.abs(force - f).max() / max(1.0, np.abs(f).max())
                if not (off <= _TOLERANCE and off_force <= _TOLERANCE):
                    msg = (
                        f"{self._parts[members[0]].name} disagrees with OpenMM's Reference "
                        f"platform (relative energy {off:.1e}, force {off_force:.1e}; allowed "
                        f"{_TOLERANCE:g}): use ContextPool"
                    )
                    raise UnsupportedSystemError(msg)

    def _torch_parts(self, members: list[int], x: FloatArray) -> tuple[FloatArray, FloatArray]:
        modules = [self.terms[k] for k in members]
        energy, force = _differentiate(modules, torch.from_numpy(x), forces=True)
        return energy.numpy(), cast(Tensor, force).numpy()

    def _compiled_parts(self, members: list[int], x: FloatArray) -> tuple[FloatArray, FloatArray]:
        kernels = [cast(Kernel, self._parts[k].kernel) for k in members]
        energy, force = run_kernels(kernels, x, True)
        return energy, cast(FloatArray, force)


def _differentiate(
    modules: list[nn.Module], x: Tensor, *, forces: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of modules and minus its gradient, detached."""
    with torch.set_grad_enabled(forces):
        leaf = x.detach().clone().requires_grad_(forces)
        energy = leaf.new_zeros(len(leaf))
        for module in modules:
            energy = energy + module(leaf)
        if not forces:
            return energy, None
        if not energy.requires_grad:
            return energy, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), -gradient


def _reference(
    system: openmm.System, indices: list[int], groups: list[int], x: FloatArray
) -> dict[int, tuple[FloatArray, FloatArray]]:
    """Energies and forces of every force group on the Reference platform."""
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for index, group in zip(indices, groups, strict=True):
        copy.getForce(index).setForceGroup(group)
    integrator = openmm.VerletIntegrator(1e-3)
    context = openmm.Context(copy, integrator, openmm.Platform.getPlatformByName("Reference"))
    out = {g: (np.zeros(len(x)), np.zeros(x.shape)) for g in groups}
    for i, positions in enumerate(x):
        context.setPositions(positions)
        for group, (energy, force) in out.items():
            state = context.getState(getEnergy=True, getForces=True, groups={group})
            energy[i] = state.getPotentialEnergy()._value
            force[i] = state.getForces(asNumpy=True)._value
    return out
