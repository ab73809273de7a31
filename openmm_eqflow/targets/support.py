"""Which Systems have a density on the mean-free subspace; the others are refused by name."""

from __future__ import annotations

import networkx as nx
import numpy as np
import openmm
from openmm import app

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.constraints import Constraints, constraint_lengths
from openmm_eqflow.targets.energies.base import FloatArray

__all__ = [
    "check_invariance",
    "check_molecule",
    "check_solvent",
    "check_system",
    "complete_bonds",
    "without_solvent",
]

_BAROSTATS = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.MonteCarloMembraneBarostat,
)
_MAX_GROUPS = 32


def check_system(system: openmm.System) -> None:
    """Refuse rings of constraints, boxes, barostats, virtual sites, Drude and frozen particles.

    Raises
    ------
    UnsupportedSystemError
        With the reason, the force's class and what to do.
    """
    Constraints.of(system)
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

    Every force is probed on its own (on the Reference platform) at two configurations: beside the
    given one (atoms in line have no torsion) and a distorted one, each translated and rotated, in
    the first ``n_dims`` dimensions.

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
    beside, distorted = positions.copy(), positions.copy()
    noise = rng.normal(size=(len(positions), n_dims))
    beside[:, :n_dims] += 1e-4 * noise
    distorted[:, :n_dims] += 0.01 * noise
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

    for x in (beside, distorted):
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


def check_solvent(topology: app.Topology, name: str) -> None:
    """Refuse explicit solvent: water beside anything else; needs no bonds and no System.

    Raises
    ------
    UnsupportedSystemError
        With the number of waters and what to do.
    """
    residues = list(topology.residues())
    waters = sum(_is_water(residue) for residue in residues)
    if waters and len(residues) > 1:
        _refuse(
            f"{name} has explicit solvent ({waters} water molecules), which is not supported yet: "
            "--strip-solvent removes water and ions; an implicit solvent such as "
            "implicit/obc2.xml can stand for it"
        )


def without_solvent(topology: app.Topology, name: str) -> list[int]:
    """Atoms that are neither of a water molecule nor a residue of one atom (an ion).

    Raises
    ------
    UnsupportedSystemError
        There are none.
    """
    kept = [
        atom.index
        for residue in topology.residues()
        if not _is_water(residue) and len(list(residue.atoms())) > 1
        for atom in residue.atoms()
    ]
    if not kept:
        _refuse(f"{name} holds nothing but solvent: leave --strip-solvent out for one molecule")
    return kept


def _is_water(residue: app.Residue) -> bool:
    elements = [atom.element for atom in residue.atoms()]
    symbols = sorted(element.symbol for element in elements if element is not None)
    return symbols in (["H", "H", "O"], ["O"]) and len(elements) < 6


def check_molecule(topology: app.Topology, name: str) -> None:
    """Refuse anything but one bonded molecule of two atoms or more.

    Parameters
    ----------
    topology
        With its bonds.
    name
        Of its file, for the message.

    Raises
    ------
    UnsupportedSystemError
        With the atoms that are meant, counted from 1, and what to do.
    """
    if topology.getNumAtoms() < 2:
        _refuse(f"{name} has one atom: a flow needs a molecule of at least two")
    pieces = sorted(nx.connected_components(_bonds_of(topology)), key=min)
    if len(pieces) == 1:
        return
    where = {index: k for k, piece in enumerate(pieces) for index in piece}
    for residue in topology.residues():
        first, *others = residue.atoms()
        for atom in others:
            if where[atom.index] != where[first.index]:
                _refuse(
                    f"{name} lists no bonds that lead from atom {first.index + 1} ({first.name}) "
                    f"to atom {atom.index + 1} ({atom.name}) of residue {residue.name}: add "
                    "CONECT records"
                )
    sizes = " + ".join(str(len(piece)) for piece in pieces[:4])
    more = " + ..." if len(pieces) > 4 else ""
    _refuse(
        f"{name} holds {len(pieces)} molecules ({sizes}{more} atoms): flows are for one, choose "
        "it with --chain or --residue; if they are bonded, add CONECT records"
    )


def complete_bonds(topology: app.Topology, system: openmm.System) -> None:
    """Add the System's bonds to a topology in pieces (a PDB file without CONECT records).

    A force whose every bond spans an angle holds Urey-Bradley terms, not bonds.
    """
    atoms = list(topology.atoms())
    graph = _bonds_of(topology)
    if len(atoms) != system.getNumParticles() or not atoms or nx.is_connected(graph):
        return
    spans = {
        frozenset(parameters[0:3:2])
        for force in system.getForces()
        if isinstance(force, openmm.HarmonicAngleForce | openmm.CustomAngleForce)
        for parameters in map(force.getAngleParameters, range(force.getNumAngles()))
    }
    listed = list(constraint_lengths(system))
    for force in system.getForces():
        if not isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce):
            continue
        pairs = [force.getBondParameters(k)[:2] for k in range(force.getNumBonds())]
        if all(frozenset(pair) in spans for pair in pairs):
            continue
        listed += pairs
    for a, b in listed:
        if not graph.has_edge(a, b):
            graph.add_edge(a, b)
            topology.addBond(atoms[a], atoms[b])


def _bonds_of(topology: app.Topology) -> nx.Graph:
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(range(topology.getNumAtoms()))
    graph.add_edges_from((a.index, b.index) for a, b in topology.bonds())
    return graph


def _refuse(message: str) -> None:
    raise UnsupportedSystemError(message)
