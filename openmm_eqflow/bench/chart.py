"""Value and score of both ends of a path in the chart: compiled against autograd, in one run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.kernels import latent_target, prior_score
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.parallel import machine_name, one_torch_thread
from openmm_eqflow.priors.compiled_chart import covers
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system

__all__ = [
    "run_bench",
]

_SYSTEMS = ("alanine-dipeptide", "ala3")


def run_bench(
    systems: Sequence[str] = _SYSTEMS,
    *,
    batch: int = 512,
    n_repeats: int = 9,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time one thread, in microseconds per configuration.

    Parameters
    ----------
    systems
        Systems whose flow ships, or folders with one.
    batch
        Configurations at once, samples of the prior (seed 0).
    n_repeats
        Medians of so many; compiled and autograd take turns.
    json_path
        Where to write the result.

    Returns
    -------
    dict
        ``machine``, ``batch`` and per system ``target``, ``prior`` and ``both``, each with
        ``compiled``, ``autograd`` and their ``ratio``; and the ``energy`` that both targets hold.

    Raises
    ------
    ConfigurationError
        The flow's prior has no compiled chart.
    """
    result: dict[str, Any] = {"machine": machine_name(), "batch": batch, "systems": {}}
    with one_torch_thread():
        for name in systems:
            result["systems"][name] = _bench_system(name, batch, n_repeats)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _bench_system(name: str, batch: int, n_repeats: int) -> dict[str, Any]:
    prior = load_flow(name).prior
    y = prior.sample_latent(batch, generator=torch.Generator().manual_seed(0))
    if not covers(prior, y):
        raise ConfigurationError(
            f"the prior of {name} has no compiled chart: take a molecule of three atoms or more "
            "without nearly linear angles"
        )
    with build_target(load_system(name)) as target:
        x, _ = prior.to_cartesian(y)
        cases: dict[tuple[str, str], Callable[[], Any]] = {
            ("energy", ""): partial(target.reduced_potential_and_gradient, x),
        }
        for way in ("compiled", "autograd"):
            slow = way == "autograd"
            cases["target", way] = partial(latent_target, prior, target, y, autograd=slow)
            cases["prior", way] = partial(prior_score, prior, y, autograd=slow)
        times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for k in range(n_repeats + 1):
            for case, run in cases.items():
                started = time.perf_counter()
                run()
                if k:  # the first compiles
                    times[case].append(1e6 * (time.perf_counter() - started) / batch)
    median = {case: statistics.median(values) for case, values in times.items()}
    entry: dict[str, Any] = {"energy": median["energy", ""]}
    for what in ("target", "prior"):
        entry[what] = {way: median[what, way] for way in ("compiled", "autograd")}
    entry["both"] = {
        way: entry["target"][way] + entry["prior"][way] for way in ("compiled", "autograd")
    }
    for what in ("target", "prior", "both"):
        entry[what]["ratio"] = entry[what]["autograd"] / entry[what]["compiled"]
    return entry
