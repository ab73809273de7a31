from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit
from scipy.integrate import quad
from scipy.special import i0, i1
from stand_ins import ROOT
from stand_ins.interrupts import hear_interrupts
from stand_ins.peroxide import chain_molecule

from openmm_eqflow.analysis.chains import mean_with_error
from openmm_eqflow.analysis.convergence import round_trips
from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.errors import CheckpointError, ConfigurationError, EnergyError
from openmm_eqflow.runs.reference import calibration
from openmm_eqflow.runs.reference.calibration import choose_ladder, exchange_rate, make_plan
from openmm_eqflow.runs.reference.data import load_reference, run_reference
from openmm_eqflow.runs.reference.plan import ReferenceSettings, SamplingPlan
from openmm_eqflow.runs.reference.tempering import (
    TemperingWalker,
    chunk_paths,
    read_chunk,
    write_chunk,
)
from openmm_eqflow.runs.reference.worker import run_walker
from openmm_eqflow.targets.library import load_system, systems_directory
from openmm_eqflow.units import energy_in_kj_mol, kt_in_kj_mol, positions_quantity

UNLIMITED = 1e6


def with_settings(name, **options):
    system = load_system(name)
    return dataclasses.replace(system, settings={"reference": options})


def plan_and_engine(system, *, n_walkers=2, seed=3, frames_per_chunk=8):
    settings = ReferenceSettings.from_mapping(system.settings["reference"], Path("here"))
    plan, sampled, starts = make_plan(
        system, settings, system_hash="x", torsions=(), seed=seed, n_walkers=n_walkers
    )
    plan = dataclasses.replace(plan, frames_per_chunk=frames_per_chunk, platform="Reference")
    return plan, TemperingWalker(plan, sampled, 0), starts, sampled


def test_exchange_rate_matches_a_million_draws():
    rng = np.random.default_rng(0)
    beta, mean, spread = (0.40, 0.33), (-60.0, -48.0), (13.0, 15.0)
    energies = [rng.normal(m, s, 10**6) for m, s in zip(mean, spread, strict=True)]
    exponent = (beta[0] - beta[1]) * (energies[0] - energies[1])
    expected = np.minimum(1.0, np.exp(exponent)).mean()
    assert exchange_rate(beta, mean, spread) == pytest.approx(expected, abs=2e-3)


def test_ladder_is_the_shortest_with_equal_rates():
    grid = np.linspace(300.0, 660.0, 5)
    kt = grid * 0.0083144626
    # A classical harmonic system of 60 degrees of freedom: <U> = 30 RT, sd = sqrt(30) RT.
    means, spreads = 30.0 * kt, np.sqrt(30.0) * kt
    ladder, rate = choose_ladder(grid, means, spreads, swap_rate=0.3, max_temperatures=12)
    assert ladder[0] == 300.0
    assert ladder[-1] == pytest.approx(660.0)
    rates = [
        exchange_rate(
            (1 / (0.0083144626 * a), 1 / (0.0083144626 * b)),
            (30 * 0.0083144626 * a, 30 * 0.0083144626 * b),
            (np.sqrt(30) * 0.0083144626 * a, np.sqrt(30) * 0.0083144626 * b),
        )
        for a, b in itertools.pairwise(ladder)
    ]
    np.testing.assert_allclose(rates, rate, atol=1e-6)
    assert 0.3 <= rate < 0.5
    shorter, lowered = choose_ladder(
        grid, means, spreads, swap_rate=0.3, max_temperatures=len(ladder) - 1
    )
    assert len(shorter) == len(ladder) - 1
    assert shorter[-1] < 660.0
    assert lowered == 0.3


def test_torsions_agree_with_mdtraj():
    trajectory = mdtraj.load(str(next((systems_directory() / "ala3").glob("*.pdb"))))
    quads = [(0, 4, 6, 8), (4, 6, 8, 14), (6, 8, 14, 16)]
    expected = mdtraj.compute_dihedrals(trajectory, quads)
    found = torsion_angles(trajectory.xyz.astype(float), quads)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_round_trips_counts_closed_journeys():
    # One replica (0) goes cold, hot, cold, hot; replica 1 does the opposite: one trip each.
    replica = np.array([[0, 1], [1, 0], [0, 1], [1, 0]])
    assert round_trips(replica) == 2
    assert round_trips(np.zeros((5, 1), dtype=int)) == 0


