"""Which Systems have a density on the mean-free subspace; the others are refused by name."""

from __future__ import annotations

import numpy as np
import openmm

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.base import FloatArray

__all__ = [
    "check_invariance",
    "check_system",
]

_BAROSTATS = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.MonteCarloMembraneBarostat,
)
_MAX_GROUPS = 32


def check_system(system: openmm.System) -> None:
    """Refuse constraints, periodic boxes, barostats, virtual sites, Drude and frozen particles.

    Raises
    ------
    UnsupportedSystemError
        With the reason, the force's class and what to do.
    """
    if n := system.getNumConstraints():
        _refuse(
            f"the System has {n} constraints, under which energies of unconstrained proposals are "
            "wrong: rebuild it with constraints=None, rigidWater=False"
        )
    for force in system.getForces():
        name = type(force).__name__
        if isinstance(force, _BAROSTATS):
            _refuse(f"the System has a barostat ({name}): remove it, flows sample at fixed volume")
        if isinstance(force, openmm.DrudeForce):
            _refuse(f"the System has Drude particles ({name}): use a fixed-charge force field")
        if force.usesPeriodicBoundaryConditions():
            _refuse(
                f"{name} uses periodic boundary conditions: rebuild the System with "
                "nonbondedMethod=NoCutoff"
            )
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            _refuse(
                f"atom {i + 1} is a virtual site: use a model without massless sites, their "
                "positions are not free coordinates"
            )
        if system.getParticleMass(i)._value == 0:
            _refuse(
                f"atom {i + 1} has zero mass, which freezes it in dynamics: give it its mass, "
                "the flow moves every particle"
            )


def check_invariance(system: openmm.System, positions: FloatArray, n_dims: int) -> None:
    """Refuse a System whose energy changes under translation or rotation of all particles.

    In the plane (``n_dims`` 2) also one whose energy is not a sum of a part in x, y and one in z:
    the density at z = 0 is then not that of x and y.

    Every force is probed on its own (on the Reference platform) at two configurations: the given
    one and a distorted one, each translated and rotated, in the first ``n_dims`` dimensions.

    Raises
    ------
    UnsupportedSystemError
        Naming the force.
    """
    probe = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    forces = list(probe.getForces())
    for i, force in enumerate(forces):
        force.setForceGroup(min(i, _MAX_GROUPS - 1))
    integrator = openmm.VerletIntegrator(1e-3)
    context = openmm.Context(probe, integrator, openmm.Platform.getPlatformByName("Reference"))
    rng = np.random.default_rng(0)
    distorted = positions.copy()
    distorted[:, :n_dims] += 0.01 * rng.normal(size=(len(positions), n_dims))
    moves: list[tuple[FloatArray, FloatArray, str]] = []
    shift, turn = np.zeros(3), np.eye(3)
    shift[:n_dims] = [0.731, -0.467, 0.293][:n_dims]
    q, _ = np.linalg.qr(rng.normal(size=(n_dims, n_dims)))
    q[:, 0] *= np.sign(np.linalg.det(q))
    turn[:n_dims, :n_dims] = q
    moves += [(shift, np.eye(3), "translated"), (np.zeros(3), turn, "rotated")]

    def energies(x: FloatArray) -> list[float]:
        context.setPositions(x)
        groups = range(min(len(forces), _MAX_GROUPS))
        return [
            context.getState(getEnergy=True, groups={g}).getPotentialEnergy()._value
            for g in groups
        ]

    for x in (positions, distorted):
        before = energies(x)
        for offset, rotation, word in moves:
            after = energies(x @ rotation.T + offset)
            for force, u0, u1 in zip(forces, before, after, strict=False):
                if not abs(u1 - u0) <= 1e-6 * (1.0 + abs(u0)):
                    name = type(force).__name__
                    _refuse(
                        f"{name} changes from {u0:.6g} to {u1:.6g} kJ/mol when all particles are "
                        f"{word}: remove this external force or restraint, the flow's density is "
                        "invariant under rigid motions"
                    )
    if n_dims == 2:
        # What lifting the particles out of the plane costs must not depend on where they are.
        gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        nearest = float(gaps[gaps > 0.0].min()) if (gaps > 0.0).any() else 1.0
        lift = np.zeros_like(positions)
        lift[:, 2] = 0.3 * nearest * rng.normal(size=len(positions))
        near, far = (
            sum(energies(x + lift)) - sum(energies(x)) for x in (positions, 1.3 * positions)
        )
        if not abs(near - far) <= 1e-6 * (1.0 + abs(near) + abs(far)):
            _refuse(
                f"out of the plane the energy rises by {near:.6g} kJ/mol in one configuration and "
                f"by {far:.6g} in another: z does not separate from x and y, so this System has "
                "no density in the plane; use n_dims=3"
            )


def _refuse(message: str) -> None:
    raise UnsupportedSystemError(message)
