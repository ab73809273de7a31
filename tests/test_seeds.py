"""Every use of a seed has a stream of its own: shown by the draws, not by the names."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch
from stand_ins import ROOT
from stand_ins.objectives import SMALL, dw4_frames

from openmm_eqflow.flows.audit import audit
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs import evaluation, stages
from openmm_eqflow.runs.evaluation import evaluate_flow
from openmm_eqflow.runs.fit import train_flow
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.seeds import EarlierSeed, child, child_seed
from openmm_eqflow.targets.library import load_system


def uses() -> set[str]:
    """Names that the package gives to :func:`child` and :func:`child_seed`."""
    return {
        node.args[1].value
        for path in (ROOT / "openmm_eqflow").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) in ("child", "child_seed")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }


def rows(z: torch.Tensor) -> set[bytes]:
    return {row.double().numpy().tobytes() for row in z}


def draws(seed: int, name: str, index: int = 0) -> set[bytes]:
    return rows(torch.randn(64, 3, generator=child(seed, name, index)))


def overlaps(sets: list[set[bytes]]) -> int:
    return sum(map(len, sets)) - len(set().union(*sets))


def test_names_seeds_and_chunks_share_no_draw() -> None:
    assert uses() > {"weights", "training", "pool", "evaluation", "audit", "audit command"}
    every = [draws(seed, name, k) for seed in range(4) for name in uses() for k in range(4)]
    assert overlaps(every) == 0
    assert draws(3, "training") == draws(3, "training")
    # Power: what version 0.1 did meets itself, within a seed and between neighbours.
    assert overlaps([draws(EarlierSeed(0), n) for n in ("training", "evaluation")]) == 64
    assert overlaps([draws(EarlierSeed(s), n) for s, n in ((2, "training"), (0, "pool"))]) == 64


def test_earlier_seeds_keep_their_streams() -> None:
    """A run that version 0.1 began goes on as it began (the stored runs show the rest)."""
    assert child_seed(EarlierSeed(11), "evaluation", 2) == 11 * 1_000_003 + 2
    assert child_seed(EarlierSeed(0), "chains") == 13
    assert child_seed(EarlierSeed(5), "tuning") == child_seed(5, "tuning")


@pytest.fixture
def seen(monkeypatch) -> dict[str, set[bytes]]:
    """Latents of the cluster's prior, by the part that was last begun."""
    found: dict[str, set[bytes]] = {}
    draw = MeanFreeGaussian.sample_latent

    def listen(self, n, generator=None):
        z = draw(self, n, generator=generator)
        found[next(reversed(found))] |= rows(z)
        return z

    monkeypatch.setattr(MeanFreeGaussian, "sample_latent", listen)
    return found


def trained(target, seed: int, folder):
    return train_flow(
        replace(SMALL, objective="flow-matching"),
        target,
        dw4_frames(200),
        seed=seed,
        folder=folder,
        device="cpu",
    )[0]


@pytest.mark.parametrize(("kind", "shared"), [(int, False), (EarlierSeed, True)])
def test_an_evaluation_meets_no_latent_of_the_training(
    kind, shared, tmp_path, monkeypatch, seen
) -> None:
    """Of the same seed. Power: with the streams of 0.1 latents come twice."""
    monkeypatch.setattr(evaluation, "_CHUNKS_PER_BLOCK", 1)
    with build_target(load_system("dw4")) as target:
        seen["training"] = set()
        flow = trained(target, kind(0), tmp_path)
        flow.audit_report = None  # so that the evaluation has to audit it
        seen["evaluation"] = set()
        evaluate_flow(flow, target, n_samples=4 * flow.chunk_size, seed=kind(0), name="dw4")
    assert min(map(len, seen.values())) > 50
    assert flow.audit_report is not None
    assert bool(overlaps(list(seen.values()))) is shared


def test_the_audit_command_meets_no_latent_of_the_runs_own_audit(
    tmp_path, monkeypatch, seen, shell
) -> None:
    """Of the same seed. Power: the run's own stream gives its latents again."""
    system = load_system("dw4")
    with build_target(system) as target:
        seen["run"] = set()
        flow = trained(target, 0, tmp_path)
    monkeypatch.setattr(stages, "flow_of", lambda *_: (system, flow, None))
    seen["command"] = set()
    assert shell("audit", "dw4", "--seed", 0, "--n-samples", 32).code == 0
    assert len(seen["command"]) == 32
    assert overlaps(list(seen.values())) == 0
    seen["again"] = set()
    audit(flow, n=32, generator=child(0, "audit"))
    assert len(seen["again"] & seen["run"]) == 32
