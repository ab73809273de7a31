r"""A System's energies and forces in batches: torch modules and compiled kernels.

Energy terms as torch modules: differentiable, any dtype and device, vectorised over the batch.

Every module maps positions ``(n, n_particles, 3)`` in nm to energies ``(n,)`` in kJ/mol.

A System's forces in batches: torch modules everywhere, compiled kernels for float64 on the CPU
and, where there is Triton, on a GPU.

OpenMM evaluates one configuration at a time; here every term is vectorised over the batch. The
torch modules are differentiable in any precision and on any device. Where numba is installed, the
float64 CPU path runs compiled kernels with analytic forces instead. Both are checked against
OpenMM's Reference platform, force by force, when the object is made.

The same batch gives the same bits, whatever the number of threads; the compiled path gives a
configuration the same bits in any batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.parallel import triton_kernels
from openmm_eqflow.targets.energies.base import (
    ENERGY_LIMIT,
    FloatArray,
    check_batch,
    count,
    mask_invalid,
)
from openmm_eqflow.targets.energies.compiled import Kernel, compile_term, run_kernels
from openmm_eqflow.targets.energies.contexts import probe_positions
from openmm_eqflow.targets.energies.custom_terms import GBStage, GeneralGBTerm, read_custom
from openmm_eqflow.targets.energies.terms import (
    AngleTerm,
    BondTerm,
    FourierTorsionTerm,
    GBSATerm,
    MapTerm,
    PairTerm,
    ProgramTerm,
    StandardTerm,
    read_standard,
)

__all__ = [
    "AnyTerm",
    "TorchEnergy",
    "torch_term",
]

AnyTerm = StandardTerm | ProgramTerm | GeneralGBTerm
# Keeps the gradient of an angle finite where its particles are exactly collinear, as OpenMM does.
_TINY = 1e-30


def _distance(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(x[:, i] - x[:, j], dim=-1)
    return distance


def _angle(x: Tensor, index: Tensor) -> Tensor:
    a, b = x[:, index[:, 0]] - x[:, index[:, 1]], x[:, index[:, 2]] - x[:, index[:, 1]]
    cross = torch.linalg.cross(a, b).square().sum(-1).clamp_min(_TINY).sqrt()
    return torch.atan2(cross, (a * b).sum(-1))


def _dihedral_plane(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`(\rho\cos\phi, \rho\sin\phi)` (IUPAC sign)."""
    p = [x[:, index[:, k]] for k in range(4)]
    b1, b2, b3 = p[1] - p[0], p[2] - p[1], p[3] - p[2]
    n1, n2 = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    length = torch.linalg.vector_norm(b2, dim=-1)
    return (n1 * n2).sum(-1), length * (b1 * n2).sum(-1)


def _dihedral(x: Tensor, index: Tensor) -> Tensor:
    cosine, sine = _dihedral_plane(x, index)
    return torch.atan2(sine, cosine)


class _Module(nn.Module):
    def put(self, name: str, array: NDArray[np.generic]) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def get(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))


class _Harmonic(_Module):
    def __init__(self, term: BondTerm | AngleTerm) -> None:
        super().__init__()
        self._is_bond = isinstance(term, BondTerm)
        self.put("index", term.index)
        self.put("origin", term.length if isinstance(term, BondTerm) else term.angle)
        self.put("k", term.k)

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        q = _distance(x, index[:, 0], index[:, 1]) if self._is_bond else _angle(x, index)
        return 0.5 * (q - self.get("origin")).square() @ self.get("k")


class _Torsions(_Module):
    def __init__(self, term: FourierTorsionTerm) -> None:
        super().__init__()
        self.put("index", term.index)
        self.put("cosine", term.cosine.T)
        self.put("sine", term.sine.T)

    def forward(self, x: Tensor) -> Tensor:
        cosine, sine = _dihedral_plane(x, self.get("index"))
        radius = torch.sqrt(cosine.square() + sine.square())
        c1, s1 = cosine / radius, sine / radius
        a, b = self.get("cosine"), self.get("sine")
        total = a[0].sum() + torch.zeros_like(c1[:, 0])
        c, s = c1, s1
        for n in range(1, len(a)):
            total = total + c @ a[n] + s @ b[n]
            c, s = c * c1 - s * s1, s * c1 + c * s1
        return total


