"""Objectives combined by schedule, from the recipe to the trained flow."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stand_ins.flows import stream
from stand_ins.objectives import (
    SIGMA,
    SMALL,
    Anisotropic,
    Scaling,
    dw4_frames,
    four_particles,
    prior,
    scaling_target,
)
from stand_ins.peroxide import write_system

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.runs import fit as fitting
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.training.divergences import (
    ForwardPathLoss,
    LikelihoodLoss,
    ReverseKLLoss,
    ReversePathLoss,
)
from openmm_eqflow.training.flow_matching import FlowMatchingLoss
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.objectives import ScheduledLoss
from openmm_eqflow.training.precision import AutocastField, training_precision
from openmm_eqflow.training.recipes import make_recipe
from openmm_eqflow.training.schedule import Schedule
from openmm_eqflow.vector_fields import ChartField, LeaveOneOutField
from openmm_eqflow.vector_fields.baselines import EGNNField

KINDS = {
    "flow-matching": FlowMatchingLoss,
    "nll": LikelihoodLoss,
    "reverse-kl": ReverseKLLoss,
    "path-forward": ForwardPathLoss,
    "path-reverse": ReversePathLoss,
}
TWO = {"nll": [[0.0, 1.0], [0.5, 1.0], [1.0, 0.5]], "reverse-kl": [[0.5, 0.0], [1.0, 0.5]]}


def parameters(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def test_weights_are_piecewise_linear() -> None:
    schedule = Schedule(TWO)
    for fraction in (0.0, 0.3, 0.5, 0.62, 0.9, 1.0, 1.2):
        weights = schedule.weights(fraction)
        assert weights["nll"] == pytest.approx(np.interp(fraction, [0.5, 1], [1, 0.5]))
        assert weights["reverse-kl"] == pytest.approx(np.interp(fraction, [0.5, 1], [0, 0.5]))
    assert Schedule("liouville").weights(0.4) == {"liouville": 1.0}


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        ("nlll", "expected one of liouville, flow-matching, nll"),
        (3, "expected an objective's name or a mapping"),
        ({}, "expected an objective's name or a mapping"),
        ({"kl": [[0, 1]]}, r"expected names out of .* \(not 'kl'\)"),
        ({"nll": []}, r"expected for 'nll' a list of \[fraction, weight\]"),
        ({"nll": [[0, 1, 2]]}, "expected for 'nll' pairs"),
        ({"nll": [[0, True]]}, "expected for 'nll' pairs"),
        ({"nll": [[0, float("nan")]]}, "expected for 'nll' pairs"),
        ({"nll": [[0.5, 1], [0.5, 0]]}, "expected for 'nll' increasing fractions"),
        ({"nll": [[0, 1], [1.5, 0]]}, "expected for 'nll' increasing fractions"),
        ({"nll": [[0, -1]]}, "expected for 'nll' weights that are not negative"),
        ({"nll": [[0, 1], [1, 0]]}, "expected at least one objective .* at fraction 1$"),
        (
            {"nll": [[0, 1], [0.4, 0]], "reverse-kl": [[0.4, 0], [1, 1]]},
            r"expected at least one objective .* at fraction 0\.4$",
        ),
    ],
)
def test_malformed_objectives_are_one_line(objective: object, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"key 'objective' is .*{complaint}") as info:
        make_recipe("molecule", "quick", {"recipe": {"objective": objective}})
    assert "\n" not in str(info.value)


def test_other_new_keys_are_checked() -> None:
    for key, value, complaint in (
        ("precision", "float16", "expected one of float32, tf32, bfloat16"),
        ("ode_steps", 0, "expected at least 1"),
        ("patience", 1.5, "expected a whole number"),
    ):
        with pytest.raises(ConfigurationError, match=f"key '{key}' is .*{complaint}"):
            make_recipe("molecule", "quick", {"recipe": {key: value}})
    # The standard recipes are what they were.
    recipe = make_recipe("molecule", "standard")
    assert (recipe.objective, recipe.patience, recipe.precision) == ("liouville", 0, "float32")
    assert make_recipe("cluster", "standard").objective == "flow-matching"


def test_the_schedule_is_in_the_config(tmp_path: Path) -> None:
    write_system(tmp_path / "hooh", recipe={"objective": TWO})
    system = load_system(tmp_path / "hooh")
    with build_target(system) as target:
        run = RunDirectory.create(
            tmp_path / "run", system, target, budget="quick", seed=0, device="cpu"
        )
    content = yaml.safe_load((run.path / "config.yaml").read_text())
    assert content["recipe"]["objective"] == TWO
    assert RunDirectory.open(run.path).config.recipe == run.config.recipe
    content["recipe"]["objective"] = {"nll": 1}
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match=r"for 'nll' a list of \[fraction, weight\]"):
        RunDirectory.open(run.path)


class Counter:
    """An objective that remembers what it was asked."""

    def __init__(self, value: float) -> None:
        self.weight = torch.tensor(value, requires_grad=True)
        self.seen: list[float] = []
        self.grown: list[int] = []

    def grow(self, step: int) -> None:
        self.grown.append(step)

    def __call__(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        self.seen.append(float(torch.rand((), generator=generator)))
        return self.weight * batch_size

    def validation(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return self.weight.detach()


def test_combined_loss_and_its_streams() -> None:
    def batches(fractions: tuple[float, ...]) -> tuple[ScheduledLoss, list[float], list[float]]:
        one, two = Counter(1.0), Counter(10.0)
        loss = ScheduledLoss({"nll": one, "reverse-kl": two}, Schedule(TWO))
        generator, values = stream(1), []
        for step, fraction in enumerate(fractions):
            loss.advance(fraction)
            loss.grow(step)
            values.append(float(loss(2, generator).detach()))
        assert one.grown == two.grown == list(range(len(fractions)))
        assert float(loss.validation(5, stream(2))) == pytest.approx(0.5 + 5.0)
        return loss, values, one.seen

    loss, values, seen = batches((0.0, 0.5, 0.75, 1.0))
    assert values == pytest.approx([2.0, 2.0, 2 * 0.75 + 20 * 0.25, 11.0])
    assert len(loss.objectives["reverse-kl"].seen) == 2  # weight zero: not evaluated
    # Batches do not depend on the weights, that is, on the clock.
    assert batches((0.0, 0.0, 0.0, 0.0))[2] == seen
    with pytest.raises(ValueError, match="differ"):
        ScheduledLoss({"nll": loss}, Schedule(TWO))


@pytest.mark.parametrize("forward", ["nll", "path-forward"])
@pytest.mark.parametrize("reverse", ["reverse-kl", "path-reverse"])
def test_a_schedule_trains(forward: str, reverse: str) -> None:
    field, target = Scaling(torch.zeros(2, dtype=torch.float64)), scaling_target()
    # Data of another spread: the first half fits them, the second half the energy.
    data = 1.3 * Anisotropic().sample(2000, stream(3))
    kinds: dict[str, Any] = {
        "nll": lambda: LikelihoodLoss(field, prior(), data, n_steps=3),
        "path-forward": lambda: ForwardPathLoss(field, target, data / 1.3, n_steps=3),
        "reverse-kl": lambda: ReverseKLLoss(field, target, n_steps=3),
        "path-reverse": lambda: ReversePathLoss(field, target, n_steps=3),
    }
    plan = {forward: [[0.0, 1.0], [0.5, 1.0], [0.6, 0.0]], reverse: [[0.5, 0.0], [0.6, 1.0]]}
    loss = ScheduledLoss({name: kinds[name]() for name in plan}, Schedule(plan))
    options = {"seconds": 1e6, "batch_size": 128, "learning_rate": 0.02, "warmup_steps": 5}
    result = train(field, loss, TrainingSettings(max_steps=250, average=0.9, **options))  # type: ignore[arg-type]
    assert float((result.average.rate.detach() - SIGMA.log()).abs().max()) < 0.05
    if forward == "nll":  # power control: the likelihood alone ends elsewhere
        alone = Scaling(torch.zeros(2, dtype=torch.float64))
        other = LikelihoodLoss(alone, prior(), data, n_steps=3)
        result = train(alone, other, TrainingSettings(max_steps=250, average=0.9, **options))  # type: ignore[arg-type]
        assert float((result.average.rate.detach() - SIGMA.log()).abs().min()) > 0.2


@pytest.mark.parametrize(
    "objective",
    [
        "nll",
        "reverse-kl",
        "path-forward",
        "path-reverse",
        {"flow-matching": [[0, 1], [0.5, 0.1]], "path-forward": [[0, 0], [0.5, 1]]},
    ],
    ids=str,
)
def test_from_the_recipe_to_the_flow(
    tmp_path: Path, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objectives asked for are those that are evaluated; their weights are the flow's."""
    recipe = replace(SMALL, objective=objective)
    log = tmp_path / "history.csv"
    evaluated: set[type] = set()
    for kind in KINDS.values():

        def call(self: Any, *given: Any, own: Any = kind.__call__) -> Any:
            evaluated.add(type(self))
            return own(self, *given)

        monkeypatch.setattr(kind, "__call__", call)
    starts: list[torch.Tensor] = []

    def watched(field: torch.nn.Module, *given: Any, **options: Any) -> Any:
        starts.append(parameters(field))
        return train(field, *given, **options)

    monkeypatch.setattr(fitting, "train", watched)
    with four_particles() as target:
        flow, result = fitting.train_flow(
            recipe, target, dw4_frames(300), seed=1, folder=tmp_path / "training", log=log
        )
    asked = [objective] if isinstance(objective, str) else objective
    assert evaluated == {KINDS[name] for name in asked}
    assert result.n_steps == 12
    (start,), end = starts, parameters(result.average)
    assert float((end - start).abs().max()) > 1e-4
    kept = 0.0 if result.prior_kept else 1.0  # a flow that lost to its prior is at rest
    torch.testing.assert_close(parameters(flow.module).to(end), kept * end)
    assert flow.audit_report is not None
    with log.open() as handle:
        (row,) = list(csv.DictReader(handle))
    assert all(float(value) == float(value) for value in row.values())
    assert float(row["loss"]) == pytest.approx(result.history[0]["loss"])


