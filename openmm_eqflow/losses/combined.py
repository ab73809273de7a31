r"""Several objectives as one: :math:`L = \sum_k w_k(s)\, L_k`, s the fraction of training done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.losses.schedule import Schedule

__all__ = ["ScheduledLoss"]

_SEEDS = 2**62


class ScheduledLoss:
    """Weighted sum of objectives over the same field; one of weight zero is not evaluated.

    Every objective has a stream of its own, seeded from the caller's by one draw per batch: which
    batch an objective sees at a step does not depend on the weights, which follow the clock where
    training does.

    Parameters
    ----------
    objectives
        By name; those of the schedule.
    schedule
        Weights over the fraction of training done.
    """

    def __init__(self, objectives: Mapping[str, Any], schedule: Schedule) -> None:
        if list(objectives) != list(schedule.knots):
            raise ValueError(
                f"objectives {list(objectives)} and those of the schedule, "
                f"{list(schedule.knots)}, differ: give one for each, in the same order"
            )
        self.objectives, self.schedule = dict(objectives), schedule
        self.weights = schedule.weights(0.0)

    def advance(self, fraction: float) -> None:
        """Set the weights for ``fraction`` of the training done."""
        self.weights = self.schedule.weights(fraction)

    def grow(self, step: int) -> None:
        """Let objectives add the data that are due at ``step``."""
        for objective in self.objectives.values():
            if hasattr(objective, "grow"):
                objective.grow(step)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Weighted sum over one batch of each objective."""
        seeds = torch.randint(_SEEDS, (len(self.objectives),), generator=generator).tolist()
        total: Tensor | None = None
        for (name, objective), seed in zip(self.objectives.items(), seeds, strict=True):
            if self.weights[name] > 0:
                stream = torch.Generator().manual_seed(seed)
                term = self.weights[name] * objective(batch_size, stream)
                total = term if total is None else total + term
        if total is None:
            raise ValueError(f"every weight is zero: {self.weights}")
        return total

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Weighted sum with the weights at the *end* of training: comparable all the way."""
        final = self.schedule.weights(1.0)
        seeds = torch.randint(_SEEDS, (len(self.objectives),), generator=generator).tolist()
        parts = [
            final[name] * objective.validation(n, torch.Generator().manual_seed(seed))
            for (name, objective), seed in zip(self.objectives.items(), seeds, strict=True)
            if final[name] > 0
        ]
        return torch.stack([part.double() for part in parts]).sum()
