r"""Is log q accurate enough for an acceptance ratio? Measured, in kT.

Are the log determinants of a stochastic flow's maps right? Measured, in kT.

The weight of a path is exact if every map's determinant is, every map's inverse inverts it, and
every Monte Carlo layer is reversible. The last holds by construction (and is tested); the others
are measured on paths: at evenly chosen levels the log determinant the kernels report is compared
with that of the map's Jacobian in float64, and the map is inverted. Errors over a whole path are
the sum over the chosen levels, scaled to all of them.

Is log q accurate enough for an acceptance ratio? Measured, in kT, on given configurations.

(a) log q on the shipped grid and network precision against a twice finer grid in float64;
(b) the round trips z -> x -> z and z -> x -> z -> x (nm) and log q from sampling against log_prob;
(c) for small systems, the log determinant against that of the discrete map's Jacobian.

Of a stochastic flow the maps between its levels are measured (:mod:`.stochastic.audit`).

Hutchinson estimates never enter an acceptance ratio: a flow whose divergence is not exact fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.errors import AuditError
from openmm_eqflow.flows.flow import EquivariantFlow, rk4
from openmm_eqflow.flows.softcore import Batch
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.priors.zmatrix import wrap_angle
from openmm_eqflow.vector_fields.base import VectorField
from openmm_eqflow.vector_fields.radial import RadialSplineField

__all__ = [
    "audit",
    "path_errors",
    "require_passed_audit",
]

_LEVELS = 24


def path_errors(
    flow: StochasticFlow, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of ``n`` paths.

    Returns
    -------
    Tensor, Tensor, Tensor
        (n,): error of the log determinants in kT, log determinants forwards against backwards in
        kT, and the largest deviation of a coordinate after a map and its inverse, nm.
    """
    z = flow.prior.sample_latent(n, generator=generator)
    seed = int(torch.randint(0, 2**62, (1,), generator=generator))
    batch, levels = Batch(z.numpy(), np.random.default_rng(seed)), flow.levels
    n_maps = len(levels.tables)
    chosen = set(np.linspace(0, n_maps - 1, min(_LEVELS, n_maps)).round().astype(int).tolist())
    wrong, back, gap = np.zeros(n), np.zeros(n), np.zeros(n)
    for k in range(n_maps):
        batch.set_level(levels.parameters[k])
        batch.relax(levels.parameters[k], levels.timesteps[k], levels.n_leapfrog)
        before = batch.x.copy()
        ladj = batch.transport(levels.tables[k], levels.spacing).astype(float)
        if k not in chosen:
            continue
        after = batch.x.copy()
        back += ladj - batch.transport_back(levels.tables[k], levels.spacing)
        gap = np.maximum(gap, np.abs(batch.x - before).max((0, 1)))
        batch.x[:] = after
        wrong += ladj - _log_determinant(flow, k, torch.from_numpy(np.moveaxis(before, -1, 0)))
    scale = n_maps / len(chosen)
    return (
        torch.from_numpy(np.abs(wrong) * scale),
        torch.from_numpy(np.abs(back) * scale),
        torch.from_numpy(gap),
    )


def _log_determinant(flow: StochasticFlow, k: int, x: Tensor) -> Any:
    """Log determinant of map k by autograd in float64, (n,)."""
    push = map_in_float64(flow, k)
    size = x[0].numel()
    found = []
    for point in x.double():
        rows = point.expand(size, *point.shape).clone().requires_grad_(True)
        with torch.enable_grad():
            image = push(rows).flatten(1)
            (jacobian,) = torch.autograd.grad(image.diagonal().sum(), rows)
        found.append(torch.linalg.slogdet(jacobian.flatten(1))[1])
    return torch.stack(found).numpy()


def map_in_float64(flow: StochasticFlow, k: int) -> Callable[[Tensor], Tensor]:
    """Map k of a flow, x + h v(x + h v(x) / 2) at the middle of its interval, without kernels."""
    low, high = flow.grid[k], flow.grid[k + 1]
    field = flow.vector_field
    assert isinstance(field, RadialSplineField)
    middle = torch.tensor(0.5 * (low + high))
    weights = field.coefficients(middle.reshape(1))[:, :-3].detach()
    frozen = RadialSplineField(**(field.config | {"times": [0.0, 1.0]})).double()
    with torch.no_grad():
        frozen.weight.copy_((high - low) * weights.double().expand(2, -1))
    frozen.requires_grad_(False)
    t = torch.tensor(0.0, dtype=torch.float64)
    return lambda x: x + frozen(t, x + 0.5 * frozen(t, x))

TOLERANCE = 0.01  # kT, 99th percentile
_MAX_JACOBIAN = 16


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


