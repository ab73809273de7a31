r"""The training loop: one objective, Adam, cosine schedule, exponential moving average, resume.

A checkpoint (weights, average, optimiser moments, random stream, history) is written at least
every
``checkpoint_seconds`` by atomic rename. A run killed at any moment continues from the last one
with
the same data order: the objective draws only from the generator that is stored, and grows its data
at step numbers, not at wall-clock times.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from openmm_eqflow.checkpoint import load_tensors, save_tensors
from openmm_eqflow.errors import CheckpointError, TrainingError

__all__ = ["Objective", "TrainingResult", "TrainingSettings", "train"]

_MAX_BAD_STEPS = 20


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


@dataclass(frozen=True)
class TrainingSettings:
    """What one training run does; ``seconds`` counts earlier attempts too."""

    seconds: float
    max_steps: int = 10**9
    batch_size: int = 512
    learning_rate: float = 2e-3
    final_fraction: float = 0.005
    warmup_steps: int = 100
    average: float = 0.999
    gradient_clip: float = 2.0
    weight_decay: float = 0.0
    validation_size: int = 4096
    checkpoint_seconds: float = 20.0
    evaluate_seconds: float = 40.0
    n_threads: int = 1
    seed: int = 0


@dataclass
class TrainingResult:
    """The averaged field and what happened on the way."""

    average: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    n_steps: int = 0
    seconds: float = 0.0


class _State:
    """Everything a resumed run needs, as tensors and JSON."""

    def __init__(self, module: nn.Module, settings: TrainingSettings) -> None:
        self.module = module
        self.average = copy.deepcopy(module)
        self.optimiser = torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        device = next(module.parameters()).device
        self.generator = torch.Generator(device="cpu").manual_seed(settings.seed)
        self.n_threads = settings.n_threads if device.type == "cpu" else 1
        self.executor = ThreadPoolExecutor(self.n_threads)
        self.step, self.seconds, self.since_record = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []

    def gradient(self, objective: Objective, batch_size: int) -> Tensor:
        """Set the gradients of one batch, split over threads; return its mean loss.

        Torch splits single operations over threads, which hardly pays at these sizes; whole
        shards side by side do. Every shard has its own stream, seeded from the stored one.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        n = self.n_threads
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

            parts = list(self.executor.map(shard, seeds))
            loss = sum((p[0] for p in parts[1:]), parts[0][0]) / n
            gradients = tuple(
                sum(column[1:], column[0]) / n
                for column in zip(*(p[1] for p in parts), strict=True)
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, module in (("module", self.module), ("average", self.average)):
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        moments = self.optimiser.state_dict()["state"]
        for index, slots in moments.items():
            tensors |= {f"adam.{index}.{k}": v for k, v in slots.items()}
        words = {"step": self.step, "seconds": self.seconds, "history": self.history}
        save_tensors(path, tensors, words)

    def load(self, path: Path) -> None:
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
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = int(words["step"]), float(words["seconds"])
        self.history = list(words["history"])


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Gradients, zero for weights the loss does not see (a field without torsions has some)."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    )


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
    evaluate
        Called with the averaged module every ``evaluate_seconds``; its numbers join the history.
    progress
        Called with the fraction done and a short text.

    Raises
    ------
    TrainingError
        The loss stays non-finite; the last good weights are in ``checkpoint``.
    """
    state = _State(module, settings)
    if checkpoint is not None and checkpoint.is_file():
        state.load(checkpoint)
    elif checkpoint is not None:
        state.save(checkpoint)
    try:
        _loop(state, objective, settings, checkpoint, evaluate, progress)
    finally:
        state.executor.shutdown()
    return TrainingResult(state.average, state.history, state.step, state.seconds)


def _loop(
    state: _State,
    objective: Objective,
    settings: TrainingSettings,
    checkpoint: Path | None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    progress: Callable[[float, str], None] | None,
) -> None:
    started = time.monotonic() - state.seconds
    saved = recorded = time.monotonic()
    losses: list[float] = []
    bad = 0
    while True:
        state.seconds = time.monotonic() - started
        fraction = max(state.seconds / settings.seconds, state.step / settings.max_steps)
        now = time.monotonic()
        due = now - recorded > settings.evaluate_seconds
        if losses and (due or fraction >= 1.0):
            state.history.append(_record(state, objective, settings, losses, evaluate))
            losses, recorded = [], time.monotonic()
        due = fraction >= 1.0 or time.monotonic() - saved > settings.checkpoint_seconds
        # Weights that give no finite loss are not worth keeping: the file holds the last good
        # ones.
        if checkpoint is not None and due and not bad:
            state.save(checkpoint)
            saved = time.monotonic()
        if fraction >= 1.0:
            break
        if isinstance(objective, GrowingObjective):
            objective.grow(state.step)
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
    state: _State, objective: Objective, settings: TrainingSettings, fraction: float
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
    state: _State,
    objective: Objective,
    settings: TrainingSettings,
    losses: list[float],
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
) -> dict[str, float]:
    """One row of the history; the validation points are the same every time."""
    row = {
        "step": float(state.step),
        "seconds": state.seconds,
        "loss": sum(losses) / len(losses),
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


def _summary(state: _State, losses: list[float]) -> str:
    recent = losses[-100:]
    text = f"step {state.step}, loss {sum(recent) / len(recent):.4g}" if recent else ""
    if state.history and "relative_ess" in state.history[-1]:
        text += f", ESS {100 * state.history[-1]['relative_ess']:.0f} %"
    return text
