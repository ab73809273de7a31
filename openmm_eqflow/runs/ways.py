"""Several flows to one target: what an effective sample of each costs, and which to take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from openmm_eqflow.analysis.weights import relative_ess_with_error
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.runs.evaluation import draw_weighted, prior_log_weights
from openmm_eqflow.seeds import child, child_seed
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "PRIOR",
    "cheapest",
    "measure_ways",
]

PRIOR = "prior alone"


def measure_ways(
    ways: Mapping[str, FlowPath],
    target: BoltzmannTarget,
    *,
    n: int = 500,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Relative ESS and cost of the prior alone and of every flow that starts from it.

    Parameters
    ----------
    ways
        Flows with one prior, by what a person calls them.
    target
        Of all of them.
    n
        Independent samples of each; from the same latent points, of a stream that ``seed`` gives
        to this alone.
    progress
        Called with the name of each way before it is measured.

    Returns
    -------
    list of dict
        ``name``, ``n``, ``relative_ess`` with ``relative_ess_error``, ``seconds_per_sample``
        (sample, log q and energy, on this machine as busy as it is) and ``effective_per_second``;
        the prior first.
    """
    tell, rows = progress or (lambda name: None), []
    tell(PRIOR)
    first = next(iter(ways.values()))
    started = time.perf_counter()
    log_w = prior_log_weights(first, target, n, generator=child(seed, "prior of the ways"))
    rows.append(_row(PRIOR, log_w, time.perf_counter() - started))
    for name, flow in ways.items():
        tell(name)
        if flow.device.type == "cuda":  # compile and record what is needed
            flow.sample(n, generator=child(seed, "warming up"))
        started = time.perf_counter()
        samples = draw_weighted(flow, target, n, seed=child_seed(seed, "ways"))
        rows.append(_row(name, samples.log_weight, time.perf_counter() - started))
    return rows


def _row(name: str, log_weight: torch.Tensor, seconds: float) -> dict[str, Any]:
    ess, n = relative_ess_with_error(log_weight.numpy()), len(log_weight)
    return {
        "name": name,
        "n": n,
        "relative_ess": float(ess.value),
        "relative_ess_error": float(ess.error) if math.isfinite(ess.error) else None,
        "seconds_per_sample": seconds / n,
        "effective_per_second": float(ess.value) * n / seconds,
    }


def cheapest(rows: list[dict[str, Any]], asked: float) -> str:
    """Name of the way with most effective samples a second among those that reach an ESS.

    Within two standard errors of ``asked``; if none does, the way with the highest ESS.
    """
    good = [
        row
        for row in rows
        if row["relative_ess"] + 2.0 * (row["relative_ess_error"] or 0.0) >= asked
    ]
    if good:
        return str(max(good, key=lambda row: row["effective_per_second"])["name"])
    return str(max(rows, key=lambda row: row["relative_ess"])["name"])
