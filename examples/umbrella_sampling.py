"""Cis and trans of N-methylacetamide in vacuum: a path from chemistry and umbrella sampling.

Dynamics never cross the barrier of 20 kcal/mol. Umbrella sampling pulls the amide over in windows,
which MBAR joins (Shirts, Chodera 2008); a path starts from both sides, and needs no coordinate.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

logging.getLogger("pymbar").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
import openmm  # noqa: E402
import pymbar  # noqa: E402
from openmm import unit  # noqa: E402

from openmm_eqflow import init_system  # noqa: E402
from openmm_eqflow.analysis.isomers import isomer_populations  # noqa: E402
from openmm_eqflow.flows.adapt import path_from_chemistry  # noqa: E402
from openmm_eqflow.runs.evaluation import draw_weighted  # noqa: E402
from openmm_eqflow.runs.stages import build_target  # noqa: E402
from openmm_eqflow.targets.isomers import find_isomers  # noqa: E402

KCAL = 4.184

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pdb", type=Path, default=Path(__file__).with_name("n-methylacetamide.pdb"))
parser.add_argument("--windows", type=int, default=36)
parser.add_argument("--picoseconds", type=float, default=100.0, help="of every window")
parser.add_argument("--n-samples", type=int, default=10_000, help="of the path")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    system = init_system(
        Path(folder) / "nma", pdb=arguments.pdb, forcefield=["amber14-all.xml"]
    )
(amide,) = (t for t in find_isomers(system.system, system.topology).torsions if t.kind == "amide")

# -- the path -------------------------------------------------------------------------------------
with build_target(system) as target:
    path = path_from_chemistry(target, ess=0.9, seed=arguments.seed).path
    samples = draw_weighted(path, target, arguments.n_samples, seed=arguments.seed)
    kt = target.kT
rows = isomer_populations((amide,), samples.x.numpy(), samples.log_weight.numpy(), kt)
(cis,) = (row for row in rows if row["state"] == "cis")
by_path, path_error = cis["free_energy_kcal_mol"], cis["free_energy_kcal_mol_error"]
print(f"path:     cis - trans {by_path:.3f} +- {path_error:.3f} kcal/mol, n = {len(samples.u)}")

# -- umbrella sampling ----------------------------------------------------------------------------
SPRING = 200.0  # kJ/mol/rad^2
bias = openmm.CustomTorsionForce(
    "0.5*k*d^2; d=theta-a-2*pi*floor((theta-a+pi)/(2*pi)); pi=3.14159265358979"
)
bias.addGlobalParameter("k", SPRING)
bias.addGlobalParameter("a", 0.0)
bias.addTorsion(*amide.atoms)
bias.setForceGroup(1)
biased = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system.system))
biased.addForce(bias)
integrator = openmm.LangevinMiddleIntegrator(
    system.temperature, 5.0 / unit.picosecond, 1.0 * unit.femtosecond
)
integrator.setRandomNumberSeed(arguments.seed + 1)
context = openmm.Context(biased, integrator, openmm.Platform.getPlatformByName("Reference"))
context.setPositions(system.positions)
context.setVelocitiesToTemperature(system.temperature, arguments.seed + 1)


def torsion() -> float:
    """Angle of the amide, rad."""
    x = context.getState(positions=True).getPositions(asNumpy=True)._value
    b = [x[j] - x[i] for i, j in zip(amide.atoms[:-1], amide.atoms[1:], strict=True)]
    n, m = np.cross(b[0], b[1]), np.cross(b[1], b[2])
    return float(np.arctan2(np.linalg.norm(b[1]) * (b[0] @ m), n @ m))


centres = torsion() + 2 * np.pi * np.arange(arguments.windows) / arguments.windows
found = []
for centre in centres:  # each begins where the one before it ended
    context.setParameter("a", float(centre))
    integrator.step(5000)
    steps = max(1, round(arguments.picoseconds / 0.1))
    values = []
    for _ in range(steps):
        integrator.step(100)
        values.append(torsion())
    values = np.array(values)
    kept = pymbar.timeseries.subsample_correlated_data(np.sin(values - centre))
    found.append(values[np.asarray(kept)] if len(kept) > 10 else values[::10])
counts = np.array([len(v) for v in found])
values = np.concatenate(found)
away = values - centres[:, None]
away -= 2 * np.pi * np.floor((away + np.pi) / (2 * np.pi))
with warnings.catch_warnings():  # pymbar hands scipy options that its solver does not know
    warnings.simplefilter("ignore")
    mbar = pymbar.MBAR(0.5 * SPRING / kt * away**2, counts)
inside = np.cos(values) > 0.0
shares = mbar.compute_perturbed_free_energies(
    np.stack([np.where(inside, 0.0, 700.0), np.where(inside, 700.0, 0.0)])
)
by_umbrella = -shares["Delta_f"][0, 1] * kt / KCAL
error = shares["dDelta_f"][0, 1] * kt / KCAL
print(f"umbrella: cis - trans {by_umbrella:.3f} +- {error:.3f} kcal/mol, n = {counts.sum()}")
