"""Which objective trains best: ESS against training time, of each alone and of schedules.

Prior and initial weights are made once and shared through ``start.safetensors``; data, seed,
batch size and learning rate are those of the run's recipe. Everything is resumable: a finished
objective is a JSON file in the folder, one under way has a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_eqflow.atomic import plain_json, write_json, write_text
from openmm_eqflow.bench.learning_curve import Start, learning_curve, prior_alone, times
from openmm_eqflow.bench.objectives_choice import RECIPE, choose
from openmm_eqflow.bench.objectives_report import draw, table
from openmm_eqflow.checkpoint import file_sha256, load_flow, save_flow
from openmm_eqflow.distributed import world_size
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.fitting import build_field, fit_prior, hot_frames, split_frames
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.parallel import one_torch_thread
from openmm_eqflow.precision import resolve_device
from openmm_eqflow.reference import load_reference
from openmm_eqflow.rundir import RunDirectory
from openmm_eqflow.target import BoltzmannTarget
from openmm_eqflow.training import TrainingSettings
from openmm_eqflow.workflow import build_target

__all__ = ["run_bench"]

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
        torch.manual_seed(seed)  # as the training stage does
        generator = torch.Generator().manual_seed(seed + 2)
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
        See :func:`~openmm_eqflow.bench.objectives_choice.choose`.
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
