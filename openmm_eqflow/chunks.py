"""Chunk files of reference data: what a walker has finished, and how to go on from there.

A walker's folder holds ``chunk-00000.npz``, ``chunk-00001.npz``, ... Each is renamed into place
when complete and ends with the exact state (float64 positions and velocities, ladder positions),
so a walker killed at any moment loses at most the chunk it was in.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.atomic import write_npz
from openmm_eqflow.errors import CheckpointError

__all__ = [
    "Chunk",
    "WalkerState",
    "chunk_paths",
    "last_state",
    "read_chunk",
    "walker_directory",
    "write_chunk",
]


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
