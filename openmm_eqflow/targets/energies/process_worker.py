"""The parent's end of a worker process: start, exchange with a deadline, kill."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from openmm_eqflow.errors import EnergyError
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.worker import REQUEST, SETUP

__all__ = [
    "ProcessContext",
    "WorkerLostError",
]

_WORKER = Path(__file__).with_name("worker.py")


class WorkerLostError(EnergyError):
    """A worker process died or exceeded its time limit."""


class ProcessContext:
    """A Context in a process of its own, started on first use and again after a loss.

    The process is spawned by ``exec``, never forked: a CPU-platform Context hangs after a fork.

    Parameters
    ----------
    system_xml, platform
        As for :class:`~openmm_eqflow.targets.energies.worker.LocalContext`.
    timeout
        Seconds one ``compute`` may take.
    start_timeout
        Seconds from the start of the process to its first sign of life.
    """

    def __init__(
        self, system_xml: str, platform: str, *, timeout: float, start_timeout: float = 120.0
    ) -> None:
        self._setup = _setup_frame(system_xml, platform)
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self.n_starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and wait until its Context exists.

        Raises
        ------
        EnergyError
            The process does not come up (its standard error is the user's).
        """
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.n_starts += 1
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
        try:
            self._exchange(self._setup, 1, self._start_timeout)
        except WorkerLostError as error:
            msg = (
                f"an energy worker process did not start ({error}): see its message above, or use "
                "mode='threads'"
            )
            raise EnergyError(msg) from error

    def compute(self, x: FloatArray, forces: bool) -> tuple[FloatArray, FloatArray | None]:
        """Energies and forces of a chunk.

        Raises
        ------
        WorkerLostError
            The process died or exceeded the time limit; it is gone, the next call starts another.
        """
        if self._process is None:
            self.start()
        n = len(x)
        request = REQUEST.pack(n, x.shape[1], int(forces)) + x.tobytes()
        size = n * 8 + (x.nbytes if forces else 0)
        reply = np.frombuffer(self._exchange(request, size, self._timeout))
        return reply[:n].copy(), reply[n:].reshape(x.shape).copy() if forces else None

    def close(self) -> None:
        """Kill the process, if any, and reap it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def _exchange(self, request: bytes, reply_size: int, timeout: float) -> bytes:
        """Write ``request`` and read ``reply_size`` bytes, both before the deadline."""
        try:
            return self._transfer(request, reply_size, timeout)
        except (OSError, ValueError) as error:  # broken pipe, or closed by another thread
            self.close()
            msg = f"worker lost: {error}"
            raise WorkerLostError(msg) from error
        except BaseException:
            # An interrupted exchange leaves the pipe mid-frame: such a worker is of no more use.
            self.close()
            raise

    def _transfer(self, request: bytes, reply_size: int, timeout: float) -> bytes:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            msg = "worker lost: closed"
            raise WorkerLostError(msg)
        deadline = time.monotonic() + timeout
        to_send, reply = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(reply) < reply_size:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    msg = f"worker {process.pid} gave no answer within {timeout:g} s"
                    raise WorkerLostError(msg)
                for key, _ in events:
                    if key.fileobj is process.stdin:
                        to_send = to_send[os.write(key.fd, to_send[:65536]) :]
                        if not to_send:
                            selector.unregister(process.stdin)
                    else:
                        data = os.read(key.fd, 1 << 20)
                        if not data:
                            msg = f"worker {process.pid} died"
                            raise WorkerLostError(msg)
                        reply += data
        return bytes(reply)


def _setup_frame(system_xml: str, platform: str) -> bytes:
    xml, name = system_xml.encode(), platform.encode()
    return SETUP.pack(len(xml), len(name)) + xml + name
