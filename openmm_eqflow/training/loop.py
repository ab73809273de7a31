r"""The training loop: settings, objective, and the state a resumed run needs.

What a training run is made of: objective, settings, and the state a resumed run needs.

The training loop: one objective, Adam, cosine schedule, exponential moving average, resume.

A checkpoint (weights, average, optimiser moments, random stream, history) is written at least
every ``checkpoint_seconds`` by atomic rename. A run killed at any moment continues from the last
one with the same data order: the objective draws only from the generator that is stored, and grows
its data at step numbers, not at wall-clock times.

Under torchrun every process runs this loop; rank 0 has the clock, evaluates and writes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import CheckpointError, TrainingError
from openmm_eqflow.files import write_history
from openmm_eqflow.flows.storage import load_tensors, save_tensors
from openmm_eqflow.parallel import (
    clock,
    is_main,
    rank,
    share,
    share_tensors,
    sum_over_processes,
    world_size,
)
from openmm_eqflow.seeds import child

__all__ = [
    "GrowingObjective",
    "Objective",
    "ScheduledObjective",
    "TrainingResult",
    "TrainingSettings",
    "TrainingState",
    "join_trainings",
    "train",
]


class Objective(Protocol):
    """A differentiable loss over fresh batches."""

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Scalar loss of one batch."""
        ...

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Loss on held-out data."""
        ...


@runtime_checkable
class GrowingObjective(Objective, Protocol):
    """An objective whose data grow with the step number."""

    def grow(self, step: int) -> None:
        """Add the data that are due at ``step``."""
        ...


@runtime_checkable
class ScheduledObjective(Objective, Protocol):
    """An objective that changes with the fraction of the training done."""

    def advance(self, fraction: float) -> None:
        """Be what is wanted when ``fraction`` is done."""
        ...


@dataclass(frozen=True)
class TrainingSettings:
    """What one training run does; ``seconds`` counts earlier attempts too.

    The averaged field is evaluated every ``evaluate_steps`` steps, or if that is 0 every
    ``evaluate_seconds``; steps make an early stop the same on every machine.
    ``patience`` evaluations without a better validation loss end it (0: never). A batch is worked
    on in ``n_shards`` parts (0: one per thread, at least one per process); the loss curve depends
    on their number, not on how many threads or processes share them. ``evaluate_at`` are seconds
    of training to evaluate at, in place of every ``evaluate_seconds``: for a learning curve, so
    that the time evaluations take is then not counted.
    """

    seconds: float
    max_steps: int = 10**9
    batch_size: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    average: float = 0.999
    gradient_clip: float = 2.0
    validation_size: int = 4096
    checkpoint_seconds: float = 20.0
    evaluate_seconds: float = 40.0
    evaluate_steps: int = 0
    n_threads: int = 1
    seed: int = 0
    patience: int = 0
    n_shards: int = 0
    evaluate_at: tuple[float, ...] = ()


class TrainingState:
    """Everything a resumed run needs, as tensors and JSON."""

    def __init__(self, module: nn.Module, settings: TrainingSettings) -> None:
        self.module = module
        self.average = copy.deepcopy(module)
        self.optimiser = torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        device = next(module.parameters()).device
        self.generator = child(settings.seed, "training")
        self.n_threads = settings.n_threads if device.type == "cpu" else 1
        self.executor = ThreadPoolExecutor(self.n_threads)
        self.n_shards: int = max(share(settings.n_shards or self.n_threads), world_size())
        self.patience = settings.patience
        self.best: dict[str, Tensor] = {}
        self.step, self.seconds, self.since_record = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []

    def gradient(self, objective: Objective, batch_size: int) -> Tensor:
        """Set the gradients of one batch, split over threads and processes; return its mean loss.

        Torch splits single operations over threads, which hardly pays at these sizes; whole
        shards side by side do. Every shard has its own stream, seeded from the stored one.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        n = self.n_shards
        if n == 1:
            loss = objective(batch_size, self.generator)
            gradients = _gradients(loss, parameters)
        else:
            seeds = torch.randint(2**62, (n,), generator=self.generator).tolist()

            def shard(seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
                torch.set_num_threads(1)
                stream = torch.Generator().manual_seed(seed)
                part = objective(-(-batch_size // n), stream)
                return part.detach(), _gradients(part, parameters)

            parts = list(self.executor.map(shard, seeds[rank() :: world_size()]))
            own = [sum((p[0] for p in parts[1:]), parts[0][0]).to(parts[0][1][0])]
            own += [sum(c[1:], c[0]) for c in zip(*(p[1] for p in parts), strict=True)]
            loss, *total = (value / n for value in sum_over_processes(own))
            gradients = tuple(total)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def synchronise(self) -> None:
        """Make weights and random stream those of rank 0."""
        for module in (self.module, self.average):
            shared = share_tensors(module.state_dict())
            if rank() > 0:
                module.load_state_dict(shared)
        self.generator.set_state(share_tensors({"state": self.generator.get_state()})["state"])

    def evaluation_due(self, settings: TrainingSettings, waited: float) -> bool:
        """Whether to evaluate now, ``waited`` seconds after the last time."""
        if settings.evaluate_steps:
            return self.step % settings.evaluate_steps == 0
        if not settings.evaluate_at:
            return waited > settings.evaluate_seconds
        last = self.history[-1]["seconds"] if self.history else 0.0
        return any(last < t <= self.seconds for t in settings.evaluate_at)

    def append(self, row: dict[str, float]) -> None:
        """Add a row to the history; keep the average if its validation loss is the best so far."""
        self.history.append(row)
        if self.patience and self._since_best() == 0:
            self.best = {k: v.detach().clone() for k, v in self.average.state_dict().items()}

    def _since_best(self) -> int:
        """Count evaluations since the best validation loss; one that is no number is the worst."""
        losses = [row.get("validation_loss", math.inf) for row in self.history]
        losses = [math.inf if math.isnan(value) else value for value in losses]
        return len(losses) - 1 - losses.index(min(losses))

    @property
    def out_of_patience(self) -> bool:
        """Whether ``patience`` evaluations brought no better validation loss."""
        return bool(self.patience and self.history and self._since_best() >= self.patience)

    def outcome(self) -> nn.Module:
        """Return the averaged module: the best with ``patience``, else the last."""
        if self.patience and self.best:
            self.average.load_state_dict(self.best)
        return self.average

    def save(self, path: Path) -> None:
        """Write everything atomically."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, module in (("module", self.module), ("average", self.average)):
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        moments = self.optimiser.state_dict()["state"]
        for index, slots in moments.items():
            tensors |= {f"adam.{index}.{k}": v for k, v in slots.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        words = {"step": self.step, "seconds": self.seconds, "history": self.history}
        save_tensors(path, tensors, words)

    def load(self, path: Path) -> None:
        """Continue from what :meth:`save` wrote."""
        tensors, words = load_tensors(path)
        try:
            for name, module in (("module", self.module), ("average", self.average)):
                start = f"{name}."
                module.load_state_dict(
                    {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
                )
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} belongs to another architecture; delete the folder {path.parent} to "
                "train anew"
            ) from error
        state = self.optimiser.state_dict()
        state["state"] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, slot = key.split(".")
                state["state"].setdefault(int(index), {})[slot] = value
        self.optimiser.load_state_dict(state)
        self.best = {k[5:]: v for k, v in tensors.items() if k.startswith("best.")}
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = int(words["step"]), float(words["seconds"])
        self.history = list(words["history"])


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Gradients, zero for weights the loss does not see (a field without torsions has some)."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )

_FLOOR = 0.005  # of the learning rate, at the end
_MAX_BAD_STEPS = 20


@dataclass
class TrainingResult:
    """The averaged field and what happened on the way.

    With ``patience`` it is the average of the best validation loss, and ``stopped_early`` tells
    whether that ended the training. ``prior_kept``: relative ESS of the trained flow, of its prior
    and their number of samples, where the flow lost to the prior and its field was put to rest.
    """

    average: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    n_steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    prior_kept: dict[str, float] | None = None


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
    return settings.learning_rate * warmup * (_FLOOR + (1 - _FLOOR) * cosine)


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
        CSV file that mirrors the history (:mod:`~openmm_eqflow.files`).
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
    fixed = child(settings.seed, "validation")
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
