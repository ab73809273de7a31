"""Every use of a seed has a stream of its own: shown by the draws, not by the names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from stand_ins.objectives import SMALL, dw4_frames

from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs import evaluation
from openmm_eqflow.runs.evaluation import evaluate_flow
from openmm_eqflow.runs.fit import train_flow
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import EarlierSeed, child, child_seed
from openmm_eqflow.targets.library import load_system

USES = ("weights", "training", "validation", "pool", "evaluation", "prior", "starts", "chains")


def rows(z: torch.Tensor) -> set[bytes]:
    return {row.double().numpy().tobytes() for row in z}


def draws(seed: int, name: str, index: int = 0) -> set[bytes]:
    return rows(torch.randn(64, 3, generator=child(seed, name, index)))


def overlaps(sets: list[set[bytes]]) -> int:
    return sum(map(len, sets)) - len(set().union(*sets))


def test_names_seeds_and_chunks_share_no_draw() -> None:
    uses = [draws(seed, name, k) for seed in range(4) for name in USES for k in range(4)]
    assert overlaps(uses) == 0
    assert draws(3, "training") == draws(3, "training")
    # Power: what version 0.1 did meets itself, within a seed and between neighbours.
    assert overlaps([draws(EarlierSeed(0), n) for n in ("training", "evaluation")]) == 64
    assert overlaps([draws(EarlierSeed(s), n) for s, n in ((2, "training"), (0, "pool"))]) == 64


def test_earlier_seeds_keep_their_streams() -> None:
    """A run that version 0.1 began goes on as it began (the stored runs show the rest)."""
    assert child_seed(EarlierSeed(11), "evaluation", 2) == 11 * 1_000_003 + 2
    assert child_seed(EarlierSeed(0), "chains") == 13
    assert child_seed(EarlierSeed(5), "tuning") == child_seed(5, "tuning")


@pytest.mark.parametrize(("kind", "shared"), [(int, False), (EarlierSeed, True)])
def test_an_evaluation_meets_no_latent_of_the_training(
    kind, shared, tmp_path, monkeypatch
) -> None:
    """Of the same seed. Power: with the streams of 0.1 latents come twice."""
    seen: dict[str, set[bytes]] = defaultdict(set)
    part = "training"
    draw = MeanFreeGaussian.sample_latent

    def listen(self, n, generator=None):
        z = draw(self, n, generator=generator)
        seen[part] |= rows(z)
        return z

    monkeypatch.setattr(MeanFreeGaussian, "sample_latent", listen)
    monkeypatch.setattr(evaluation, "_CHUNKS_PER_BLOCK", 1)
    system, recipe = load_system("dw4"), replace(SMALL, objective="flow-matching")
    with build_target(system) as target:
        flow, _ = train_flow(
            recipe, target, dw4_frames(200), seed=kind(0), folder=tmp_path, device="cpu"
        )
        part = "evaluation"
        evaluate_flow(flow, target, n_samples=4 * flow.chunk_size, seed=kind(0), name="dw4")
    assert min(map(len, seen.values())) > 50
    assert set(seen) == {"training", "evaluation"}
    assert bool(overlaps(list(seen.values()))) is shared
