"""Overview of a campaign: every molecule in one table, with links to what there is of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from openmm_eqflow.files import write_text
from openmm_eqflow.report.build import render
from openmm_eqflow.report.verdict import pm

__all__ = [
    "write_overview",
]

_GRADES = {"done": "good", "waiting": "fair", "failed": "poor"}
#: What a molecule may have left, in the order of the links.
_FILES = (
    ("report", "runs/{}/report.html"),
    ("structure", "runs/{}/topology.pdb"),
    ("frames", "runs/{}/samples.dcd"),
    ("figures", "runs/{}/metrics.json"),
    ("log", "logs/{}.log"),
)


def write_overview(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``out/index.html`` from the rows of :func:`~openmm_eqflow.runs.campaign.run_campaign`.

    Parameters
    ----------
    out
        Folder of the campaign; links are relative to it, so that it can be moved or served.
    rows
        One a molecule; those without an answer are ``waiting``.

    Returns
    -------
    Path
        The page: one file, no external request, no script.

    Examples
    --------
    >>> import tempfile
    >>> write_overview(Path(tempfile.mkdtemp()), []).name
    'index.html'
    """
    out = Path(out)
    counts = [(s, sum(row["status"] == s for row in rows)) for s in _GRADES]
    html = render(
        "campaign.html",
        {
            "title": f"Campaign {out.resolve().name}",
            "counts": [(status, _GRADES[status], n) for status, n in counts if n],
            "tables": [
                name
                for stem in ("results", "populations")
                for name in (f"{stem}.csv", f"{stem}.parquet")
                if (out / name).is_file()
            ],
            "rows": [_cells(out, row) for row in rows],
            "populations": [
                (
                    row["name"],
                    p["torsion"],
                    p["state"],
                    _with_error(p["population"], p["population_error"]),
                )
                for row in rows
                for p in row["populations"]
            ],
        },
    )
    write_text(out / "index.html", html)
    return out / "index.html"


def _cells(out: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    where = quote(row["name"])
    links = [
        (label, pattern.format(where))
        for label, pattern in _FILES
        if (out / pattern.format(row["name"])).is_file()
    ]
    k = row["pareto_k"]
    return {
        "name": row["name"],
        "status": row["status"],
        "grade": _GRADES[row["status"]],
        "said": ". ".join(filter(None, [row["verdict"], row["message"]])),
        "cells": [
            ("budget", row["budget"]),
            ("K", "-" if row["temperature"] is None else f"{row['temperature']:g}"),
            ("atoms", "-" if row["n_atoms"] is None else str(row["n_atoms"])),
            ("relative ESS", _with_error(row["relative_ess"], row["relative_ess_error"])),
            ("Pareto k", "-" if k is None else f"{k:.2f}"),
            ("log Z", _with_error(row["log_z"], row["log_z_error"])),
            ("seconds", "-" if row["seconds"] is None else f"{row['seconds']:.0f}"),
        ],
        "links": links,
    }


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None else pm(value, math.inf if error is None else error)
