"""An OpenMM System as a coloured hypergraph: what every force says about which particles.

Two particles look alike to the potential when they carry the same *colour* (all per-particle
parameters of all forces) and take part in the same *terms* (bonds, angles, torsions, exceptions,
exclusions, ...). Symmetry is read off these and from nothing else: never from element names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
from openmm import unit

__all__ = ["ForceTerms", "Term", "force_terms"]

#: (kind, particles in canonical order): the kind names the force and carries its parameters.
Term = tuple[Hashable, tuple[int, ...]]

#: Terms listed by a force: class name -> (count, getter, number of leading particle arguments).
_LISTED = {
    "HarmonicBondForce": ("getNumBonds", "getBondParameters", 2),
    "HarmonicAngleForce": ("getNumAngles", "getAngleParameters", 3),
    "PeriodicTorsionForce": ("getNumTorsions", "getTorsionParameters", 4),
    "RBTorsionForce": ("getNumTorsions", "getTorsionParameters", 4),
    "CustomBondForce": ("getNumBonds", "getBondParameters", 2),
    "CustomAngleForce": ("getNumAngles", "getAngleParameters", 3),
    "CustomTorsionForce": ("getNumTorsions", "getTorsionParameters", 4),
}
_PER_PARTICLE = ("NonbondedForce", "GBSAOBCForce", "CustomNonbondedForce", "CustomGBForce")
_WITHOUT_ENERGY = ("CMMotionRemover", "AndersenThermostat")
#: Forces whose last parameter is a prefactor: the term vanishes with it.
_PREFACTOR_LAST = ("HarmonicBondForce", "HarmonicAngleForce", "PeriodicTorsionForce")


@dataclass
class ForceTerms:
    """Colours and terms of a System.

    Attributes
    ----------
    colours
        Per particle, the tuple of its parameters in every force.
    terms
        Multiset of terms. Terms whose energy is the same read backwards are stored in the smaller
        of both orders.
    ordered_kinds
        Kinds for which the order of particles matters.
    """

    colours: list[tuple[Hashable, ...]]
    terms: Counter[Term] = field(default_factory=Counter)
    ordered_kinds: set[Hashable] = field(default_factory=set)

    def canonical(self, kind: Hashable, particles: Iterable[int]) -> Term:
        """Return the stored form of a term."""
        order = tuple(particles)
        if kind not in self.ordered_kinds:
            order = min(order, order[::-1])
        return kind, order


def force_terms(system: openmm.System) -> ForceTerms:
    """Read colours and terms from every force.

    A force class unknown here makes every particle a class of its own: the symmetry found is then
    too small, never too large.
    """
    out = ForceTerms([() for _ in range(system.getNumParticles())])
    for index, force in enumerate(system.getForces()):
        name = type(force).__name__
        if name in _WITHOUT_ENERGY:
            continue
        if name in _LISTED:
            _read_listed(out, index, name, force)
        elif name in _PER_PARTICLE:
            _read_particles(out, index, name, force)
        elif name == "CMAPTorsionForce":
            for i in range(force.getNumTorsions()):
                surface, *particles = force.getTorsionParameters(i)
                _add(out, (index, "cmap", surface), particles, ordered=True)
        elif name == "CustomCompoundBondForce":
            ordered: dict[Hashable, bool] = {}
            for i in range(force.getNumBonds()):
                particles, parameters = force.getBondParameters(i)
                kind = (index, "compound", _key(parameters))
                if kind not in ordered:
                    ordered[kind] = not _reads_backwards(force, parameters)
                _add(out, kind, particles, ordered=ordered[kind])
        elif name == "CustomExternalForce":
            seen: dict[int, list[Hashable]] = {}
            for i in range(force.getNumParticles()):
                particle, parameters = force.getParticleParameters(i)
                seen.setdefault(particle, []).append(_key(parameters))
            for p in range(len(out.colours)):
                out.colours[p] += (tuple(sorted(seen.get(p, []), key=repr)),)
        else:
            for p in range(len(out.colours)):
                out.colours[p] += (p,)
    return out


def _reads_backwards(force: Any, parameters: Any) -> bool:
    """Whether a compound bond has the same energy with its particles in reverse order.

    Its expression can be anything, so OpenMM is asked, at three random placements.
    """
    alone = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))
    single = openmm.CustomCompoundBondForce(
        alone.getNumParticlesPerBond(), alone.getEnergyFunction()
    )
    for i in range(alone.getNumPerBondParameters()):
        single.addPerBondParameter(alone.getPerBondParameterName(i))
    for i in range(alone.getNumGlobalParameters()):
        single.addGlobalParameter(
            alone.getGlobalParameterName(i), alone.getGlobalParameterDefaultValue(i)
        )
    for i in range(alone.getNumTabulatedFunctions()):
        table = openmm.XmlSerializer.clone(alone.getTabulatedFunction(i))
        single.addTabulatedFunction(alone.getTabulatedFunctionName(i), table)
    n = single.getNumParticlesPerBond()
    single.addBond(list(range(n)), parameters)
    system = openmm.System()
    for _ in range(n):
        system.addParticle(1.0)
    system.addForce(single)
    integrator = openmm.VerletIntegrator(1e-3)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    rng = np.random.default_rng(0)
    for scale in (0.2, 0.5, 2.0):
        x = scale * rng.normal(size=(n, 3))
        energies = []
        for positions in (x, x[::-1].copy()):
            context.setPositions(positions)
            energies.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
        if not abs(energies[0] - energies[1]) <= 1e-10 * (1.0 + abs(energies[0])):
            return False
    return True


def _read_listed(out: ForceTerms, index: int, name: str, force: Any) -> None:
    count, getter, n = _LISTED[name]
    for i in range(getattr(force, count)()):
        arguments = getattr(force, getter)(i)
        # Custom forces return their per-bond parameters as one tuple, possibly empty.
        parameters = _key(v for a in arguments[n:] for v in (a if isinstance(a, tuple) else (a,)))
        if name in _PREFACTOR_LAST and parameters[-1] == 0:
            continue
        _add(out, (index, name, parameters), arguments[:n])


def _read_particles(out: ForceTerms, index: int, name: str, force: Any) -> None:
    for p in range(len(out.colours)):
        parameters = _key(force.getParticleParameters(p))
        if name == "NonbondedForce" and parameters[2] == 0:
            parameters = (parameters[0], 0, 0)  # sigma means nothing without epsilon
        out.colours[p] += (parameters,)
    if name == "NonbondedForce":
        offsets: dict[int, list[Hashable]] = {}
        for i in range(force.getNumParticleParameterOffsets()):
            parameter, particle, *scales = force.getParticleParameterOffset(i)
            offsets.setdefault(particle, []).append((parameter, _key(scales)))
        exception_offsets: dict[int, list[Hashable]] = {}
        for i in range(force.getNumExceptionParameterOffsets()):
            parameter, exception, *scales = force.getExceptionParameterOffset(i)
            exception_offsets.setdefault(exception, []).append((parameter, _key(scales)))
        for p in range(len(out.colours)):
            out.colours[p] += (tuple(sorted(offsets.get(p, []), key=repr)),)
        for i in range(force.getNumExceptions()):
            a, b, charge, sigma, epsilon = force.getExceptionParameters(i)
            parameters = _key((charge, sigma, epsilon))
            if parameters[2] == 0:
                parameters = (parameters[0], 0, 0)
            extra = tuple(sorted(exception_offsets.get(i, []), key=repr))
            _add(out, (index, "exception", parameters, extra), (a, b))
    if name in ("CustomNonbondedForce", "CustomGBForce"):
        for i in range(force.getNumExclusions()):
            _add(out, (index, "exclusion"), force.getExclusionParticles(i))
    if name == "CustomNonbondedForce":
        for i in range(force.getNumInteractionGroups()):
            first, second = (set(s) for s in force.getInteractionGroupParameters(i))
            for p in range(len(out.colours)):
                out.colours[p] += ((p in first, p in second),)


def _add(
    out: ForceTerms, kind: Hashable, particles: Iterable[int], *, ordered: bool = False
) -> None:
    if ordered:
        out.ordered_kinds.add(kind)
    out.terms[out.canonical(kind, particles)] += 1


def _key(values: Iterable[Any]) -> tuple[float, ...]:
    """Parameters rounded to ten digits: equal up to the round-off of unit conversions."""
    plain = (
        v.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(v) else v for v in values
    )
    return tuple(float(f"{float(v):.10g}") for v in plain)
