"""One training of the 2020 paper: its frames, its budget, its test."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives import FIELDS, RECIPE, FieldSpec, build_objective
from reference_frames import Frames
from torch import Tensor, nn

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import save_flow
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.training.loop import TrainingSettings, train

Report = Callable[[float, str], None]
N_EVALUATIONS = 20
MAX_VALIDATION = 500
GRID_TOLERANCE = 0.01  # kT
FEWEST_STEPS, MOST_STEPS = 4, 128  # of a time grid


@dataclass(frozen=True)
class Task:
    """One training: which field on how many frames of what."""

    system: str
    field: str
    augmented: bool
    size: int
    seed: int

    @property
    def name(self) -> str:
        """Stem of its files."""
        how = "augmented" if self.augmented else "plain"
        return f"{self.system}-{self.field}-{how}-{self.size}-seed{self.seed}"


@dataclass(frozen=True)
class Budget:
    """What every training gets: seconds or optimiser steps, whichever is set."""

    seconds: float | None
    steps: int | None
    objective: str
    batch_size: int
    n_test: int

    def settings(self, spec: FieldSpec, seed: int) -> TrainingSettings:
        """Set the training loop: it never stops early and keeps the best weights."""
        evaluations: dict[str, Any] = {"evaluate_seconds": (self.seconds or 0.0) / N_EVALUATIONS}
        if self.steps is not None:
            evaluations["evaluate_steps"] = max(1, self.steps // N_EVALUATIONS)
        return TrainingSettings(
            seconds=self.seconds or math.inf,
            max_steps=self.steps or 10**9,
            batch_size=self.batch_size,
            learning_rate=spec.learning_rate,
            average=RECIPE.average,
            gradient_clip=RECIPE.gradient_clip,
            validation_size=512,
            patience=10**9,
            seed=seed,
            **evaluations,
        )


def training_frames(frames: Frames, task: Task) -> tuple[Tensor, Tensor]:
    """Frames of a task, and the rest; the sets of a seed are nested, the larger holds the smaller.

    The first of them are those for validation.
    """
    order = torch.randperm(len(frames.pool), generator=torch.Generator().manual_seed(task.seed))
    return frames.pool[order[: task.size]], frames.pool[order[task.size :]]


def train_one(
    task: Task, frames: Frames, budget: Budget, folder: Path, report: Report, device: str
) -> dict[str, Any]:
    """Fit prior and field, train, calibrate the time grid, measure the test NLL, save."""
    spec, classes = FIELDS[task.field], frames.target.symmetry.classes
    x, _ = training_frames(frames, task)
    n_validation = max(2, min(task.size // 5, MAX_VALIDATION))
    held_out, x = x[:n_validation], x[n_validation:]
    prior = MeanFreeGaussian.fit(x)
    torch.manual_seed(task.seed)  # initial weights only
    module = spec.build(x, classes=classes, **spec.sizes).to(device)
    objective = build_objective(
        budget.objective,
        module,
        prior,
        x,
        held_out,
        classes=classes,
        augmented=task.augmented,
        equivariant=spec.equivariant,
    )
    # One that was interrupted goes on, unless its budget was another.
    mark = zlib.crc32(repr(budget).encode())
    checkpoint = folder / f"{task.name}-{mark:08x}.checkpoint.safetensors"
    settings = budget.settings(spec, task.seed)
    result = train(module, objective, settings, checkpoint=checkpoint, progress=report)
    best = min(result.history, key=lambda row: row.get("validation_loss", math.inf))
    report(1.0, "test NLL")
    started = time.monotonic()
    flow = EquivariantFlow(
        prior,
        result.average.eval(),  # type: ignore[arg-type]
        chunk_size=spec.chunk_size(*prior.event_shape),
    )
    test = frames.test[:: round(1 / spec.share(*prior.event_shape))]
    measured = measure_nll(flow, frames, test, task.seed)
    save_flow(flow, folder.parent / "flows" / task.name, {"task": asdict(task)})
    checkpoint.unlink(missing_ok=True)
    return measured | {
        "floor": float(frames.floor.value),
        "floor_error": float(frames.floor.error),
        "n_training": len(x),
        "n_validation": n_validation,
        "n_steps": result.n_steps,
        "training_seconds": result.seconds,
        "kept_step": best["step"],
        "evaluation_seconds": time.monotonic() - started,
        "n_parameters": n_parameters(flow.module),
        "device": device,
        "history": result.history,
    }


def n_parameters(module: nn.Module) -> int:
    """Count trained numbers."""
    return sum(p.numel() for p in module.parameters())


def calibrate(flow: EquivariantFlow, frames: Tensor, *, seed: int) -> float:
    """Freeze the coarsest uniform grid on which log q is right, of frames and of samples alike.

    The number of RK4 steps is doubled until the mean change of log q is below 0.01 kT; that
    change, an estimate of the error of the coarser grid, is returned. Test frames count because a
    flow fitted to little data is stiff where they are and its samples are not.
    """
    latents = flow.prior.sample_latent(len(frames), generator=torch.Generator().manual_seed(seed))

    def log_q(n_steps: int) -> Tensor:
        flow.grid = tuple(k / n_steps for k in range(n_steps + 1))
        with torch.no_grad():
            forwards = flow.transform(latents.to(flow.device))[1]
        return torch.cat([flow.log_prob(frames), forwards])

    n_steps, before, change = FEWEST_STEPS, log_q(FEWEST_STEPS), math.inf
    while n_steps < MOST_STEPS:
        after = log_q(2 * n_steps)
        change = float((after - before).abs().nan_to_num(nan=math.inf).mean())
        if change <= GRID_TOLERANCE:
            flow.grid = tuple(k / n_steps for k in range(n_steps + 1))
            break
        n_steps, before = 2 * n_steps, after
    return change


def measure_nll(flow: EquivariantFlow, frames: Frames, test: Tensor, seed: int) -> dict[str, Any]:
    r"""Mean of -log q over test frames, and how far it is above the least possible one.

    The excess is the forward Kullback-Leibler divergence, :math:`E_p[\log w] - \log Z`, which is
    far less noisy than a difference of two means of u.
    """
    change = calibrate(flow, test[: min(32, flow.chunk_size)], seed=seed)
    log_q = flow.log_prob(test).cpu()
    log_w = (-frames.target.reduced_potential(test) - log_q).numpy()
    nll = -log_q.numpy()
    root = math.sqrt(len(nll))
    return {
        "n_test": len(nll),
        "n_not_finite": int((~np.isfinite(nll)).sum()),
        "test_nll": float(nll.mean()),
        "test_nll_error": float(nll.std(ddof=1)) / root,
        "excess": float(log_w.mean()) - float(frames.log_z.value),
        "excess_error": math.hypot(float(log_w.std(ddof=1)) / root, float(frames.log_z.error)),
        "n_ode_steps": flow.n_ode_steps,
        "grid_change": change,
    }
