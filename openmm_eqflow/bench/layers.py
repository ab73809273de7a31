"""What the layers of a stochastic flow are worth: ESS with and without field, and by cost.

The same levels, time steps and random streams with the field and with the field taken out, on
several numbers of levels, and the prior alone. A field earns its place if the flow with it is
better than without at equal cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_eqflow.analysis.weights import log_z, pareto_k, relative_ess
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_json
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.parallel import available_threads, machine_name
from openmm_eqflow.runs.evaluation import draw_weighted, prior_log_weights
from openmm_eqflow.runs.fit import train_stochastic_flow
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.recipes import make_recipe

__all__ = [
    "run_bench",
]


def run_bench(
    system_name: str,
    *,
    n_levels: Sequence[int] = (250, 500, 1000),
    n_samples: int = 4096,
    seed: int = 0,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Fit a stochastic flow to a cluster (its recipe's options) and take it apart.

    Parameters
    ----------
    system_name
        A ``lennard-jones`` cluster.
    n_levels
        The flow on so many levels, with the field and without.
    n_samples
        Per case.

    Returns
    -------
    dict
        ``cases``: name, n_levels, relative_ess, log_z with error, pareto_k, ms_per_sample.
    """
    system = load_system(system_name)
    if system.kind != "cluster":
        raise ConfigurationError(f"{system_name} is no cluster: stochastic flows are for those")
    options = make_recipe(system.kind, "standard", system.settings).stochastic_options()
    with build_target(system) as target:
        flow, training = train_stochastic_flow(options, target, seed=seed)
        cases = []
        for n in n_levels:
            whole = flow.on_levels(n)
            cases.append(_case("field and Monte Carlo", whole, target, n_samples, seed))
            bare = whole.without_field()
            cases.append(_case("Monte Carlo alone", bare, target, n_samples, seed))
        stream = child(seed, "prior")
        log_w = prior_log_weights(flow, target, n_samples, generator=stream).numpy()
        cases.append({"name": "prior", "relative_ess": relative_ess(log_w)})
    result = {
        "system": system.name,
        "n_samples": n_samples,
        "seed": seed,
        "options": options,
        "fit_seconds": training.seconds,
        "n_fit_levels": training.n_steps,
        "n_threads": available_threads(),
        "device_name": machine_name(),
        "cases": cases,
    }
    if json_path is not None:
        write_json(Path(json_path), result)
    return result


def _case(
    name: str, flow: StochasticFlow, target: BoltzmannTarget, n: int, seed: int
) -> dict[str, Any]:
    samples = draw_weighted(flow, target, n, seed=seed)
    log_w = samples.log_weight.numpy()
    estimate, k = log_z(log_w), pareto_k(log_w)
    return {
        "name": name,
        "n_levels": len(flow.grid),
        "relative_ess": relative_ess(log_w),
        "log_z": float(estimate.value),
        "log_z_error": float(estimate.error),
        "pareto_k": float(k) if np.isfinite(k) else None,
        "ms_per_sample": 1e3 * samples.seconds / n,
    }
