r"""The training loop: one objective, Adam, cosine schedule, exponential moving average, resume.

A checkpoint (weights, average, optimiser moments, random stream, history) is written at least
every ``checkpoint_seconds`` by atomic rename. A run killed at any moment continues from the last
one with the same data order: the objective draws only from the generator that is stored, and grows
its data at step numbers, not at wall-clock times.

Under torchrun every process runs this loop; rank 0 has the clock, evaluates and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from openmm_eqflow.distributed import clock, is_main, share
from openmm_eqflow.errors import TrainingError
from openmm_eqflow.training_log import write_history
from openmm_eqflow.training_state import (
    GrowingObjective,
    Objective,
    ScheduledObjective,
    TrainingSettings,
    TrainingState,
)

__all__ = ["Objective", "TrainingResult", "TrainingSettings", "join_trainings", "train"]

_MAX_BAD_STEPS = 20


@dataclass
class TrainingResult:
    """The averaged field and what happened on the way.

    With ``patience`` it is the average of the best validation loss, and ``stopped_early`` tells
    whether that ended the training.
    """

    average: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    n_steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False


def join_trainings(results: Sequence[TrainingResult]) -> TrainingResult:
    """Trainings of one field in turn as one: steps and seconds go on counting.

    Rows of the history say which ``training`` they are of if there are several; losses of
    different objectives do not compare.
    """
    history: list[dict[str, float]] = []
    steps, seconds = 0, 0.0
    for index, result in enumerate(results):
        part = {"training": float(index)} if len(results) > 1 else {}
        history += [
            row | part | {"step": row["step"] + steps, "seconds": row["seconds"] + seconds}
            for row in result.history
        ]
        steps, seconds = steps + result.n_steps, seconds + result.seconds
    last = results[-1]
    return TrainingResult(last.average, history, steps, seconds, last.stopped_early)


def _learning_rate(step: int, fraction: float, settings: TrainingSettings) -> float:
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    floor = settings.final_fraction
    return settings.learning_rate * warmup * (floor + (1 - floor) * cosine)


def train(
    module: nn.Module,
    objective: Objective,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    log: Path | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> TrainingResult:
    """Minimise ``objective`` for ``settings.seconds`` or ``max_steps``, whichever comes first.

    Parameters
    ----------
    module
        The field; trained in place.
    objective
        Loss over the same module.
    checkpoint
        File to write and to resume from.
    log
        CSV file that mirrors the history (:mod:`~openmm_eqflow.training_log`).
    evaluate
        Called with the averaged module at every evaluation; its numbers join the history.
    progress
        Called with the fraction done and a short text.

    Raises
    ------
    TrainingError
        The loss stays non-finite; the last good weights are in ``checkpoint``. The error has the
        history.
    """
    state = TrainingState(module, settings)
    if checkpoint is not None and share(checkpoint.is_file()):
        state.load(checkpoint)
    elif checkpoint is not None and is_main():
        state.save(checkpoint)
    state.synchronise()
    try:
        early = _loop(
            state,
            objective,
            settings,
            checkpoint if is_main() else None,
            log if is_main() else None,
            evaluate,
            progress if is_main() else None,
        )
    except TrainingError as error:
        error.history = state.history
        raise
    finally:
        state.executor.shutdown()
    return TrainingResult(state.outcome(), state.history, state.step, state.seconds, early)


def _loop(
    state: TrainingState,
    objective: Objective,
    settings: TrainingSettings,
    checkpoint: Path | None,
    log: Path | None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    progress: Callable[[float, str], None] | None,
) -> bool:
    saved = recorded = clock()
    started = saved - state.seconds
    if log is not None:
        write_history(log, state.history)
    losses: list[float] = []
    bad = 0
    while True:
        now = clock()
        state.seconds = now - started
        fraction = max(state.seconds / settings.seconds, state.step / settings.max_steps)
        due = state.evaluation_due(settings, now - recorded)
        if losses and (due or fraction >= 1.0):
            state.append(share(_record(state, objective, settings, losses, evaluate)))
            if log is not None:
                write_history(log, state.history)
            losses, recorded = [], clock()
            if settings.evaluate_at:
                started += recorded - now
            now = recorded
        early = state.out_of_patience
        over = fraction >= 1.0 or early
        due = over or now - saved > settings.checkpoint_seconds
        # Weights that give no finite loss are not worth keeping: the file holds the last good
        # ones.
        if checkpoint is not None and due and not bad:
            state.save(checkpoint)
            saved = now
        if over:
            return early
        if isinstance(objective, GrowingObjective):
            objective.grow(state.step)
        if isinstance(objective, ScheduledObjective):
            objective.advance(fraction)
        loss = _step(state, objective, settings, fraction)
        if loss is None:
            bad += 1
            if bad >= _MAX_BAD_STEPS:
                kept = f"the last good weights are in {checkpoint}" if checkpoint else "none kept"
                raise TrainingError(
                    f"the loss was not finite {bad} times in a row at step {state.step}; {kept}; "
                    "lower the learning rate and run again"
                )
        else:
            bad = 0
            losses.append(loss)
        if progress is not None and state.step % 20 == 0:
            progress(fraction, _summary(state, losses))


def _step(
    state: TrainingState, objective: Objective, settings: TrainingSettings, fraction: float
) -> float | None:
    for group in state.optimiser.param_groups:
        group["lr"] = _learning_rate(state.step, fraction, settings)
    loss = state.gradient(objective, settings.batch_size)
    norm = nn.utils.clip_grad_norm_(state.module.parameters(), settings.gradient_clip)
    state.step += 1
    if not bool(torch.isfinite(norm + loss.detach())):
        return None
    state.optimiser.step()
    decay = min(settings.average, state.step / (state.step + 10.0))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(state.average.parameters()), list(state.module.parameters()), 1 - decay
        )
    return float(loss.detach())


def _record(
    state: TrainingState,
    objective: Objective,
    settings: TrainingSettings,
    losses: list[float],
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
) -> dict[str, float]:
    """One row of the history; the validation points are the same every time."""
    if not is_main():
        return {}
    row = {
        "step": float(state.step),
        "seconds": state.seconds,
        "loss": sum(losses) / len(losses),
        "learning_rate": float(state.optimiser.param_groups[0]["lr"]),
    }
    fixed = torch.Generator().manual_seed(settings.seed + 1)
    weights = {k: v.detach().clone() for k, v in state.module.state_dict().items()}
    state.module.load_state_dict(state.average.state_dict())
    try:
        with torch.no_grad():
            row["validation_loss"] = float(objective.validation(settings.validation_size, fixed))
    finally:
        state.module.load_state_dict(weights)
    if evaluate is not None:
        row |= evaluate(state.average)
    return row


def _summary(state: TrainingState, losses: list[float]) -> str:
    recent = losses[-100:]
    text = f"step {state.step}, loss {sum(recent) / len(recent):.4g}" if recent else ""
    if state.history and "relative_ess" in state.history[-1]:
        text += f", ESS {100 * state.history[-1]['relative_ess']:.0f} %"
    return text
