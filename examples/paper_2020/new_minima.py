"""New minima: quenched flow samples against the quenched training set (Köhler et al. 2020, LJ13).

The flows are those of nll_vs_size.py, trained here if they are missing:

    python examples/paper_2020/new_minima.py --out paper
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from experiment import argument_parser, errors_in_one_line, measure_flows
from minima import Quenched, label_minima, lowest_curvature, quench
from objectives import FIELDS
from one_training import Report, Task, training_frames
from reference_frames import Frames
from tables import draw_minima, minima_table, write_result
from torch import Tensor

from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.precision import resolve_device

SOURCES = ("training", "flow", "prior", "reference")


def measure(
    task: Task, frames: Frames, arguments: argparse.Namespace, report: Report
) -> dict[str, Any]:
    """Quench training frames, flow samples, prior samples and as many unseen frames."""
    flow = load_flow(arguments.out / "flows" / task.name, device=resolve_device(arguments.device))
    n = max(2, round(FIELDS[task.field].share(*flow.prior.event_shape) * arguments.n_samples))
    samples = draw_weighted(
        flow, frames.target, n, seed=task.seed + 200, progress=lambda f, t: report(0.5 * f, t)
    )
    training, others = training_frames(frames, task)
    stream = torch.Generator().manual_seed(task.seed)
    starts = dict(
        zip(
            SOURCES,
            (training, samples.x, flow.prior.sample(n, generator=stream), others[:n]),
            strict=True,
        )
    )
    ends = {}
    for k, (source, x) in enumerate(starts.items()):
        report(0.5 + 0.1 * k, f"quenching {len(x)} of {source}")
        ends[source] = quench(frames.target, x)
    return compare(frames.target, ends)


def compare(target: BoltzmannTarget, ends: dict[str, Quenched]) -> dict[str, Any]:
    """Count distinct minima of every source, and those the training set does not have."""
    x = torch.cat([end.x[end.converged] for end in ends.values()])
    u = torch.cat([end.u[end.converged] for end in ends.values()])
    sizes = [int(end.converged.sum()) for end in ends.values()]
    labels = label_minima(x, u)
    energy, curvature = _of_each(target, x, u, labels)
    minima = curvature > 0
    parts = dict(zip(ends, labels.split(sizes), strict=True))
    lowest = int(energy.argmin())
    found = {
        source: set(torch.unique(part).tolist()) & set(minima.nonzero().flatten().tolist())
        for source, part in parts.items()
    }

    def energies(members: set[int]) -> list[float]:
        return sorted(float(energy[k]) for k in members)

    result: dict[str, Any] = {
        source: {
            "n_quenched": len(ends[source].x),
            "n_converged": int(ends[source].converged.sum()),
            "n_distinct": len(members),
            "n_new": len(members - found["training"]),
            "lowest_share": float((parts[source] == lowest).double().mean()),
            "energies": energies(members),
            "new_energies": energies(members - found["training"]),
        }
        for source, members in found.items()
    }
    new = found["flow"] - found["training"]
    return result | {
        "n_saddles": int((~minima).sum()),
        "n_new_confirmed": len(new & found.get("reference", set())),
    }


def _of_each(
    target: BoltzmannTarget, x: Tensor, u: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Energy and smallest curvature of one member of every distinct minimum."""
    n = int(labels.max()) + 1 if len(labels) else 0
    member = torch.empty(n, dtype=torch.long)
    member[labels] = torch.arange(len(labels))
    parts = [lowest_curvature(target, part) for part in x[member].split(100)]
    return u[member], torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, quench, write table and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1_000])
    parser.add_argument("--n-samples", type=int, default=5_000, help="flow samples to quench")
    parser.set_defaults(systems=["lj13"])
    arguments = parser.parse_args(argv)
    with errors_in_one_line():
        records = measure_flows(arguments, "quenching", "minima", measure)
        write_result(arguments.out, "new_minima", minima_table(records), draw_minima(records))


if __name__ == "__main__":
    main()
