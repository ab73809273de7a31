"""The compiled chart against autograd and differences: shipped priors, extremes, constraints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.flows import stream, water_prior
from stand_ins.priors import agree, prior_of
from torch import Tensor

from openmm_eqflow.flows.kernels import latent_target, prior_score
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.priors import chart_kernels
from openmm_eqflow.priors.compiled_chart import covers
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system

NAMES = ["alanine-dipeptide", "alanine-dipeptide-vacuum", "toluene", "ala3"]


class Pull:
    """Springs between all atoms: smooth whatever the configuration."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            gaps = (point[:, :, None] - point[:, None]).square().sum((1, 2, 3))
            u = 3.0 * gaps + 0.1 * gaps.square()
            (gradient,) = torch.autograd.grad(u.sum(), point)
        return u.detach(), gradient


def points(prior: Any, n: int = 300) -> Tensor:
    """Samples of the prior, the same far out, and torsions at and beyond the wrap."""
    y = prior.sample_latent(n, generator=stream(0))
    far = prior.sample_latent(n // 3, generator=stream(1))
    far[:, : prior.n_stiff] *= 3
    edge = y[: n // 3].clone()
    edge[:, prior.n_stiff :] = math.pi * torch.tensor([1.0, -1.0, 3.0], dtype=y.dtype).repeat(
        math.ceil(n // 3 / 3)
    )[: n // 3, None]
    return torch.cat([y, far, edge])


def same(prior: Any, target: Any, y: Tensor) -> bool:
    """Value and score of target and prior are those of autograd."""
    assert covers(prior, y)
    ours, theirs = (latent_target(prior, target, y, autograd=way) for way in (False, True))
    valid = torch.isfinite(theirs[0])
    assert torch.equal(valid, torch.isfinite(ours[0]))
    assert not ours[1][~valid].any()
    good = agree(ours[0][valid], theirs[0][valid]) and agree(ours[1][valid], theirs[1][valid])
    ours, theirs = (prior_score(prior, y, autograd=way) for way in (False, True))
    return good and agree(ours[0], theirs[0]) and agree(ours[1], theirs[1])


@pytest.mark.parametrize("name", [*NAMES, "water", "methanol", "held water", "conformers"])
def test_values_and_scores_are_those_of_autograd(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = prior_of(name)
    y = points(prior)
    assert same(prior, Pull(), y)

    # power: a reverse pass without the gradient of the volume element
    def without(rows: Any, lead: Any, b: Any, th: Any, *rest: Any) -> None:
        pull_back(rows, lead, b, th, *rest)
        rest[3][:] -= 2 / b
        rest[4][:] -= 1 / np.tan(th)

    pull_back = chart_kernels.pull_back
    monkeypatch.setattr(chart_kernels, "pull_back", without)
    assert not same(prior, Pull(), y)


@pytest.mark.parametrize("name", ["alanine-dipeptide", "toluene"])
def test_with_the_energies_of_a_molecule(name: str) -> None:
    prior = prior_of(name)
    y = prior.sample_latent(200, generator=stream(2))
    with build_target(load_system(name)) as target:
        u, _ = latent_target(prior, target, y)
        assert same(prior, target, y[u > u.median() - 100])


@pytest.mark.parametrize("name", ["alanine-dipeptide", "conformers", "held water"])
def test_scores_are_differences(name: str) -> None:
    prior, target, step = prior_of(name), Pull(), 1e-5
    y = prior.sample_latent(3, generator=stream(3))
    _, by_target = latent_target(prior, target, y)
    _, by_prior = prior_score(prior, y)
    for k in range(y.shape[1]):
        e = torch.zeros_like(y)
        e[:, k] = step
        for score, value in (
            (by_target, lambda z: latent_target(prior, target, z)[0]),
            (by_prior, lambda z: prior_score(prior, z)[0]),
        ):
            difference = (value(y + e) - value(y - e)) / (2 * step)
            torch.testing.assert_close(score[:, k], difference, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["alanine-dipeptide", "conformers"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    prior, target = prior_of(name), Pull()
    y = prior.sample_latent(130, generator=stream(4))
    for function in (lambda z: latent_target(prior, target, z), lambda z: prior_score(prior, z)):
        value, score = function(y)
        for part in (slice(0, 1), slice(17, 40), slice(64, 130)):
            # Matrix products of other shapes may round in another way, and nothing else does.
            v, s = function(y[part])
            torch.testing.assert_close(v, value[part], atol=1e-10, rtol=1e-12)
            torch.testing.assert_close(s, score[part], atol=1e-9, rtol=1e-11)


def test_what_is_not_covered_goes_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, target = water_prior(), Pull()
    y = prior.sample_latent(4, generator=stream(5))
    assert covers(prior, y)
    assert not covers(prior, y.float())
    assert not covers(load_flow("dw4").prior, y)
    ran: list[str] = []
    place = chart_kernels.pull_back

    def seen(*given: Any) -> None:
        ran.append("compiled")
        place(*given)

    monkeypatch.setattr(chart_kernels, "pull_back", seen)
    latent_target(prior, target, y)
    assert ran == ["compiled"]  # power: what is covered does not
    prior.bends = {0: 10.0}
    assert not covers(prior, y)
    ran.clear()
    for ours, theirs in (
        (latent_target(prior, target, y), latent_target(prior, target, y, autograd=True)),
        (prior_score(prior, y), prior_score(prior, y, autograd=True)),
    ):
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one, two)
            assert torch.isfinite(one).all()
    assert ran == []
