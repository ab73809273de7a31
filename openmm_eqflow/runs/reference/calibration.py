r"""The plan of a reference run: time step, platform and temperature ladder, by measurement.

A temperature ladder with equal exchange rates, from energy means and spreads.

For two temperatures with normal, independent energies the exchange exponent
:math:`y = (\beta_a - \beta_b)(U_a - U_b)` is normal with mean m and variance v, and

.. math:: E[\min(1, e^y)] = \Phi(m/\sqrt v) + e^{m + v/2}\, \Phi(-(v + m)/\sqrt v).

(Kofke 2002, J. Chem. Phys. 117, 6911, discusses the same average for parallel tempering.)

How reference data are sampled: masses, time step, platform and temperature ladder.

The configurational Boltzmann density does not depend on the masses, so they are chosen for speed
(with constrained bonds it does: then they are the System's own).
Hydrogens get 6 u: with the heavy atoms unchanged the fastest vibration is then a carbonyl stretch,
at half the frequency of a real N-H bond.

The time step is a constant over omega_max, the largest eigenfrequency of the mass-weighted Hessian
over a few configurations. LangevinMiddle samples a harmonic mode exactly at any stable step (below
2 / omega; Zhang et al. 2019, J. Phys. Chem. A 123, 6056), so only anharmonicity is left as an
error. 1 fs with real hydrogens is 0.62 / omega. Alanine dipeptide, OBC, 300 K, 5 ns each, mean
reduced energies with one standard error:

========== ======= ======= ========= ========= ==========
hydrogen u step fs omega*t bonds     angles    total
========== ======= ======= ========= ========= ==========
real       1       0.62    11.68(5)  14.85(5)  -23.81(8)
6          2       0.66    11.58(5)  14.89(5)  -23.86(8)
6          3       1.00    11.65(5)  14.90(6)  -23.85(9)
12         3       0.97    11.61(5)  14.85(6)  -23.85(9)
12         4       1.30    11.65(5)  14.85(6)  -23.79(9)
========== ======= ======= ========= ========= ==========

0.9 is used for molecules (2.7 fs here) and 0.66 where repulsive walls set the frequency.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit
from scipy.linalg import null_space
from scipy.special import log_ndtr, ndtr

from openmm_eqflow.analysis.observables import Torsion
from openmm_eqflow.errors import EnergyError
from openmm_eqflow.runs.reference.plan import (
    ReferenceSettings,
    SamplingPlan,
    atoms_in_line,
    make_context,
    sampling_system,
    set_aside_singular_torsions,
)
from openmm_eqflow.targets.constraints import constraint_lengths
from openmm_eqflow.targets.energies.implicit_solvent import with_compiled_solvent
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.units import (
    energy_in_kj_mol,
    kelvin,
    kt_in_kj_mol,
    masses_in_dalton,
    positions_in_nm,
    temperature_quantity,
)

__all__ = [
    "choose_ladder",
    "exchange_rate",
    "make_plan",
]

FloatArray = NDArray[np.float64]
logger = logging.getLogger(__name__)


def exchange_rate(
    beta: tuple[float, float], mean: tuple[float, float], spread: tuple[float, float]
) -> float:
    """Mean acceptance of an exchange between two states with normal energies.

    Parameters
    ----------
    beta, mean, spread
        Inverse temperature (mol/kJ), mean and standard deviation of the energy (kJ/mol) of both.
    """
    difference = beta[0] - beta[1]
    m = difference * (mean[0] - mean[1])
    v = difference**2 * (spread[0] ** 2 + spread[1] ** 2)
    if v == 0.0:
        return float(min(1.0, np.exp(m)))
    root = np.sqrt(v)
    # The second term in logarithms: exp overflows where the normal tail underflows.
    return float(ndtr(m / root) + np.exp(m + 0.5 * v + log_ndtr(-(v + m) / root)))


def choose_ladder(
    grid: FloatArray,
    means: FloatArray,
    spreads: FloatArray,
    *,
    swap_rate: float,
    max_temperatures: int,
) -> tuple[tuple[float, ...], float]:
    """Shortest ladder from ``grid[0]`` to ``grid[-1]`` whose exchange rate reaches ``swap_rate``.

    Parameters
    ----------
    grid, means, spreads
        Ascending temperatures (K) with mean and standard deviation of the energy (kJ/mol);
        interpolated linearly in between.
    swap_rate
        Least acceptance between neighbours.
    max_temperatures
        At most so many; the hottest temperature is lowered if they do not suffice.

    Returns
    -------
    temperatures, rate
        Ascending, all neighbours with the same predicted acceptance.
    """

    def rate(a: float, b: float) -> float:
        mean = np.interp([a, b], grid, means)
        spread = np.interp([a, b], grid, spreads)
        beta = [1.0 / kt_in_kj_mol(temperature_quantity(t)) for t in (a, b)]
        return exchange_rate(
            (beta[0], beta[1]),
            (float(mean[0]), float(mean[1])),
            (float(spread[0]), float(spread[1])),
        )

    def next_temperature(a: float, wanted: float) -> float:
        """Hottest b on the grid that still exchanges with a at the wanted rate."""
        low, high = a, float(grid[-1])
        if rate(a, high) >= wanted:
            return high
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if rate(a, middle) >= wanted else (low, middle)
        return low

    def climb(n: int, wanted: float) -> list[float]:
        ladder = [float(grid[0])]
        while len(ladder) < n:
            ladder.append(next_temperature(ladder[-1], wanted))
        return ladder

    n = 2
    while n < max_temperatures and climb(n, swap_rate)[-1] < grid[-1]:
        n += 1
    if climb(n, swap_rate)[-1] < grid[-1]:
        return tuple(climb(n, swap_rate)), swap_rate
    low, high = swap_rate, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if climb(n, middle)[-1] >= grid[-1] else (low, middle)
    return tuple(climb(n, low)), low
_HYDROGEN_MASS = 6.0
_STEP_TIMES_FREQUENCY = {"molecule": 0.9, "cluster": 0.66, "harmonic": 0.66}
_BESIDE = 1e-3  # nm
_LEAST_STEP = 0.02  # fs; that of H2 is 0.9
_CALIBRATION_TEMPERATURES = 5
_CALIBRATION_SAMPLES = 200
# Slow potentials get fewer samples rather than a long wait before the first frame.
_CALIBRATION_SECONDS = 2.0
# Below this size a GPU step is all launch latency, and the CPU platform hands every step to a
# second thread: Reference is as fast with walkers on all cores, and repeats a run bit by bit.
_GPU_PARTICLES = 100
_CHUNK_SECONDS = 6.0
_TURNS = 3


def make_plan(
    system: MolecularSystem,
    settings: ReferenceSettings,
    *,
    system_hash: str,
    torsions: tuple[Torsion, ...],
    seed: int,
    n_walkers: int,
) -> tuple[SamplingPlan, openmm.System, FloatArray]:
    """Choose masses, time step and ladder by short runs (a few seconds), the platform by rule.

    Returns
    -------
    plan, sampling System, starting positions ``(n_temperatures, n_particles, 3)`` in nm
    """
    started = time.monotonic()
    target = kelvin(system.temperature)
    hottest = target * settings.max_temperature_ratio
    masses = masses_in_dalton(system.system)
    if not system.system.getNumConstraints():  # with constraints masses enter the density
        for index, atom in enumerate(system.topology.atoms()):
            if atom.element is not None and atom.element.atomic_number == 1:
                masses[index] = _HYDROGEN_MASS
    start = positions_in_nm(system.positions)
    copy = sampling_system(system.system, masses)
    if aside := set_aside_singular_torsions(copy, start):
        logger.warning(
            "the torsions %s turn about atoms in line, where their force has no bound: the "
            "dynamics of the reference leaves them out, energies and weights have them",
            ", ".join(aside),
        )
    copy = with_compiled_solvent(copy, start)
    x = _minimise(copy, start)
    if atoms_in_line(system.topology, x):
        # A singular point of angles and torsions, where the differences of forces that give the
        # time step mean nothing, and initial velocities feel what is left of them: start beside.
        x = x + np.random.default_rng(0).normal(scale=_BESIDE, size=x.shape)
    timestep = settings.timestep_fs or (
        _STEP_TIMES_FREQUENCY[system.kind] * _frequency_period(copy, x, masses, hottest)
    )
    if system.kind == "molecule" and timestep < _LEAST_STEP and settings.timestep_fs is None:
        raise EnergyError(
            f"the fastest vibration of {system.name} asks for a time step of {timestep:.1e} fs, "
            "in which nothing would move: look for a wrong force constant, or set reference: "
            "timestep_fs in the settings of system.yaml"
        )
    platform, rate = _first_platform(copy, x, target, timestep)
    temperatures, starts, swap_rate = _calibrate(
        copy, x, platform, timestep, settings, target, hottest
    )
    steps_per_frame = settings.steps_per_swap * settings.swaps_per_frame * len(temperatures)
    plan = SamplingPlan(
        system_hash=system_hash,
        n_dims=system.n_dims,
        temperatures=temperatures,
        masses=tuple(float(mass) for mass in masses),
        timestep_fs=timestep,
        friction_per_ps=settings.friction_per_ps,
        platform=platform,
        steps_per_swap=settings.steps_per_swap,
        swaps_per_frame=settings.swaps_per_frame,
        equilibration_frames=settings.equilibration_frames,
        frames_per_chunk=int(np.clip(_CHUNK_SECONDS * rate / steps_per_frame, 1, 5000)),
        seed=seed,
        n_walkers=n_walkers,
        torsions=torsions,
        expected_swap_rate=swap_rate,
        steps_per_second=rate,
        setup_seconds=time.monotonic() - started,
    )
    return plan, copy, starts


def _minimise(system: openmm.System, x: FloatArray) -> FloatArray:
    context = make_context(
        system, "Reference", temperature=1.0, timestep_fs=1.0, friction_per_ps=1.0
    )
    context.setPositions(x)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 1000)
    state = context.getState(positions=True, energy=True)
    energy = energy_in_kj_mol(state.getPotentialEnergy())
    if not np.isfinite(energy):
        raise EnergyError(
            f"the starting structure has energy {energy} kJ/mol even after minimisation; "
            "check for overlapping atoms in the coordinates file"
        )
    minimum = positions_in_nm(state.getPositions(asNumpy=True))
    result: FloatArray = minimum - minimum.mean(axis=0)
    return result


def _largest_frequency(context: openmm.Context, x: FloatArray, masses: FloatArray) -> float:
    """Square root of the largest eigenvalue of the mass-weighted Hessian, rad/ps."""
    step = 1e-5

    def forces(shifted: FloatArray) -> FloatArray:
        context.setPositions(shifted)
        groups = context.getIntegrator().getIntegrationForceGroups()
        raw = context.getState(forces=True, groups=groups).getForces(asNumpy=True)
        value: FloatArray = raw.value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        return value.ravel()

    rows = []
    for index in range(x.size):
        shift = np.zeros(x.shape)
        shift.flat[index] = step
        rows.append((forces(x - shift) - forces(x + shift)) / (2.0 * step))
    hessian: FloatArray = np.array(rows)
    weights = 1.0 / np.sqrt(np.repeat(masses, 3))
    hessian = 0.5 * (hessian + hessian.T) * weights[:, None] * weights[None, :]
    pairs = list(constraint_lengths(context.getSystem()))
    if pairs:  # motions that keep the constraints
        along = np.zeros((len(pairs), *x.shape))
        for k, (a, b) in enumerate(pairs):
            along[k, a] = (x[a] - x[b]) / np.linalg.norm(x[a] - x[b])
            along[k, b] = -along[k, a]
        basis = null_space(along.reshape(len(pairs), -1) * weights)
        hessian = basis.T @ hessian @ basis
    return float(np.sqrt(max(np.linalg.eigvalsh(hessian)[-1], 0.0)))


def _frequency_period(
    system: openmm.System, x: FloatArray, masses: FloatArray, hottest: float
) -> float:
    """1 / omega_max in fs, over the minimum and a few hot configurations."""
    context = make_context(
        system, "Reference", temperature=hottest, timestep_fs=1.0, friction_per_ps=1.0
    )
    largest = _largest_frequency(context, x, masses)
    # Repulsive walls are steeper where hot particles collide than at the minimum: look there too,
    # with a step that is safe at twice the minimum's frequency.
    context.getIntegrator().setStepSize(0.3 / largest * unit.picosecond)
    context.setPositions(x)
    context.setVelocitiesToTemperature(hottest * unit.kelvin, 1)
    for _ in range(4):
        context.getIntegrator().step(400)
        hot = positions_in_nm(context.getState(positions=True).getPositions(asNumpy=True))
        largest = max(largest, _largest_frequency(context, hot, masses))
        context.setPositions(hot)
    return 1e3 / largest


def _first_platform(
    system: openmm.System, x: FloatArray, temperature: float, timestep: float
) -> tuple[str, float]:
    """Name of the first platform that runs the System, and its steps per second.

    A rule, not a race: one seed means the same dynamics however busy the machine is.
    """
    small = system.getNumParticles() < _GPU_PARTICLES
    for name in ("Reference", "CPU") if small else ("CUDA", "HIP", "CPU", "Reference"):
        try:
            context = make_context(
                system, name, temperature=temperature, timestep_fs=timestep, friction_per_ps=1.0
            )
            context.setPositions(x)
            context.getIntegrator().step(20)
            context.getState(energy=True)
        except openmm.OpenMMException:
            # Not installed here, or installed where no device is.
            continue
        return name, max(_steps_per_second(context) for _ in range(_TURNS))
    raise EnergyError(
        "no OpenMM platform could run this System: see python -m openmm.testInstallation"
    )


def _steps_per_second(context: openmm.Context) -> float:
    """Rate of dynamics with an energy now and then, over a twentieth of a second."""
    started = time.perf_counter()
    n_steps = 0
    while (spent := time.perf_counter() - started) < 0.05:
        context.getIntegrator().step(20)
        context.getState(energy=True)
        n_steps += 20
    return n_steps / spent


def _calibrate(
    system: openmm.System,
    x: FloatArray,
    platform: str,
    timestep: float,
    settings: ReferenceSettings,
    target: float,
    hottest: float,
) -> tuple[tuple[float, ...], FloatArray, float]:
    r"""Mean and spread of the energy along temperature, and the ladder that follows from them.

    The raw moments of such short runs are too noisy to place temperatures by, so they are smoothed
    by what classical thermodynamics says of them: a quadratic mean, and a spread proportional to T
    (:math:`\mathrm{var}\,U = R T^2 C` with a constant heat capacity C).
    """
    grid = np.geomspace(target, hottest, _CALIBRATION_TEMPERATURES)
    if hottest == target:
        grid = grid[:1]
    means, spreads, finals = [], [], []
    for temperature in grid:
        context = make_context(
            system,
            platform,
            temperature=float(temperature),
            timestep_fs=timestep,
            friction_per_ps=settings.friction_per_ps,
        )
        context.setPositions(x)
        context.setVelocitiesToTemperature(float(temperature) * unit.kelvin, 1)
        context.getIntegrator().step(2500)
        samples: list[float] = []
        started = time.monotonic()
        while len(grid) > 1 and len(samples) < _CALIBRATION_SAMPLES:
            context.getIntegrator().step(100)
            state = context.getState(energy=True)
            samples.append(energy_in_kj_mol(state.getPotentialEnergy()))
            if len(samples) >= 30 and time.monotonic() - started > _CALIBRATION_SECONDS:
                break
        if samples:
            means.append(float(np.mean(samples)))
            spreads.append(float(np.std(samples)))
        x = positions_in_nm(context.getState(positions=True).getPositions(asNumpy=True))
        x = x - x.mean(axis=0)
        finals.append(x)
    if len(grid) == 1:
        return (target,), np.array(finals), 1.0
    relative_spread = float(np.sqrt(np.mean(np.square(np.array(spreads) / grid))))
    temperatures, rate = choose_ladder(
        grid,
        np.asarray(np.polyval(np.polyfit(grid, means, 2), grid), dtype=np.float64),
        relative_spread * grid,
        swap_rate=settings.swap_rate,
        max_temperatures=int(settings.max_temperatures),
    )
    nearest = [int(np.argmin(np.abs(grid - temperature))) for temperature in temperatures]
    return temperatures, np.array([finals[index] for index in nearest]), rate
