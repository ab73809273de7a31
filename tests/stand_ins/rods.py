"""Three particles, both bonds held, no potential: masses alone decide how the rods meet."""

from __future__ import annotations

import math

import numpy as np
import openmm
import torch
from openmm import app, unit
from scipy.integrate import quad
from torch import Tensor

from openmm_eqflow.priors.fit import fit_internal_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.targets.target import BoltzmannTarget

LENGTH, MASSES = 0.1, (12.0, 2.0, 12.0)
START = np.array([[LENGTH, 0, 0], [0, 0, 0], [0, LENGTH, 0]])


def rods() -> tuple[openmm.System, app.Topology]:
    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("ROD", topology.addChain())
    atoms = [
        topology.addAtom(name, app.Element.getBySymbol("C"), residue) for name in ("A", "B", "C")
    ]
    for mass in MASSES:
        system.addParticle(mass)
    for k in (0, 1):
        system.addConstraint(k, k + 1, LENGTH)
        topology.addBond(atoms[k], atoms[k + 1])
    # A force that says nothing: a System without any is refused.
    nothing = openmm.CustomBondForce("0*r")
    nothing.addBond(0, 2)
    system.addForce(nothing)
    return system, topology


def rods_target() -> BoltzmannTarget:
    return BoltzmannTarget(*rods(), 300 * unit.kelvin, START)


def metric(c: float) -> float:
    """Square root of det H by hand, for the cosine of the angle."""
    inverse = [1 / m for m in MASSES]
    share = inverse[1] / math.sqrt((inverse[0] + inverse[1]) * (inverse[1] + inverse[2]))
    return math.sqrt(1 - (share * c) ** 2)


MEAN_SQUARE = (
    quad(lambda c: c * c * metric(c), -1, 1)[0] / quad(metric, -1, 1)[0]
)  # 0.2861, without the metric 1/3
LOG_Z = math.log(8 * math.pi**2 * 3**-1.5 * LENGTH**4 * quad(metric, -1, 1)[0])


def cosine(x: Tensor) -> Tensor:
    u, v = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
    return (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))


def bent(c: Tensor) -> Tensor:
    """Configurations (n, 3, 3) of given cosines."""
    x = torch.zeros(len(c), 3, 3, dtype=torch.float64)
    x[:, 0, 0] = LENGTH
    x[:, 2, 0], x[:, 2, 1] = LENGTH * c, LENGTH * (1 - c * c).sqrt()
    return x - x.mean(1, keepdim=True)


def rods_prior(target: BoltzmannTarget) -> InternalCoordinatePrior:
    generator = torch.Generator().manual_seed(3)
    c = 2 * torch.rand(500, generator=generator, dtype=torch.float64) - 1
    return fit_internal_prior(bent(c), [(0, 1), (1, 2)], MASSES, constraints=target.constraints)
