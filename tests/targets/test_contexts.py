"""ContextPool: which platform, what is refused."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import unit
from stand_ins.energies import empty_system

from openmm_eqflow.errors import EnergyError
from openmm_eqflow.targets.energies import contexts
from openmm_eqflow.targets.energies.contexts import ContextPool, LocalContext, available_platforms
from openmm_eqflow.targets.library import load_system


@pytest.fixture(scope="module")
def molecule():
    return load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def batch(molecule):
    positions = np.array(molecule.positions.value_in_unit(unit.nanometer))
    return positions + 0.01 * np.random.default_rng(1).normal(size=(600, *positions.shape))


def test_the_platform_follows_from_a_rule(molecule, monkeypatch) -> None:
    """Not from who was quicker: one seed gives the same bits on a busy machine."""
    quick = {"CPU": 1e9, "Reference": 1.0}
    names: list[str] = []
    broken = ""

    class Named(LocalContext):
        def __init__(self, xml: str, platform: str) -> None:
            names.append(platform)
            if platform == broken:
                raise openmm.OpenMMException("cannot")
            super().__init__(xml, platform)
            self.rate = quick[platform]

    monkeypatch.setattr(contexts, "LocalContext", Named)
    monkeypatch.setattr(contexts, "evaluation_rate", lambda context, probe: context.rate)
    with ContextPool(molecule.system, n_workers=1) as pool:
        assert pool.platform == "Reference"
    broken = "Reference"
    with ContextPool(molecule.system, n_workers=1) as pool:
        assert pool.platform == "CPU"
    assert set(names) == {"Reference", "CPU"}  # the stand-in was in use
    with ContextPool(molecule.system, platform="CPU", n_workers=1) as pool:
        assert pool.platform == "CPU"  # a name is taken at its word


def test_automatic_choices_and_refusals(molecule, batch):
    pool = ContextPool(molecule.system, n_workers=1)
    assert pool.platform in available_platforms()
    pool.close()
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(batch)
    with pytest.raises(EnergyError, match="not installed"):
        ContextPool(molecule.system, platform="Abacus")
    with pytest.raises(ValueError, match="n_workers"):
        ContextPool(molecule.system, n_workers=0)


def test_a_system_that_cannot_start_is_an_error():
    system = empty_system(2)
    force = openmm.CustomBondForce("r + nosuch")
    force.addBond(0, 1, [])
    system.addForce(force)
    with pytest.raises(EnergyError, match="no OpenMM platform can run"):
        ContextPool(system, n_workers=1)
