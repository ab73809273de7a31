"""A flow that loses to its prior gives way to it, and the advice follows from the cause."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from stand_ins import peroxide
from stand_ins.moves import Springs
from stand_ins.runs import write_run
from torch import nn

from openmm_eqflow.analysis.weights import forward_ess_with_error, relative_ess
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.report.data import load_run
from openmm_eqflow.report.populations import compare_ensembles
from openmm_eqflow.report.verdict import judge, training_trend
from openmm_eqflow.runs import fit as fitting
from openmm_eqflow.runs.fit import keep_prior
from openmm_eqflow.runs.stages import build_target, open_run, run_stage
from openmm_eqflow.targets.library import load_system, systems_directory


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def spoilt(module, scale=3.0):
    """A field that a training has led astray."""
    torch.manual_seed(0)
    bad = copy.deepcopy(module)
    with torch.no_grad():
        for weights in bad.parameters():
            weights.add_(scale * weights.detach().abs().mean() * torch.randn_like(weights))
    return bad


@pytest.mark.parametrize(("name", "n"), [("alanine-dipeptide", 600), ("dw4", 400)])
def test_the_better_of_flow_and_prior_is_kept(name, n, tmp_path):
    flow = load_flow(systems_directory() / name / "flow.safetensors")
    with build_target(load_system(name)) as target:
        frames = flow.sample_and_log_prob(200, generator=stream(2))[0]  # as good as the target's
        same, kept = keep_prior(flow, target, n, frames, seed=0)
        assert same is flow
        assert kept is None
        bad = EquivariantFlow(flow.prior, spoilt(flow.module), grid=(0.0, 0.5, 1.0))
        rest, kept = keep_prior(bad, target, n, frames, seed=0)
    assert kept is not None
    assert kept["flow"] < kept["prior"]
    assert kept["n"] == n
    # Flow and prior are one density, on the way to a file and back too.
    save_flow(rest, tmp_path / "flow", {})
    for made in (rest, load_flow(tmp_path / "flow")):
        z = flow.prior.sample_latent(50, generator=stream(1))
        x, log_q = made.transform(z)
        y, log_volume = flow.prior.to_cartesian(z)
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(log_q, flow.prior.latent_log_prob(z) - log_volume)
        torch.testing.assert_close(made.log_prob(x), log_q, rtol=0.0, atol=1e-5)
    # Power: the spoilt flow is neither.
    assert float((bad.transform(z)[0].detach() - y).abs().max()) > 1e-3


class GapField(nn.Module):
    """v = (gap / (1 + exp(-40 (|y| - 2.35))) - shrink) y: it empties a shell."""

    exact_divergence = True
    config: ClassVar = {}
    event_shape = (2, 3)

    def __init__(self, gap):
        super().__init__()
        self.gap = nn.Parameter(torch.tensor(gap, dtype=torch.float64))
        self.shrink = nn.Parameter(torch.tensor(0.262, dtype=torch.float64))

    def with_divergence(self, t, y):
        r = y.square().sum((1, 2)).sqrt()
        inside = torch.sigmoid(40.0 * (r - 2.35))
        h, slope = self.gap * inside - self.shrink, 40.0 * self.gap * inside * (1.0 - inside)
        return h[:, None, None] * y, 3.0 * h + r * slope

    def forward(self, t, y):
        return self.with_divergence(t, y)[0]


def test_what_a_flow_has_lost_is_seen_in_frames_and_not_in_its_draws():
    target, prior = Springs(), MeanFreeGaussian(2, 3, 0.65)
    frames = MeanFreeGaussian(2, 3, 0.5).sample_latent(4000, generator=stream(3))
    grid = tuple(k / 16 for k in range(17))
    gap, whole = (EquivariantFlow(prior, GapField(c), grid=grid) for c in (1.0, 0.0))
    x, log_q = gap.sample_and_log_prob(1000, generator=stream(4))
    draws = relative_ess((-target.reduced_potential(x) - log_q).detach().numpy())
    assert draws > 0.97  # the prior has .76
    kept = keep_prior(gap, target, 1000, frames, seed=0)[1]
    assert kept is not None
    assert kept["flow"] < 0.01 < 0.7 < kept["prior"]
    # Power: frames that avoid the gap say nothing, and a flow without one stays.
    near = frames[frames.square().sum((1, 2)).sqrt() < 1.4]
    assert keep_prior(gap, target, 1000, near, seed=0)[1] is None
    assert keep_prior(whole, target, 1000, frames, seed=0)[1] is None


def test_frames_of_a_state_that_neither_knows_decide_nothing(caplog):
    """Three of some thousand, where both densities are nothing: the better flow stays."""

    class WithShell(Springs):
        def reduced_potential(self, x):
            far = x.square().sum((1, 2)) > 100.0
            return torch.where(far, 0.0, super().reduced_potential(x))

    target, prior = WithShell(), MeanFreeGaussian(2, 3, 0.65)
    frames = MeanFreeGaussian(2, 3, 0.5).sample_latent(4000, generator=stream(3))
    grid = tuple(k / 16 for k in range(17))
    gap, better = (EquivariantFlow(prior, GapField(c), grid=grid) for c in (1.0, 0.0))
    frames[:3] *= 16.0 / frames[:3].square().sum((1, 2), keepdim=True).sqrt()
    # Power: by all frames the flow, which is narrower than its prior, would be the worse one.
    u = target.reduced_potential(frames)
    by_all = [
        forward_ess_with_error((-u - q).detach().numpy()).value
        for q in (better.log_prob(frames), prior.log_prob(frames))
    ]
    assert by_all[0] < 1e-3 * by_all[1]
    assert keep_prior(better, target, 4000, frames, seed=0)[1] is None
    # They are told.
    assert "3 of 4000 held-out frames are of a state that neither flow nor prior" in caplog.text
    # One that has lost what the prior knows is still found out.
    assert keep_prior(gap, target, 1000, frames, seed=0)[1] is not None


def test_a_run_whose_training_fails_goes_on_with_the_prior_and_says_so(tmp_path, monkeypatch):
    peroxide.write_system(tmp_path / "hpx")
    directory = open_run(tmp_path / "hpx", tmp_path / "run", budget="quick", seed=0)
    train = fitting.train

    def astray(*arguments, **options):
        result = train(*arguments, **options)
        result.average.load_state_dict(spoilt(result.average).state_dict())
        return result

    monkeypatch.setattr(fitting, "train", astray)
    for stage in ("reference", "train", "sample", "report"):
        run_stage(directory, stage)
    metrics = directory.metrics()
    facts = json.loads((directory.path / "stages" / "train.json").read_text())
    kept = facts["prior_kept"]
    assert kept["flow"] < kept["prior"]
    assert metrics["relative_ess"] > 0.7 * metrics["prior_relative_ess"]
    assert load_flow(directory.path / "flow").metadata["prior_kept"] == kept
    (check,) = [c for c in metrics["verdict"]["checks"] if c["name"] == "flow against its prior"]
    assert "which is used alone" in check["reason"]
    assert "The prior alone is in use" in metrics["verdict"]["advice"]
    assert "prior kept" in (directory.path / "report.html").read_text(encoding="utf-8")


def history(ess, held=None, loss=None):
    n = len(ess)
    held = [1.0] * n if held is None else held
    loss = [1.0] * n if loss is None else loss
    return [
        {"step": k, "seconds": 10.0 * k, "relative_ess": e, "validation_loss": h, "loss": o}
        for k, (e, h, o) in enumerate(zip(ess, held, loss, strict=True))
    ]


RISING = history(np.linspace(0.05, 0.4, 12))
FLAT = history([0.1, 0.2, 0.3, *[0.35] * 9])
FALLING = history([0.1, 0.3, 0.4, 0.4, 0.4, 0.35, 0.3, 0.25, 0.2, 0.12, 0.1, 0.08])
MEMORISED = history(
    [0.3] * 12, held=[3, 2, 1, *np.linspace(1.1, 2, 9)], loss=np.linspace(3, 0.1, 12)
)


def test_trend_of_a_training():
    assert training_trend(RISING) == "rising"
    assert training_trend(FLAT) == "flat"
    assert training_trend(FALLING) == "falling"
    assert training_trend(MEMORISED) == "falling"
    # A noisier validation loss with a training loss that rises as well is not memory.
    assert training_trend(history([0.3] * 12, held=[1.0] * 9 + [1.3] * 3)) == "flat"
    # Of two trainings the last counts.
    parts = enumerate((FALLING, RISING))
    two = [row | {"training": float(k)} for k, rows in parts for row in rows]
    assert training_trend(two) == "rising"
    # A memory shows in few rows already; more training is never the answer by default.
    few = history([0.003] * 4, held=[64, 82, 117, 117], loss=[27, 21, 15, 14])
    assert training_trend(few) == "falling"
    assert training_trend([]) == training_trend(RISING[:5]) == "flat"


@pytest.mark.parametrize(
    ("rows", "prior", "says", "never"),
    [
        (RISING, 0.2, "more training, --budget standard", "reference_seconds"),
        (FALLING, 0.2, "too flexible for 400 frames", "--budget"),
        (MEMORISED, 0.2, "more training makes it worse", "--budget"),
        (FLAT, 0.002, "a better start, that is more reference data", "--budget"),
        (FLAT, 0.2, "a more flexible field", "--budget"),
    ],
)
def test_advice_follows_from_the_cause(tmp_path, rows, prior, says, never):
    run = load_run(write_run(tmp_path / "run", spread=3.0))
    run.stages["train"]["history"] = rows
    run.metrics["prior_relative_ess"] = prior
    verdict = judge(run, compare_ensembles(run))
    assert verdict.flow == "poor"
    assert says in verdict.advice
    assert never not in verdict.advice
    kept = {"flow": 0.001, "prior": prior, "n": 4096.0}
    run = dataclasses.replace(run, stages=run.stages | {
        "train": run.stages["train"] | {"prior_kept": kept}
    })  # fmt: skip
    verdict = judge(run, compare_ensembles(run))
    assert "The prior alone is in use: training" in verdict.advice
    assert says in verdict.advice


def test_short_chains_and_short_references_are_told_apart(tmp_path):
    run = load_run(write_run(tmp_path / "run", n_steps=10))
    advice = judge(run, compare_ensembles(run)).advice
    assert "the chains are short: change n_samples" in advice
    assert "training" not in advice
    run.stages["reference"]["convergence"] = {"mixed": False, "converged": False}
    assert "change reference_seconds" in judge(run, compare_ensembles(run)).advice
