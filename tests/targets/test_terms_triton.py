"""Energy terms on a GPU, interpreted, against the compiled kernels of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import pytest
import torch
from numpy.typing import NDArray
from openmm import unit

from openmm_eqflow import load_system
from openmm_eqflow.targets.energies.compiled import compile_term, run_kernels
from openmm_eqflow.targets.energies.terms import AngleTerm, BondTerm, GBSATerm, read_standard
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy

triton_terms = pytest.importorskip(
    "openmm_eqflow.targets.energies.terms_triton", reason="no Triton here"
)
if torch.cuda.is_available():
    pytest.skip("a GPU runs them itself: -m gpu", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy at places of no energy
Array = NDArray[np.float64]


def summed(term: Any, x: Array) -> tuple[Array, Array]:
    """Energies and forces of a term as a GPU adds them up."""
    here = torch.from_numpy(x).permute(1, 2, 0).contiguous()
    share, force = torch.zeros_like(here[:, 0]), torch.zeros_like(here)
    triton_terms.fuse(term, x.shape[1], torch.device("cpu"))(here, share, force)
    return share.sum(0).numpy(), force.permute(2, 0, 1).numpy()


def terms_of(system: openmm.System) -> list[Any]:
    return [t for f in system.getForces() if (t := read_standard(f)) is not None]


def close(ours: Array, theirs: Array) -> bool:
    return bool(np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["toluene", "alanine-dipeptide"])
def test_terms(name: str) -> None:
    system = load_system(name)
    start = np.asarray(system.positions.value_in_unit(unit.nanometer))
    x = start + 0.01 * np.random.default_rng(0).normal(size=(5, *start.shape))
    seen = set()
    for term in terms_of(system.system):
        kernel = compile_term(term)
        assert kernel is not None
        energy, force = run_kernels([kernel], x, True)
        ours, by = summed(term, x)
        assert close(ours, energy), type(term)
        assert close(by, force), type(term)  # type: ignore[arg-type]
        # Power: of other positions both differ.
        other, by_other = summed(term, x[::-1].copy())
        assert not close(other, energy)
        assert not close(by_other, force)  # type: ignore[arg-type]
        seen.add(type(term).__name__)
    assert {"BondTerm", "AngleTerm", "FourierTorsionTerm", "PairTerm"} <= seen
    assert ("GBSATerm" in seen) == (name == "alanine-dipeptide")


def test_a_collinear_angle_and_a_spring_of_no_length() -> None:
    """Finite, as OpenMM's; particles at one place have no Coulomb energy."""
    x = np.array(
        [[[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]], [[0.0, 0, 0], [0.1, 0, 0], [0.05, 0, 0]]]
    )
    angle = AngleTerm(np.array([[0, 1, 2]]), np.array([1.9]), np.array([400.0]))
    spring = BondTerm(np.array([[0, 2]]), np.array([0.0]), np.array([3.0]))
    for term in (angle, spring):
        energy, force = run_kernels([compile_term(term)], x, True)  # type: ignore[list-item]
        ours, by = summed(term, x)
        assert np.isfinite(by).all()
        assert close(ours, energy)
        assert close(by, force)  # type: ignore[arg-type]


def test_burial_of_every_kind() -> None:
    """Born integrals from far apart to one sphere inside the other."""
    gaps = np.array([0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.6])
    x = np.zeros((len(gaps), 3, 3))
    x[:, 1, 0], x[:, 2, 1] = gaps, 0.5
    radius = np.array([0.25, 0.1, 0.17])
    term = GBSATerm(np.array([0.4, -0.7, 0.3]), radius, radius - 0.009, 0.8 * radius, 137.0, 28.3)
    energy, force = run_kernels([compile_term(term)], x, True)  # type: ignore[list-item]
    ours, by = summed(term, x)
    assert close(ours, energy)
    assert close(by, force)  # type: ignore[arg-type]


def test_a_whole_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and, for a force that has none, torch."""
    system = load_system("toluene")
    whole = openmm.XmlSerializer.clone(system.system)
    pull = openmm.CustomBondForce("3 * r^4")
    pull.addBond(0, 5, [])
    whole.addForce(pull)
    start = np.asarray(system.positions.value_in_unit(unit.nanometer))
    energy = TorchEnergy(whole, positions=start)
    x = torch.from_numpy(start + 0.01 * np.random.default_rng(1).normal(size=(3, *start.shape)))
    u, force = energy.energies_and_forces_tensor(x)
    ours, by = energy._by_kernels(x, True)
    assert len(energy._on_gpu[x.device].rest) == 1
    assert close(ours.numpy(), u.numpy())
    assert close(by.numpy(), force.numpy())  # type: ignore[union-attr]
    assert energy._by_kernels(x, False)[1] is None
