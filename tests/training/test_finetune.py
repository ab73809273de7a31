"""A second training from the averaged weights of the first: recipe, resume, history, report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins.objectives import SMALL, dw4_frames, four_particles

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.report.figures_chain import training_panels
from openmm_eqflow.runs import fit as fitting
from openmm_eqflow.runs.publish import _objectives
from openmm_eqflow.training.divergences import ForwardPathLoss
from openmm_eqflow.training.loop import TrainingResult, join_trainings
from openmm_eqflow.training.recipes import Recipe, make_recipe

SECOND = {"objective": "path-forward", "train_seconds": 1e6, "max_steps": 5, "batch_size": 8}
TWO = replace(SMALL, objective="flow-matching", finetune=SECOND)


def weights(flow: EquivariantFlow) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in flow.module.parameters()])


def fit(recipe: Recipe, folder: Path) -> tuple[EquivariantFlow, TrainingResult]:
    with four_particles() as target:
        return fitting.train_flow(
            recipe,
            target,
            dw4_frames(300),
            seed=1,
            folder=folder / "training",
            log=folder / "history.csv",
        )


def test_trainings_differ_in_what_finetune_says() -> None:
    assert SMALL.trainings() == (SMALL,)
    first, second = TWO.trainings()
    assert first == replace(TWO, finetune=None)
    assert second == replace(first, **SECOND)
    assert Recipe.from_dict(TWO.to_dict()) == TWO


@pytest.mark.parametrize(
    ("finetune", "complaint"),
    [
        ("nll", "key 'finetune' is 'nll', expected a mapping"),
        ({"objective": "nll"}, "expected a mapping with 'train_seconds'"),
        ({}, "expected a mapping with 'objective' and 'train_seconds'"),
        (SECOND | {"objective": "kl"}, "expected one of liouville, .* as its 'objective'"),
        (SECOND | {"train_seconds": 0}, "expected more than 0 as its 'train_seconds'"),
        (SECOND | {"batchsize": 3}, r"not 'batchsize'; did you mean 'batch_size'"),
        (SECOND | {"prior": "gaussian"}, r"not 'prior'; expected objective, train_seconds"),
        (SECOND | {"finetune": SECOND}, r"not 'finetune'"),
    ],
)
def test_a_finetune_that_makes_no_sense_is_refused(finetune: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as info:
        make_recipe("cluster", "quick", {"quick": {"finetune": finetune}})
    assert "\n" not in str(info.value)


def test_finetuning_starts_from_the_average_of_the_first_training(tmp_path: Path) -> None:
    alone, _ = fit(replace(TWO, finetune=None), tmp_path / "alone")
    idle, result = fit(replace(TWO, finetune=SECOND | {"learning_rate": 0.0}), tmp_path / "idle")
    both, _ = fit(TWO, tmp_path / "both")
    torch.testing.assert_close(weights(idle), weights(alone), rtol=1e-6, atol=1e-7)
    # Power: a second training that does something is told from one that does not.
    assert float((weights(both) - weights(alone)).abs().max()) > 1e-4
    assert result.n_steps == 12 + 5
    assert [(row["training"], row["step"]) for row in result.history] == [(0, 12), (1, 17)]
    assert result.history[1]["seconds"] > result.history[0]["seconds"]
    for name, step in (("history", "12"), ("history-finetune", "5")):
        with (tmp_path / "idle" / f"{name}.csv").open() as handle:
            (row,) = list(csv.DictReader(handle))
        assert row["step"] == step
        assert float(row["validation_loss"]) == float(row["validation_loss"])


def test_killed_while_finetuning_it_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fitting.training_settings
    monkeypatch.setattr(
        fitting,
        "training_settings",
        lambda *a, **b: replace(settings(*a, **b), checkpoint_seconds=0.0),
    )
    whole, _ = fit(TWO, tmp_path / "whole")
    loss = ForwardPathLoss.__call__
    calls: list[int] = []

    def counted(self: ForwardPathLoss, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3 * TWO.n_shards:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardPathLoss, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            fit(TWO, tmp_path / "killed")
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ForwardPathLoss, "__call__", lambda *a: calls.append(1) or loss(*a))
        resumed, result = fit(TWO, tmp_path / "killed")
    assert len(calls) == 2 * TWO.n_shards  # the last two of its five steps, no others
    assert result.n_steps == 17
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_one_training_is_joined_as_it_is() -> None:
    row = {"step": 3.0, "seconds": 2.0, "loss": 1.0}
    alone = TrainingResult(torch.nn.Linear(1, 1), [row], 3, 2.5, True)
    joined = join_trainings([alone])
    assert joined == alone
    twice = join_trainings([alone, replace(alone, stopped_early=False)])
    assert [r["step"] for r in twice.history] == [3, 6]
    assert [r["seconds"] for r in twice.history] == [2.0, 4.5]
    assert (twice.n_steps, twice.seconds, twice.stopped_early) == (6, 5.0, False)


def test_report_and_card_keep_the_losses_apart() -> None:
    history = [
        {"step": 12.0 * k, "seconds": 30.0 * k, "loss": 4.0, "relative_ess": 0.2, "training": late}
        for k, late in enumerate((0, 0, 1, 1), start=1)
    ]
    run: Any = SimpleNamespace(
        stages={"train": {"history": history}},
        run=SimpleNamespace(config=SimpleNamespace(recipe=TWO)),
        metrics={"relative_ess": 0.4, "n_samples": 100, "prior_relative_ess": 0.1},
    )
    panels = training_panels(run)
    assert [panel.title for panel in panels] == [
        "Training loss",
        "Fine-tuning loss",
        "ESS during training",
    ]
    assert "flow-matching loss" in panels[0].svg
    assert "negative log likelihood" in panels[1].svg
    assert _objectives(SMALL) == str(SMALL.objective)
    assert _objectives(TWO) == "flow-matching, then path-forward (1e+06 s, batch 8)"
