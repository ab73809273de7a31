"""OBC2 as a CustomGBForce runs compiled in the reference stage, and only where it is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit
from stand_ins import DATA, ROOT

from openmm_eqflow.runs.reference.calibration import make_plan
from openmm_eqflow.runs.reference.plan import ReferenceSettings
from openmm_eqflow.targets.energies.implicit_solvent import with_compiled_solvent
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.targets.target import system_sha256
from openmm_eqflow.units import energy_in_kj_mol, positions_in_nm

SMALL = ROOT / "examples" / "n-methylacetamide.pdb"
LARGE = DATA / "phe-dipeptide.pdb"


def made(solvent: str, pdb: Path = SMALL, **options: object) -> tuple[openmm.System, np.ndarray]:
    structure = app.PDBFile(str(pdb))
    forcefield = app.ForceField("amber14-all.xml", f"implicit/{solvent}.xml")
    options = {"nonbondedMethod": app.NoCutoff} | options
    system = forcefield.createSystem(structure.topology, constraints=None, **options)
    return system, positions_in_nm(structure.positions)


def evaluated(system: openmm.System, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    context = openmm.Context(
        system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    u, f = [], []
    for point in points:
        context.setPositions(point)
        state = context.getState(energy=True, forces=True)
        u.append(energy_in_kj_mol(state.getPotentialEnergy()))
        f.append(state.getForces(asNumpy=True)._value)
    return np.array(u), np.array(f)


def kinds(system: openmm.System) -> set[str]:
    return {type(force).__name__ for force in system.getForces()}


@pytest.mark.parametrize("pdb", [SMALL, LARGE])
@pytest.mark.parametrize("options", [{}, {"soluteDielectric": 2.0, "solventDielectric": 60.0}])
def test_the_compiled_form_has_the_same_energies_and_forces(pdb, options):
    system, x = made("obc2", pdb, **options)
    before = system_sha256(system)
    fast = with_compiled_solvent(system, x)
    assert "CustomGBForce" in kinds(system)
    assert system_sha256(system) == before
    assert "GBSAOBCForce" in kinds(fast)
    assert "CustomGBForce" not in kinds(fast)
    assert fast.getNumForces() == system.getNumForces()
    points = x + 0.01 * np.random.default_rng(5).normal(size=(6, *x.shape))
    for ours, theirs in zip(evaluated(fast, points), evaluated(system, points), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solvent", ["obc1", "hct", "gbn", "gbn2"])
def test_other_models_stay(solvent):
    system, x = made(solvent)
    assert with_compiled_solvent(system, x) is system


@pytest.mark.parametrize(
    "options",
    [
        {"implicitSolventKappa": 1.0 / unit.nanometer},
        {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 2.0 * unit.nanometer},
    ],
)
def test_salt_and_cutoffs_stay(options):
    system, x = made("obc2", **options)
    assert with_compiled_solvent(system, x) is system


@pytest.mark.parametrize(("old", "new"), [("4.85", "4.86"), ("0.25", "0.2500001")])
def test_a_formula_that_differs_a_little_stays(old, new):
    system, x = made("obc2")
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.CustomGBForce))
    for i in range(force.getNumComputedValues()):
        name, text, kind = force.getComputedValueParameters(i)
        force.setComputedValueParameters(i, name, text.replace(old, new), kind)
    assert with_compiled_solvent(system, x) is system


def test_the_reference_stage_uses_it(tmp_path):
    init_system(tmp_path / "nma", pdb=SMALL, forcefield=["amber14-all.xml", "implicit/obc2.xml"])
    system = load_system(tmp_path / "nma")
    plan, sampled, _ = make_plan(
        system, ReferenceSettings(), system_hash="x", torsions=(), seed=0, n_walkers=1
    )
    assert "CustomGBForce" not in kinds(sampled)
    assert "GBSAOBCForce" in kinds(sampled)
    assert plan.platform == "Reference"
    x = positions_in_nm(system.positions)[None]
    for ours, theirs in zip(evaluated(sampled, x), evaluated(system.system, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-8)