class _Maps(_Module):
    def __init__(self, term: MapTerm) -> None:
        super().__init__()
        self._size = term.coefficients.shape[1]
        self.put("index", term.index)
        self.put("coefficients", term.coefficients)

    def forward(self, x: Tensor) -> Tensor:
        index, table = self.get("index"), self.get("coefficients")
        powers, cells = [], []
        for angles in (index[:, :4], index[:, 4:]):
            s = (_dihedral(x, angles) % (2 * torch.pi)) * (self._size / (2 * torch.pi))
            # nan has no cell; any will do, the energy stays nan
            cell = torch.nan_to_num(s.detach()).floor().long() % self._size
            s = s - s.detach().floor()
            cells.append(cell)
            powers.append(torch.stack([torch.ones_like(s), s, s * s, s * s * s], dim=-1))
        which = torch.arange(len(index), device=x.device)
        patch = table[which, cells[0], cells[1]]
        return torch.einsum("btk,btl,btkl->b", powers[0], powers[1], patch)


class _Pairs(_Module):
    def __init__(self, term: PairTerm) -> None:
        super().__init__()
        self.put("index", term.index)
        for name in ("charge", "a", "b"):
            self.put(name, getattr(term, name))

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        inverse = (x[:, index[:, 0]] - x[:, index[:, 1]]).square().sum(-1).rsqrt()
        six = (inverse * inverse) ** 3
        return inverse @ self.get("charge") + (six * six) @ self.get("a") - six @ self.get("b")


class _GBSA(_Module):
    r"""OBC2: Born radii from pair integrals, the Still formula, and the ACE surface term.

    Onufriev, Bashford and Case 2004, equations 6 to 8; Still et al. 1990, equation 3;
    Schaefer, Bartels and Karplus 1998.
    """

    def __init__(self, term: GBSATerm) -> None:
        super().__init__()
        n = len(term.charge)
        i, j = np.argwhere(~np.eye(n, dtype=bool)).T
        self._n = n
        self._scale = (-0.5 * term.prefactor, term.surface, term.probe)
        self.put("i", i)
        self.put("j", j)
        for name in ("radius", "offset_radius", "charge"):
            self.put(name, getattr(term, name))
        self.put("pair_charge", term.charge[i] * term.charge[j])
        self.put("near", term.offset_radius[i])
        self.put("reach", term.scaled_radius[j])

    def forward(self, x: Tensor) -> Tensor:
        i, j, near, reach = (self.get(k) for k in ("i", "j", "near", "reach"))
        r = _distance(x, i, j)
        lower = 1 / torch.maximum(near, (r - reach).abs())
        upper = 1 / (r + reach)
        square = upper.square() - lower.square()
        term = lower - upper + 0.25 * r * square + 0.5 / r * torch.log(upper / lower)
        term = term - 0.25 * reach.square() / r * square
        term = term + torch.where(near < reach - r, 2 * (1 / near - lower), 0.0)
        term = torch.where(near < r + reach, term, 0.0)
        offset, radius, charge = (self.get(k) for k in ("offset_radius", "radius", "charge"))
        psi = 0.5 * offset * term.reshape(len(x), self._n, -1).sum(-1)
        born = 1 / (1 / offset - torch.tanh(psi * (1 - psi * (0.8 - 4.85 * psi))) / radius)
        polar, surface, probe = self._scale
        product = born[:, i] * born[:, j]
        still = torch.sqrt(r * r + product * torch.exp(-r * r / (4 * product)))
        energy = polar * ((1 / still) @ self.get("pair_charge") + (1 / born) @ charge.square())
        return energy + surface * ((radius / born) ** 6) @ (radius + probe).square()


class _Programs(_Module):
    def __init__(self, term: ProgramTerm) -> None:
        super().__init__()
        self._program, self._geometry = term.program, term.geometry
        self._constants = list(term.constants)
        self.put("index", term.index)
        for k, array in enumerate(term.constants.values()):
            self.put(f"constant{k}", array)

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        inputs = {name: self.get(f"constant{k}") for k, name in enumerate(self._constants)}
        for name, (kind, slots) in self._geometry.items():
            at = torch.stack([index[:, slot] for slot in slots], 1)
            if kind == "distance":
                inputs[name] = _distance(x, at[:, 0], at[:, 1])
            elif kind == "angle":
                inputs[name] = _angle(x, at)
            elif kind == "dihedral":
                inputs[name] = _dihedral(x, at)
            else:
                inputs[name] = x[:, at[:, 0], "xyz".index(kind)]
        energy = self._program.run(inputs, x)
        return energy.expand(len(x), len(index)).sum(-1)


