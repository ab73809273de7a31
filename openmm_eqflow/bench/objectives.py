"""Which objective trains best: ESS against training time, with table and figure.

Which objectives and schedules a comparison has, by name; imports nothing heavy.

Table and figure of the comparison of objectives, from its JSON alone.

Which objective trains best: ESS against training time, of each alone and of schedules.

Prior and initial weights are made once and shared through ``start.safetensors``; data, seed,
batch size and learning rate are those of the run's recipe. Everything is resumable: a finished
objective is a JSON file in the folder, one under way has a checkpoint.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from openmm_eqflow.bench.learning_curve import Start, learning_curve, prior_alone, times
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import atomic_path, plain_json, write_json, write_text
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import file_sha256, load_flow, save_flow
from openmm_eqflow.parallel import one_torch_thread, world_size
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.fit import build_field, fit_prior, hot_frames, split_frames
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import child, child_seed
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.loop import TrainingSettings
from openmm_eqflow.training.precision import resolve_device
from openmm_eqflow.training.recipes import Recipe
from openmm_eqflow.training.schedule import OBJECTIVES, schedule_misfit

__all__ = [
    "RECIPE",
    "choose",
    "draw",
    "parse_schedules",
    "run_bench",
    "suited",
    "table",
]

#: Name of the recipe's own objective where that is a schedule.
RECIPE = "recipe"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


def suited(recipe: Recipe) -> tuple[str, ...]:
    """Objectives that make sense with the prior of a recipe, each alone.

    The Liouville residual needs a prior that overlaps the target, flow matching moves Cartesian
    coordinates; the others train any flow.
    """
    other = "flow-matching" if recipe.prior == "internal" else "liouville"
    return tuple(name for name in OBJECTIVES if name != other)


def parse_schedules(given: Iterable[str]) -> dict[str, Any]:
    """Schedules given as ``NAME=JSON``.

    Examples
    --------
    >>> parse_schedules(['both={"nll": [[0, 1], [1, 0.5]], "reverse-kl": [[0, 0], [1, 0.5]]}'])
    {'both': {'nll': [[0, 1], [1, 0.5]], 'reverse-kl': [[0, 0], [1, 0.5]]}}

    Raises
    ------
    ConfigurationError
        Not of that form, a name that is taken or no file name, or no schedule.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, words = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"schedule is {text!r}, expected NAME=JSON with a name of letters, digits, '-' "
                "and '_'"
            )
        if name in (*OBJECTIVES, RECIPE, *found):
            raise ConfigurationError(f"schedule {name!r}: the name is taken, choose another")
        try:
            found[name] = json.loads(words)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"schedule {name!r} is not valid JSON ({error}), expected "
                '{"OBJECTIVE": [[fraction, weight], ...], ...}'
            ) from None
        if (wanted := schedule_misfit(found[name])) is not None:
            raise ConfigurationError(f"schedule {name!r}: expected {wanted}")
    return found


def choose(
    recipe: Recipe, names: Sequence[str] | None = None, schedules: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what is compared, {name: objective}.

    Parameters
    ----------
    recipe
        Of the run; its own objective is called ``recipe`` if it is a schedule.
    names
        Objectives alone, or ``recipe``; all that make sense by default.
    schedules
        Further ones, by name.

    Raises
    ------
    ConfigurationError
        An unknown objective (with near matches), or one that does not suit the prior.
    """
    alone = suited(recipe)
    known: dict[str, Any] = {name: name for name in alone}
    if not isinstance(recipe.objective, str):
        known[RECIPE] = recipe.objective
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = " or ".join(map(repr, near)) if near else f"one of {', '.join(known)}"
            why = f"does not suit the {recipe.prior} prior" if name in OBJECTIVES else "is unknown"
            raise ConfigurationError(f"objective {name!r} {why}; did you mean {hint}?")
    chosen = {name: known[name] for name in dict.fromkeys(names or known)}
    for name, schedule in (schedules or {}).items():
        for part in schedule:
            if part not in alone:
                raise ConfigurationError(
                    f"schedule {name!r}: objective {part!r} does not suit the {recipe.prior} "
                    f"prior, expected names out of {', '.join(alone)}"
                )
        chosen[name] = schedule
    return chosen

# Okabe and Ito (2008), without black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("-", "--", ":")
_FLOOR = 1e-4
_NONE = "-"


def _ess(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(rows: list[dict[str, Any]], time: float) -> str:
    """ESS at ``time`` seconds; with the true time if a step took much longer."""
    row = next((row for row in rows if row["seconds"] >= time), None)
    if row is None:
        return _NONE
    late = f" (at {_seconds(row['seconds'])} s)" if row["seconds"] > 1.25 * time else ""
    return _ess(row["relative_ess"]) + late


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per objective, a column per time, and why any of them ended early."""
    heads = ["objective", *(f"{_seconds(t)} s" for t in result["times"])]
    heads += ["Pareto k", "steps", "set-up"]
    prior = [_ess(result["prior"]["relative_ess"])] * len(result["times"])
    lines = [["prior alone", *prior, _pareto(result["prior"]), _NONE, _NONE]]
    notes = []
    for name, record in result["objectives"].items():
        rows = record["rows"]
        label = f"{name} (the recipe's)" if name == result["chosen"] else name
        cells = [_cell(rows, t) for t in result["times"]]
        last = [_pareto(rows[-1]), f"{rows[-1]['steps']:,}"] if rows else [_NONE, _NONE]
        lines.append([label, *cells, *last, f"{_seconds(record['setup_seconds'])} s"])
        if record["status"] != "done":
            notes.append(f"{name} ended early: {record['error']}.")
    text = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)]
    text += [
        "",
        f"{result['system']}: raw relative ESS of {result['n_samples']:,} independent samples "
        "after these seconds of training; seed "
        f"{result['seed']}; {_machines(result)}.",
    ]
    for note in notes:
        text += ["", note]
    return "\n".join(text) + "\n"


