r"""Parallel tempering of one ladder, and the chunk files it leaves.

Chunk files of reference data: what a walker has finished, and how to go on from there.

A walker's folder holds ``chunk-00000.npz``, ``chunk-00001.npz``, ... Each is renamed into place
when complete and ends with the exact state (float64 positions and velocities, ladder positions),
so a walker killed at any moment loses at most the chunk it was in.

Parallel tempering of one ladder: the loop of one reference walker.

Between exchanges every replica runs LangevinMiddle dynamics at its own temperature; neighbours
a, b exchange temperatures with probability :math:`\min(1, e^{(\beta_a-\beta_b)(U_a-U_b)})` and
their velocities are scaled by :math:`\sqrt{T'/T}` (Sugita, Okamoto 1999, Chem. Phys. Lett. 314,
141).

``openmm.app.ReplicaExchangeSampler`` is not used here for three reasons: it moves positions and
velocities of every replica through one Context as Python lists each iteration, which at 125 steps
an iteration costs as much as the dynamics of a small molecule; it draws exchanges from the global
``random`` module, so a resumed run cannot be reproduced; and its reporter stores no state from
which an interrupted run goes on. Here each replica keeps its own Context and only temperatures
move.
``replica_exchange.py`` adapts flow moves to that sampler for users who run it themselves.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_eqflow.errors import CheckpointError, EnergyError
from openmm_eqflow.files import write_npz
from openmm_eqflow.runs.reference.plan import ASIDE, SamplingPlan, make_context
from openmm_eqflow.units import (
    energy_in_kj_mol,
    kt_in_kj_mol,
    masses_in_dalton,
    temperature_quantity,
)

__all__ = [
    "Chunk",
    "TemperingWalker",
    "WalkerState",
    "chunk_paths",
    "last_state",
    "read_chunk",
    "walker_directory",
    "write_chunk",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WalkerState:
    """State of a walker between two chunks; R replicas on a ladder of R temperatures.

    Attributes
    ----------
    positions, velocities
        ``(R, n_particles, 3)`` in nm and nm/ps.
    order
        ``order[r]``: which temperature replica r is at.
    next_chunk, n_frames, wall_seconds
        Progress, over all attempts.
    """

    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]
    order: NDArray[np.int64]
    next_chunk: int
    n_frames: int
    wall_seconds: float


@dataclass(frozen=True, eq=False)
class Chunk:
    """Frames of all temperatures, stored centred.

    Attributes
    ----------
    frames
        ``(n_frames, R, n_particles, n_dims)`` float32 nm.
    energies
        ``(n_frames, R)`` kJ/mol.
    replica
        ``(n_frames, R)``: which replica was at each temperature.
    attempts, accepted
        ``(R - 1,)`` exchange counts of neighbouring temperatures.
    """

    frames: NDArray[np.float32]
    energies: NDArray[np.float64]
    replica: NDArray[np.int64]
    attempts: NDArray[np.int64]
    accepted: NDArray[np.int64]
    state: WalkerState


def walker_directory(directory: Path, walker: int) -> Path:
    """Folder of one walker."""
    return directory / f"walker-{walker}"


def chunk_paths(directory: Path, walker: int) -> list[Path]:
    """Finished chunks in order; stops at the first gap, so later files cannot be misread."""
    folder = walker_directory(directory, walker)
    paths: list[Path] = []
    while (path := folder / f"chunk-{len(paths):05d}.npz").is_file():
        paths.append(path)
    return paths


def write_chunk(directory: Path, walker: int, chunk: Chunk) -> None:
    """Write a finished chunk atomically; ``chunk.state`` is the state after it."""
    state = chunk.state
    path = walker_directory(directory, walker) / f"chunk-{state.next_chunk - 1:05d}.npz"
    write_npz(
        path,
        {
            "frames": chunk.frames,
            "energies": chunk.energies,
            "replica": chunk.replica,
            "attempts": chunk.attempts,
            "accepted": chunk.accepted,
            "positions": state.positions,
            "velocities": state.velocities,
            "order": state.order,
            "progress": np.array([state.next_chunk, state.n_frames, state.wall_seconds]),
        },
    )


def _load(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    try:
        # Opened here: numpy leaves the file open when it is not a whole archive.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys}
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is truncated or altered ({error}); delete it to continue from the one before"
        ) from error


def _state(path: Path) -> WalkerState:
    content = _load(path, ("positions", "velocities", "order", "progress"))
    progress = content["progress"]
    return WalkerState(
        positions=content["positions"],
        velocities=content["velocities"],
        order=content["order"],
        next_chunk=int(progress[0]),
        n_frames=int(progress[1]),
        wall_seconds=float(progress[2]),
    )


def read_chunk(path: Path) -> Chunk:
    """Read one chunk; a damaged file is a ``CheckpointError`` naming it."""
    content = _load(path, ("frames", "energies", "replica", "attempts", "accepted"))
    return Chunk(state=_state(path), **content)


def last_state(directory: Path, walker: int) -> WalkerState | None:
    """State after the last finished chunk, or None before the first."""
    paths = chunk_paths(directory, walker)
    if not paths:
        return None
    # A chunk that was rewritten shorter than its successor expects cannot happen: chunks are only
    # ever appended, so the position in the list is the number.
    return replace(_state(paths[-1]), next_chunk=len(paths))



class TemperingWalker:
    """One ladder of replicas in one process.

    Random numbers restart at every chunk from (seed, walker, chunk), so a walker that was killed
    and resumed produces bit for bit the frames of one that was not (on the Reference platform).

    Parameters
    ----------
    plan, system
        From :func:`~openmm_eqflow.runs.reference.calibration.make_plan`; sampling masses.
    walker
        Index of this walker: selects its random numbers.
    """

    def __init__(self, plan: SamplingPlan, system: openmm.System, walker: int) -> None:
        self.plan = plan
        self.walker = walker
        # A Context does not keep its System alive, and needs it to be initialised again.
        self._system = system
        self._temperatures = np.array(plan.temperatures)
        self._beta = np.array(
            [1.0 / kt_in_kj_mol(temperature_quantity(t)) for t in plan.temperatures]
        )
        self._contexts = [self._context(system, t) for t in plan.temperatures]
        self._masses = masses_in_dalton(system)[:, None]
        self._aside = any(force.getForceGroup() == ASIDE for force in system.getForces())
        self._order = np.arange(len(plan.temperatures))
        self._parity = 0
        self._rng = np.random.default_rng()
        # A planar model has energy in z that the flow never sees: stored energies are at z = 0.
        self._flat = self._context(system, plan.temperatures[0]) if plan.n_dims == 2 else None

    def _context(self, system: openmm.System, temperature: float) -> openmm.Context:
        return make_context(
            system,
            self.plan.platform,
            temperature=temperature,
            timestep_fs=self.plan.timestep_fs,
            friction_per_ps=self.plan.friction_per_ps,
        )

    def start(self, positions: FloatArray) -> WalkerState:
        """Equilibrate: a hot stretch to part the walkers, then tempering that is thrown away.

        Parameters
        ----------
        positions
            ``(R, n_particles, 3)`` nm, one per temperature, shared by all walkers.
        """
        n_replicas = len(self._contexts)
        state = WalkerState(
            positions=positions,
            velocities=np.zeros_like(positions),
            order=np.full(n_replicas, n_replicas - 1),
            next_chunk=0,
            n_frames=0,
            wall_seconds=0.0,
        )
        # The equilibration's random numbers must differ from those of chunk 0.
        self._restore(state, stream=1)
        for index, context in enumerate(self._contexts):
            context.setVelocitiesToTemperature(
                self._temperatures[-1] * unit.kelvin, int(self._rng.integers(1, 2**31 - 1))
            )
            context.getIntegrator().step(2500)
            self._set_temperature(index, n_replicas - 1, index)
            self._order[index] = index
        for _ in range(self.plan.equilibration_frames * self.plan.swaps_per_frame):
            self._advance(np.zeros((2, max(n_replicas - 1, 0)), dtype=np.int64))
        return self._capture(state, n_frames=0, wall_seconds=0.0, next_chunk=0)

    def run_chunk(
        self,
        state: WalkerState,
        *,
        max_frames: int,
        should_stop: Callable[[int], bool],
    ) -> Chunk:
        """Produce the next chunk.

        Parameters
        ----------
        max_frames
            At most so many frames, and never more than the plan's chunk length.
        should_stop
            Called after each frame with the number of frames in this chunk; True ends it early.

        The chunk holds at least one frame.
        """
        started = time.monotonic()
        self._restore(state, stream=0)
        n_frames = min(max_frames, self.plan.frames_per_chunk)
        n_replicas, n_particles = state.positions.shape[:2]
        shape = (n_frames, n_replicas)
        frames = np.empty((*shape, n_particles, self.plan.n_dims), dtype=np.float32)
        energies = np.empty(shape)
        replica = np.empty(shape, dtype=np.int64)
        counts = np.zeros((2, n_replicas - 1), dtype=np.int64)
        done = 0
        while done < n_frames:
            for _ in range(self.plan.swaps_per_frame):
                self._advance(counts)
            self._store(frames[done], energies[done], replica[done])
            done += 1
            if should_stop(done):
                break
        after = self._capture(
            state,
            n_frames=state.n_frames + done,
            wall_seconds=state.wall_seconds + time.monotonic() - started,
            next_chunk=state.next_chunk + 1,
        )
        return Chunk(
            frames=frames[:done],
            energies=energies[:done],
            replica=replica[:done],
            attempts=counts[0],
            accepted=counts[1],
            state=after,
        )

    def _restore(self, state: WalkerState, *, stream: int) -> None:
        """Put every Context exactly where ``state`` says, with reproducible random numbers."""
        sequence = np.random.SeedSequence([self.plan.seed, self.walker, state.next_chunk, stream])
        seeds = sequence.generate_state(len(self._contexts) + 1) & 0x7FFFFFFF
        self._rng = np.random.default_rng(sequence.spawn(1)[0])
        self._parity = 0
        self._order = state.order.copy()
        for index, context in enumerate(self._contexts):
            integrator = context.getIntegrator()
            integrator.setRandomNumberSeed(int(seeds[index]) or 1)
            integrator.setTemperature(self._temperatures[self._order[index]] * unit.kelvin)
            # A new seed takes effect only when the Context is initialised again.
            context.reinitialize()
            context.setPositions(state.positions[index])
            context.setVelocities(state.velocities[index])

    def _capture(
        self, before: WalkerState, *, n_frames: int, wall_seconds: float, next_chunk: int
    ) -> WalkerState:
        positions = np.empty_like(before.positions)
        velocities = np.empty_like(before.velocities)
        for index, context in enumerate(self._contexts):
            state = context.getState(positions=True, velocities=True)
            x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            # Free diffusion would eat the precision of single-precision platforms.
            positions[index] = x - x.mean(axis=0)
            velocities[index] = state.getVelocities(asNumpy=True).value_in_unit(
                unit.nanometer / unit.picosecond
            )
        return WalkerState(
            positions, velocities, self._order.copy(), next_chunk, n_frames, wall_seconds
        )

    def _set_temperature(self, index: int, old: int, new: int) -> None:
        """Rescale the velocities of the time of the positions; the Context's are half a step late.

        Those are correlated with the positions: rescaled by themselves they leave each temperature
        too cold or too hot by some percent of a stiff mode's energy.
        """
        context = self._contexts[index]
        context.getIntegrator().setTemperature(self._temperatures[new] * unit.kelvin)
        v, kick = self._velocities(context)
        scale = float(np.sqrt(self._temperatures[new] / self._temperatures[old]))
        self._set_velocities(context, scale * (v + kick) - kick)

    def _velocities(self, context: openmm.Context) -> tuple[FloatArray, FloatArray]:
        """Velocities half a step late, and what half a step's forces would add to them."""
        groups = context.getIntegrator().getIntegrationForceGroups()
        state = context.getState(velocities=True, forces=True, groups=groups)
        v = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
        force = state.getForces(asNumpy=True).value_in_unit(
            unit.kilojoule_per_mole / unit.nanometer
        )
        return v, 0.5e-3 * self.plan.timestep_fs * force / self._masses

    @staticmethod
    def _set_velocities(context: openmm.Context, v: FloatArray) -> None:
        context.setVelocities(v)
        if context.getSystem().getNumConstraints():
            context.applyVelocityConstraints(1e-7)

    def _energies(self) -> FloatArray:
        values = np.array(
            [
                energy_in_kj_mol(context.getState(energy=True).getPotentialEnergy())
                for context in self._contexts
            ]
        )
        if not np.isfinite(values).all():
            raise EnergyError(
                f"dynamics became unstable (energy {values[~np.isfinite(values)][0]} kJ/mol) at a "
                f"time step of {self.plan.timestep_fs:.3g} fs; set settings: reference: "
                "timestep_fs: to a smaller value in system.yaml and start in a new folder"
            )
        return values

    def _advance(self, counts: NDArray[np.int64]) -> None:
        """Dynamics up to the next exchange, then exchange attempts of alternating pairs."""
        for index, context in enumerate(self._contexts):
            if self._aside:
                self._step_and_accept(context, float(self._beta[self._order[index]]))
            else:
                context.getIntegrator().step(self.plan.steps_per_swap)
        energies = self._energies()
        replica_at = np.argsort(self._order)
        for low in range(self._parity, len(self._contexts) - 1, 2):
            a, b = replica_at[low], replica_at[low + 1]
            exponent = (self._beta[low] - self._beta[low + 1]) * (energies[a] - energies[b])
            counts[0, low] += 1
            if np.log(self._rng.random()) < exponent:
                counts[1, low] += 1
                self._order[a], self._order[b] = low + 1, low
                self._set_temperature(int(a), low, low + 1)
                self._set_temperature(int(b), low + 1, low)
        self._parity = 1 - self._parity

    def _step_and_accept(self, context: openmm.Context, beta: float) -> None:
        """Dynamics without the terms set aside, accepted by these; else back, and reversed."""
        before = context.getState(positions=True)
        v, kick = self._velocities(context)
        energy = self._energy_aside(context)
        context.getIntegrator().step(self.plan.steps_per_swap)
        if np.log(self._rng.random()) < beta * (energy - self._energy_aside(context)):
            return
        context.setPositions(before.getPositions())
        self._set_velocities(context, -v - 2.0 * kick)

    @staticmethod
    def _energy_aside(context: openmm.Context) -> float:
        state = context.getState(energy=True, groups={ASIDE})
        return energy_in_kj_mol(state.getPotentialEnergy())

    def _store(
        self, frames: NDArray[np.float32], energies: FloatArray, replica: NDArray[np.int64]
    ) -> None:
        """Write one frame of every temperature into the given rows."""
        for index, (context, place) in enumerate(zip(self._contexts, self._order, strict=True)):
            state = context.getState(positions=True, energy=True)
            x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            # Centred in float64 before rounding: float32 is good to 3e-8 nm near the origin.
            x = x - x.mean(axis=0)
            energy = state.getPotentialEnergy()
            if self._flat is not None:
                x[:, 2] = 0.0
                self._flat.setPositions(x)
                energy = self._flat.getState(energy=True).getPotentialEnergy()
            frames[place] = x[:, : self.plan.n_dims]
            energies[place] = energy_in_kj_mol(energy)
            replica[place] = index