class _GeneralGB(_Module):
    def __init__(self, term: GeneralGBTerm) -> None:
        super().__init__()
        self._n = term.n_particles
        self._stages = (*term.values, *term.energies)
        for k, stage in enumerate(self._stages):
            if stage.pairs is not None:
                self.put(f"pairs{k}", stage.pairs)
            for m, array in enumerate(stage.constants.values()):
                self.put(f"constant{k}_{m}", array)

    def _run(self, k: int, stage: GBStage, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        inputs = {name: self.get(f"constant{k}_{m}") for m, name in enumerate(stage.constants)}
        if stage.pairs is None:
            inputs.update(values)
            return stage.program.run(inputs, x).expand(len(x), self._n)
        i, j = self.get(f"pairs{k}").T
        inputs["r"] = _distance(x, i, j)
        for name, value in values.items():
            inputs[name + "1"], inputs[name + "2"] = value[:, i], value[:, j]
        return stage.program.run(inputs, x).expand(len(x), len(i))

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        energy = x.new_zeros(len(x))
        for k, stage in enumerate(self._stages):
            result = self._run(k, stage, x, values)
            if not stage.name:
                energy = energy + result.sum(-1)
            elif stage.pairs is None:
                values[stage.name] = result
            else:
                zero = x.new_zeros(len(x), self._n)
                values[stage.name] = zero.index_add(1, self.get(f"pairs{k}")[:, 0], result)
        return energy


def torch_term(term: AnyTerm) -> nn.Module:
    """Wrap the arrays of a force as a module."""
    if isinstance(term, BondTerm | AngleTerm):
        return _Harmonic(term)
    if isinstance(term, FourierTorsionTerm):
        return _Torsions(term)
    if isinstance(term, MapTerm):
        return _Maps(term)
    if isinstance(term, PairTerm):
        return _Pairs(term)
    if isinstance(term, GBSATerm):
        return _GBSA(term)
    if isinstance(term, ProgramTerm):
        return _Programs(term)
    return _GeneralGB(term)

_WITHOUT_ENERGY = (openmm.CMMotionRemover, openmm.AndersenThermostat)
#: A force none of whose lists has an entry has no terms.
_COUNTERS = ("getNumBonds", "getNumAngles", "getNumTorsions", "getNumParticles", "getNumDonors")
_UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError, openmm.OpenMMException)
_TOLERANCE = 1e-8
#: Configurations per pass over the kernels: positions and forces stay in the second-level cache.
_CHUNK = 256
_MAX_GROUPS = 32


_GUARD = threading.Lock()  # of counts and of the executor, where several threads call


def _fused() -> Any:
    return triton_kernels("openmm_eqflow.targets.energies.terms_triton")


class _Part(NamedTuple):
    """One force of the System."""

    name: str
    position: int
    term: AnyTerm
    kernel: Kernel | None