@pytest.mark.parametrize("name", ["toluene", "dw4"])
def test_resumed_walker_is_bit_identical(name):
    system = with_settings(name, steps_per_swap=20, equilibration_frames=2)
    plan, engine, starts, sampled = plan_and_engine(system, frames_per_chunk=5)
    first = engine.run_chunk(engine.start(starts), max_frames=5, should_stop=lambda n: False)
    second = engine.run_chunk(first.state, max_frames=5, should_stop=lambda n: False)
    assert len(plan.temperatures) > 1
    other = TemperingWalker(plan, sampled, 0)
    again = other.run_chunk(first.state, max_frames=5, should_stop=lambda n: False)
    np.testing.assert_array_equal(again.frames, second.frames)
    np.testing.assert_array_equal(again.energies, second.energies)
    np.testing.assert_array_equal(again.state.velocities, second.state.velocities)
    assert not np.array_equal(second.frames, first.frames)


def test_walkers_and_seeds_differ():
    system = with_settings("harmonic", steps_per_swap=10, max_temperature_ratio=1.0)
    plan, _, starts, _ = plan_and_engine(system)
    frames = []
    for walker, seed in ((0, 3), (1, 3), (0, 4)):
        engine = TemperingWalker(dataclasses.replace(plan, seed=seed), system.system, walker)
        state = engine.start(starts)
        frames.append(engine.run_chunk(state, max_frames=2, should_stop=lambda n: False).frames)
    seen = [{frame.tobytes() for frame in f.reshape(-1, 6, 3)} for f in frames]
    assert all(len(part) == frames[0].shape[0] * frames[0].shape[1] for part in seen)
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]


@pytest.fixture(scope="module")
def tempered(tmp_path_factory):
    """A harmonic ladder run through the public call: every mean and variance is known."""
    directory = tmp_path_factory.mktemp("tempered")
    system = with_settings("harmonic", max_temperature_ratio=3.0, steps_per_swap=40)
    calls: list[tuple[float, str]] = []
    data = run_reference(
        system,
        directory,
        seconds=UNLIMITED,
        max_frames=4001,
        seed=7,
        progress=lambda fraction, text: calls.append((fraction, text)),
    )
    return system, directory, data, calls


@pytest.mark.statistical
def test_every_temperature_has_its_exact_energy(tempered):
    _, _, data, _ = tempered
    assert len(data.temperatures) >= 3
    for energies, temperature in zip(data.all_energies, data.temperatures, strict=True):
        u = energies / (0.00831446261815324 * temperature)
        for values, exact in ((u, 7.5), ((u - 7.5) ** 2, 7.5)):
            mean, error = mean_with_error(values)
            assert error < 0.5
            assert abs(mean - exact) < 5.0 * error
            # Power: the same test at a temperature 10 % off must fail for the mean.
        mean, error = mean_with_error(u / 1.1)
        assert abs(mean - 7.5) > 5.0 * error


def bent():
    """Two stiff bonds and an angle, as water has them: integrated at 0.9 / omega."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("HOH", topology.addChain("A"))
    elements = (app.element.hydrogen, app.element.oxygen, app.element.hydrogen)
    atoms = [topology.addAtom(f"A{k}", e, residue) for k, e in enumerate(elements)]
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for first, second in ((0, 1), (1, 2)):
        topology.addBond(atoms[first], atoms[second])
        bonds.addBond(first, second, 0.0957, 462_750.0)
    angles.addAngle(0, 1, 2, 1.824, 836.8)
    for atom in atoms:
        system.addParticle(atom.element.mass)
    system.addForce(bonds)
    system.addForce(angles)
    x = np.array([[0.0957, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.0240, 0.0927, 0.0]])
    return dataclasses.replace(
        load_system("toluene"),
        name="bent",
        system=system,
        topology=topology,
        positions=positions_quantity(x),
        settings={"reference": {"max_temperature_ratio": 2.2, "steps_per_swap": 10}},
    )


def bent_energy(kelvin):
    """Mean reduced energy by quadrature."""
    kt = kt_in_kj_mol(kelvin * unit.kelvin)

    def mean(u, volume, low, high):
        top = quad(lambda q: u(q) * volume(q) * np.exp(-u(q)), low, high)[0]
        return top / quad(lambda q: volume(q) * np.exp(-u(q)), low, high)[0]

    stretch = mean(lambda r: 231_375.0 * (r - 0.0957) ** 2 / kt, lambda r: r * r, 0.07, 0.12)
    bend = mean(lambda t: 418.4 * (t - 1.824) ** 2 / kt, np.sin, 0.9, 2.8)
    return 2.0 * stretch + bend


def half_step_late(self, context):
    """Velocities of the Context, taken for those of the positions' time."""
    v = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    return v, np.zeros_like(v)


