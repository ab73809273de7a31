r"""The forces of a System as plain arrays, read once and shared by the torch and compiled paths.

Every torsion series is brought to one form, grouped by particles:

.. math:: \sum_n k_n [1 + \cos(n\phi - \phi_n)] = \sum_{n \ge 0} a_n \cos n\phi + b_n \sin n\phi,

Ryckaert-Bellemans polynomials too, so torsions cost no inverse trigonometric function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.expressions import Program

__all__ = [
    "COULOMB",
    "AngleTerm",
    "BondTerm",
    "FourierTorsionTerm",
    "GBSATerm",
    "IndexArray",
    "MapTerm",
    "PairTerm",
    "ProgramTerm",
    "StandardTerm",
    "as_rows",
    "particle_parameters",
    "read_standard",
]

IndexArray = NDArray[np.int64]

_AVOGADRO = 6.02214076e23
_ELEMENTARY_CHARGE = 1.602176634e-19
_VACUUM_PERMITTIVITY = 1e-6 * 8.8541878128e-12 / (_ELEMENTARY_CHARGE**2 * _AVOGADRO)
#: 1/(4 pi eps0) in kJ nm / (mol e^2), from the constants OpenMM uses.
COULOMB = 1.0 / (4.0 * np.pi * _VACUUM_PERMITTIVITY)

# Onufriev, Bashford and Case 2004 (OBC2), ACE surface term: values of OpenMM's reference kernel.
_GB_OFFSET = 0.009
_GB_PROBE = 0.14


@dataclass(frozen=True)
class BondTerm:
    r""":math:`\tfrac12 k (r - r_0)^2`."""

    index: IndexArray
    length: FloatArray
    k: FloatArray


@dataclass(frozen=True)
class AngleTerm:
    r""":math:`\tfrac12 k (\theta - \theta_0)^2`."""

    index: IndexArray
    angle: FloatArray
    k: FloatArray


@dataclass(frozen=True)
class FourierTorsionTerm:
    r""":math:`\sum_n a_n \cos n\phi + b_n \sin n\phi`; ``cosine`` and ``sine`` are (terms, n)."""

    index: IndexArray
    cosine: FloatArray
    sine: FloatArray


@dataclass(frozen=True)
class MapTerm:
    r"""Bicubic patches: with :math:`s = \phi / \Delta - i`, :math:`\sum_{kl} c_{ijkl} s^k t^l`.

    ``index`` is (terms, 8), ``coefficients`` (terms, size, size, 4, 4).
    """

    index: IndexArray
    coefficients: FloatArray


@dataclass(frozen=True)
class PairTerm:
    r""":math:`q q' / r + A / r^{12} - B / r^6`, exceptions folded in."""

    index: IndexArray
    charge: FloatArray
    a: FloatArray
    b: FloatArray


@dataclass(frozen=True)
class GBSATerm:
    """GBSAOBCForce; ``prefactor`` (1/eps_in - 1/eps_out) / (4 pi eps0), ``surface`` 4 pi gamma."""

    charge: FloatArray
    radius: FloatArray
    offset_radius: FloatArray
    scaled_radius: FloatArray
    prefactor: float
    surface: float
    probe: float = _GB_PROBE


@dataclass(frozen=True)
class ProgramTerm:
    """A custom force: ``program`` over geometric inputs of the particles of each term.

    ``geometry`` maps each input that depends on positions to ``(kind, slots)``: ``("distance",
    (0, 1))``, ``("angle", (0, 1, 2))``, ``("dihedral", (0, 1, 2, 3))``, ``("x", (0,))`` etc.
    """

    index: IndexArray
    program: Program
    constants: dict[str, FloatArray]
    geometry: dict[str, tuple[str, tuple[int, ...]]]


StandardTerm = BondTerm | AngleTerm | FourierTorsionTerm | MapTerm | PairTerm | GBSATerm


def _plain(values: Any) -> list[float]:
    return [
        float(v.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(v) else v)
        for v in values
    ]


def particle_parameters(force: Any) -> FloatArray:
    """Per-particle parameters ``(n_particles, n_parameters)`` in md units."""
    n = force.getNumParticles()
    return as_rows([_plain(force.getParticleParameters(i)) for i in range(n)])


def as_rows(rows: Sequence[Sequence[float]]) -> FloatArray:
    """Rows of equal length as ``(n, k)``; also without rows, or without columns."""
    return np.array(rows, dtype=float).reshape(len(rows), len(rows[0]) if rows else 0)


def _listed(force: Any, what: str, n: int) -> tuple[IndexArray, FloatArray]:
    count = getattr(force, f"getNum{what}s")()
    rows = [getattr(force, f"get{what}Parameters")(i) for i in range(count)]
    index = np.array([row[:n] for row in rows], dtype=np.int64).reshape(-1, n)
    return index, as_rows([_plain(row[n:]) for row in rows])


def read_standard(force: openmm.Force) -> StandardTerm | None:
    """Arrays of a non-custom force; None if the class is not one of them."""
    readers: dict[type, Callable[[Any], StandardTerm]] = {
        openmm.HarmonicBondForce: _bonds,
        openmm.HarmonicAngleForce: _angles,
        openmm.PeriodicTorsionForce: _periodic,
        openmm.RBTorsionForce: _ryckaert_bellemans,
        openmm.CMAPTorsionForce: _maps,
        openmm.NonbondedForce: _pairs,
        openmm.GBSAOBCForce: _gbsa,
    }
    reader = readers.get(type(force))
    return None if reader is None else reader(force)


def _bonds(force: Any) -> BondTerm:
    index, values = _listed(force, "Bond", 2)
    return BondTerm(index, *(values.T if len(values) else np.zeros((2, 0))))


def _angles(force: Any) -> AngleTerm:
    index, values = _listed(force, "Angle", 3)
    return AngleTerm(index, *(values.T if len(values) else np.zeros((2, 0))))


def _fourier(rows: list[tuple[tuple[int, ...], FloatArray, FloatArray]]) -> FourierTorsionTerm:
    """Sum series over equal quadruples (read backwards a quadruple has the same angle)."""
    width = max((len(c) for _, c, _ in rows), default=1)
    sums: dict[tuple[int, ...], FloatArray] = {}
    for particles, cosine, sine in rows:
        total = sums.setdefault(min(particles, particles[::-1]), np.zeros((2, width)))
        total[0, : len(cosine)] += cosine
        total[1, : len(sine)] += sine
    index = np.array(list(sums), dtype=np.int64).reshape(-1, 4)
    series = np.array(list(sums.values())).reshape(-1, 2, width)
    return FourierTorsionTerm(index, series[:, 0].copy(), series[:, 1].copy())


def _periodic(force: Any) -> FourierTorsionTerm:
    rows = []
    for particles, (n, phase, k) in zip(*_listed(force, "Torsion", 4), strict=True):
        cosine, sine = np.zeros(int(n) + 1), np.zeros(int(n) + 1)
        cosine[0] += k
        cosine[int(n)] += k * np.cos(phase)
        sine[int(n)] += k * np.sin(phase)
        rows.append((tuple(int(p) for p in particles), cosine, sine))
    return _fourier(rows)


def _ryckaert_bellemans(force: Any) -> FourierTorsionTerm:
    rows = []
    for particles, c in zip(*_listed(force, "Torsion", 4), strict=True):
        # Powers of cos(phi - pi) = -cos(phi), as a Chebyshev series in cos(phi).
        cosine = np.polynomial.chebyshev.poly2cheb(c * (-1.0) ** np.arange(len(c)))
        rows.append((tuple(int(p) for p in particles), cosine, np.zeros(len(cosine))))
    return _fourier(rows)


def _maps(force: Any) -> MapTerm:
    tables = []
    for m in range(force.getNumMaps()):
        size, energy = force.getMapParameters(m)
        # OpenMM stores element i + size*j for the first angle i and the second angle j.
        tables.append(_bicubic(np.array(_plain(energy)).reshape(size, size).T))
    index, which = [], []
    for i in range(force.getNumTorsions()):
        table, *particles = force.getTorsionParameters(i)
        which.append(table)
        index.append(particles)
    if len({t.shape for t in tables}) > 1:
        msg = "CMAPTorsionForce with maps of different sizes"
        raise UnsupportedSystemError(msg)
    array = np.array(index, dtype=np.int64).reshape(-1, 8)
    return MapTerm(array, np.array([tables[t] for t in which]))


def _bicubic(energy: FloatArray) -> FloatArray:
    """Patch coefficients of the periodic bicubic spline through a grid, ``(size, size, 4, 4)``."""
    size = len(energy)
    # Slopes of a periodic cubic spline: d[i-1] + 4 d[i] + d[i+1] = 3 (e[i+1] - e[i-1]).
    ring = np.roll(np.eye(size), 1, axis=0)
    slope = np.linalg.solve(ring + 4 * np.eye(size) + ring.T, 3 * (ring.T - ring))
    corners = np.array([[energy, energy @ slope.T], [slope @ energy, slope @ energy @ slope.T]])
    nodal = np.array(
        [
            [np.roll(corners[a, b], (-i, -j), axis=(0, 1)) for b in (0, 1) for j in (0, 1)]
            for a in (0, 1)
            for i in (0, 1)
        ]
    )
    hermite = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=float)
    patches: FloatArray = np.einsum("ka,lb,abij->ijkl", hermite, hermite, nodal)
    return patches


def _pairs(force: Any) -> PairTerm:
    if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
        msg = "NonbondedForce with a cutoff"
        raise UnsupportedSystemError(msg)
    context = {
        force.getGlobalParameterName(i): force.getGlobalParameterDefaultValue(i)
        for i in range(force.getNumGlobalParameters())
    }
    particle = particle_parameters(force)
    for i in range(force.getNumParticleParameterOffsets()):
        name, p, *scales = force.getParticleParameterOffset(i)
        particle[p] += context[name] * np.array(_plain(scales))
    n = len(particle)
    first, second = np.triu_indices(n, k=1)
    charge = COULOMB * particle[first, 0] * particle[second, 0]
    sigma = 0.5 * (particle[first, 1] + particle[second, 1])
    epsilon = np.sqrt(particle[first, 2] * particle[second, 2])
    exceptions, values = _listed(force, "Exception", 2)
    for i in range(force.getNumExceptionParameterOffsets()):
        name, e, *scales = force.getExceptionParameterOffset(i)
        values[e] += context[name] * np.array(_plain(scales))
    where = np.full((n, n), -1)
    where[first, second] = where[second, first] = np.arange(len(first))
    for (i, j), (qq, s, e) in zip(exceptions, values, strict=True):
        charge[where[i, j]], sigma[where[i, j]], epsilon[where[i, j]] = COULOMB * qq, s, e
    present = (charge != 0) | (epsilon != 0)
    six = sigma[present] ** 6
    b = 4 * epsilon[present] * six
    return PairTerm(np.stack([first, second], 1)[present], charge[present], b * six, b)


def _gbsa(force: Any) -> GBSATerm:
    if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
        msg = "GBSAOBCForce with a cutoff"
        raise UnsupportedSystemError(msg)
    charge, radius, scale = particle_parameters(force).T
    offset_radius = radius - _GB_OFFSET
    (surface,) = _plain([force.getSurfaceAreaEnergy()])
    return GBSATerm(
        charge=charge.copy(),
        radius=radius.copy(),
        offset_radius=offset_radius,
        scaled_radius=scale * offset_radius,
        prefactor=COULOMB * (1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric()),
        surface=4 * np.pi * surface,
    )
