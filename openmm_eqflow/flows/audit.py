r"""Is log q accurate enough for an acceptance ratio? Measured, in kT.

The weight of a path is exact if every map's determinant is, every map's inverse inverts it, and
every kernel is reversible. The last holds by construction (and is tested); the others are
measured, of a flow with a density on given configurations:

(a) log q on the shipped grid and network precision against a twice finer grid in float64;
(b) the round trips z -> x -> z and z -> x -> z -> x (nm) and log q from sampling against log_prob;
(c) for small systems, the log determinant against that of the discrete map's Jacobian.

Of a relaxed flow these are the errors of the flow it was made from. Of a stochastic flow of a
cluster the maps between evenly chosen levels are measured on paths, scaled to all of them
(:meth:`~openmm_eqflow.flows.stochastic.StochasticFlow.map_errors`).

Hutchinson estimates never enter an acceptance ratio: a flow whose divergence is not exact fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.errors import AuditError
from openmm_eqflow.flows.path import Path
from openmm_eqflow.vector_fields.base import VectorField

__all__ = [
    "audit",
    "require_passed_audit",
]

TOLERANCE = 0.01  # kT, 99th percentile


def _quantiles(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {"median": float("inf"), "p99": float("inf"), "max": float("inf")}
    # A log q that is not a number counts as infinitely wrong: leaving it out would hide it.
    ordered = torch.nan_to_num(values.double(), nan=torch.inf).sort().values
    last = len(ordered) - 1
    return {
        "median": float(ordered[last // 2]),
        "p99": float(ordered[-(-99 * last // 100)]),
        "max": float(ordered[last]),
    }


def audit(
    flow: Path,
    *,
    n: int = 256,
    x: Tensor | None = None,
    tolerance: float = TOLERANCE,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Measure the errors of log q; stored in ``flow.audit_report`` and returned.

    Parameters
    ----------
    flow
        Flow to audit.
    n
        Latent samples used.
    x
        Further configurations (n, N, D), such as reference frames: the inverse is what an
        acceptance needs there.
    tolerance
        Largest acceptable 99th percentile of the error of log q, kT.

    Returns
    -------
    dict
        JSON-able: quantiles of every error, ``log_q_error_p99``, ``passed``.
    """
    if not flow.maps.vector_field.exact_divergence:
        raise AuditError(
            f"{type(flow.maps.vector_field).__name__} estimates its divergence: exp of an "
            "unbiased log q is biased, so it can't be used for acceptance; use an exact divergence"
        )
    errors = flow.maps.map_errors(n, x, generator)
    report: dict[str, Any] = {
        "n": max(map(len, errors.values())),
        "n_ode_steps": flow.maps.n_ode_steps,
        "tolerance": tolerance,
    } | {name: _quantiles(values) for name, values in errors.items()}
    worst = max(
        report[key]["p99"]
        for key in ("grid_and_precision", "sampling_against_log_prob", "against_jacobian")
        if key in report
    )
    report["log_q_error_p99"] = worst
    report["passed"] = bool(worst <= tolerance)
    flow.audit_report = report
    return report


def require_passed_audit(flow: Path) -> None:
    """Raise :class:`AuditError` unless the flow's stored audit passed."""
    field: VectorField = flow.maps.vector_field
    if not field.exact_divergence:
        raise AuditError(
            f"{type(field).__name__} estimates its divergence and can't be used for acceptance; "
            "use a field with an exact divergence"
        )
    report = flow.audit_report
    if report is None:
        raise AuditError(
            "this flow was never audited; call openmm_eqflow.flows.audit.audit(flow) and save "
            "it again"
        )
    if not report["passed"]:
        error = report["log_q_error_p99"]
        found = "not finite" if error is None else f"off by {error:.2g} kT"
        raise AuditError(
            f"log q is {found} (99th percentile; at most {report['tolerance']:.2g} kT allowed): "
            "use a finer grid (flow.calibrate) and audit again"
        )
