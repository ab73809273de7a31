"""Energies of any System on any OpenMM platform, one Context per thread.

OpenMM evaluates one configuration at a time. The pool cuts a batch into chunks and hands them to
Contexts in threads (``getState`` releases Python's lock). It is the arbiter other evaluators are
checked against and the fallback for Systems they do not cover.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_eqflow.errors import EnergyError
from openmm_eqflow.targets.energies.base import FloatArray, check_batch, mask_invalid

__all__ = [
    "ContextPool",
    "LocalContext",
    "available_platforms",
    "evaluation_rate",
    "first_platform",
    "probe_positions",
]

_TIMING_SECONDS = 0.03
#: Seconds of work per chunk: long against the exchange (about 0.1 ms), short against a batch.
_CHUNK_SECONDS = 0.02


class LocalContext:
    """A Context on a named platform, with failures turned into NaN.

    Parameters
    ----------
    system_xml
        Serialised System. The Context gets a System of its own: a Context keeps no reference to
        Python's one, and a System must not be shared between threads.
    platform
        OpenMM platform name; ``"CPU"`` gets one thread, GPU platforms mixed precision.
    """

    def __init__(self, system_xml: str, platform: str) -> None:
        self._system = openmm.XmlSerializer.deserialize(system_xml)
        self._integrator = openmm.VerletIntegrator(1e-3)
        properties = {}
        if platform == "CPU":
            properties["Threads"] = "1"
        elif platform != "Reference":
            properties["Precision"] = "mixed"
        self._context = openmm.Context(
            self._system, self._integrator, openmm.Platform.getPlatformByName(platform), properties
        )

    def compute(
        self, x: NDArray[np.float64], forces: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Energies and, if asked for, forces; NaN where OpenMM raised."""
        context = self._context
        energy = np.full(len(x), np.nan)
        force = np.zeros(x.shape) if forces else None
        finite = np.isfinite(x).all(axis=(1, 2))
        for i in np.flatnonzero(finite):
            # The CPU platform raises on NaN (GPU platforms too); Reference returns NaN.
            try:
                context.setPositions(x[i])
                state = context.getState(getEnergy=True, getForces=forces)
                energy[i] = state.getPotentialEnergy()._value
                if force is not None:
                    force[i] = state.getForces(asNumpy=True)._value
            except openmm.OpenMMException:
                energy[i] = np.nan
        return energy, force


def evaluation_rate(context: LocalContext, probe: FloatArray) -> float:
    """Energy + force evaluations per second: the best of a few short blocks.

    The best, because other work on the machine can only make a block slower.
    """
    x = np.repeat(probe[None], 4, axis=0)
    context.compute(x[:1], True)
    best, end = np.inf, time.perf_counter() + _TIMING_SECONDS
    while (start := time.perf_counter()) < end or not np.isfinite(best):
        context.compute(x, True)
        best = min(best, time.perf_counter() - start)
    return len(x) / best


