r"""Model potentials as OpenMM Systems, in units where RT at the system's temperature is 1.

Lengths are nm. Every energy below is multiplied by the context parameter ``energy_unit`` (kJ/mol),
set to RT at the temperature in system.yaml, so the reduced potential there is the formula itself.

=============== =================================================================================
``lennard-jones`` :math:`u = \sum_{i \ne j} (d_{ij}^{-12} - 2 d_{ij}^{-6})
                  + \tfrac12 \sum_i |x_i - \bar x|^2`, ordered pairs (Köhler, Klein, Noé 2020)
``double-well``   :math:`u = \sum_{i<j} 0.9 (d_{ij}-4)^4 - 4 (d_{ij}-4)^2`, d in the xy plane
``harmonic``      :math:`u = \tfrac12 \sum_{i<j} k_{ij} |x_i - x_j|^2`, all :math:`k_{ij}` distinct
=============== =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app

__all__ = [
    "MODEL_DIMENSIONS",
    "build_model",
    "harmonic_log_z",
    "harmonic_stiffness",
    "model_topology",
]

# Out-of-plane stiffness per particle of the planar model, kT/nm^2: softer than in-plane (16),
# so it never limits the time step.
_PLANE_STIFFNESS = 4.0


def _empty_system(n_particles: int) -> openmm.System:
    system = openmm.System()
    for _ in range(n_particles):
        system.addParticle(app.element.argon.mass)
    return system


def _lennard_jones(n_particles: int, energy_unit: float) -> openmm.System:
    r"""One pair force.

    The sum over ordered pairs is twice the sum over unique pairs, and
    :math:`\tfrac12 \sum_i |x_i - \bar x|^2 = \tfrac{1}{2N} \sum_{i<j} d_{ij}^2`, so the harmonic
    term is a pair term too and no external force breaks translation invariance.
    """
    force = openmm.CustomNonbondedForce(
        f"energy_unit*(2*(r^(-12) - 2*r^(-6)) + {0.5 / n_particles!r}*r^2)"
    )
    force.addGlobalParameter("energy_unit", energy_unit)
    force.setNonbondedMethod(openmm.CustomNonbondedForce.NoCutoff)
    system = _empty_system(n_particles)
    for _ in range(n_particles):
        force.addParticle([])
    system.addForce(force)
    return system


def _double_well(n_particles: int, energy_unit: float) -> openmm.System:
    r"""In-plane pair wells, and a separate force that only depends on z.

    The z term is a pair term, :math:`\tfrac{k}{2} \sum_{i<j} (z_i - z_j)^2`: harmonic in z,
    independent of x and y, zero at z = 0 and invariant under translation.
    """
    wells = openmm.CustomCompoundBondForce(
        2,
        "energy_unit*(0.9*(d-4)^4 - 4*(d-4)^2); d=sqrt((x1-x2)^2 + (y1-y2)^2)",
    )
    plane = openmm.CustomCompoundBondForce(
        2, f"energy_unit*{0.5 * _PLANE_STIFFNESS / n_particles!r}*(z1-z2)^2"
    )
    plane.setName("OutOfPlaneForce")
    system = _empty_system(n_particles)
    for force in (wells, plane):
        force.addGlobalParameter("energy_unit", energy_unit)
        for i in range(n_particles):
            for j in range(i + 1, n_particles):
                force.addBond([i, j], [])
        system.addForce(force)
    return system


def harmonic_stiffness(n_particles: int) -> NDArray[np.float64]:
    """Symmetric matrix of spring constants k_ij in kT/nm^2, no two pairs alike, zero diagonal.

    Distinct springs leave no relabelling of the particles that keeps the energy, so the system
    has no permutation symmetry.
    """
    stiffness = np.zeros((n_particles, n_particles))
    rows, columns = np.triu_indices(n_particles, k=1)
    stiffness[rows, columns] = 2.0 + 0.25 * np.arange(rows.size)
    return stiffness + stiffness.T


def harmonic_log_z(n_particles: int, n_dims: int = 3) -> float:
    r"""Exact log normaliser of the ``harmonic`` model on the mean-free subspace.

    With the graph Laplacian L of the springs, :math:`u = \tfrac12 \sum_a x_a^T L x_a` and

    .. math:: \log Z = \tfrac{D}{2} \left[(N-1) \log 2\pi - \log \det{}' L\right],

    det' over the N - 1 non-zero eigenvalues. u is half a chi-squared variable of (N-1)D degrees
    of freedom: its mean and its variance are both (N-1)D/2.
    """
    stiffness = harmonic_stiffness(n_particles)
    laplacian = np.diag(stiffness.sum(axis=1)) - stiffness
    eigenvalues = np.linalg.eigvalsh(laplacian)[1:]
    log_two_pi = float(np.log(2.0 * np.pi))
    return 0.5 * n_dims * ((n_particles - 1) * log_two_pi - float(np.log(eigenvalues).sum()))


def _harmonic(n_particles: int, energy_unit: float) -> openmm.System:
    force = openmm.HarmonicBondForce()
    stiffness = harmonic_stiffness(n_particles)
    for i in range(n_particles):
        for j in range(i + 1, n_particles):
            force.addBond(i, j, 0.0, float(stiffness[i, j]) * energy_unit)
    system = _empty_system(n_particles)
    system.addForce(force)
    return system


_BUILDERS: dict[str, Callable[[int, float], openmm.System]] = {
    "lennard-jones": _lennard_jones,
    "double-well": _double_well,
    "harmonic": _harmonic,
}

MODEL_DIMENSIONS: dict[str, int] = {"lennard-jones": 3, "double-well": 2, "harmonic": 3}


def build_model(name: str, n_particles: int, energy_unit: float) -> openmm.System:
    """Build a model System.

    Parameters
    ----------
    name
        A key of ``MODEL_DIMENSIONS``.
    n_particles
        At least 2 (3 for ``harmonic``: two particles can always be exchanged).
    energy_unit
        RT in kJ/mol at the temperature where the formula is the reduced potential.

    Raises
    ------
    ValueError
        Unknown name or too few particles.
    """
    if name not in _BUILDERS:
        raise ValueError(f"model {name!r} is unknown; expected one of {sorted(_BUILDERS)}")
    fewest = 3 if name == "harmonic" else 2
    if n_particles < fewest:
        raise ValueError(f"n_particles is {n_particles}; {name} needs at least {fewest}")
    return _BUILDERS[name](n_particles, energy_unit)


def model_topology(n_particles: int, residue_name: str) -> app.Topology:
    """One chain, one residue, argon atoms: a topology.pdb any viewer opens."""
    topology = app.Topology()
    residue = topology.addResidue(residue_name, topology.addChain("A"))
    for i in range(n_particles):
        topology.addAtom(f"A{i + 1}", app.element.argon, residue)
    return topology
