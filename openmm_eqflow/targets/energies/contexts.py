"""Energies of any System by OpenMM Contexts: platforms, and one Context per worker.

Which OpenMM platforms there are, and which is taken.

Energies of any System on any OpenMM platform, one Context per worker.

OpenMM evaluates one configuration at a time. The pool cuts a batch into chunks and hands them to
Contexts in threads (``getState`` releases Python's lock) or in processes, whichever a short timing
finds faster. It is the arbiter other evaluators are checked against and the fallback for Systems
they do not cover.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue

import numpy as np
import openmm

from openmm_eqflow.errors import EnergyError
from openmm_eqflow.targets.energies.base import FloatArray, check_batch, mask_invalid
from openmm_eqflow.targets.energies.process_worker import ProcessContext, WorkerLostError
from openmm_eqflow.targets.energies.worker import LocalContext

__all__ = [
    "ContextPool",
    "available_platforms",
    "evaluation_rate",
    "first_platform",
    "probe_positions",
]

_TIMING_SECONDS = 0.03


def evaluation_rate(context: LocalContext | ProcessContext, probe: FloatArray) -> float:
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

#: Seconds of work per chunk: long against the exchange (about 0.1 ms), short against a batch.
_CHUNK_SECONDS = 0.02


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
    mode
        ``"threads"``, ``"processes"`` or ``"auto"`` (a short timing). Only processes survive a
        crash or a hang inside OpenMM.
    timeout
        Seconds a chunk may take in a worker process before it is killed and replaced.
    positions
        ``(n_particles, 3)`` nm for the timings; default a loose lattice.

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
        mode: str = "auto",
        timeout: float = 60.0,
        positions: FloatArray | None = None,
    ) -> None:
        if mode not in ("auto", "threads", "processes"):
            msg = f"mode is {mode!r}, expected 'auto', 'threads' or 'processes'"
            raise ValueError(msg)
        if n_workers is not None and n_workers < 1:
            msg = f"n_workers is {n_workers}, expected at least 1 (or None: one per core)"
            raise ValueError(msg)
        self.n_particles: int = system.getNumParticles()
        self.n_invalid = 0
        self.n_restarts = 0
        self.n_workers: int = n_workers or os.cpu_count() or 1
        self._xml: str = openmm.XmlSerializer.serialize(system)
        # Another process cannot read a function of this one's __main__: it would crash.
        if mode == "auto" and 'type="PythonForce"' in self._xml:
            mode = "threads"
        self._probe = probe_positions(self.n_particles) if positions is None else positions
        if platform == "auto":
            platform = first_platform(self._xml, self._probe)
        elif platform not in available_platforms():
            msg = f"platform {platform!r} is not installed; there are {available_platforms()}"
            raise EnergyError(msg)
        self.platform = platform
        self._timeout = timeout
        self._aborted = threading.Event()
        self._executor = ThreadPoolExecutor(self.n_workers, thread_name_prefix="eqflow-energy")
        self._contexts: list[LocalContext | ProcessContext] = []
        self._idle: SimpleQueue[LocalContext | ProcessContext] = SimpleQueue()
        self._chunk = 1
        self.mode = self._choose_mode() if mode == "auto" else mode
        if not self._contexts:
            self._open(self.mode)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the live workers (none with threads)."""
        pids = [c.pid for c in self._contexts if isinstance(c, ProcessContext)]
        return [pid for pid in pids if pid is not None]

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
        """Stop threads and kill worker processes."""
        self._aborted.set()
        for context in self._contexts:
            if isinstance(context, ProcessContext):
                context.close()
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
            energy, force = self._compute(x[part], forces)
            energies[part] = energy
            if out is not None and force is not None:
                out[part] = force

        self._aborted.clear()
        futures = [self._executor.submit(run, start) for start in range(0, len(x), chunk)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            # Ctrl-C or a lost pool: leave no thread waiting for a worker.
            self._aborted.set()
            for future in futures:
                future.cancel()
            for context in self._contexts:
                if isinstance(context, ProcessContext):
                    context.close()
            wait(futures)
            raise
        energies, out, n_invalid = mask_invalid(x, energies, out)
        self.n_invalid += n_invalid
        return energies, out

    def _compute(
        self, x: FloatArray, forces: bool, attempts: int = 2
    ) -> tuple[FloatArray, FloatArray | None]:
        """One chunk on an idle worker; a lost worker is replaced and its chunk redone.

        A chunk that costs ``attempts`` workers is halved until the one configuration that kills
        or blocks them is alone; that one is invalid.
        """
        for _ in range(attempts):
            context = self._idle.get()
            try:
                return context.compute(x, forces)
            except WorkerLostError:
                if self._aborted.is_set():
                    raise
                self.n_restarts += 1
            finally:
                self._idle.put(context)
        if len(x) == 1:
            return np.full(1, np.nan), np.zeros(x.shape) if forces else None
        halves = [self._compute(half, forces) for half in np.array_split(x, 2)]
        forces_out = [f for _, f in halves if f is not None]
        return (
            np.concatenate([e for e, _ in halves]),
            np.concatenate(forces_out) if forces else None,
        )

    def _open(self, mode: str) -> None:
        make = self._thread_context if mode == "threads" else self._process_context
        self._contexts = [make() for _ in range(self.n_workers)]
        if mode == "processes":
            try:
                list(self._executor.map(_start, self._contexts))
            except BaseException:
                self.close()
                raise
        self._idle = SimpleQueue()
        for context in self._contexts:
            self._idle.put(context)
        rate = evaluation_rate(self._contexts[0], self._probe)
        self._chunk = int(np.clip(rate * _CHUNK_SECONDS, 1, 1024))

    def _thread_context(self) -> LocalContext | ProcessContext:
        return LocalContext(self._xml, self.platform)

    def _process_context(self) -> LocalContext | ProcessContext:
        return ProcessContext(self._xml, self.platform, timeout=self._timeout)

    def _choose_mode(self) -> str:
        """Threads, unless they scale badly here and processes turn out faster."""
        self._open("threads")
        alone = evaluation_rate(self._contexts[0], self._probe)
        threads = self._pool_rate(alone)
        if self.n_workers == 1 or threads > 0.75 * self.n_workers * alone:
            return "threads"
        with_threads = self._contexts
        self._open("processes")
        processes = self._pool_rate(alone)
        if processes > threads:
            return "processes"
        for context in self._contexts:
            if isinstance(context, ProcessContext):
                context.close()
        self._contexts = with_threads
        self._idle = SimpleQueue()
        for context in self._contexts:
            self._idle.put(context)
        return "threads"

    def _pool_rate(self, rate: float) -> float:
        n = max(self.n_workers, int(rate * self.n_workers * _TIMING_SECONDS))
        x = np.repeat(self._probe[None], n, axis=0)
        self._evaluate(x[: 2 * self.n_workers], forces=True)
        start = time.perf_counter()
        self._evaluate(x, forces=True)
        self.n_invalid = 0
        return n / (time.perf_counter() - start)


def _start(context: LocalContext | ProcessContext) -> None:
    if isinstance(context, ProcessContext):
        context.start()
