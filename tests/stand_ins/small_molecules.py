"""Molecules from their bonds: a System whose equivalent atoms are alike, and an embedding."""

from __future__ import annotations

import networkx as nx
import numpy as np
import openmm
from openmm import app

from openmm_eqflow.targets.own_system import init_system

RADIUS = {"H": 0.031, "C": 0.077, "N": 0.070, "O": 0.066, "F": 0.064}


def molecule(heavy, bonds, *, hydrogens=(), double=(), flat=()):
    """Topology and System of a molecule.

    ``heavy`` are elements, ``bonds`` pairs of them, ``hydrogens`` their numbers of hydrogens;
    ``double`` bonds are short, atoms in ``flat`` have angles of 120 degrees.
    """
    elements, bonds = list(heavy), [tuple(b) for b in bonds]
    for k, n in enumerate(hydrogens):
        for _ in range(n):
            bonds.append((k, len(elements)))
            elements.append("H")
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(f"{e}{k + 1}", app.Element.getBySymbol(e), residue)
        for k, e in enumerate(elements)
    ]
    system = openmm.System()
    for atom in atoms:
        system.addParticle(atom.element.mass)
    graph = nx.Graph(bonds)
    springs, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    pairs = openmm.CustomNonbondedForce("(s/r)^6; s=(a1+a2)")
    pairs.addPerParticleParameter("a")
    for a, b in bonds:
        topology.addBond(atoms[a], atoms[b])
        short = 0.9 if (a, b) in double or (b, a) in double else 1.0
        length = short * (RADIUS[elements[a]] + RADIUS[elements[b]])
        springs.addBond(a, b, length, 2e5)
    for centre in graph:
        around = sorted(graph[centre])
        theta = np.radians(120.0 if centre in flat else 109.5)
        for i, a in enumerate(around):
            for b in around[i + 1 :]:
                angles.addAngle(a, centre, b, theta, 400.0)
    planes = openmm.PeriodicTorsionForce()
    for b, c in double:
        for a in set(graph[b]) - {c}:
            for d in set(graph[c]) - {b}:
                planes.addTorsion(a, b, c, d, 2, np.pi, 30.0)
    for e in elements:
        pairs.addParticle([0.08 if e == "H" else 0.12])
    pairs.createExclusionsFromBonds(bonds, 2)
    for force in (springs, angles, planes, pairs):
        system.addForce(force)
    return topology, system


def embed(system, seed=0):
    """A minimum from random positions, ``(n, 3)`` nm."""
    rng = np.random.default_rng(seed)
    reference = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(1e-3), reference)
    for _ in range(20):
        context.setPositions(rng.normal(scale=0.2, size=(system.getNumParticles(), 3)))
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 2000)
        state = context.getState(positions=True, energy=True)
        if state.getPotentialEnergy()._value < 20.0 * system.getNumParticles():
            return state.getPositions(asNumpy=True)._value
    raise AssertionError("no embedding found")