def probe_positions(n_particles: int, spacing: float = 0.25) -> FloatArray:
    """Positions ``(n_particles, 3)`` on a slightly disordered cubic lattice, in nm."""
    side = int(np.ceil(n_particles ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    jitter = np.random.default_rng(0).uniform(-0.1, 0.1, (n_particles, 3))
    positions: FloatArray = spacing * (grid[:n_particles] + jitter)
    return positions


def available_platforms() -> list[str]:
    """Names of the OpenMM platforms of this installation."""
    n = openmm.Platform.getNumPlatforms()
    return [openmm.Platform.getPlatform(i).getName() for i in range(n)]


def first_platform(system_xml: str, probe: FloatArray) -> str:
    """First of Reference and CPU that runs the System.

    A rule, not a race: the bits of the energies do not depend on how busy the machine is, and both
    work in double or nearly double precision. Reference, the arbiter of all other energies, runs
    nearly every System, and for the small ones meant here it is often the fastest; a GPU, with its
    mixed precision, is taken where it is named. ``bench energies`` times them all.

    Raises
    ------
    EnergyError
        Neither can run the System.
    """
    reasons: list[str] = []
    for name in ("Reference", "CPU"):
        try:
            LocalContext(system_xml, name).compute(probe[None], True)
        except openmm.OpenMMException as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise EnergyError(f"no OpenMM platform can run this System ({'; '.join(reasons)})")


class ContextPool:
    """Batched energies through OpenMM Contexts.

    Parameters
    ----------
    system
        Any System; a copy is used.
    platform
        OpenMM platform name, or ``"auto"`` for the first of Reference and CPU (one thread) that
        runs the System.
    n_workers
        Contexts; default one per core.
    positions
        ``(n_particles, 3)`` nm for the timing of a chunk; default a loose lattice.

    Examples
    --------
    >>> with ContextPool(system, n_workers=2) as pool:      # doctest: +SKIP
    ...     energies, forces = pool.energies_and_forces(x)
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        platform: str = "auto",
        n_workers: int | None = None,
        positions: FloatArray | None = None,
    ) -> None:
        if n_workers is not None and n_workers < 1:
            msg = f"n_workers is {n_workers}, expected at least 1 (or None: one per core)"
            raise ValueError(msg)
        self.n_particles: int = system.getNumParticles()
        self.n_invalid = 0
        self.n_workers: int = n_workers or os.cpu_count() or 1
        xml = openmm.XmlSerializer.serialize(system)
        probe = probe_positions(self.n_particles) if positions is None else positions
        if platform == "auto":
            platform = first_platform(xml, probe)
        elif platform not in available_platforms():
            msg = f"platform {platform!r} is not installed; there are {available_platforms()}"
            raise EnergyError(msg)
        self.platform = platform
        self._executor = ThreadPoolExecutor(self.n_workers, thread_name_prefix="eqflow-energy")
        self._contexts = [LocalContext(xml, platform) for _ in range(self.n_workers)]
        self._idle: SimpleQueue[LocalContext] = SimpleQueue()
        for context in self._contexts:
            self._idle.put(context)
        rate = evaluation_rate(self._contexts[0], probe)
        self._chunk = int(np.clip(rate * _CHUNK_SECONDS, 1, 1024))

    def energies(self, x: FloatArray) -> FloatArray:
        """Energies ``(n,)`` in kJ/mol; +inf where invalid."""
        return self._evaluate(x, forces=False)[0]

    def energies_and_forces(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Energies ``(n,)`` and forces ``(n, n_particles, 3)``; +inf and 0 where invalid."""
        energies, forces = self._evaluate(x, forces=True)
        if forces is None:
            msg = "no forces came back: report this as a bug"
            raise EnergyError(msg)
        return energies, forces

    def close(self) -> None:
        """Stop the threads."""
        self._contexts.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> ContextPool:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    def _evaluate(self, x: FloatArray, *, forces: bool) -> tuple[FloatArray, FloatArray | None]:
        if not self._contexts:
            msg = "this pool is closed: make another"
            raise EnergyError(msg)
        x = check_batch(x, self.n_particles)
        energies = np.full(len(x), np.nan)
        out = np.zeros(x.shape) if forces else None
        # Small batches are cut too, so that every worker has something to do.
        chunk = max(1, min(self._chunk, -(-len(x) // self.n_workers)))

        def run(start: int) -> None:
            part = slice(start, start + chunk)
            context = self._idle.get()
            try:
                energy, force = context.compute(x[part], forces)
            finally:
                self._idle.put(context)
            energies[part] = energy
            if out is not None and force is not None:
                out[part] = force

        futures = [self._executor.submit(run, start) for start in range(0, len(x), chunk)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            for future in futures:  # Ctrl-C: begin nothing more
                future.cancel()
            wait(futures)
            raise
        energies, out, n_invalid = mask_invalid(x, energies, out)
        self.n_invalid += n_invalid
        return energies, out
