"""One OpenMM Context evaluating configurations one by one, in this process or as a worker.

Run as a script this file is the worker process of :mod:`.process_worker`. It therefore imports
nothing of the package, so a worker starts in the time OpenMM takes to load, and a user's
``__main__`` is never imported a second time. Frames are plain bytes, so nothing is unpickled.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
from typing import BinaryIO

import numpy as np
import openmm
from numpy.typing import NDArray

__all__ = [
    "REQUEST",
    "SETUP",
    "LocalContext",
]

#: Byte counts of the System XML and of the platform name.
SETUP = struct.Struct("<qq")
#: Number of configurations, number of particles, 1 if forces are wanted; the reply is bare arrays.
REQUEST = struct.Struct("<qqq")


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


def _read(stream: BinaryIO, n: int) -> bytes:
    data = stream.read(n)
    if len(data) != n:
        raise EOFError
    return data


def _watch_parent(parent: int) -> None:
    """Leave as soon as the parent is gone, even while a computation is stuck."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Serve requests from stdin until it closes."""
    # Ctrl-C reaches the whole process group; only the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = int(sys.argv[1])
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a plugin that prints must not corrupt the frames
    try:
        n_xml, n_platform = SETUP.unpack(_read(requests, SETUP.size))
        xml = _read(requests, n_xml).decode()
        context = LocalContext(xml, _read(requests, n_platform).decode())
        replies.write(b"R")
        replies.flush()
        while True:
            n, n_particles, forces = REQUEST.unpack(_read(requests, REQUEST.size))
            x = np.frombuffer(_read(requests, n * n_particles * 24)).reshape(n, n_particles, 3)
            energy, force = context.compute(x, bool(forces))
            replies.write(energy.tobytes())
            if force is not None:
                replies.write(force.tobytes())
            replies.flush()
    except EOFError:
        return


if __name__ == "__main__":
    main()