ISOBUTANE = molecule("CCCC", [(0, 1), (0, 2), (0, 3)], hydrogens=(1, 3, 3, 3))
ISOPROPANOL = molecule("CCCO", [(0, 1), (0, 2), (0, 3)], hydrogens=(1, 3, 3, 1))
TERT_BUTANOL = molecule("CCCCO", [(0, k) for k in range(1, 5)], hydrogens=(0, 3, 3, 3, 1))
NEOPENTANE = molecule("CCCCC", [(0, k) for k in range(1, 5)], hydrogens=(0, 3, 3, 3, 3))
BUTANE = molecule("CCCC", [(0, 1), (1, 2), (2, 3)], hydrogens=(3, 2, 2, 3))
DIFLUOROBUTANE = molecule(
    "CCCCFF", [(0, 1), (1, 2), (2, 3), (1, 4), (2, 5)], hydrogens=(3, 1, 1, 3)
)
ETHENE = molecule("CC", [(0, 1)], hydrogens=(2, 2), double=[(0, 1)], flat=(0, 1))
BUTENE = molecule(
    "CCCC", [(0, 1), (1, 2), (2, 3)], hydrogens=(3, 1, 1, 3), double=[(1, 2)], flat=(1, 2)
)
ISOBUTENE = molecule(
    "CCCC", [(0, 1), (0, 2), (0, 3)], hydrogens=(0, 2, 3, 3), double=[(0, 1)], flat=(0, 1)
)
METHYL_ACETATE = molecule(
    "CCOOC",
    [(0, 1), (1, 2), (1, 3), (3, 4)],
    hydrogens=(3, 0, 0, 0, 3),
    double=[(1, 2)],
    flat=(1,),
)
FORMIC_ACID = molecule(
    "COO", [(0, 1), (0, 2)], hydrogens=(1, 0, 1), double=[(0, 1)], flat=(0,)
)
CYCLOHEXANE = molecule("CCCCCC", [(k, (k + 1) % 6) for k in range(6)], hydrogens=(2,) * 6)
METHYLCYCLOHEXANE = molecule(
    "CCCCCCC", [(k, (k + 1) % 6) for k in range(6)] + [(0, 6)], hydrogens=(1, 2, 2, 2, 2, 2, 3)
)
METHYLPIPERIDINE = molecule(
    "NCCCCCC", [(k, (k + 1) % 6) for k in range(6)] + [(0, 6)], hydrogens=(0, 2, 2, 2, 2, 2, 3)
)
FORMYLPIPERIDINE = molecule(
    "NCCCCCCO",
    [(k, (k + 1) % 6) for k in range(6)] + [(0, 6), (6, 7)],
    hydrogens=(0, 2, 2, 2, 2, 2, 1, 0),
    double=[(6, 7)],
    flat=(0, 6),
)
DIMETHYLCYCLOHEXANE = molecule(
    "CCCCCCCC",
    [(k, (k + 1) % 6) for k in range(6)] + [(0, 6), (3, 7)],
    hydrogens=(1, 2, 2, 1, 2, 2, 3, 3),
)
#: Acetyl and N-methyl caps: CH3-CO-NH-CH(R)-CO-NH-CH3.
_CAPPED = "CCONCCONC"
_CAPPED_BONDS = [(0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (5, 6), (5, 7), (7, 8)]
_CAPPED_HYDROGENS = (3, 0, 0, 1, 1, 0, 0, 1, 3)
VALINE = molecule(
    _CAPPED + "CCC",
    [*_CAPPED_BONDS, (4, 9), (9, 10), (9, 11)],
    hydrogens=(*_CAPPED_HYDROGENS, 1, 3, 3),
    flat=(1, 3, 5, 7),
)
LEUCINE = molecule(
    _CAPPED + "CCCC",
    [*_CAPPED_BONDS, (4, 9), (9, 10), (10, 11), (10, 12)],
    hydrogens=(*_CAPPED_HYDROGENS, 2, 1, 3, 3),
    flat=(1, 3, 5, 7),
)
TOLUENE = molecule(
    "CCCCCCC",
    [(k, (k + 1) % 6) for k in range(6)] + [(0, 6)],
    hydrogens=(0, 1, 1, 1, 1, 1, 3),
    flat=range(6),
)


ibuprofen = molecule(
    "CCCCCCCCCCCCCOO",
    [
        *((k, k + 1) for k in (0, 1, 3, 4, 5, 6, 7, 8, 10, 12)),
        *((1, 3), (4, 9), (7, 10), (10, 12), (12, 14)),
    ],
    hydrogens=(3, 1, 3, 2, 0, 1, 1, 0, 1, 1, 1, 3, 0, 0, 1),
    double=[(4, 5), (6, 7), (8, 9), (12, 13)],
    flat=[*range(4, 10), 12],
)


def written(folder, name):
    """A folder with system.yaml of one of the small molecules."""
    topology, system = globals()[name]
    folder.mkdir()
    (folder / "in.xml").write_text(openmm.XmlSerializer.serialize(system))
    x = 10.0 * embed(system)
    with (folder / "in.pdb").open("w") as handle:
        app.PDBFile.writeFile(topology, x, handle)
    return init_system(folder / "system", pdb=folder / "in.pdb", system_xml=folder / "in.xml")


def turned(x, system, atoms, angle):
    """Positions (N, 3) with the torsion of four atoms at an angle, rad."""
    force = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    graph = nx.Graph(tuple(force.getBondParameters(k)[:2]) for k in range(force.getNumBonds()))
    a, b, c, d = atoms
    graph.remove_edge(b, c)
    moving = sorted(nx.node_connected_component(graph, c))
    axis = (x[c] - x[b]) / np.linalg.norm(x[c] - x[b])
    n, m = np.cross(x[b] - x[a], axis), np.cross(axis, x[d] - x[c])
    now = np.arctan2(np.dot(np.cross(n, m), axis), np.dot(n, m))
    cos, sin = np.cos(angle - now), np.sin(angle - now)
    arms = x[moving] - x[c]
    along = np.outer(arms @ axis, axis)
    out = np.array(x, dtype=float)
    out[moving] = x[c] + along + cos * (arms - along) + sin * np.cross(axis, arms)
    return out
