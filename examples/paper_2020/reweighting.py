"""Raw relative ESS of flows and of their prior alone (Köhler, Klein, Noé 2020, reweighting).

The flows are those of nll_vs_size.py, trained here if they are missing:

    python examples/paper_2020/reweighting.py --out paper
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from experiment import argument_parser, errors_in_one_line, measure_flows
from objectives import FIELDS
from one_training import Report, Task
from reference_frames import Frames
from tables import draw_ess, ess_table, write_result

from openmm_eqflow.analysis.weights import log_z, pareto_k, relative_ess
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.runs.evaluation import draw_weighted, prior_log_weights
from openmm_eqflow.training.precision import resolve_device


def measure(
    task: Task, frames: Frames, arguments: argparse.Namespace, report: Report
) -> dict[str, Any]:
    """Weights of fresh samples, nothing dropped."""
    flow = load_flow(arguments.out / "flows" / task.name, device=resolve_device(arguments.device))
    n = max(2, round(FIELDS[task.field].share(*flow.prior.event_shape) * arguments.n_samples))
    samples = draw_weighted(flow, frames.target, n, seed=task.seed + 100, progress=report)
    generator = torch.Generator().manual_seed(task.seed)
    prior = prior_log_weights(flow, frames.target, arguments.n_samples, generator=generator)
    log_w = samples.log_weight.numpy()
    estimate = log_z(log_w)
    return {
        "n": n,
        "relative_ess": relative_ess(log_w),
        "pareto_k": pareto_k(log_w),
        "log_z": float(estimate.value),
        "log_z_error": float(estimate.error),
        "known_log_z": float(frames.log_z.value),
        "prior_n": arguments.n_samples,
        "prior_relative_ess": relative_ess(prior.numpy()),
        "seconds_per_sample": samples.seconds / n,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, measure, write table and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000])
    parser.add_argument("--n-samples", type=int, default=10_000)
    arguments = parser.parse_args(argv)
    with errors_in_one_line():
        records = measure_flows(arguments, "sampling", "reweighting", measure)
        write_result(arguments.out, "reweighting", ess_table(records), draw_ess(records))


if __name__ == "__main__":
    main()
