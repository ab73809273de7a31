"""Potentials in Python, and polarisable ones, through Contexts; stored code is not run unasked."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.forcefield import CODE_ALLOWED, load_system_xml
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.targets.target import BoltzmannTarget

SPRING, LENGTH = 1000.0, 0.1


def spring(state):
    x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    d = x[0] - x[1]
    r = np.linalg.norm(d)
    pull = -SPRING * (r - LENGTH) * d / r
    return 0.5 * SPRING * (r - LENGTH) ** 2, np.array([pull, -pull])


def pair(function):
    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("H2", topology.addChain())
    atoms = [topology.addAtom(f"H{k}", app.element.hydrogen, residue) for k in range(2)]
    topology.addBond(*atoms)
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(function))
    return system, topology


def test_a_force_in_python_is_a_target_and_told_once():
    x = torch.tensor([[[0.0, 0, 0], [0.12, 0, 0]], [[0.0, 0, 0], [0, 0.07, 0]]]).double()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        target = BoltzmannTarget(*pair(spring), 300 * unit.kelvin, x[0].numpy())
        u, gradient = target.reduced_potential_and_gradient(x)
    told = [str(w.message) for w in heard]
    assert len([w for w in told if "OpenMM Contexts: PythonForce" in w]) == 1
    with target:
        assert isinstance(target.evaluator, ContextPool)
        expected = torch.tensor([0.5 * SPRING * 0.02**2, 0.5 * SPRING * 0.03**2])
        torch.testing.assert_close(u, expected.double() / target.kT)
        assert gradient[0, 1, 0] * target.kT == pytest.approx(SPRING * 0.02)
        with pytest.raises(ConfigurationError, match=r"PythonForce.*--allow-code"):
            BoltzmannTarget.from_record(target.record())


def test_a_function_that_cannot_be_stored_is_refused():
    with pytest.raises(UnsupportedSystemError, match="top level of a module, neither a lambda"):
        BoltzmannTarget(*pair(lambda state: spring(state)), 300 * unit.kelvin)


def test_code_in_a_system_runs_only_when_it_is_allowed(tmp_path, monkeypatch):
    """A function that leaves a trace when it is unpickled: none without permission."""
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(
        f"open({str(trace)!r}, 'w').close()\ndef spring(state): return 0.0, None\n"
    )
    written = "import openmm, evil; s = openmm.System(); s.addParticle(1.0)\n"
    written += "s.addForce(openmm.PythonForce(evil.spring))\n"
    written += "open('in.xml', 'w').write(openmm.XmlSerializer.serialize(s))"
    subprocess.run([sys.executable, "-c", written], cwd=tmp_path, check=True)
    trace.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"in\.xml holds code .*--allow-code"):
        load_system_xml(tmp_path / "in.xml")
    assert not trace.exists()
    monkeypatch.setenv(CODE_ALLOWED, "1")
    assert load_system_xml(tmp_path / "in.xml").getNumForces() == 1
    assert trace.exists()  # power: it would have run


@pytest.mark.filterwarnings("ignore:falling back to OpenMM Contexts")
def test_a_polarisable_force_is_evaluated_by_openmm(tmp_path):
    lines = [
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O",
        "HETATM    2  H1  HOH A   1       0.957   0.000   0.000  1.00  0.00           H",
        "HETATM    3  H2  HOH A   1      -0.240   0.927   0.000  1.00  0.00           H",
    ]
    (tmp_path / "water.pdb").write_text("\n".join([*lines, "END", ""]))
    told = []
    made = init_system(
        tmp_path / "mol",
        pdb=tmp_path / "water.pdb",
        forcefield=["amoeba2018.xml"],
        tell=told.append,
    )
    assert any(line.startswith("AmoebaMultipoleForce") for line in told)
    with BoltzmannTarget(
        made.system, made.topology, made.temperature, made.positions, n_workers=1
    ) as target:
        assert isinstance(target.evaluator, ContextPool)
        u = target.reduced_potential(torch.from_numpy(np.array(made.positions._value))[None])
    context = openmm.Context(
        made.system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(made.positions)
    expected = context.getState(energy=True).getPotentialEnergy()._value / target.kT
    assert u.item() == pytest.approx(expected, rel=1e-6)
