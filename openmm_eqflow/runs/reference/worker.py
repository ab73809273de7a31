"""Process of one reference walker: ``python -m openmm_eqflow.runs.reference.worker``.

A fresh interpreter rather than a fork (a CPU-platform Context hangs after fork) and rather than
``multiprocessing`` (which would import the caller's script again). It talks to its parent in JSON
lines on standard output. Standard input carries nothing: its end of file means that the parent
asks to stop or is gone, even by kill -9, so no orphan stays behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm

from openmm_eqflow.errors import CheckpointError, EqFlowError
from openmm_eqflow.runs.reference.plan import SamplingPlan
from openmm_eqflow.runs.reference.tempering import (
    TemperingWalker,
    WalkerState,
    last_state,
    walker_directory,
    write_chunk,
)

__all__ = [
    "main",
    "run_walker",
]

# However small the time budget, what comes back can be analysed.
_LEAST_FRAMES = 20


def _say(**content: object) -> None:
    # Unbuffered, and silent when nobody reads: the frames of this chunk are still to be written.
    with suppress(BrokenPipeError):
        os.write(1, (json.dumps(content) + "\n").encode())


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the walker's folder; a killed predecessor gets a moment to notice and let go."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two runs in one folder are then not noticed.
        yield
        return
    with (folder / "lock").open("w") as handle:
        deadline = time.monotonic() + 15.0
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder} is being written by another process; wait for it or stop it"
                    ) from None
                time.sleep(0.1)
        yield


def run_walker(
    directory: Path, walker: int, *, seconds: float, max_frames: int, stop: threading.Event
) -> WalkerState:
    """Continue a walker until its wall-clock or frame budget, over all attempts, is used up."""
    started = time.monotonic()
    plan = SamplingPlan.read(directory / "plan.json")
    system = openmm.XmlSerializer.deserialize((directory / "system.xml").read_text("utf-8"))
    with _only_writer(walker_directory(directory, walker)):
        engine = TemperingWalker(plan, system, walker)
        state = last_state(directory, walker)
        spent_before = plan.setup_seconds if state is None else state.wall_seconds
        if state is None:
            with np.load(directory / "start.npz", allow_pickle=False) as archive:
                state = engine.start(archive["positions"])
        n_before = state.n_frames
        said = 0.0

        def spent() -> float:
            return spent_before + time.monotonic() - started

        def should_stop(n_new: int) -> bool:
            nonlocal said
            total = n_before + n_new
            if spent() - said > 0.2:
                said = spent()
                _say(frames=total, seconds=said)
            return stop.is_set() or (spent() >= seconds and total >= _LEAST_FRAMES)

        while not stop.is_set() and state.n_frames < max_frames:
            if spent() >= seconds and state.n_frames >= _LEAST_FRAMES:
                break
            n_before = state.n_frames
            chunk = engine.run_chunk(
                state, max_frames=max_frames - state.n_frames, should_stop=should_stop
            )
            # Start-up and equilibration count as spent too.
            state = replace(chunk.state, wall_seconds=spent())
            write_chunk(directory, walker, replace(chunk, state=state))
    return state


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process; errors become one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--walker", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--max-frames", type=int, required=True)
    options = parser.parse_args(arguments)
    stop = threading.Event()

    def wait_for_parent() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    try:
        run_walker(
            options.directory,
            options.walker,
            seconds=options.seconds,
            max_frames=options.max_frames,
            stop=stop,
        )
    except (EqFlowError, OSError, openmm.OpenMMException, ValueError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        _say(error=text, kind=type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
