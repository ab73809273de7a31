"""Custom forces as programs over geometric inputs, with everything constant folded away."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.expressions import OPERATIONS, Program, parse, specialise
from openmm_eqflow.targets.energies.terms import (
    IndexArray,
    ProgramTerm,
    as_rows,
    particle_parameters,
)

__all__ = [
    "GBStage",
    "GeneralGBTerm",
    "read_custom",
]

_Geometry = dict[str, tuple[str, tuple[int, ...]]]
_BONDED: dict[type, tuple[str, int, _Geometry]] = {
    openmm.CustomBondForce: ("Bond", 2, {"r": ("distance", (0, 1))}),
    openmm.CustomAngleForce: ("Angle", 3, {"theta": ("angle", (0, 1, 2))}),
    openmm.CustomTorsionForce: ("Torsion", 4, {"theta": ("dihedral", (0, 1, 2, 3))}),
}
_Table = Callable[..., FloatArray]


@dataclass(frozen=True)
class GBStage:
    """One computed value (``name``) or energy term (empty name) of a CustomGBForce.

    ``pairs`` is None for single-particle stages; ordered pairs for a computed value, unordered
    ones for an energy. Inputs of ``program`` are ``r``, earlier values (suffixed 1 and 2 in pair
    stages) and ``constants`` (per pair or per particle).
    """

    name: str
    pairs: IndexArray | None
    program: Program
    constants: dict[str, FloatArray]


@dataclass(frozen=True)
class GeneralGBTerm:
    """CustomGBForce: computed values in order, then energy terms."""

    n_particles: int
    values: tuple[GBStage, ...]
    energies: tuple[GBStage, ...]


def read_custom(force: openmm.Force) -> ProgramTerm | GeneralGBTerm | None:
    """Program of a custom force; None if the class is not one of them.

    Raises
    ------
    UnsupportedSystemError
        A feature of the force is not covered.
    """
    if type(force) in _BONDED:
        return _bonded(force)
    if type(force) is openmm.CustomNonbondedForce:
        return _nonbonded(force)
    if type(force) is openmm.CustomCompoundBondForce:
        return _compound(force)
    if type(force) is openmm.CustomGBForce:
        return _gb(force)
    return None


def _globals(force: Any) -> dict[str, FloatArray]:
    return {
        force.getGlobalParameterName(i): np.asarray(force.getGlobalParameterDefaultValue(i))
        for i in range(force.getNumGlobalParameters())
    }


def _tables(force: Any) -> tuple[dict[str, int], dict[str, _Table]]:
    arity: dict[str, int] = {}
    functions: dict[str, _Table] = {}
    for i in range(force.getNumTabulatedFunctions()):
        name, table = force.getTabulatedFunctionName(i), force.getTabulatedFunction(i)
        kind = type(table).__name__
        if not re.fullmatch(r"Discrete[123]DFunction", kind):
            msg = f"tabulated function {name} of class {kind}"
            raise UnsupportedSystemError(msg)
        arity[name] = int(kind[8])
        parameters = table.getFunctionParameters()
        *shape, values = (len(parameters), parameters) if arity[name] == 1 else parameters
        # OpenMM runs the first index fastest.
        functions[name] = _discrete(np.array(values).reshape(shape[::-1]))
    return arity, functions


def _discrete(values: FloatArray) -> _Table:
    def look_up(*index: FloatArray) -> FloatArray:
        rounded = np.broadcast_arrays(*(np.round(i).astype(np.int64) for i in reversed(index)))
        return np.asarray(values[tuple(rounded)])

    return look_up


def _finish(program: Program, constants: dict[str, FloatArray], free: set[str]) -> None:
    """Refuse what is left over: unknown names, tables that depend on positions."""
    unknown = [n for n in program.inputs if n not in free and n not in constants]
    if unknown:
        msg = f"unknown variable {unknown[0]!r} in an expression"
        raise UnsupportedSystemError(msg)
    tables = [o.op for o in program.operations if o.op not in OPERATIONS]
    if tables:
        msg = f"tabulated function {tables[0]!r} of positions"
        raise UnsupportedSystemError(msg)


def _bonded(force: Any) -> ProgramTerm:
    what, n, geometry = _BONDED[type(force)]
    values = _globals(force)
    index, parameters = [], []
    for i in range(getattr(force, f"getNum{what}s")()):
        *particles, own = getattr(force, f"get{what}Parameters")(i)
        index.append(particles)
        parameters.append(own)
    array = as_rows(parameters)
    for k in range(getattr(force, f"getNumPer{what}Parameters")()):
        values[getattr(force, f"getPer{what}ParameterName")(k)] = array[:, k]
    program, constants = specialise(parse(force.getEnergyFunction()), values)
    _finish(program, constants, set(geometry))
    return ProgramTerm(
        np.array(index, dtype=np.int64).reshape(-1, n), program, constants, dict(geometry)
    )


def _compound(force: Any) -> ProgramTerm:
    n = force.getNumParticlesPerBond()
    arity, tables = _tables(force)
    values = _globals(force)
    index, parameters = [], []
    for i in range(force.getNumBonds()):
        particles, own = force.getBondParameters(i)
        index.append(particles)
        parameters.append(own)
    array = as_rows(parameters)
    for k in range(force.getNumPerBondParameters()):
        values[force.getPerBondParameterName(k)] = array[:, k]
    program = parse(force.getEnergyFunction(), tables=arity, points=n)
    program, constants = specialise(program, values, tables)
    geometry: _Geometry = {}
    for name in program.inputs:
        if match := re.fullmatch(r"(distance|angle|dihedral)\((.*)\)", name):
            slots = tuple(int(p[1:]) - 1 for p in match[2].split(","))
            geometry[name] = (match[1], slots)
        elif match := re.fullmatch(r"([xyz])([1-9]\d*)", name):
            geometry[name] = (match[1], (int(match[2]) - 1,))
    _finish(program, constants, set(geometry))
    return ProgramTerm(
        np.array(index, dtype=np.int64).reshape(-1, n), program, constants, geometry
    )


def _nonbonded(force: Any) -> ProgramTerm:
    if force.getNonbondedMethod() != openmm.CustomNonbondedForce.NoCutoff:
        msg = "CustomNonbondedForce with a cutoff"
        raise UnsupportedSystemError(msg)
    if force.getNumComputedValues():
        msg = "CustomNonbondedForce with computed values"
        raise UnsupportedSystemError(msg)
    n = force.getNumParticles()
    wanted = np.zeros((n, n), dtype=np.int64)
    if groups := force.getNumInteractionGroups():
        for i in range(groups):
            first, second = (list(s) for s in force.getInteractionGroupParameters(i))
            pairs = {(min(a, b), max(a, b)) for a in first for b in second if a != b}
            for a, b in pairs:
                wanted[a, b] += 1
    else:
        wanted[np.triu_indices(n, k=1)] = 1
    for i in range(force.getNumExclusions()):
        a, b = force.getExclusionParticles(i)
        wanted[a, b] = wanted[b, a] = 0
    present = np.argwhere(wanted)
    index = np.repeat(present, wanted[wanted > 0], axis=0)
    values = _globals(force)
    _add_particle_parameters(values, force, index)
    arity, tables = _tables(force)
    program = parse(force.getEnergyFunction(), tables=arity)
    program, constants = specialise(program, values, tables)
    _finish(program, constants, {"r"})
    return ProgramTerm(index, program, constants, {"r": ("distance", (0, 1))})


def _add_particle_parameters(
    values: dict[str, FloatArray], force: Any, pairs: IndexArray | None
) -> None:
    array = particle_parameters(force)
    for k in range(force.getNumPerParticleParameters()):
        name = force.getPerParticleParameterName(k)
        if pairs is None:
            values[name] = array[:, k]
        else:
            values[name + "1"], values[name + "2"] = array[pairs[:, 0], k], array[pairs[:, 1], k]


def _gb(force: Any) -> GeneralGBTerm:
    if force.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff:
        msg = "CustomGBForce with a cutoff"
        raise UnsupportedSystemError(msg)
    n = force.getNumParticles()
    ordered = np.argwhere(~np.eye(n, dtype=bool))
    unordered = np.argwhere(np.triu(np.ones((n, n), dtype=bool), k=1))
    excluded = {
        tuple(sorted(force.getExclusionParticles(i))) for i in range(force.getNumExclusions())
    }
    arity, tables = _tables(force)
    known: list[str] = []

    def stage(name: str, text: str, kind: int) -> GBStage:
        values = _globals(force)
        pairs = None
        if kind != openmm.CustomGBForce.SingleParticle:
            pairs = ordered if name else unordered
            if kind == openmm.CustomGBForce.ParticlePair and excluded:
                keep = [tuple(sorted(p)) not in excluded for p in pairs.tolist()]
                pairs = pairs[np.array(keep)]
        _add_particle_parameters(values, force, pairs)
        program, constants = specialise(parse(text, tables=arity), values, tables)
        free = set(known) if pairs is None else {"r", *(k + s for k in known for s in "12")}
        _finish(program, constants, free)
        return GBStage(name, pairs, program, constants)

    stages = []
    for i in range(force.getNumComputedValues()):
        name, text, kind = force.getComputedValueParameters(i)
        stages.append(stage(name, text, kind))
        known.append(name)
    energies = [
        stage("", *force.getEnergyTermParameters(i)) for i in range(force.getNumEnergyTerms())
    ]
    return GeneralGBTerm(n, tuple(stages), tuple(energies))