def _pareto(row: dict[str, Any]) -> str:
    return "∞" if row["pareto_k"] is None else f"{row['pareto_k']:.2f}"


def _machines(result: dict[str, Any]) -> str:
    found = {(r["machine"], r["n_threads"]) for r in result["objectives"].values()}
    words = [f"{machine}, {n} thread{'s'[: n != 1]}" for machine, n in sorted(found)]
    return "; ".join(words) or "nothing measured yet"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of ESS against seconds of training, drawn no lower than 1e-4."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    styles = itertools.cycle(itertools.product(_DASHES, _COLOURS))
    shown = [result["prior"]["relative_ess"]]
    for (name, record), (dash, colour) in zip(result["objectives"].items(), styles, strict=False):
        rows = record["rows"]
        chosen = name == result["chosen"]
        label = name + (" (the recipe's)" if chosen else "")
        label += "" if record["status"] == "done" else " (aborted)"
        values = [max(row["relative_ess"], _FLOOR) for row in rows]
        shown += values
        axes.plot(
            [row["seconds"] for row in rows],
            values,
            linestyle=dash,
            color=colour,
            linewidth=2.4 if chosen else 1.4,
            marker="o" if record["status"] == "done" else "x",
            markersize=4,
            label=label,
        )
    axes.axhline(
        max(result["prior"]["relative_ess"], _FLOOR),
        color="0.4",
        linestyle=(0, (1, 2)),
        label="prior alone",
    )
    axes.set_xscale("log")
    axes.set_xticks(result["times"], [_seconds(t) for t in result["times"]])
    axes.minorticks_off()
    if min(shown) < 0.05:
        axes.set_yscale("log")
        axes.set_ylim(max(_FLOOR, min(shown)) / 1.3, 1.3)
    else:
        axes.set_ylim(0, 1)
    axes.set_xlabel("training, s")
    axes.set_ylabel(f"raw relative ESS (n = {result['n_samples']:,})")
    axes.set_title(result["system"])
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)

