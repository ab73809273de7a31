"""Batches through the compiled kernels: packing, threads, and what has a kernel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.custom_terms import GBStage, GeneralGBTerm
from openmm_eqflow.targets.energies.expressions import Program
from openmm_eqflow.targets.energies.terms import (
    AngleTerm,
    BondTerm,
    FourierTorsionTerm,
    GBSATerm,
    IndexArray,
    MapTerm,
    PairTerm,
    ProgramTerm,
)

__all__ = [
    "HAVE_NUMBA",
    "Kernel",
    "compile_term",
    "pack",
    "run_kernels",
    "unpack",
]

#: Whether the optional dependency numba is installed.
HAVE_NUMBA = importlib.util.find_spec("numba") is not None

#: ``kernel(x, e, f, forces)`` adds to e and f; see :mod:`.kernels_bonded` for the layout.
Kernel = Callable[[FloatArray, FloatArray, FloatArray, bool], None]


@cache
def load_kernels() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    """Import the kernels with their machine code cached under a hash of all their sources.

    numba notices that a file changed, not that a function it inlined from another file did; after
    an upgrade it would run a mixture of old and new code.
    """
    import numba

    here = Path(__file__).parent
    sources = sorted([*here.glob("kernels_*.py"), here / "vector_math.py"])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    config: Any = numba.config
    chosen = config.CACHE_DIR
    base = Path(chosen) if chosen else here / "__pycache__"
    if not os.access(base if base.exists() else here, os.W_OK):
        base = Path.home() / ".cache" / "openmm_eqflow"
    # Read when a function is decorated; put back for other users of numba.
    config.CACHE_DIR = str(base / f"kernels-{digest}")
    try:
        from openmm_eqflow.targets.energies import (
            kernels_bonded,
            kernels_gb,
            kernels_map,
            kernels_program,
        )
    finally:
        config.CACHE_DIR = chosen
    return kernels_bonded, kernels_gb, kernels_map, kernels_program


def compile_term(term: object) -> Kernel | None:
    """Return the kernel of a term, or None if there is none (torch then evaluates it)."""
    if not HAVE_NUMBA:
        return None
    kernels_bonded, kernels_gb, kernels_map, kernels_program = load_kernels()
    table: dict[type, tuple[Any, tuple[str, ...]]] = {
        BondTerm: (kernels_bonded.bond_kernel, ("index", "length", "k")),
        AngleTerm: (kernels_bonded.angle_kernel, ("index", "angle", "k")),
        FourierTorsionTerm: (kernels_bonded.torsion_kernel, ("index", "cosine", "sine")),
        MapTerm: (kernels_map.map_kernel, ("index", "coefficients")),
        PairTerm: (kernels_bonded.pair_kernel, ("index", "charge", "a", "b")),
        GBSATerm: (
            kernels_gb.gbsa_kernel,
            (
                "charge", "radius", "offset_radius", "scaled_radius",
                "prefactor", "surface", "probe",
            ),
        ),
    }  # fmt: skip
    if type(term) in table:
        kernel, names = table[type(term)]
        return _Bound(kernel, tuple(getattr(term, name) for name in names))
    if isinstance(term, ProgramTerm):
        tape = _encode(term.program, term.constants, len(term.index))
        kinds = {"distance": 0, "angle": 1, "dihedral": 2, "x": 3, "y": 4, "z": 5}
        geometry = [
            (kinds[kind], tape.rows[name], *slots, *([0] * (4 - len(slots))))
            for name, (kind, slots) in term.geometry.items()
            if name in tape.rows
        ]
        return _Bound(
            kernels_program.program_kernel,
            (term.index, *tape.arguments, np.array(geometry, dtype=np.int64).reshape(-1, 6)),
        )
    if isinstance(term, GeneralGBTerm):
        return _CompiledGB(kernels_program.stage_kernel, term)
    return None


@dataclass(frozen=True)
class _Bound:
    kernel: Any
    arguments: tuple[Any, ...]

    def __call__(self, x: FloatArray, e: FloatArray, f: FloatArray, forces: bool) -> None:
        self.kernel(x, e, f, forces, *self.arguments)


@dataclass(frozen=True)
class _Tape:
    code: IndexArray
    value: FloatArray
    output: int
    constant_rows: IndexArray
    constants: FloatArray
    rows: dict[str, int]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.code, self.value, self.output, self.constant_rows, self.constants


def _encode(program: Program, constants: dict[str, FloatArray], n_terms: int) -> _Tape:
    """Return the operations the output depends on, numbered."""
    from openmm_eqflow.targets.energies.kernels_tape import CODES

    needed = {program.output}
    for index in range(program.output, -1, -1):
        if index in needed:
            needed.update(program.operations[index].arguments)
    place: dict[int, int] = {}
    code: list[list[int]] = []
    value: list[float] = []
    rows: dict[str, int] = {}
    for index in sorted(needed):
        op, arguments, own = program.operations[index]
        place[index] = len(code)
        padded = [place[a] for a in arguments] + [0] * (3 - len(arguments))
        code.append([CODES[op], *padded])
        value.append(float(own) if op == "constant" else 0.0)
        if op == "input":
            rows[str(own)] = place[index]
    used = [name for name in constants if name in rows]
    return _Tape(
        np.array(code, dtype=np.int64),
        np.array(value),
        place[program.output],
        np.array([rows[name] for name in used], dtype=np.int64),
        np.array([np.broadcast_to(constants[n], (n_terms,)) for n in used]).reshape(
            len(used), n_terms
        ),
        rows,
    )


class _CompiledGB:
    """CustomGBForce: values forward, energies forward and back, values back in reverse order."""

    def __init__(self, kernel: Any, term: GeneralGBTerm) -> None:
        self._kernel = kernel
        self._n_values = len(term.values)
        slots = {stage.name: k for k, stage in enumerate(term.values)}
        every = np.arange(term.n_particles)[:, None]
        self._values = [self._bind(s, slots, every) for s in term.values]
        self._n_terms = max([1, *(len(stage[0]) for stage in self._values)])
        self._energies = [self._bind(s, slots, every) for s in term.energies]

    @staticmethod
    def _bind(stage: GBStage, slots: dict[str, int], every: IndexArray) -> tuple[Any, ...]:
        particles = every if stage.pairs is None else np.ascontiguousarray(stage.pairs)
        tape = _encode(stage.program, stage.constants, len(particles))
        uses = []
        for name, slot in slots.items():
            suffixes = {name: 0} if stage.pairs is None else {name + "1": 0, name + "2": 1}
            uses += [(tape.rows[n], who, slot) for n, who in suffixes.items() if n in tape.rows]
        return (
            particles,
            *tape.arguments,
            tape.rows.get("r", -1) if stage.pairs is not None else -1,
            np.array(uses, dtype=np.int64).reshape(-1, 3),
            slots.get(stage.name, -1),
        )

    def __call__(self, x: FloatArray, e: FloatArray, f: FloatArray, forces: bool) -> None:
        shape = (max(1, self._n_values), *x.shape[2:])
        slopes = np.empty((max(1, self._n_values), self._n_terms, x.shape[-1]))
        for b in range(len(x)):
            # Block by block, so that the slopes kept between passes stay in the cache.
            own = slice(b, b + 1)
            block = x[own], e[own], f[own if forces else slice(1)]
            kept = np.zeros((1, *shape)), np.zeros((1, *shape))
            for stage, slope in zip(self._values, slopes, strict=False):
                self._kernel(*block, False, forces, *stage, *kept, slope)
            for stage in self._energies:
                self._kernel(*block, False, forces, *stage, *kept, slopes[0])
            if forces:
                for stage, slope in zip(self._values[::-1], slopes[::-1], strict=True):
                    self._kernel(*block, True, True, *stage, *kept, slope)


def pack(x: FloatArray) -> FloatArray:
    """``(n, N, 3)`` to ``(blocks, 3, N, LANES)``; the last block is filled up with copies."""
    from openmm_eqflow.targets.energies.vector_math import LANES

    if short := -len(x) % LANES:
        x = np.concatenate([x, np.repeat(x[-1:], short, axis=0)])
    blocks = x.reshape(-1, LANES, *x.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1))


def unpack(f: FloatArray, n: int) -> FloatArray:
    """Inverse of :func:`pack`."""
    return f.transpose(0, 3, 2, 1).reshape(-1, f.shape[2], 3)[:n]


def run_kernels(
    kernels: Sequence[Kernel], x: FloatArray, forces: bool
) -> tuple[FloatArray, FloatArray | None]:
    """Energies and forces of one chunk, unmasked."""
    packed = pack(x)
    e = np.zeros((len(packed), packed.shape[-1]))
    f = np.zeros(packed.shape if forces else (1, 3, 1, packed.shape[-1]))
    for kernel in kernels:
        kernel(packed, e, f, forces)
    return e.reshape(-1)[: len(x)], unpack(f, len(x)) if forces else None
