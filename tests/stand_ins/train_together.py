"""What test_parallel does, here or under torchrun: short trainings and an evaluation."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from openmm_eqflow.parallel import process_group, rank, sum_over_processes, world_size
from openmm_eqflow.runs.evaluation import draw_weighted, prior_log_weights
from openmm_eqflow.training.flow_matching import FlowMatchingLoss
from openmm_eqflow.training.loop import TrainingSettings, train
from stand_ins.flows import planar_flow, stream
from stand_ins.objectives import four_particles


class Slow(FlowMatchingLoss):
    """Rank 1 is late: its own clock would let it stop at another step."""

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        time.sleep(0.02 * rank())
        return super().__call__(batch_size, generator)


def training(folder: Path, n_shards: int, seconds: float) -> dict[str, object]:
    flow = planar_flow()
    field: nn.Module = flow.module.requires_grad_(True)
    if rank() > 0:  # whatever other processes start from, the weights are those of rank 0
        with torch.no_grad():
            for p in field.parameters():
                p.add_(1.0)
    data = flow.prior.sample(500, generator=stream(2)) * 0.7
    kind = FlowMatchingLoss if seconds > 100 else Slow
    loss = kind(field, flow.prior, data, classes=[0] * 4, proper=False, n_starts=1)
    settings = TrainingSettings(
        seconds=seconds,
        max_steps=25 if seconds > 100 else 10**9,
        batch_size=32,
        warmup_steps=3,
        validation_size=64,
        evaluate_seconds=0.0 if seconds > 100 else 1e9,
        checkpoint_seconds=0.0,
        n_shards=n_shards,
    )
    own = folder / f"rank-{rank()}"
    result = train(
        field, loss, settings, checkpoint=own / "checkpoint.safetensors", log=own / "history.csv"
    )
    weights = float(sum(p.detach().double().square().sum() for p in field.parameters()))
    return {"history": result.history, "n_steps": result.n_steps, "weights": weights}


def evaluation(folder: Path) -> dict[str, object]:
    flow = planar_flow()
    flow.chunk_size = 16
    with four_particles() as target:
        samples = draw_weighted(flow, target, 200, seed=3, folder=folder / f"rank-{rank()}")
        prior = prior_log_weights(flow, target, 9000, generator=stream(4))
    return {"log_weight": samples.log_weight.tolist(), "prior": prior.tolist()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with process_group():
        found = {
            "world_size": world_size(),
            "sum": [v.tolist() for v in sum_over_processes([torch.tensor([1.0, rank()])])],
            "steps": training(folder / "steps", 2, 1e6),
            "seconds": training(folder / "seconds", 2, 1.5),
            "evaluation": evaluation(folder / "evaluation"),
        }
        (folder / f"found-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