class _OnGPU(NamedTuple):
    """What a GPU computes by kernels of its own, and the modules of the rest."""

    fused: list[Callable[[Tensor, Tensor, Tensor], None]]
    rest: list[nn.Module]


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
        self._n_invalid = 0
        self._invalid_there: dict[torch.device, Tensor] = {}
        self._device = torch.device("cpu")  # of the torch modules
        self.n_threads = n_threads or os.cpu_count() or 1
        self._executor: ThreadPoolExecutor | None = None
        self._on_gpu: dict[torch.device, _OnGPU] = {}
        self._parts: list[_Part] = []
        self.terms = nn.ModuleList()
        for index, force in enumerate(system.getForces()):
            if not isinstance(force, _WITHOUT_ENERGY):
                self._add(index, force, compiled)
        self._kernels = [p.kernel for p in self._parts if p.kernel is not None]
        self._eager = [m for m, p in zip(self.terms, self._parts, strict=True) if p.kernel is None]
        self._check(system, probe_positions(self.n_particles) if positions is None else positions)

    @property
    def n_invalid(self) -> int:
        """Invalid energies since construction."""
        return self._n_invalid + sum(int(total) for total in self._invalid_there.values())

    @property
    def compiled_forces(self) -> tuple[str, ...]:
        """Names of the forces the compiled path covers."""
        return tuple(p.name for p in self._parts if p.kernel is not None)

    @property
    def replayable(self) -> bool:
        """Whether an evaluation on a GPU may be recorded: it reads tensors that stay there."""
        return bool(self._on_gpu) and not any(own.rest for own in self._on_gpu.values())

    @property
    def concurrent(self) -> bool:
        """Whether several threads may call side by side: where compiled kernels do all."""
        return not self._eager

    def forward(self, x: Tensor) -> Tensor:
        """Energies ``(n,)`` in kJ/mol of ``(n, n_particles, 3)`` nm; no masking."""
        energy = x.new_zeros(len(x))
        for term in self.terms:
            energy = energy + term(x)
        return energy

    def energies_and_forces_tensor(
        self, x: Tensor, *, forces: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Masked energies and forces on the device and in the precision of ``x``.

        On a GPU in float64 by kernels of Triton, where they are and for what they cover; the rest
        by torch.
        """
        self._move(x.device)
        if x.is_cuda and x.dtype == torch.float64 and _fused() is not None:
            energy, force = self._by_kernels(x.detach(), forces)
        else:
            energy, force = _differentiate([self], x.detach(), forces=forces)
        valid = (energy.abs() < ENERGY_LIMIT) & torch.isfinite(x.detach()).all(-1).all(-1)
        if force is not None:
            valid = valid & torch.isfinite(force).all(-1).all(-1)
            force = torch.where(valid[:, None, None], force, 0.0)
        count(self._invalid_there, x.device, (~valid).sum())
        return torch.where(valid, energy, torch.inf), force

    def _by_kernels(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor | None]:
        if x.device not in self._on_gpu:
            fused = [_fused().fuse(p.term, self.n_particles, x.device) for p in self._parts]
            rest = [m for m, f in zip(self.terms, fused, strict=True) if f is None]
            self._on_gpu[x.device] = _OnGPU([f for f in fused if f is not None], rest)
        own = self._on_gpu[x.device]
        here = x.permute(1, 2, 0).contiguous()  # as the chart's kernels have it
        share, force = torch.zeros_like(here[:, 0]), torch.zeros_like(here)
        for add in own.fused:
            add(here, share, force)
        energy, whole = share.sum(0), force.permute(2, 0, 1)
        if own.rest:
            more, by = _differentiate(own.rest, x, forces=forces)
            energy, whole = energy + more, whole if by is None else whole + by
        return energy, whole if forces else None

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

    def _move(self, device: torch.device) -> None:
        if self._device != device:
            self.to(device)
            self._device = device

    def _add(self, index: int, force: openmm.Force, compiled: bool) -> None:
        name = f"{type(force).__name__} (force {index})"
        counts = [getattr(force, counter)() for counter in _COUNTERS if hasattr(force, counter)]
        if counts and not any(counts):
            return  # a force without terms has no energy
        try:
            term = read_standard(force) or read_custom(force)
        except UnsupportedSystemError as error:
            msg = f"{name} is not covered: {error}"
            raise UnsupportedSystemError(msg) from error
        except _UNREADABLE as error:  # Contexts can still evaluate it
            msg = f"{name} cannot be read ({type(error).__name__}: {error})"
            raise UnsupportedSystemError(msg) from error
        if term is None:
            msg = f"{name} is not covered: use ContextPool"
            raise UnsupportedSystemError(msg)
        if not len(getattr(term, "index", (0,))):
            return  # no pairs are left
        self._parts.append(_Part(name, index, term, compile_term(term) if compiled else None))
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
            with _GUARD:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(self.n_threads)
            results = list(self._executor.map(lambda c: self._chunk(c, forces), chunks))
        energy = np.concatenate([e for e, _ in results])
        force = np.concatenate([f for _, f in results if f is not None]) if forces else None
        energy, force, n_invalid = mask_invalid(x, energy, force)
        if n_invalid:
            with _GUARD:
                self._n_invalid = self._n_invalid + n_invalid
        return energy, force

    def _chunk(self, x: FloatArray, forces: bool) -> tuple[FloatArray, FloatArray | None]:
        energy, force = run_kernels(self._kernels, x, forces) if self._kernels else (None, None)
        if self._eager:
            self._move(torch.device("cpu"))
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
