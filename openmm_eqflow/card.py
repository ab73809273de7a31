"""The card of a flow: its measured rows, written with it and renewed by a new measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmm_eqflow.atomic import write_text
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.stochastic.flow import StochasticFlow

__all__ = ["card_text", "measured_rows", "renew_card"]


def card_text(title: str, name: str, rows: dict[str, str], metrics: dict[str, Any]) -> str:
    """Markdown of the card of the system in folder ``name``; empty rows are left out."""
    command = f"openmm-eqflow evaluate {name} --n-samples {metrics['n_samples']}"
    lines = [title, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value]
    lines += [
        "",
        f"Measure it again: `{command} --seed {metrics['seed']}`. Raw weights: nothing is clipped "
        "or dropped.",
        "",
    ]
    return "\n".join(lines)


def measured_rows(flow: EquivariantFlow, metrics: dict[str, Any]) -> dict[str, str]:
    """Write what a measurement says of a flow, from the metrics of ``evaluate_flow``."""
    audit = flow.audit_report or {}
    k, log_z = metrics["pareto_k"], metrics["log_z"]
    return {
        "relative ESS (raw)": f"{_with_error(metrics, 'relative_ess')}, "
        f"n = {metrics['n_samples']:,}, evaluation seed {metrics['seed']}"
        + (", weights of paths" if isinstance(flow, StochasticFlow) else ""),
        "prior alone": f"{metrics['prior_relative_ess']:.3f}, same n",
        "Pareto k, largest weight": f"{'infinite' if k is None else f'{k:.2f}'}, "
        f"{100 * metrics['max_weight_share']:.2f} %",
        "log Z (mean-free, nm)": "unknown" if log_z is None else _with_error(metrics, "log_z"),
        "reverse KL": _reverse_kl(metrics),
        "log q error, 99th percentile": f"{audit['log_q_error_p99']:.1e} kT (n = {audit['n']})",
        "cost": f"{1e3 * metrics['seconds_per_sample']:.2g} ms per sample with log q, "
        f"{metrics['n_threads']} threads",
    }


def renew_card(card: Path, flow: EquivariantFlow, metrics: dict[str, Any]) -> None:
    """Put a new measurement into a card; what it says of how the flow was made stays."""
    title, *lines = card.read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ")]
    measured = measured_rows(flow, metrics)
    made = {c[0]: c[1] for c in table if len(c) == 2 and c[0] not in measured}
    write_text(card, card_text(title, card.resolve().parent.name, made | measured, metrics))


def _with_error(metrics: dict[str, Any], key: str) -> str:
    error = metrics.get(f"{key}_error")
    return f"{metrics[key]:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _reverse_kl(metrics: dict[str, Any]) -> str:
    """KL(q|p) = log Z - E_q[log w], which few samples measure where few of them carry weight."""
    mean, error = metrics.get("mean_log_weight"), metrics.get("mean_log_weight_error")
    if mean is None or error is None:
        return ""
    return f"{metrics['log_z'] - mean:.3f} kT, mean log weight {mean:.3f} +- {error:.3f}"