def test_exchange_rescales_the_velocities_of_the_positions_time(monkeypatch):
    _, engine, starts, _ = plan_and_engine(bent())
    engine.start(starts)
    v, kick = engine._velocities(engine._contexts[0])
    assert np.abs(kick).max() > 0.02 * np.abs(v).max()  # velocities are drawn anew each time
    engine._set_temperature(0, 0, 1)
    after, same = engine._velocities(engine._contexts[0])
    scale = (engine.plan.temperatures[1] / engine.plan.temperatures[0]) ** 0.5
    np.testing.assert_allclose(after + same, scale * (v + kick), atol=1e-10)
    assert np.abs(after - scale * v).max() > 0.01 * np.abs(v).max()


@pytest.mark.slow
@pytest.mark.statistical
def test_exchange_leaves_stiff_modes_at_their_temperature(monkeypatch):
    plan, engine, starts, _ = plan_and_engine(bent(), frames_per_chunk=40_000)
    assert 2.0 < plan.timestep_fs < 3.0
    assert len(plan.temperatures) == 2
    state = engine.start(starts)

    def worst():
        chunk = engine.run_chunk(state, max_frames=40_000, should_stop=lambda n: False)
        found = []
        for energies, kelvin in zip(chunk.energies.T, plan.temperatures, strict=True):
            mean, error = mean_with_error(energies / kt_in_kj_mol(kelvin * unit.kelvin))
            assert error < 0.03
            found.append(abs(mean - bent_energy(kelvin)) / error)
        return max(found)

    assert worst() < 4.0
    # Power: rescaled as the Context has them.
    monkeypatch.setattr(TemperingWalker, "_velocities", half_step_late)
    assert worst() > 6.0


