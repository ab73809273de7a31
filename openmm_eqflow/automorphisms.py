"""Automorphisms of a coloured hypergraph of force terms, as generators and group order.

Colour refinement splits particles by what surrounds them until nothing changes; where that leaves
several particles in a cell, one is individualised and refinement continues. An orbit of the
stabiliser chain is found by looking, for every other member of the cell, for one automorphism that
carries the individualised particle there; every candidate is verified on the full multiset of
terms. The order is the product of the orbit lengths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from openmm_eqflow.force_terms import ForceTerms, Term

__all__ = ["automorphism_generators", "orbits", "twin_classes"]

_Incidence = list[list[tuple[Hashable, tuple[int, ...], int, bool]]]


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
    """Find generators and order of the automorphisms that also preserve ``rank``."""
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
