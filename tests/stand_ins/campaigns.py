"""Rows of a campaign's table."""

from __future__ import annotations

from typing import Any

EMPTY = dict.fromkeys(
    (
        *("n_atoms", "seconds", "n_samples", "relative_ess", "relative_ess_error", "pareto_k"),
        *("log_z", "log_z_error"),
    )
)


def row(name: str, status: str, **changes: Any) -> dict[str, Any]:
    kept = {"name": name, "status": status, "budget": "anneal", "temperature": 300.0, "seed": 0}
    return {**EMPTY, **kept, "verdict": "", "message": "", "populations": [], **changes}
