"""The history of a training as history.csv: written whole and renamed into place, never torn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from openmm_eqflow.atomic import write_text

__all__ = ["COLUMNS", "PATH_COLUMNS", "write_history"]

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
