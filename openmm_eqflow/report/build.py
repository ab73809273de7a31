"""Assemble report.html from the files of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

from openmm_eqflow.atomic import write_text

__all__ = ["write_report"]


def write_report(path: Path) -> Path:
    """Write ``path``/report.html."""
    metrics = json.loads((path / "metrics.json").read_text())
    write_text(path / "report.html", f"<html><pre>{json.dumps(metrics, indent=1)}</pre></html>")
    return path / "report.html"
