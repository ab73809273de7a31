"""Trainings of the 2020 paper: command-line options, what is trained, where it is kept.

A finished training is ``OUT/trainings/NAME.json``, with its flow in ``OUT/flows``; a script that
finds one does not train again. Tables are made of all that a folder has, whoever made it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from objectives import FIELDS, RECIPE
from one_training import Budget, Report, Task, train_one
from reference_frames import Frames, load_frames, reference_run
from rich.console import Console

from openmm_eqflow.cli.progress import stage_progress
from openmm_eqflow.errors import ConfigurationError, EqFlowError
from openmm_eqflow.files import write_json
from openmm_eqflow.parallel import machine_name, one_torch_thread
from openmm_eqflow.training.precision import resolve_device

CONSOLE = Console()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that the experiments share."""
    parser = argparse.ArgumentParser(
        description=(description or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument(
        "--runs", type=Path, help="folder of runs named as the systems, made if absent [OUT/runs]"
    )
    parser.add_argument("--n-frames", type=int, default=12_500, help="of a run that is made")
    parser.add_argument("--systems", nargs="+", default=["dw4", "lj13"])
    parser.add_argument("--fields", nargs="+", default=list(FIELDS), choices=list(FIELDS))
    parser.add_argument("--augmentation", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, default=2000, help="optimiser steps of each training")
    budget.add_argument("--seconds", type=float, help="of each training, instead of steps")
    parser.add_argument("--batch-size", type=int, default=RECIPE.batch_size)
    parser.add_argument("--objective", default="flow-matching", choices=["flow-matching", "nll"])
    parser.add_argument("--n-test", type=int, default=1000, help="frames of the test NLL")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    return parser


def budget_of(arguments: argparse.Namespace) -> Budget:
    """Read the budget from parsed options."""
    return Budget(
        arguments.seconds,
        None if arguments.seconds else arguments.steps,
        arguments.objective,
        arguments.batch_size,
        arguments.n_test,
    )


def tasks_of(arguments: argparse.Namespace, sizes: Sequence[int]) -> list[Task]:
    """All combinations; the last seed comes last, so that an early stop leaves whole tables."""
    return [
        Task(system, field, how == "on", size, seed)
        for seed in arguments.seeds
        for system in arguments.systems
        for size in sizes
        for field in arguments.fields
        for how in arguments.augmentation
    ]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End with one line for what the user can put right."""
    try:
        yield
    except (EqFlowError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def prepare(arguments: argparse.Namespace, sizes: Sequence[int]) -> dict[str, Frames]:
    """Frames of every system asked for; makes the reference data that are missing."""
    if min(sizes) < 4 or arguments.n_test < 10:
        raise ConfigurationError(
            f"got sizes {list(sizes)} and n-test {arguments.n_test}, expected at least 4 frames "
            "to train on and 10 to test on"
        )
    runs = arguments.runs or arguments.out / "runs"
    # A tenth of every run is for tests, and a little more than that lost to rounding.
    needed = max(math.ceil(max(sizes) / 0.9), 10 * arguments.n_test) + 20
    n_frames = max(arguments.n_frames, needed)
    frames = {}
    for name in arguments.systems:
        with stage_progress(f"{name} data", CONSOLE) as report:
            run = reference_run(name, runs / name, n_frames, report)
        frames[name] = load_frames(run, name, n_pool=max(sizes), n_test=arguments.n_test)
    return frames


def each_missing(
    title: str,
    folder: Path,
    tasks: Sequence[Task],
    settings: Callable[[Task], dict[str, Any]],
    work: Callable[[Task, Report], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Do what has no file in ``folder`` yet, with progress; return all records in order.

    Raises
    ------
    ConfigurationError
        A record was made with other settings.
    """
    records = {task: _finished(folder / f"{task.name}.json", settings(task)) for task in tasks}
    missing = [task for task, record in records.items() if record is None]
    if len(missing) < len(tasks):
        CONSOLE.print(f"{title}: {len(tasks) - len(missing)} of {len(tasks)} done before")
    with stage_progress(title, CONSOLE) as report:
        for k, task in enumerate(missing):

            def progress(fraction: float, text: str, k: int = k, task: Task = task) -> None:
                # The last few percent are for what comes after the training.
                report((k + 0.95 * min(fraction, 1.0)) / len(missing), f"{task.name}: {text}")

            started = time.monotonic()
            record = work(task, progress) | {
                "task": asdict(task),
                "settings": settings(task),
                "machine": machine_name(),
                "wall_seconds": time.monotonic() - started,
            }
            write_json(folder / f"{task.name}.json", record)
            records[task] = _finished(folder / f"{task.name}.json", settings(task))
            report((k + 1) / len(missing), f"{task.name} done")
    return [record for record in records.values() if record is not None]


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        found = record["settings"].get(key)
        if found != value:
            raise ConfigurationError(
                f"{path} was made with {key} {found}, now {value}: choose another --out"
            )
    return record


def all_records(folder: Path) -> list[dict[str, Any]]:
    """Read every record of ``folder``, of this command and of earlier ones."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]

    def order(record: dict[str, Any]) -> tuple[Any, ...]:
        task = Task(**record["task"])
        field = list(FIELDS).index(task.field)
        return task.system, task.size, field, task.augmented, task.seed

    return sorted(records, key=order)


def train_all(
    tasks: Sequence[Task], frames: dict[str, Frames], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train and test what is missing."""
    folder, budget = arguments.out / "trainings", budget_of(arguments)

    def settings(task: Task) -> dict[str, Any]:
        return asdict(budget) | {"reference": frames[task.system].identity}

    def work(task: Task, report: Report) -> dict[str, Any]:
        device = resolve_device(arguments.device)
        with one_torch_thread():
            return train_one(task, frames[task.system], budget, folder, report, device)

    return each_missing("training", folder, tasks, settings, work)


def measure_flows(
    arguments: argparse.Namespace,
    title: str,
    kind: str,
    measure: Callable[[Task, Frames, argparse.Namespace, Report], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Train what is missing, measure every flow once; return all records of folder ``kind``."""
    frames = prepare(arguments, arguments.sizes)
    tasks = tasks_of(arguments, arguments.sizes)
    train_all(tasks, frames, arguments)
    settings = {"n_samples": arguments.n_samples, "training": asdict(budget_of(arguments))}
    each_missing(
        title,
        arguments.out / kind,
        tasks,
        lambda task: settings,
        lambda task, report: measure(task, frames[task.system], arguments, report),
    )
    return all_records(arguments.out / kind)
