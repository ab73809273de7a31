"""Files that exist completely or not at all, and the history of a training among them.

Files that exist completely or not at all: write beside, flush, rename.

The history of a training as history.csv: written whole and renamed into place, never torn.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "COLUMNS",
    "PATH_COLUMNS",
    "atomic_path",
    "plain_json",
    "read_dcd",
    "write_dcd",
    "write_history",
    "write_json",
    "write_npz",
    "write_text",
]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes ``path`` only if the block succeeds.

    The temporary name holds the process id, so a process left over from a killed run cannot write
    into the same one. It keeps the suffix, because some writers choose the format by it.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name a person knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _plain_name(path: Path) -> Iterator[str]:
    """Yield a name of a file that a program which knows only ASCII can open."""
    if str(path).isascii():
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"link{path.suffix}"
        link.symlink_to(path.absolute())
        yield str(link)


def write_dcd(path: Path, x: ArrayLike) -> None:
    """Write frames (n, N, D) in nm as a DCD file, in angstrom; planar ones get z = 0."""
    from mdtraj.formats import DCDTrajectoryFile

    frames = np.asarray(x, dtype=np.float32)
    flat = np.zeros((*frames.shape[:2], 3 - frames.shape[2]), dtype=np.float32)
    with (
        atomic_path(path) as temporary,
        _plain_name(temporary) as name,
        DCDTrajectoryFile(name, "w") as dcd,
    ):
        dcd.write(np.float32(10.0) * np.concatenate([frames, flat], axis=2))


def read_dcd(path: Path) -> NDArray[np.float32]:
    """Read frames (n, N, 3) of a DCD file, in nm."""
    from mdtraj.formats import DCDTrajectoryFile

    with _plain_name(path) as name, DCDTrajectoryFile(name) as dcd:
        frames: NDArray[np.float32] = dcd.read()[0] / np.float32(10.0)
    return frames


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain_json(content: Any) -> Any:
    """Copy of nested containers with non-finite floats as None: JSON has no word for them.

    Examples
    --------
    >>> plain_json({"p99": float("inf"), "grid": (0.0, 1.0)})
    {'p99': None, 'grid': [0.0, 1.0]}
    """
    if isinstance(content, Mapping):
        return {str(key): plain_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain_json(value) for value in content]
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, readable by a person; NaN and infinities become null."""
    write_text(path, json.dumps(plain_json(content), indent=1, allow_nan=False) + "\n")


def write_npz(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write an uncompressed .npz atomically (thermal coordinates hardly compress).

    Raises
    ------
    TypeError
        An array holds Python objects, which only pickle could write.
    """
    values = {key: np.asarray(array) for key, array in arrays.items()}
    if objects := [key for key, array in values.items() if array.dtype.hasobject]:
        raise TypeError(f"{path}: {objects} hold Python objects, expected numbers")
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **values)  # type: ignore[arg-type]

#: In this order, whatever was measured; what was not is empty.
COLUMNS = ("step", "seconds", "loss", "validation_loss", "relative_ess", "learning_rate")
#: Of the fit of a stochastic flow, a row per level.
PATH_COLUMNS = ("step", "seconds", "time", "spread", "residual", "acceptance")


def _cell(name: str, row: Mapping[str, float]) -> str:
    value = row.get(name)
    if value is None or not math.isfinite(value):
        return ""
    return str(int(value)) if name == "step" else f"{value:.9g}"


def write_history(
    path: Path, history: Iterable[Mapping[str, float]], columns: Sequence[str] = COLUMNS
) -> None:
    """Write one line per evaluation under a line of ``columns``.

    Rows after the last checkpoint of a run that was killed are made again when it continues, and
    so are their lines: the file always agrees with the training that goes on.
    """
    lines = [",".join(columns)]
    lines += [",".join(_cell(name, row) for name in columns) for row in history]
    write_text(path, "\n".join(lines) + "\n")
