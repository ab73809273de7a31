"""A System as a coloured hypergraph of force terms, and its automorphisms.

An OpenMM System as a coloured hypergraph: what every force says about which particles.

Two particles look alike to the potential when they carry the same *colour* (all per-particle
parameters of all forces) and take part in the same *terms* (bonds, angles, torsions, exceptions,
exclusions, ...). Symmetry is read off these and from nothing else: never from element names.

Automorphisms of a coloured hypergraph of force terms, as generators and group order.

Colour refinement splits particles by what surrounds them until nothing changes; where that leaves
several particles in a cell, one is individualised and refinement continues. An orbit of the
stabiliser chain is found by looking, for every other member of the cell, for one automorphism that
carries the individualised particle there; every candidate is verified on the full multiset of
terms. The order is the product of the orbit lengths.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.constraints import constraint_lengths

__all__ = [
    "ForceTerms",
    "Term",
    "automorphism_generators",
    "force_terms",
    "orbits",
    "twin_classes",
]

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
    for pair, length in constraint_lengths(system).items():
        _add(out, ("constraint", round(length, 9)), pair)
    if system.getNumConstraints():  # masses enter the density then
        for p in range(len(out.colours)):
            out.colours[p] += (round(system.getParticleMass(p)._value, 6),)
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

_Incidence = list[list[tuple[Hashable, tuple[int, ...], int, bool]]]
#: Particles looked at, in all refinements of one search: some ten seconds. A molecule of 100 atoms
#: without any twins takes 40 000.
_MOST_WORK = 500_000


def twin_classes(terms: ForceTerms) -> list[list[int]]:
    """Classes (two members or more, ascending) within which every transposition is a symmetry."""
    touching: dict[int, list[tuple[Term, int]]] = defaultdict(list)
    for term, count in terms.terms.items():
        for p in term[1]:
            touching[p].append((term, count))
    cells: dict[tuple[Hashable, ...], list[list[int]]] = defaultdict(list)
    for p, colour in enumerate(terms.colours):
        # Being transposable is an equivalence relation: one comparison per class suffices.
        for members in cells[colour]:
            if _swaps(terms, touching, members[0], p):
                members.append(p)
                break
        else:
            cells[colour].append([p])
    return sorted(m for cell in cells.values() for m in cell if len(m) > 1)


def _swaps(
    terms: ForceTerms, touching: Mapping[int, list[tuple[Term, int]]], a: int, b: int
) -> bool:
    if len(touching.get(a, [])) != len(touching.get(b, [])):
        return False
    other = {a: b, b: a}
    for (kind, particles), count in [*touching.get(a, []), *touching.get(b, [])]:
        image = terms.canonical(kind, (other.get(p, p) for p in particles))
        if terms.terms.get(image, 0) != count:
            return False
    return True


def orbits(n_particles: int, generators: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Smallest member of each particle's orbit."""
    label = list(range(n_particles))

    def find(p: int) -> int:
        while label[p] != p:
            p = label[p]
        return p

    for g in generators:
        for p, q in enumerate(g):
            a, b = find(p), find(q)
            label[max(a, b)] = min(a, b)
    return tuple(find(p) for p in range(n_particles))


def automorphism_generators(
    terms: ForceTerms, rank: Mapping[int, int]
) -> tuple[list[tuple[int, ...]], int]:
    """Find generators and order of the automorphisms that also preserve ``rank``.

    Raises
    ------
    UnsupportedSystemError
        There are so many equal parts that the search would not end.
    """
    search = _Search(terms)
    start = _compress([(c, rank[p]) for p, c in enumerate(terms.colours)])
    colours, _ = search.refine(start)
    generators: list[tuple[int, ...]] = []
    order = 1
    while (cell := _smallest_cell(colours)) is not None:
        base, *others = cell
        level: list[tuple[int, ...]] = []
        for target in others:
            classes = orbits(len(colours), level)
            if classes[target] == classes[base]:
                continue
            found = search.isomorphism(
                _individualise(colours, base), _individualise(colours, target)
            )
            if found is not None:
                level.append(found)
        classes = orbits(len(colours), level)
        order *= sum(classes[p] == classes[base] for p in cell)
        generators += level
        colours, _ = search.refine(_individualise(colours, base))
    return generators, order


class _Search:
    def __init__(self, terms: ForceTerms) -> None:
        self._terms = terms
        self._work = 0
        kinds = {kind: i for i, kind in enumerate(sorted({k for k, _ in terms.terms}, key=repr))}
        self._incident: _Incidence = [[] for _ in terms.colours]
        for (kind, particles), count in terms.terms.items():
            reversible = kind not in terms.ordered_kinds
            for position, p in enumerate(particles):
                self._incident[p].append(((kinds[kind], count), particles, position, reversible))

    def refine(self, colours: list[int]) -> tuple[list[int], list[Hashable]]:
        """Stable colouring and its trace; both depend on structure only, not on labels."""
        trace: list[Hashable] = []
        while True:
            self._work += len(colours)
            if self._work > _MOST_WORK:
                raise UnsupportedSystemError(
                    f"the search for symmetries of {len(colours)} particles was given up: too "
                    "many parts are equal; give one molecule, without explicit solvent"
                )
            signatures = [self._signature(p, colours) for p in range(len(colours))]
            trace.append(hash(tuple(sorted(signatures))))
            refined = _compress(signatures)
            if len(set(refined)) == len(set(colours)):
                return refined, trace
            colours = refined

    def _signature(self, p: int, colours: list[int]) -> tuple[object, ...]:
        around = []
        for kind, particles, position, reversible in self._incident[p]:
            view = (position, tuple(colours[q] for q in particles))
            if reversible:
                view = min(view, (len(particles) - 1 - position, view[1][::-1]))
            around.append((kind, view))
        return (colours[p], tuple(sorted(around)))

    def isomorphism(self, source: list[int], target: list[int]) -> tuple[int, ...] | None:
        """Return one automorphism carrying colouring ``source`` to ``target``, or None."""
        source, source_trace = self.refine(source)
        target, target_trace = self.refine(target)
        if source_trace != target_trace:
            return None
        cell = _smallest_cell(source)
        if cell is None:
            where = {c: p for p, c in enumerate(target)}
            image = tuple(where[c] for c in source)
            return image if self._is_automorphism(image) else None
        first = _individualise(source, cell[0])
        for q in [p for p, c in enumerate(target) if c == source[cell[0]]]:
            found = self.isomorphism(first, _individualise(target, q))
            if found is not None:
                return found
        return None

    def _is_automorphism(self, image: Sequence[int]) -> bool:
        terms = self._terms
        same_colour = all(terms.colours[p] == terms.colours[q] for p, q in enumerate(image))
        return same_colour and all(
            terms.terms.get(terms.canonical(kind, (image[p] for p in particles)), 0) == count
            for (kind, particles), count in terms.terms.items()
        )


def _compress(values: Sequence[tuple[object, ...]]) -> list[int]:
    names = {v: i for i, v in enumerate(sorted(set(values)))}
    return [names[v] for v in values]


def _individualise(colours: list[int], p: int) -> list[int]:
    out = [2 * c for c in colours]
    out[p] += 1
    return out


def _smallest_cell(colours: list[int]) -> list[int] | None:
    cells: dict[int, list[int]] = defaultdict(list)
    for p, c in enumerate(colours):
        cells[c].append(p)
    larger = [(len(m), c) for c, m in cells.items() if len(m) > 1]
    return cells[min(larger)[1]] if larger else None