Progress = Callable[[float, str], None]


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder one of these settings, or make sure that it is."""
    file, wanted = out / "settings.json", plain_json(settings)
    if not file.is_file():
        if out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
            raise ConfigurationError(
                f"{out} exists and holds no such measurement (no settings.json); choose another "
                "--out"
            )
        write_json(file, settings)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{file} is not valid JSON ({error}); delete {out}") from error
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigurationError(
                f"{out} belongs to another measurement: its {key.replace('_', ' ')} is "
                f"{found.get(key)!r}, now {value!r}; choose another --out or delete it"
            )


def _start(
    run: RunDirectory, target: BoltzmannTarget, out: Path, device: str, report: Progress
) -> tuple[EquivariantFlow, torch.Tensor, torch.Tensor]:
    """Prior and untrained field, from the folder if they are there; training and test frames."""
    recipe, seed, data = run.config.recipe, run.config.seed, load_reference(run.path)
    frames, test = split_frames(data)
    if not (out / "start.json").is_file():
        report(0.0, "fitting the prior")
        torch.manual_seed(child_seed(seed, "weights"))  # as the training stage does
        generator = child(seed, "pool")
        prior = fit_prior(recipe, target, frames, hot_frames(recipe, data), generator)
        field: Any = build_field(recipe, prior, target, frames)
        metadata = {"system_hash": target.system_hash, "seed": seed}
        save_flow(EquivariantFlow(prior, field), out / "start", metadata)
    return load_flow(out / "start", device=device), frames, test


def run_bench(
    run_path: str | Path,
    *,
    out: str | Path,
    seconds: float = 300.0,
    objectives: Sequence[str] | None = None,
    schedules: Mapping[str, Any] | None = None,
    n_samples: int = 2_000,
    n_points: int = 6,
    warmup_steps: int = TrainingSettings.warmup_steps,
    seed: int = 0,
    json_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the field of a run by every objective for the same time; measure ESS on the way.

    Parameters
    ----------
    run_path
        Run directory with a complete reference stage; its recipe gives field, prior, batch size,
        learning rate and ``ode_steps``, its seed prior and initial weights.
    out
        Folder of all results; resumes what it holds. ``objectives.json``, ``.md`` and ``.png``
        are written there after every objective.
    seconds
        Training time of each objective. The learning rate falls to its end over the whole of it,
        so that early measurements are worse than a training that was to end there.
    objectives, schedules
        See :func:`~openmm_eqflow.bench.objectives.choose`.
    n_samples, n_points
        Independent samples per measurement, raw weights; number of measurements, each at twice
        the time of the one before.
    warmup_steps
        First steps of each, over which the learning rate rises: fewer than usual where an
        objective makes few steps in its seconds.
    seed
        Of batches and measurements.
    json_path
        Another copy of the result.
    progress
        Called with the fraction of the training that is left to this call, and a short text.

    Returns
    -------
    dict
        ``prior`` (raw weights of the prior alone), ``chosen`` (name of the recipe's own
        objective), ``times``, and ``objectives``: per name the record of
        :func:`~openmm_eqflow.bench.learning_curve.learning_curve`.

    Raises
    ------
    ConfigurationError
        An objective that is unknown or does not suit, or a folder of another measurement.
    CheckpointError
        The run has no reference data.
    """
    if world_size() > 1:
        raise ConfigurationError(
            "bench objectives measures one process; start it without torchrun"
        )
    run, folder = RunDirectory.open(Path(run_path)), Path(out)
    recipe = run.config.recipe
    entries = choose(recipe, objectives, schedules)
    run.require("reference")
    device = resolve_device(run.config.device)
    settings = {
        "system": run.load_system().name,
        "system_hash": run.config.system_hash,
        "reference_sha256": file_sha256(run.path / "reference.npz"),
        "run_seed": run.config.seed,
        "seed": seed,
        "device": device,
        "seconds": float(seconds),
        "n_points": n_points,
        "n_samples": n_samples,
        "warmup_steps": warmup_steps,
    } | {f"recipe_{key}": value for key, value in recipe.to_dict().items()}
    _claim(folder, settings)
    report = progress or (lambda fraction, text: None)
    with one_torch_thread(), build_target(run.load_system()) as target:
        flow, frames, test = _start(run, target, folder, device, report)
        start = Start(
            recipe=recipe,
            target=target,
            flow=flow,
            frames=frames,
            test=test,
            device=device,
            seconds=seconds,
            n_points=n_points,
            n_samples=n_samples,
            seed=seed,
            warmup_steps=warmup_steps,
        )
        result = settings | {
            "recipe": recipe.to_dict(),
            "start_sha256": flow.source[1] if flow.source else None,
            "chosen": recipe.objective if isinstance(recipe.objective, str) else RECIPE,
            "times": times(seconds, n_points),
            "prior": prior_alone(start),
        }
        result = {k: v for k, v in result.items() if not k.startswith("recipe_")}
        curves = {name: _finished(folder, name, objective) for name, objective in entries.items()}
        missing = [name for name, record in curves.items() if record is None]
        for k, name in enumerate(missing):

            def part(fraction: float, text: str, k: int = k, name: str = name) -> None:
                report((k + fraction) / len(missing), f"{name}: {text}")

            # A checkpoint belongs to the objective, not to what its schedule was called.
            words = json.dumps(plain_json(entries[name]), sort_keys=True).encode()
            work = folder / f"training-{hashlib.sha256(words).hexdigest()[:12]}"
            record = learning_curve(start, entries[name], work, part)
            write_json(folder / f"objective-{name}.json", record)
            shutil.rmtree(work, ignore_errors=True)
            curves[name] = plain_json(record)
            _write(folder, plain_json(result | {"objectives": _known(curves)}))
    made: dict[str, Any] = plain_json(result | {"objectives": _known(curves)})
    if not missing:
        _write(folder, made)  # another choice of what was measured before
    if json_path is not None:
        write_json(Path(json_path), made)
    return made


def _finished(folder: Path, name: str, objective: Any) -> dict[str, Any] | None:
    """Record of an objective that was measured before."""
    file = folder / f"objective-{name}.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record["objective"] != plain_json(objective):
        raise ConfigurationError(
            f"{file} is of another schedule, {json.dumps(record['objective'])}; choose another "
            "name or delete it"
        )
    return record


def _known(curves: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    return {name: record for name, record in curves.items() if record is not None}


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "objectives.json", result)
    write_text(folder / "objectives.md", table(result))
    draw(result, folder / "objectives.png")
