r"""A faster form of OBC implicit solvent, taken only if it is the same.

``implicit/obc2.xml`` and OpenMM's Amber readers write the model of Onufriev, Bashford and Case
(2004) as a CustomGBForce, an interpreted formula. ``GBSAOBCForce`` is the same model compiled; its
two constants differ in the eighth digit, which scaled charges and a fitted surface energy undo.
Steps per second with either, Reference platform on one core of an AMD EPYC: 12 atoms 729 and
110,000, 32 atoms 640 and 17,000 (the CPU platform makes 4,700 and 3,600 with the CustomGBForce).

Nothing is believed: energies and forces of both are compared at scattered positions, and any
difference above 1e-8 (relative, or kJ/mol) keeps the original.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_eqflow.targets.energies.terms import COULOMB, particle_parameters
from openmm_eqflow.units import energy_in_kj_mol

__all__ = [
    "with_compiled_solvent",
]

FloatArray = NDArray[np.float64]
_TOLERANCE = 1e-8
_OFFSET = 0.009  # nm, of GBSAOBCForce
_SCATTER = (0.0, 0.005, 0.02)  # nm, around the given positions
_NUMBER = r"([0-9.]+(?:e-?[0-9]+)?)"


def with_compiled_solvent(system: openmm.System, positions: FloatArray) -> openmm.System:
    """Return ``system``, or a copy with every CustomGBForce replaced that is OBC2.

    Parameters
    ----------
    system
        Not changed.
    positions
        ``(n_particles, 3)`` in nm, around which both forms are compared.
    """
    found = [
        (index, made)
        for index in range(system.getNumForces())
        if (made := _compiled(system.getForce(index))) is not None
        and _same(system.getForce(index), made, positions)
    ]
    if not found:
        return system
    changed = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for index, made in reversed(found):
        made.setForceGroup(changed.getForce(index).getForceGroup())
        changed.removeForce(index)
        changed.addForce(made)
    return changed


def _compiled(force: openmm.Force) -> openmm.GBSAOBCForce | None:
    """Candidate with the charges, radii and constants that can be read; None if they cannot."""
    if (
        type(force) is not openmm.CustomGBForce
        or force.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff
        or force.getNumTabulatedFunctions()
        or force.getNumGlobalParameters()
        or force.getNumExclusions()
        or force.getNumEnergyTerms() not in (2, 3)
    ):
        return None
    n = force.getNumPerParticleParameters()
    names = [force.getPerParticleParameterName(i) for i in range(n)]
    terms = [force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms())]
    pattern = rf"-0\.5\*{_NUMBER}\*\(1/soluteDielectric-1/solventDielectric\)\*charge\^2/B;"
    own = re.match(pattern, terms[0])
    solute = re.search(rf"soluteDielectric={_NUMBER}(?:;|$)", terms[0])
    solvent = re.search(rf"solventDielectric={_NUMBER}(?:;|$)", terms[0])
    surface = re.match(rf"{_NUMBER}\*\(radius\+0\.14\)\^2\*\(radius/B\)\^6;", terms[1])
    if names != ["charge", "or", "sr"] or None in (own, solute, solvent):
        return None
    made = openmm.GBSAOBCForce()
    made.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    made.setSoluteDielectric(_number(solute))
    made.setSolventDielectric(_number(solvent))
    made.setSurfaceAreaEnergy(_number(surface) / (4 * np.pi))
    scale = np.sqrt(_number(own) / COULOMB)
    for charge, offset_radius, scaled_radius in particle_parameters(force):
        if not offset_radius > 0.0:
            return None
        made.addParticle(scale * charge, offset_radius + _OFFSET, scaled_radius / offset_radius)
    return made


def _number(match: re.Match[str] | None) -> float:
    return 0.0 if match is None else float(match[1])


def _same(first: openmm.Force, second: openmm.Force, positions: FloatArray) -> bool:
    """Whether both forces give the same energies and forces, on the Reference platform."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(len(_SCATTER), *positions.shape))
    points = positions + np.array(_SCATTER)[:, None, None] * noise
    for a, b in zip(_evaluate(first, points), _evaluate(second, points), strict=True):
        if not np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=False):
            return False
    return True


def _evaluate(force: Any, points: FloatArray) -> list[FloatArray]:
    """Energy and forces at every point, kJ/mol and nm."""
    system = openmm.System()
    for _ in range(points.shape[1]):
        system.addParticle(1.0)
    system.addForce(copy.deepcopy(force))
    context = openmm.Context(
        system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    values = []
    for point in points:
        context.setPositions(point)
        state = context.getState(energy=True, forces=True)
        forces = state.getForces(asNumpy=True)
        values.append(np.asarray(energy_in_kj_mol(state.getPotentialEnergy())))
        values.append(forces.value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return values
