"""A finished run's flow for others to use, with a card of how it was made and how good it is.

What ships in ``systems/NAME`` is written by this; ``evaluate --card`` renews the figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openmm_eqflow.atomic import write_text
from openmm_eqflow.card import card_text, measured_rows
from openmm_eqflow.checkpoint import load_flow, save_flow
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.machine import machine_name
from openmm_eqflow.recipes import Recipe
from openmm_eqflow.rundir import STAGES, RunDirectory
from openmm_eqflow.stochastic.flow import StochasticFlow
from openmm_eqflow.thermo import kelvin

__all__ = ["publish"]


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
    flow: EquivariantFlow,
    metrics: dict[str, Any],
    facts: dict[str, dict[str, Any]],
) -> str:
    config, system = run.config, run.load_system()
    reference, train = facts["reference"], facts["train"]
    temperatures = reference["temperatures_kelvin"]
    n_weights = sum(p.numel() for p in flow.vector_field.parameters())  # type: ignore[attr-defined]
    seconds = sum(facts[stage]["seconds"] for stage in facts)
    name = Path(config.system).name
    ladder = f"{temperatures[0]:.0f} to {temperatures[-1]:.0f} K"
    method = (
        f"parallel tempering at {len(temperatures)} temperatures from {ladder}"
        if len(temperatures) > 1
        else f"Langevin dynamics at {temperatures[0]:.0f} K"
    )
    rows = {
        "made by": f"`openmm-eqflow run {name} --budget {config.budget} --seed {config.seed}`",
        "data": f"made by the same command: {reference['n_frames']:,} frames of {method}, "
        f"{reference['seconds']:.0f} s",
        "prior, field": f"{type(flow.prior).__name__}, {type(flow.vector_field).__name__} "
        f"({n_weights:,} weights), {_layers(flow)}",
        "training": _training(config.recipe, train),
        "hardware": f"{machine_name()}, {metrics['device']}; the whole run took "
        f"{seconds / 60:.0f} min",
    } | measured_rows(flow, metrics)
    title = f"# Flow of {system.name} at {kelvin(system.temperature):g} K"
    return card_text(title, name, rows, metrics)


def _layers(flow: EquivariantFlow) -> str:
    if isinstance(flow, StochasticFlow):
        return (
            f"{len(flow.grid):,} levels, on each a Hamiltonian trajectory of {flow.n_leapfrog} "
            "leapfrog steps (stochastic normalizing flow)"
        )
    return f"{flow.n_ode_steps} RK4 steps"


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
