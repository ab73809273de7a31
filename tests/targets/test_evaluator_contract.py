"""One body for every evaluator of energies: right, row by row, invalid ones infinite and counted.

A new evaluator joins ``MEMBERS``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import openmm
import pytest
from stand_ins.energies import reference

from openmm_eqflow.targets.energies.base import EnergyEvaluator
from openmm_eqflow.targets.energies.choose import choose_evaluator
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.units import positions_in_nm


class Member(NamedTuple):
    """How an evaluator is made, how right it is, and whether a row's bits see its batch."""

    make: Callable[[openmm.System], EnergyEvaluator]
    rtol: float = 1e-9
    bitwise: bool = True


MEMBERS = {
    "torch": Member(lambda s: TorchEnergy(s, n_threads=1)),
    "torch-two-threads": Member(lambda s: TorchEnergy(s, n_threads=2)),
    # Eager torch sums in an order that depends on the batch size.
    "eager": Member(lambda s: TorchEnergy(s, compiled=False), bitwise=False),
    "chosen": Member(lambda s: choose_evaluator(s, n_workers=1)),
    "threads": Member(lambda s: ContextPool(s, platform="Reference", n_workers=2)),
    # The CPU platform works in single precision.
    "cpu": Member(lambda s: ContextPool(s, platform="CPU", n_workers=2), 1e-4, False),
}


class Case(NamedTuple):
    member: Member
    system: openmm.System
    x: np.ndarray
    evaluator: EnergyEvaluator


@pytest.fixture(scope="module", params=["alanine-dipeptide", "lj13"])
def shipped(request: pytest.FixtureRequest) -> tuple[openmm.System, np.ndarray]:
    system = load_system(request.param)
    x = positions_in_nm(system.positions)
    noise = np.random.default_rng(1).normal(size=(40, *x.shape))
    return system.system, x + 0.01 * noise


@pytest.fixture(params=MEMBERS)
def case(
    request: pytest.FixtureRequest, shipped: tuple[openmm.System, np.ndarray]
) -> Iterator[Case]:
    member, (system, x) = MEMBERS[request.param], shipped
    evaluator = member.make(system)
    yield Case(member, system, x, evaluator)
    evaluator.close()


def test_agrees_with_openmm_whatever_the_batch(case: Case) -> None:
    member, system, x, evaluator = case
    assert isinstance(evaluator, EnergyEvaluator)
    assert evaluator.n_particles == system.getNumParticles()
    u, f = reference(system, x)
    assert np.ptp(u) > 1.0
    given = x.copy()
    energy, force = evaluator.energies_and_forces(x)
    np.testing.assert_array_equal(x, given)  # what is given is not written to
    assert energy.dtype == force.dtype == np.float64
    np.testing.assert_allclose(energy, u, rtol=member.rtol, atol=member.rtol)
    np.testing.assert_allclose(force, f, atol=member.rtol * np.abs(f).max())

    def same(one: np.ndarray, two: np.ndarray) -> None:
        if member.bitwise:
            np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, two, rtol=member.rtol, atol=member.rtol * np.abs(f).max())

    same(evaluator.energies(x), energy)
    same(evaluator.energies(x[::-1]), energy[::-1])  # another order, and not contiguous
    for rows in (slice(0, 1), slice(17, 18), slice(5, 23)):
        part, part_force = evaluator.energies_and_forces(x[rows])
        same(part, energy[rows])
        same(part_force, force[rows])
    empty, no_force = evaluator.energies_and_forces(x[:0])
    assert empty.shape == evaluator.energies(x[:0]).shape == (0,)
    assert no_force.shape == x[:0].shape
    assert evaluator.n_invalid == 0
    n = system.getNumParticles()
    for wrong in (x[0], x[:, :-1], x[..., :2]):
        with pytest.raises(ValueError, match=rf"expected \(n, {n}, 3\)"):
            evaluator.energies(wrong)


def test_invalid_energies_are_infinite_and_counted(case: Case) -> None:
    member, _, _, evaluator = case
    x = case.x[:9].copy()
    x[1, 3, 0] = np.nan
    x[2, 5, 2] = np.inf
    x[3, 0] = x[3, 12]
    x[4, 7] = 1e20
    x[5] = 0.0
    x[6] = -1e20
    bad, good = [1, 2, 3, 4, 5, 6], [0, 7, 8]
    clean, clean_force = evaluator.energies_and_forces(x[good])
    assert evaluator.n_invalid == 0
    energy, force = evaluator.energies_and_forces(x)
    assert np.all(np.isposinf(energy[bad]))
    assert np.all(force[bad] == 0.0)
    rtol = 1e-13 if member.rtol < 1e-4 else member.rtol
    np.testing.assert_allclose(energy[good], clean, rtol=rtol)
    np.testing.assert_allclose(force[good], clean_force, atol=10 * rtol * np.abs(force).max())
    assert evaluator.n_invalid == len(bad)
    assert np.all(np.isposinf(evaluator.energies(x)[bad]))
    assert evaluator.n_invalid == 2 * len(bad)


def test_closed_twice_and_nothing_is_left(case: Case) -> None:
    before = threading.active_count()
    another = case.member.make(case.system)
    energy = another.energies(case.x)
    another.close()
    another.close()
    assert threading.active_count() == before
    # Others of the same System go on.
    np.testing.assert_allclose(case.evaluator.energies(case.x), energy, rtol=case.member.rtol)
