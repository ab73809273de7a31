"""Which objectives count how much at which fraction of the training; imports nothing heavy.

Weights are piecewise linear in the fraction, constant outside their knots: Köhler, Klein, Noé 2020
train by likelihood first and let the reverse KL divergence in later; Vaitl, Klein 2025
(arXiv:2505.10139) go from flow matching to path gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "OBJECTIVES",
    "SIMULATING",
    "Schedule",
    "schedule_misfit",
]

OBJECTIVES = (
    "liouville",
    "flow-matching",
    "nll",
    "reverse-kl",
    "path-forward",
    "path-reverse",
)
#: Those that solve the flow's ODE in every step.
SIMULATING = frozenset(("nll", "reverse-kl", "path-forward", "path-reverse"))
_FORM = "an objective's name or a mapping {name: [[fraction, weight], ...]}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def schedule_misfit(objective: Any) -> str | None:
    """Say what ``objective`` should be, or None if it is a name or a schedule.

    Examples
    --------
    >>> schedule_misfit({"nll": [[0, 1], [1, 0.5]], "reverse-kl": [[0, 0], [1, 0.5]]})
    >>> schedule_misfit({"nll": [[0, 1], [1, 0]]})
    'at least one objective of positive weight at fraction 1'
    """
    if isinstance(objective, str):
        return None if objective in OBJECTIVES else f"one of {', '.join(OBJECTIVES)}"
    if not isinstance(objective, Mapping) or not objective:
        return _FORM
    fractions = {0.0, 1.0}
    for name, knots in objective.items():
        if name not in OBJECTIVES:
            return f"names out of {', '.join(OBJECTIVES)} (not {name!r})"
        if not isinstance(knots, (list, tuple)) or not knots:
            return f"for {name!r} a list of [fraction, weight]"
        for knot in knots:
            pair = isinstance(knot, (list, tuple)) and len(knot) == 2
            if not (pair and all(map(_number, knot))):
                return f"for {name!r} pairs [fraction, weight] of numbers (not {knot!r})"
        times = [float(knot[0]) for knot in knots]
        if times != sorted(set(times)) or times[0] < 0 or times[-1] > 1:
            return f"for {name!r} increasing fractions from 0 to 1 (not {times})"
        if min(knot[1] for knot in knots) < 0:
            return f"for {name!r} weights that are not negative"
        fractions.update(times)
    schedule = Schedule(objective)
    for fraction in sorted(fractions):
        if sum(schedule.weights(fraction).values()) <= 0:
            return f"at least one objective of positive weight at fraction {fraction:g}"
    return None


class Schedule:
    """Piecewise linear weights; ``objective`` as :func:`schedule_misfit` approves it.

    Examples
    --------
    >>> Schedule({"flow-matching": [[0.5, 1], [0.7, 0]], "path-forward": [[0.5, 0], [0.7, 1]]}
    ... ).weights(0.6)
    {'flow-matching': 0.5, 'path-forward': 0.5}
    """

    def __init__(self, objective: str | Mapping[str, Any]) -> None:
        knots = {objective: [[0.0, 1.0]]} if isinstance(objective, str) else objective
        self.knots = {
            name: [(float(fraction), float(weight)) for fraction, weight in pairs]
            for name, pairs in knots.items()
        }

    def weights(self, fraction: float) -> dict[str, float]:
        """Weight of every objective when ``fraction`` of the training is done."""
        return {name: _interpolate(pairs, fraction) for name, pairs in self.knots.items()}


def _interpolate(pairs: list[tuple[float, float]], at: float) -> float:
    if at <= pairs[0][0]:
        return pairs[0][1]
    for (left, before), (right, after) in itertools.pairwise(pairs):
        if at <= right:
            # rounded, so that 0.6 between 0.5 and 0.7 is the half it is meant to be
            return before + (after - before) * round((at - left) / (right - left), 12)
    return pairs[-1][1]