def test_reference_data_are_complete(tempered):
    system, directory, data, calls = tempered
    assert data.positions.shape == (4001, 6, 3)
    assert data.positions.dtype == np.float32
    assert np.bincount(data.walker).tolist() == [2001, 2000]
    assert np.abs(data.positions.mean(axis=1)).max() < 1e-7
    assert all(0.2 < rate < 0.8 for rate in data.convergence["swap_rates"])
    assert all(trips > 20 for trips in data.convergence["round_trips"])
    assert data.convergence["converged"]
    json.dumps(data.convergence)
    fractions = [fraction for fraction, _ in calls]
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    with np.load(directory / "reference.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["energies"], data.energies)
    trajectory = mdtraj.load(
        str(directory / "reference.dcd"), top=str(system.directory / "harmonic.pdb")
    )
    np.testing.assert_allclose(trajectory.xyz, data.positions, atol=1e-6)
    assert sorted(path.name for path in directory.iterdir()) == [
        "reference",
        "reference.dcd",
        "reference.npz",
    ]


def test_energies_belong_to_the_frames(tempered):
    system, _, data, _ = tempered
    context = openmm.Context(
        system.system,
        openmm.VerletIntegrator(1e-3),
        openmm.Platform.getPlatformByName("Reference"),
    )
    for t in range(len(data.temperatures)):
        context.setPositions(positions_quantity(data.all_positions[t, 17]))
        energy = energy_in_kj_mol(context.getState(energy=True).getPotentialEnergy())
        assert energy == pytest.approx(data.all_energies[t, 17], rel=1e-5)


def test_finished_run_returns_at_once_and_extends(tempered, tmp_path):
    system, directory, data, _ = tempered

    def chunks(folder):
        return {
            path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in (folder / "reference").rglob("chunk-*")
        }

    before = chunks(directory)
    again = run_reference(system, directory, seconds=UNLIMITED, max_frames=4001, seed=7)
    np.testing.assert_array_equal(again.positions, data.positions)
    assert chunks(directory) == before
    shutil.copytree(directory, tmp_path / "more")
    before = chunks(tmp_path / "more")
    more = run_reference(system, tmp_path / "more", seconds=UNLIMITED, max_frames=4021, seed=7)
    assert np.bincount(more.walker).tolist() == [2011, 2010]
    assert chunks(tmp_path / "more").items() > before.items()
    for walker in (0, 1):
        old, new = (d.positions[d.walker == walker] for d in (data, more))
        np.testing.assert_array_equal(new[: len(old)], old)
        assert len(np.unique(new.reshape(len(new), -1), axis=0)) == len(new)


def test_directory_of_another_system_temperature_or_seed(tempered):
    system, directory, _, _ = tempered
    hot = dataclasses.replace(system, temperature=system.temperature * 1.1)
    for other, seed, word in (
        (load_system("dw4"), 7, "System"),
        (hot, 7, "temperature"),
        (system, 8, "seed"),
    ):
        with pytest.raises(ConfigurationError, match=f"another {word}"):
            run_reference(other, directory, seconds=UNLIMITED, max_frames=10, seed=seed)


def test_planar_energies_are_those_at_z_zero():
    system = with_settings("dw4", equilibration_frames=1)
    _, engine, starts, _ = plan_and_engine(system)
    chunk = engine.run_chunk(engine.start(starts), max_frames=3, should_stop=lambda n: False)
    assert chunk.frames.shape[2:] == (4, 2)
    x = chunk.frames[-1, 0].astype(float)
    i, j = np.triu_indices(4, k=1)
    d = np.linalg.norm(x[i] - x[j], axis=1) - 4.0
    expected = np.sum(0.9 * d**4 - 4.0 * d**2) * kt_in_kj_mol(system.temperature)
    assert chunk.energies[-1, 0] == pytest.approx(expected, rel=1e-5)


def start_run(directory: Path, max_frames: int) -> subprocess.Popen[str]:
    code = (
        "import dataclasses, sys; from pathlib import Path\n"
        "from openmm_eqflow.runs.reference import calibration\n"
        "from openmm_eqflow.targets.library import load_system\n"
        "from openmm_eqflow.runs.reference.data import run_reference\n"
        "calibration._CHUNK_SECONDS = 0.5\n"
        "system = dataclasses.replace(load_system('harmonic'), settings={'reference': "
        "dict(max_temperature_ratio=2.0, steps_per_swap=1000)})\n"
        f"run_reference(system, Path(sys.argv[1]), seconds=1e6, max_frames={max_frames}, seed=5)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=hear_interrupts,
    )


def wait_for_chunks(directory: Path, n: int) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        if all(len(chunk_paths(directory / "reference", w)) >= n for w in (0, 1)):
            return
        time.sleep(0.01)
    raise AssertionError("no chunk appeared within a minute")


def children_of(directory: Path) -> list[int]:
    """Worker processes of this directory, whoever their parent is now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "tempering_worker" in command and str(directory) in command:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_keeps_its_chunks_leaves_no_orphan_and_goes_on(tmp_path, signal_number):
    process = start_run(tmp_path, 10**7)
    wait_for_chunks(tmp_path, 1)
    os.kill(process.pid, signal_number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    if signal_number == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert not children_of(tmp_path)
    deadline = time.monotonic() + 20.0
    while children_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children_of(tmp_path)
    folder = tmp_path / "reference"
    finished = [read_chunk(chunk_paths(folder, w)[0]).frames for w in (0, 1)]
    # A half-written file of the killed process must be ignored.
    (folder / "walker-0" / ".chunk-00009.1.tmp.npz").write_bytes(b"half")
    before = load_reference(tmp_path)
    system = with_settings("harmonic", max_temperature_ratio=2.0, steps_per_swap=1000)
    after = run_reference(
        system, tmp_path, seconds=UNLIMITED, max_frames=before.n_frames + 200, seed=5
    )
    assert after.n_frames >= before.n_frames + 200
    for walker in (0, 1):
        new = after.positions[after.walker == walker]
        np.testing.assert_array_equal(new[: len(finished[walker])], finished[walker][:, 0])
        kept = before.positions[before.walker == walker]
        np.testing.assert_array_equal(new[: len(kept)], kept)


def test_damaged_chunk_is_named(tmp_path):
    system = with_settings("harmonic", equilibration_frames=1)
    plan, engine, starts, _ = plan_and_engine(system, n_walkers=1)
    chunk = engine.run_chunk(engine.start(starts), max_frames=2, should_stop=lambda n: False)
    folder = tmp_path / "reference"
    write_chunk(folder, 0, chunk)
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    assert SamplingPlan.read(folder / "plan.json") == plan
    assert load_reference(tmp_path).n_frames == 2
    (path,) = chunk_paths(folder, 0)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="chunk-00000"):
        load_reference(tmp_path)
    with pytest.raises(CheckpointError, match="no reference data"):
        load_reference(tmp_path / "nowhere")


def test_walker_error_reaches_the_parent_in_one_line(tmp_path):
    system = with_settings("harmonic", equilibration_frames=1)
    run_reference(system, tmp_path, seconds=UNLIMITED, max_frames=4)
    path = tmp_path / "reference" / "plan.json"
    path.write_text(path.read_text().replace('"Reference"', '"Abacus"'))
    with pytest.raises(EnergyError, match=r"walker \d.*Abacus") as info:
        run_reference(system, tmp_path, seconds=UNLIMITED, max_frames=8)
    assert "\n" not in str(info.value)


def test_unstable_dynamics_say_what_to_change():
    system = with_settings("toluene", timestep_fs=20.0, max_temperature_ratio=1.0)
    _, engine, starts, _ = plan_and_engine(system)
    with pytest.raises(EnergyError, match="timestep_fs"):
        engine.start(starts)


def test_walker_stops_when_asked_and_counts_time(tmp_path):
    system = with_settings("harmonic", equilibration_frames=1)
    run_reference(system, tmp_path, seconds=0.01)
    data = load_reference(tmp_path)
    assert data.n_frames == 40
    assert data.wall_seconds > 0.01
    stop = threading.Event()
    stop.set()
    state = run_walker(tmp_path / "reference", 0, seconds=UNLIMITED, max_frames=10**6, stop=stop)
    assert state.n_frames == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_temprature_ratio": 2.0}, "unknown key"),
        ({"steps_per_swap": 0}, "positive number"),
        ({"friction_per_ps": True}, "positive number"),
        ({"max_temperature_ratio": 0.5}, "at least 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ReferenceSettings.from_mapping(options, Path("mine/system.yaml"))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="seconds"):
        run_reference(load_system("harmonic"), tmp_path, seconds=0.0)
    with pytest.raises(ValueError, match="n_walkers"):
        run_reference(load_system("harmonic"), tmp_path, seconds=1.0, max_frames=1)


def acetylene(torsion):
    """H-C-C-H in line, harmonic but for a torsion, which there has no direction."""
    topology, system, positions = chain_molecule(4)
    system.getForce(2).setTorsionParameters(0, 0, 1, 2, 3, 3, 0.0, torsion)
    return dataclasses.replace(
        load_system("toluene"),
        name="acetylene",
        system=system,
        topology=topology,
        positions=positions,
        settings={"reference": {"max_temperature_ratio": 1.0}},
    )


def mean_energy(molecule, tmp_path):
    """Mean of u over frames, its error, and the largest."""
    data = run_reference(molecule, tmp_path, seconds=30.0, max_frames=8000, seed=4)
    chains = np.stack([data.reduced_energies[data.walker == w][:3500] for w in (0, 1)])
    return mean_with_error(chains), data


@pytest.mark.statistical
def test_atoms_in_line_are_sampled_with_the_right_energy(tmp_path, caplog, monkeypatch):
    """Three stretches of 1/2 kT, two bends of 1 kT each, and the torsion's own energy."""
    torsion = 3.0
    molecule = acetylene(torsion)
    k = torsion / kt_in_kj_mol(molecule.temperature)
    # Of exp(-k cos): the torsion is favoured where its energy is low.
    exact = 1.5 + 2.0 + k * (1.0 - i1(k) / i0(k))
    mean, data = mean_energy(molecule, tmp_path / "aside")
    assert "the torsions 1-2-3-4 turn about atoms in line" in caplog.text
    plan = SamplingPlan.read(tmp_path / "aside" / "reference" / "plan.json")
    assert 0.5 < plan.timestep_fs < 5.0
    assert mean.error < 0.1
    assert abs(mean.value - exact) < 5 * mean.error + 0.03  # cubic terms of the bends
    assert data.reduced_energies.max() < 30.0
    # Power: dynamics that no energy of the torsion accepts find all its angles alike.
    assert abs(mean.value - 3.5 - k) > 5 * mean.error + 0.03
    # Power control: with the torsion in the dynamics its force heats the molecule.
    name = "openmm_eqflow.runs.reference.calibration.set_aside_singular_torsions"
    monkeypatch.setattr(name, lambda *_: [])
    hot, _ = mean_energy(molecule, tmp_path / "full")
    assert hot.value > exact + 1.0


def test_a_torsion_without_force_constant_is_no_reason_to_warn(caplog):
    plan_and_engine(acetylene(0.0))
    assert "in line" not in caplog.text


def test_the_platform_of_the_dynamics_follows_from_a_rule(monkeypatch):
    """Not from who was quicker: one seed means the same walk on a busy machine."""
    rates = {"CPU": 1e9, "Reference": 1.0}

    def rate(context):
        return rates[context.getPlatform().getName()]

    monkeypatch.setattr(calibration, "_steps_per_second", rate)
    assert plan_and_engine(acetylene(0.0))[0].platform == "Reference"


def test_a_time_step_in_which_nothing_moves_is_refused():
    molecule = acetylene(0.0)
    molecule.system.getForce(0).setBondParameters(1, 1, 2, 0.12, 3e10)
    with pytest.raises(EnergyError, match=r"asks for a time step of .* wrong force"):
        plan_and_engine(molecule)