def test_objectives_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with four_particles() as target:
        for changes, complaint in (
            ({"objective": "liouville"}, "'liouville' needs a prior that overlaps the target"),
            ({"objective": "foo"}, "objective is 'foo', expected one of liouville"),
            ({"precision": "bfloat16"}, "precision 'bfloat16' needs a CUDA device"),
        ):
            with pytest.raises(ConfigurationError, match=complaint) as info:
                fitting.train_flow(
                    replace(SMALL, **({"objective": "nll"} | changes)),
                    target,
                    dw4_frames(50),
                    seed=1,
                    folder=tmp_path,
                )
            assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["chart", "leave-one-out", "egnn"])
def test_autocast_field_is_the_same_field(kind: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(40, 5, 3, generator=stream(5))
    field: torch.nn.Module
    if kind == "chart":
        field, data = ChartField(12, 3, [1, 1, 3], width=16), data.flatten(1)
        torch.nn.init.normal_(field.w2, std=0.1)
    elif kind == "egnn":
        field = EGNNField.fit(data, classes=[0] * 5, width=16, n_layers=1)
    else:
        field = LeaveOneOutField.fit(data, classes=[0] * 5, width=8, readout_width=8)
    cast = AutocastField(field)
    t = torch.rand(40, generator=stream(6))
    v, div = field.with_divergence(t, data)  # type: ignore[operator]
    v_cast, div_cast = cast.with_divergence(t, data)
    assert v_cast.dtype == div_cast.dtype == torch.float32
    for exact, found in ((v, v_cast), (div, div_cast), (field(t, data), cast(t, data))):
        scale = float(exact.detach().abs().max())
        assert 0 < float((found - exact).detach().abs().max()) < 0.05 * scale
    (v_cast.square().mean() + div_cast.square().mean()).backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and bool(p.grad.any()) for p in field.parameters())
    with training_precision(field, "float32", "cpu") as same:
        assert same is field