def _latent_gap(flow: EquivariantFlow, gap: Tensor) -> Tensor:
    """Largest deviation of latent coordinates, (n,); torsions are compared on the circle."""
    n_soft = int(getattr(flow.prior, "n_soft", 0))
    if n_soft:
        gap = torch.cat([gap[:, :-n_soft], wrap_angle(gap[:, -n_soft:])], 1)
    return gap.abs().flatten(1).amax(1)


def audit(
    flow: EquivariantFlow,
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
    if not flow.vector_field.exact_divergence:
        raise AuditError(
            f"{type(flow.vector_field).__name__} estimates its divergence: exp of an unbiased "
            "log q is biased, so it can't be used for acceptance; use an exact divergence"
        )
    if isinstance(flow, StochasticFlow):
        determinant, inverse, gap = path_errors(flow, n, generator)
        return _concluded(
            flow,
            {
                "n": n,
                "n_ode_steps": flow.n_ode_steps,
                "tolerance": tolerance,
                "against_jacobian": _quantiles(determinant),
                "sampling_against_log_prob": _quantiles(inverse),
                "round_trip_nm": _quantiles(gap),
            },
        )
    z = flow.prior.sample_latent(n, generator=generator).to(flow.device)
    with torch.no_grad():
        samples, log_q = flow.transform(z)
        valid = torch.isfinite(log_q)
        if not bool(valid.any()):
            raise AuditError(
                f"none of {n} samples has a finite log q: training diverged; lower the learning "
                "rate and train again"
            )
        z, samples, log_q = z[valid], samples[valid], log_q[valid]
        points = samples if x is None else torch.cat([samples, x.to(samples)])
        z_back, log_q_back = flow.inverse(points)
        fine = _fine_log_q(flow, points)
        k = len(samples)
        x_back, _ = flow.transform(z_back[:k])
        report: dict[str, Any] = {
            "n": len(points),
            "n_ode_steps": flow.n_ode_steps,
            "tolerance": tolerance,
            "grid_and_precision": _quantiles((log_q_back - fine).abs()),
            "sampling_against_log_prob": _quantiles((log_q - log_q_back[:k]).abs()),
            "round_trip": _quantiles(_latent_gap(flow, z_back[:k] - z)),
            "round_trip_nm": _quantiles((x_back - samples).abs().flatten(1).amax(1)),
        }
        if _dimension(flow) <= _MAX_JACOBIAN:
            report["against_jacobian"] = _quantiles(_jacobian_error(flow, z[:32]))
    return _concluded(flow, report)


def _concluded(flow: EquivariantFlow, report: dict[str, Any]) -> dict[str, Any]:
    worst = max(
        report[key]["p99"]
        for key in ("grid_and_precision", "sampling_against_log_prob", "against_jacobian")
        if key in report
    )
    report["log_q_error_p99"] = worst
    report["passed"] = bool(worst <= report["tolerance"])
    flow.audit_report = report
    return report


def _fine_log_q(flow: EquivariantFlow, x: Tensor) -> Tensor:
    """Log q with twice the steps, everything in float64."""
    grid, dtype = flow.grid, flow.dtype
    middles = [0.5 * (a + b) for a, b in itertools.pairwise(grid)]
    flow.module.double()
    flow.grid = tuple(sorted([*grid, *middles]))
    try:
        return flow.log_prob(x)
    finally:
        flow.grid = grid
        flow.module.to(dtype)


def _dimension(flow: EquivariantFlow) -> int:
    shape = flow.prior.event_shape
    return (shape[0] - 1) * shape[1] if len(shape) == 2 else shape[0]


def _jacobian_error(flow: EquivariantFlow, z: Tensor) -> Tensor:
    """Compare ladj with slogdet of the discrete map's Jacobian (mean-free for Cartesian flows)."""
    dtype = flow.dtype
    flow.module.double()
    try:
        # Mean-free fields leave the centroid alone, so the determinant of the full map has the
        # same absolute value as that of its restriction to the mean-free subspace.
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            y, ladj = rk4(flow._field, z, flow.grid)
            # Rows do not see each other: one backward pass serves a component of all rows.
            rows = [
                torch.autograd.grad(y.flatten(1)[:, k].sum(), z, retain_graph=True)[0].flatten(1)
                for k in range(z[0].numel())
            ]
        return (torch.linalg.slogdet(torch.stack(rows, 1))[1] - ladj.detach()).abs()
    finally:
        flow.module.to(dtype)


def require_passed_audit(flow: EquivariantFlow) -> None:
    """Raise :class:`AuditError` unless the flow's stored audit passed."""
    field: VectorField = flow.vector_field
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
