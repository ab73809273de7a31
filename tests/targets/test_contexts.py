"""ContextPool: workers that die, hang or cannot start, no orphans, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import openmm
import pytest
from openmm import unit
from stand_ins.energies import empty_system
from stand_ins.interrupts import hear_interrupts

from openmm_eqflow.errors import EnergyError
from openmm_eqflow.targets.energies import contexts
from openmm_eqflow.targets.energies.contexts import ContextPool, available_platforms
from openmm_eqflow.targets.energies.process_worker import ProcessContext
from openmm_eqflow.targets.energies.worker import LocalContext
from openmm_eqflow.targets.library import load_system


@pytest.fixture(scope="module")
def molecule():
    return load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def batch(molecule):
    positions = np.array(molecule.positions.value_in_unit(unit.nanometer))
    return positions + 0.01 * np.random.default_rng(1).normal(size=(600, *positions.shape))


def test_killed_worker_is_replaced_and_its_batch_redone(molecule, batch):
    with ContextPool(molecule.system, mode="processes", platform="Reference", n_workers=2) as pool:
        undisturbed = pool.energies_and_forces(batch)
        many = np.concatenate([batch] * 10)
        victim = pool.worker_pids[0]
        timer = threading.Timer(0.05, os.kill, (victim, signal.SIGKILL))
        timer.start()
        energy, force = pool.energies_and_forces(many)
        timer.join()
        # Sent between batches the kill is noticed by the next one.
        np.testing.assert_array_equal(pool.energies(batch), undisturbed[0])
        assert pool.n_restarts == 1
        assert victim not in pool.worker_pids
        np.testing.assert_array_equal(energy, np.tile(undisturbed[0], 10))
        np.testing.assert_array_equal(force, np.tile(undisturbed[1], (10, 1, 1)))
        assert pool.n_invalid == 0


def test_stuck_worker_times_out(molecule, batch, monkeypatch):
    asked, exchange = [], ProcessContext._exchange

    def recorded(self, request, reply_size, timeout):
        asked.append(timeout)
        return exchange(self, request, reply_size, timeout)

    monkeypatch.setattr(ProcessContext, "_exchange", recorded)
    with ContextPool(
        molecule.system, mode="processes", platform="Reference", n_workers=1, timeout=1.0
    ) as pool:
        undisturbed = pool.energies(batch)
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        np.testing.assert_array_equal(pool.energies(batch), undisturbed)
        assert pool.n_restarts == 1
        assert set(asked) == {1.0, 120.0}  # the new worker has as long as the first


def test_configuration_that_kills_every_worker_is_invalid(molecule, batch, monkeypatch):
    from openmm_eqflow.targets.energies import contexts as context_pool
    from openmm_eqflow.targets.energies.worker import LocalContext

    class Fragile:
        def __init__(self, xml, platform, *, timeout):
            self.local = LocalContext(xml, platform)
            self.pid = None

        def start(self):
            return

        def close(self):
            return

        def compute(self, x, forces):
            if np.any(x[:, 0, 0] > 5):
                msg = "gone"
                raise context_pool.WorkerLostError(msg)
            return self.local.compute(x, forces)

    monkeypatch.setattr(context_pool, "ProcessContext", Fragile)
    pool = ContextPool(molecule.system, mode="processes", platform="Reference", n_workers=2)
    x = batch[:50].copy()
    x[17] += 10.0
    energy, force = pool.energies_and_forces(x)
    assert np.flatnonzero(np.isinf(energy)).tolist() == [17]
    assert pool.n_invalid == 1
    assert np.all(force[17] == 0)
    pool.close()


SCRIPT = """
import sys, numpy as np
from openmm_eqflow.targets.energies.process_worker import ProcessContext
from openmm_eqflow.targets.energies.worker import LocalContext
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.energies.contexts import ContextPool
molecule = load_system("alanine-dipeptide")
pool = ContextPool(molecule.system, mode="processes", platform="Reference", n_workers=2)
x = np.repeat(np.array(molecule.positions.value_in_unit(molecule.positions.unit))[None], 64, 0)
sys.stdout.write(" ".join(map(str, pool.worker_pids)) + "\\n")
sys.stdout.flush()
while True:
    pool.energies(x)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_no_orphans(how):
    # Without a __main__ guard: workers must not import the user's script again.
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_interrupts,
        text=True,
    )
    pids = [int(p) for p in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.2)
    try:
        if how == signal.SIGINT:
            # As a person would: once more if nothing happens (an interrupt that lands inside a
            # finaliser is swallowed by Python).
            for _ in range(20):
                os.killpg(process.pid, how)
                try:
                    process.wait(timeout=3)
                    break
                except subprocess.TimeoutExpired:
                    continue
        else:
            process.kill()
        process.wait(timeout=30)
    finally:
        process.kill()
        process.stdout.close()
    deadline = time.monotonic() + 30
    while any(alive(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(p) for p in pids)


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
    with ContextPool(molecule.system, n_workers=1, mode="threads") as pool:
        assert pool.platform == "Reference"
    broken = "Reference"
    with ContextPool(molecule.system, n_workers=1, mode="threads") as pool:
        assert pool.platform == "CPU"
    assert set(names) == {"Reference", "CPU"}  # the stand-in was in use
    with ContextPool(molecule.system, platform="CPU", n_workers=1, mode="threads") as pool:
        assert pool.platform == "CPU"  # a name is taken at its word


def test_automatic_choices_and_refusals(molecule, batch):
    pool = ContextPool(molecule.system, n_workers=1)
    assert pool.platform in available_platforms()
    assert pool.mode == "threads"
    pool.close()
    with pytest.raises(EnergyError, match="closed"):
        pool.energies(batch)
    with pytest.raises(EnergyError, match="not installed"):
        ContextPool(molecule.system, platform="Abacus")
    with pytest.raises(ValueError, match="expected 'auto', 'threads' or 'processes'"):
        ContextPool(molecule.system, mode="fibres")
    with pytest.raises(ValueError, match="n_workers"):
        ContextPool(molecule.system, n_workers=0)


def test_worker_that_cannot_start_is_an_error():
    system = empty_system(2)
    force = openmm.CustomBondForce("r + nosuch")
    force.addBond(0, 1, [])
    system.addForce(force)
    with pytest.raises(EnergyError, match="did not start"):
        ContextPool(system, mode="processes", platform="Reference", n_workers=1)
