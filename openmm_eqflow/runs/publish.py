"""A finished run's flow for others to use, and its card.

The card of a flow: its measured rows, written with it and renewed by a new measurement.

A finished run's flow for others to use, with a card of how it was made and how good it is.

What ships in ``systems/NAME`` is written by this; ``evaluate --card`` renews the figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from openmm_eqflow.files import write_text
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.parallel import machine_name
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.training.recipes import Recipe, make_recipe
from openmm_eqflow.units import kelvin

__all__ = [
    "card_text",
    "measured_rows",
    "publish",
    "renew_card",
]


def card_text(title: str, name: str, rows: dict[str, str], metrics: dict[str, Any]) -> str:
    """Markdown of the card of the system in folder ``name``; empty rows are left out."""
    command = f"openmm-eqflow evaluate {quote(name)} --n-samples {metrics['n_samples']}"
    lines = [title, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value]
    lines += [
        "",
        f"Measure it again: `{command} --seed {metrics['seed']}`. Raw weights: nothing is clipped "
        "or dropped.",
        "",
    ]
    return "\n".join(lines)


def measured_rows(flow: FlowPath, metrics: dict[str, Any]) -> dict[str, str]:
    """Write what a measurement says of a flow, from the metrics of ``evaluate_flow``."""
    audit = flow.audit_report or {}
    k, log_z = metrics["pareto_k"], metrics["log_z"]
    return {
        "relative ESS (raw)": f"{_with_error(metrics, 'relative_ess')}, "
        f"n = {metrics['n_samples']:,}, evaluation seed {metrics['seed']}"
        + ("" if flow.has_density else ", weights of paths"),
        "prior alone": f"{metrics['prior_relative_ess']:.3f}, same n",
        "Pareto k, largest weight": f"{'infinite' if k is None else f'{k:.2f}'}, "
        f"{100 * metrics['max_weight_share']:.2f} %",
        "log Z (mean-free, nm)": "unknown" if log_z is None else _with_error(metrics, "log_z"),
        "reverse KL": _reverse_kl(metrics),
        "log q error, 99th percentile": f"{audit['log_q_error_p99']:.1e} kT (n = {audit['n']})",
        "cost": f"{1e3 * metrics['seconds_per_sample']:.2g} ms per sample with log q, "
        f"{metrics['n_threads']} threads",
    }


def renew_card(card: Path, flow: FlowPath, metrics: dict[str, Any]) -> None:
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


def publish(run_path: str | Path, out: str | Path) -> Path:
    """Write flow.safetensors, flow.json and card.md of a complete run into ``out``.

    Parameters
    ----------
    run_path
        Run directory whose stages are complete: every number of the card comes from its files.
    out
        Folder, such as that of a system's system.yaml: ``openmm-eqflow sample`` then finds the
        flow there.

    Returns
    -------
    Path
        The card.

    Examples
    --------
    >>> publish("runs/my-molecule", "my-molecule")  # doctest: +SKIP
    """
    run = RunDirectory.open(Path(run_path))
    for stage in STAGES[:3]:
        run.require(stage)
    facts = {stage: _facts(run, stage) for stage in STAGES[:3]}
    metrics = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    flow = load_flow(run.path / "flow")
    setup = facts["reference"]["seconds"] + facts["train"]["seconds"]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_flow(flow, out / "flow", flow.metadata | {"setup_seconds": round(setup, 1)})
    card = out / "card.md"
    write_text(card, _card(run, flow, metrics, facts))
    return card


def _facts(run: RunDirectory, stage: str) -> dict[str, Any]:
    path = run.path / "stages" / f"{stage}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _card(
    run: RunDirectory,
    flow: FlowPath,
    metrics: dict[str, Any],
    facts: dict[str, dict[str, Any]],
) -> str:
    config, system = run.config, run.load_system()
    reference, train = facts["reference"], facts["train"]
    n_weights = sum(p.numel() for p in flow.maps.vector_field.parameters())
    seconds = sum(facts[stage]["seconds"] for stage in facts)
    name = Path(config.system).name
    command = f"openmm-eqflow run {quote(name)} --budget {config.budget} --seed {config.seed}"
    given = (system.kind, config.budget, system.settings, system.n_particles)
    recipe, usual = config.recipe, make_recipe(*given)  # type: ignore[arg-type]
    if recipe.method != usual.method:
        command += f" --method {recipe.method}"
    alike = make_recipe(*given, method=recipe.method)  # type: ignore[arg-type]
    if recipe.method == "annealing" and recipe.ess != alike.ess:
        command += f" --ess {recipe.ess}"
    rows = {
        "made by": f"`{command}`",
        "data": f"made by the same command: {reference['n_frames']:,} frames of "
        f"{_source(reference)}, {reference['seconds']:.0f} s",
        "prior, field": f"{type(flow.prior).__name__}, {type(flow.maps.vector_field).__name__} "
        f"({n_weights:,} weights), {flow.describe_layers()}",
        "training": _training(config.recipe, train),
        "hardware": f"{machine_name()}, {metrics['device']}; the whole run took "
        f"{seconds / 60:.0f} min",
    } | measured_rows(flow, metrics)
    title = f"# Flow of {system.name} at {kelvin(system.temperature):g} K"
    return card_text(title, name, rows, metrics)


def _source(reference: dict[str, Any]) -> str:
    """Say where the reference frames are from."""
    if reference.get("method") == "annealing":
        return f"an annealed path of {reference['n_levels']} levels from a prior of chemistry"
    temperatures = reference["temperatures_kelvin"]
    if len(temperatures) == 1:
        return f"Langevin dynamics at {temperatures[0]:.0f} K"
    ladder = f"{temperatures[0]:.0f} to {temperatures[-1]:.0f} K"
    return f"parallel tempering at {len(temperatures)} temperatures from {ladder}"


def _training(recipe: Recipe, train: dict[str, Any]) -> str:
    if recipe.stochastic is not None:
        return (
            f"Liouville residual by regression on {train['n_steps']:,} levels, "
            f"{recipe.stochastic_options()['n_fit']:,} configurations of the path, "
            f"{train['training_seconds']:.0f} s; the reference data are not used"
        )
    return (
        f"{_objectives(recipe)}, {train['training_seconds']:.0f} s, "
        f"{train['n_steps']:,} steps, batch {recipe.batch_size}"
    )


def _objectives(recipe: Recipe) -> str:
    first, *later = recipe.trainings()
    then = [f" then {r.objective} ({r.train_seconds:g} s, batch {r.batch_size})" for r in later]
    return ",".join([str(first.objective), *then])
