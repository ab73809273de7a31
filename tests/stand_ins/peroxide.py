"""Hydrogen peroxide as a user's own System: the whole main job on it takes seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openmm
import yaml
from openmm import app, unit

from openmm_eqflow.targets.constraints import constrained, hold_bonds

ATOMS = (("H1", "H"), ("O1", "O"), ("O2", "O"), ("H2", "H"))
POSITIONS = ((0.096, 0.0, 0.0), (0.0, 0.0, 0.0), (-0.03, 0.14, 0.0), (0.05, 0.165, 0.06))
HELD_MASSES, HELD_ANGLE = (12.0, 1.0, 1.0, 12.0), (1.6, 20.0)
QUICK: dict[str, Any] = {
    "reference_seconds": 60,
    "train_seconds": 2.0,
    "max_frames": 1200,
    "batch_size": 128,
    "field": {"width": 16, "conditioner_width": 16, "torsion_width": 16},
    "prior_rounds": 1,
    "prior_samples": 1000,
    "n_pool": 3000,
    "chunk": 1000,
    "n_chunks": 2,
    "n_evaluate": 1200,
    "n_samples": 240,
    "n_chains": 12,
    "n_local_steps": 5,
}


def topology() -> app.Topology:
    made = app.Topology()
    residue = made.addResidue("HPX", made.addChain("A"))
    atoms = [made.addAtom(n, app.Element.getBySymbol(s), residue) for n, s in ATOMS]
    for first, second in ((0, 1), (1, 2), (2, 3)):
        made.addBond(atoms[first], atoms[second])
    return made


def system(stiffness: float = 300_000.0) -> openmm.System:
    made = openmm.System()
    for _, symbol in ATOMS:
        made.addParticle(app.Element.getBySymbol(symbol).mass)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for first, second, length in ((0, 1, 0.097), (1, 2, 0.147), (2, 3, 0.097)):
        bonds.addBond(first, second, length, stiffness)
    angles.addAngle(0, 1, 2, 1.77, 500.0)
    angles.addAngle(1, 2, 3, 1.77, 500.0)
    torsions = openmm.PeriodicTorsionForce()
    torsions.addTorsion(0, 1, 2, 3, 2, 0.3, 4.0)
    torsions.addTorsion(0, 1, 2, 3, 1, math.pi, 3.0)
    for force in (bonds, angles, torsions):
        made.addForce(force)
    return made


class Exact(NamedTuple):
    """What is known of :func:`system` on the mean-free subspace, with orientations."""

    log_z: float
    mean_u: float


def exact(kt: float) -> Exact:
    """Factor by factor in internal coordinates: 8 pi^2 N^(-3/2) prod b^2 sin theta."""
    theta, tau = np.linspace(0.0, math.pi, 20_001), np.linspace(-math.pi, math.pi, 20_001)
    bend = (theta, np.sin(theta), 0.5 * 500.0 * (theta - 1.77) ** 2)
    turn = 4.0 * (1 + np.cos(2 * tau - 0.3)) + 3.0 * (1 + np.cos(tau - math.pi))
    factors = [bend, bend, (tau, np.ones_like(tau), turn)]
    for rest in (0.097, 0.147, 0.097):
        b = np.linspace(rest - 0.04, rest + 0.04, 20_001)
        factors.append((b, b**2, 0.5 * 300_000.0 * (b - rest) ** 2))
    log_z, mean_u = math.log(8 * math.pi**2) - 1.5 * math.log(4), 0.0
    for x, volume, energy in factors:
        f = volume * np.exp(-energy / kt)
        z = np.trapezoid(f, x)
        log_z += math.log(z)
        mean_u += np.trapezoid(f * energy / kt, x) / z
    return Exact(log_z, float(mean_u))
def held() -> openmm.System:
    """All bonds constrained, light atoms between heavy ones, soft angles: masses matter."""
    made = system()
    hold_bonds(made, topology(), "allbonds")
    for k, mass in enumerate(HELD_MASSES):
        made.setParticleMass(k, mass)
    angles = made.getForce(1)
    for k in (0, 1):
        angles.setAngleParameters(k, k, k + 1, k + 2, *HELD_ANGLE)
    return made


def held_positions() -> unit.Quantity:
    return constrained(held(), [openmm.Vec3(*p) for p in POSITIONS] * unit.nanometer)


def held_exactly(kt: float) -> tuple[float, float]:
    """Log Z of :func:`held` and its mean energy in kJ/mol; the determinant couples both angles."""
    inverse = [1 / m for m in HELD_MASSES]
    share = inverse[1] ** 2 / ((inverse[0] + inverse[1]) * (inverse[1] + inverse[2]))
    theta, (rest, k) = np.linspace(0, math.pi, 2001), HELD_ANGLE
    energy = 0.5 * k * (theta - rest) ** 2
    single = np.sin(theta) * np.exp(-energy / kt)
    squares = share * np.cos(theta) ** 2
    both = single[:, None] * single * np.sqrt(1 - squares[:, None] - squares)

    def over_angles(f: Any) -> float:
        return float(np.trapezoid(np.trapezoid(f, theta), theta))

    tau = np.linspace(-math.pi, math.pi, 20_001)
    turn = 4.0 * (1 + np.cos(2 * tau - 0.3)) + 3.0 * (1 + np.cos(tau - math.pi))
    turned = np.exp(-turn / kt)
    z = 8 * math.pi**2 * 4**-1.5 * (0.097**2 * 0.147) ** 2 * np.trapezoid(turned, tau)
    mean = over_angles(both * (energy[:, None] + energy)) / over_angles(both)
    mean += np.trapezoid(turn * turned, tau) / np.trapezoid(turned, tau)
    return math.log(z * over_angles(both)), mean


def chain_molecule(n: int) -> tuple[app.Topology, openmm.System, Any]:
    """H2 (n = 2) or HCCH in line (n = 4), harmonic, with a torsion that has no direction."""
    symbols = {2: "HH", 4: "HCCH"}[n]
    lengths = {2: (0.074,), 4: (0.106, 0.12, 0.106)}[n]
    made, structure = openmm.System(), app.Topology()
    residue = structure.addResidue("LIN", structure.addChain("A"))
    atoms = [
        structure.addAtom(f"{s}{k}", app.Element.getBySymbol(s), residue)
        for k, s in enumerate(symbols)
    ]
    bonds, angles, torsions = (
        openmm.HarmonicBondForce(),
        openmm.HarmonicAngleForce(),
        openmm.PeriodicTorsionForce(),
    )
    places = [openmm.Vec3(0, 0, 0)]
    for k, length in enumerate(lengths):
        structure.addBond(atoms[k], atoms[k + 1])
        bonds.addBond(k, k + 1, length, 300_000.0)
        places.append(places[-1] + openmm.Vec3(length, 0.001 * (-1) ** k, 0))
    for k in range(n - 2):
        angles.addAngle(k, k + 1, k + 2, math.pi, 400.0)
    if n == 4:
        torsions.addTorsion(0, 1, 2, 3, 3, 0.0, 0.65)
    for atom in atoms:
        made.addParticle(atom.element.mass)
    for force in (bonds, angles, torsions):
        made.addForce(force)
    return structure, made, places * unit.nanometer


def write_inputs(folder: Path, made: openmm.System | None = None) -> tuple[Path, Path]:
    """Write mol.pdb and system.xml."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mol.pdb").open("w") as handle:
        positions = [openmm.Vec3(*p) for p in POSITIONS] * unit.nanometer
        app.PDBFile.writeFile(topology(), positions, handle, keepIds=True)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(made or system()))
    return folder / "mol.pdb", folder / "system.xml"


def write_system(
    folder: Path, *, recipe: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Write a complete system folder; ``changes`` replace keys of system.yaml."""
    write_inputs(folder)
    content: dict[str, Any] = {
        "name": folder.name,
        "kind": "molecule",
        "coordinates": "mol.pdb",
        "temperature_kelvin": 300,
        "system_xml": "system.xml",
        "settings": {
            "reference": {
                "max_temperature_ratio": 1.2,
                "steps_per_swap": 20,
                "swaps_per_frame": 1,
                "equilibration_frames": 10,
            },
            "recipe": QUICK | (recipe or {}),
        },
    }
    content |= changes
    (folder / "system.yaml").write_text(yaml.safe_dump(content))
    return content
