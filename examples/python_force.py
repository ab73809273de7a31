"""A potential in Python (openmm.PythonForce) as a target: weighted samples from a Gaussian.

Any function of OpenMM's State will do, a machine-learned energy too. It must be at the top level
of a module, and is evaluated one configuration at a time.
"""

import argparse

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_eqflow import BoltzmannTarget, MeanFreeGaussian
from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.targets.energies.contexts import ContextPool

N, SPRING, QUARTIC = 4, 50.0, 200.0  # particles, kJ/mol/nm^2, kJ/mol/nm^4


def energy(state: openmm.State) -> tuple[float, np.ndarray]:
    """Sum over pairs of spring r^2 / 2 + quartic r^4, and its forces."""
    x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    d = x[:, None] - x[None]
    r2 = (d**2).sum(-1)
    value = 0.5 * (0.5 * SPRING * r2 + QUARTIC * r2**2).sum()
    return float(value), -((SPRING + 4.0 * QUARTIC * r2)[..., None] * d).sum(1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--n", type=int, default=20_000, help="samples")
arguments = parser.parse_args()

system, topology = openmm.System(), app.Topology()
residue = topology.addResidue("X", topology.addChain())
for k in range(N):
    system.addParticle(40.0)
    topology.addAtom(f"X{k}", None, residue)
system.addForce(openmm.PythonForce(energy))

# Without an evaluator the same pool is made, and a warning says that it is slower.
target = BoltzmannTarget(system, topology, 300 * unit.kelvin, evaluator=ContextPool(system))
prior = MeanFreeGaussian(N, 3, scale=0.07)
x = prior.sample(arguments.n, generator=torch.Generator().manual_seed(1))
u, gradient = target.reduced_potential_and_gradient(x)
log_weight = -u - prior.log_prob(x)
weight = torch.softmax(log_weight, dim=0)
virial = (weight * (x * gradient).sum((1, 2))).sum()
print(f"relative ESS {relative_ess(log_weight.numpy()):.3f}")
print(f"<x . du/dx> {virial:.3f}, exact {3 * (N - 1)}")
target.close()
