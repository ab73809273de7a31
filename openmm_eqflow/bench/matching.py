"""Whether the field with the cheap exact divergence learns as well as the EGNN.

Both fields see the same batches (one seed) of the same flow-matching objective for the same number
of steps; the validation loss is measured on the same pairs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_json
from openmm_eqflow.parallel import available_threads, machine_name, one_torch_thread
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.fit import split_frames
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import child, child_seed
from openmm_eqflow.training.flow_matching import FlowMatchingLoss
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.vector_fields import EGNNField, LeaveOneOutField

__all__ = [
    "run_bench",
]

_FIELDS: dict[str, Callable[..., nn.Module]] = {
    "LeaveOneOutField": LeaveOneOutField.fit,
    "EGNNField": EGNNField.fit,
}


def run_bench(
    run_path: str | Path,
    *,
    n_steps: int = 2_000,
    record_seconds: float = 60.0,
    n_validation: int = 16_384,
    seed: int = 0,
    egnn: dict[str, Any] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Train both fields on the reference frames of a run of a cluster.

    Parameters
    ----------
    run_path
        Run directory with a complete reference stage; its recipe names the leave-one-out field,
        batch size and learning rate.
    n_steps
        Optimiser steps of each field, with the same cosine schedule.
    record_seconds
        Time between rows of the curves.
    n_validation
        Pairs of latent and held-out frame, the same ones for both fields.
    egnn
        Keyword arguments of :class:`~openmm_eqflow.vector_fields.baselines.EGNNField`; by default
        4
        layers 64 wide as in the published flows.

    Returns
    -------
    dict
        ``curves``: of each field the rows (step, seconds, loss: held-out flow-matching loss in
        nm^2); ``seconds_per_step``; ``loss_ratio``: final loss of the leave-one-out field over
        that of the EGNN; ``time_ratio`` likewise.
    """
    run = RunDirectory.open(Path(run_path))
    recipe = run.config.recipe
    if recipe.objective != "flow-matching":
        raise ConfigurationError(f"{run_path} does not train by flow matching; name a cluster")
    run.require("reference")
    with build_target(run.load_system()) as target:
        classes, proper = target.symmetry.classes, target.check_chirality
    frames, test = split_frames(load_reference(run.path))
    prior = MeanFreeGaussian.fit(frames)
    settings = TrainingSettings(
        seconds=math.inf,
        max_steps=n_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        average=recipe.average,
        gradient_clip=recipe.gradient_clip,
        evaluate_seconds=record_seconds,
        validation_size=512,
        n_threads=available_threads(),
        seed=seed,
    )
    options = {"LeaveOneOutField": dict(recipe.field or {}), "EGNNField": dict(egnn or {})}
    curves: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    for name, build in _FIELDS.items():
        torch.manual_seed(child_seed(seed, "weights"))
        field = build(frames, classes=classes, **options[name])

        def held_out_loss(average: nn.Module) -> dict[str, float]:
            loss = FlowMatchingLoss(average, prior, test, classes=classes, proper=proper)
            stream = child(seed, "evaluation")
            return {"held_out": float(loss.validation(n_validation, stream))}

        with one_torch_thread():
            loss = FlowMatchingLoss(field, prior, frames, classes=classes, proper=proper)
            history = train(field, loss, settings, evaluate=held_out_loss).history
        curves[name] = [
            {"step": row["step"], "seconds": row["seconds"], "loss": row["held_out"]}
            for row in history
        ]
        seconds[name] = _seconds_per_step(field, loss, recipe.batch_size)
    first, second = (curves[name][-1]["loss"] for name in _FIELDS)
    result = {
        "system": run.config.system,
        "n_steps": n_steps,
        "batch_size": recipe.batch_size,
        "n_validation": n_validation,
        "seed": seed,
        "n_threads": settings.n_threads,
        "options": options,
        "curves": curves,
        "loss_ratio": first / second,
        "seconds_per_step": seconds,
        "time_ratio": seconds["LeaveOneOutField"] / seconds["EGNNField"],
        "device_name": machine_name(),
    }
    if json_path is not None:
        write_json(Path(json_path), result)
    return result


def _seconds_per_step(
    field: nn.Module, loss: FlowMatchingLoss, batch_size: int, n_repeats: int = 9
) -> float:
    """Median of loss and gradient on one thread."""
    stream = torch.Generator().manual_seed(0)
    times = []
    for _ in range(n_repeats):
        clock = time.perf_counter()
        loss(batch_size, stream).backward()
        times.append(time.perf_counter() - clock)
        field.zero_grad()
    return statistics.median(times)
