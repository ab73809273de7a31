"""The parent's side of the reference processes: start, listen, stop, and never leave an orphan."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import openmm_eqflow
from openmm_eqflow.errors import CheckpointError, EnergyError
from openmm_eqflow.runs.reference.tempering import last_state, walker_directory

__all__ = [
    "WalkerPool",
]

_STOP_SECONDS = 10.0


class WalkerPool:
    """Processes of ``tempering_worker.py``, as a context manager.

    Leaving the block, by an exception or Ctrl-C too, closes every worker's standard input; a
    worker then finishes its frame, writes its chunk and ends. One that does not is killed.

    Parameters
    ----------
    directory
        The folder with plan.json.
    quota
        Frames of each walker, earlier attempts included.
    seconds
        Wall-clock budget of each walker, earlier attempts included.
    """

    def __init__(self, directory: Path, quota: Sequence[int], *, seconds: float) -> None:
        self._directory = directory
        self._quota = list(quota)
        self._seconds = seconds
        self._messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._workers: list[subprocess.Popen[str]] = []
        self._listeners: list[threading.Thread] = []

    def __enter__(self) -> WalkerPool:
        try:
            for walker in range(len(self._quota)):
                self._start(walker)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _log(self, walker: int) -> Path:
        return walker_directory(self._directory, walker) / "stderr.log"

    def _start(self, walker: int) -> None:
        environment = dict(os.environ)
        # One core each: the walkers are the parallelism.
        environment.update(OMP_NUM_THREADS="1", OPENMM_CPU_THREADS="1", PYTHONWARNINGS="ignore")
        # The package may be importable only from the parent's working directory.
        source = str(Path(openmm_eqflow.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            [source, *filter(None, [environment.get("PYTHONPATH")])]
        )
        self._log(walker).parent.mkdir(parents=True, exist_ok=True)
        with self._log(walker).open("w", encoding="utf-8") as log:
            worker = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "openmm_eqflow.runs.reference.worker",
                    str(self._directory),
                    f"--walker={walker}",
                    f"--seconds={self._seconds}",
                    f"--max-frames={self._quota[walker]}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                # Ctrl-C in a terminal reaches the whole group; only the parent should act on it.
                start_new_session=True,
            )
        self._workers.append(worker)
        listener = threading.Thread(target=self._listen, args=(walker, worker), daemon=True)
        listener.start()
        self._listeners.append(listener)

    def _listen(self, walker: int, worker: subprocess.Popen[str]) -> None:
        if worker.stdout is not None:
            for line in worker.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    # Libraries may print a banner on standard output.
                    continue
                if isinstance(message, dict):
                    self._messages.put((walker, message))
        self._messages.put((walker, None))

    def wait(self, progress: Callable[[float, int], None]) -> None:
        """Return when all walkers have used their budget.

        Parameters
        ----------
        progress
            Called with the slowest walker's fraction and the number of frames of all walkers.

        Raises
        ------
        EnergyError, CheckpointError
            The first worker's failure, in one line.
        """
        fractions = [0.0] * len(self._workers)
        frames = [0] * len(self._workers)
        for walker in range(len(self._workers)):
            state = last_state(self._directory, walker)
            frames[walker] = 0 if state is None else state.n_frames
        running = set(range(len(self._workers)))
        while running:
            walker, message = self._messages.get()
            if message is None:
                running.discard(walker)
                code = self._workers[walker].wait()
                if code != 0:
                    raise EnergyError(self._failure(walker, code))
                fractions[walker] = 1.0
            elif "error" in message:
                text = f"reference walker {walker}: {message['error']}"
                files = ("CheckpointError", "OSError", "PermissionError", "FileNotFoundError")
                raise (CheckpointError if message["kind"] in files else EnergyError)(text)
            else:
                frames[walker] = int(message["frames"])
                fractions[walker] = min(
                    1.0,
                    max(
                        float(message["seconds"]) / self._seconds,
                        frames[walker] / self._quota[walker],
                    ),
                )
            progress(min(fractions), sum(frames))

    def _failure(self, walker: int, code: int) -> str:
        lines = self._log(walker).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return (
            f"reference walker {walker} ended with code {code} ({last}); "
            f"the same command continues from its last chunk, details are in {self._log(walker)}"
        )

    def _stop(self) -> None:
        for worker in self._workers:
            if worker.stdin is not None and not worker.stdin.closed:
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for worker, listener in zip(self._workers, self._listeners, strict=True):
            listener.join()
            if worker.stdout is not None:
                worker.stdout.close()
