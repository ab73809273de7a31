"""Systems and configurations shared by the tests of energies."""

from __future__ import annotations

import numpy as np
import openmm
from openmm import app, unit

from stand_ins import DATA


def phe_topology(one_residue):
    """Ace-Phe-Nme; CHARMM's patches want the caps inside the residue."""
    pdb = app.PDBFile(str(DATA / "phe-dipeptide.pdb"))
    positions = np.array(pdb.positions.value_in_unit(unit.nanometer))
    if not one_residue:
        return pdb.topology, positions
    topology = app.Topology()
    residue = topology.addResidue("PHE", topology.addChain())
    atoms = {}
    for atom in pdb.topology.atoms():
        suffix = "" if atom.residue.name == "PHE" else atom.residue.name[0]
        atoms[atom] = topology.addAtom(atom.name + suffix, atom.element, residue)
    for a, b in pdb.topology.bonds():
        topology.addBond(atoms[a], atoms[b])
    return topology, positions


def phe_system(*force_field):
    topology, positions = phe_topology(force_field[0].startswith("charmm"))
    system = app.ForceField(*force_field).createSystem(topology, constraints=None)
    return system, topology, positions


def empty_system(n):
    system = openmm.System()
    for _ in range(n):
        system.addParticle(12.0)
    return system


def reference(system, x):
    """Energies and forces, one configuration after the other, Reference platform."""
    copy = openmm.XmlSerializer.clone(system)
    integrator = openmm.VerletIntegrator(1e-3)
    context = openmm.Context(copy, integrator, openmm.Platform.getPlatformByName("Reference"))
    energies, forces = [], []
    for positions in x:
        context.setPositions(positions)
        state = context.getState(getEnergy=True, getForces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(state.getForces(asNumpy=True)._value)
    return np.array(energies), np.array(forces)


def assert_agree(evaluator, system, x, tolerance=1e-8):
    """Energies to ``tolerance`` of their scale, forces of the largest force, per configuration."""
    u, f = reference(system, x)
    energy, force = evaluator.energies_and_forces(x)
    np.testing.assert_array_equal(energy, evaluator.energies(x))
    assert np.all(np.abs(energy - u) <= tolerance * np.maximum(1.0, np.abs(u)))
    scale = np.maximum(1.0, np.abs(f).max(axis=(1, 2)))
    assert np.all(np.abs(force - f).max(axis=(1, 2)) <= tolerance * scale)
