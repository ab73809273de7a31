"""Refinement of the internal-coordinate prior on its own samples, and what too few frames do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from stand_ins.flows import CHAIN, chain_prior, stream
from torch import Tensor

from openmm_eqflow.priors.fit import fit_internal_prior, refine_internal_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior

TRUTH = chain_prior()


def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` and ``du/dx`` of a target that the prior can describe exactly."""
    return -TRUTH.log_prob(x), -TRUTH.gradient(x)


def divergence(prior: InternalCoordinatePrior) -> float:
    fresh = TRUTH.sample(4_000, generator=stream(77))
    return float((TRUTH.log_prob(fresh) - prior.log_prob(fresh)).mean())


def fitted(n: int, seed: int) -> tuple[InternalCoordinatePrior, Tensor]:
    x = TRUTH.sample(n, generator=stream(seed))
    return fit_internal_prior(x, *CHAIN, gradient=evaluate(x)[1]), x


def test_refinement_comes_closer_to_the_target():
    prior, x = fitted(60, 1)
    refined = refine_internal_prior(prior, x, evaluate, n_samples=4_000, generator=stream(2))
    assert divergence(refined) < 0.7 * divergence(prior)
    assert divergence(refined) < 0.2


@pytest.mark.parametrize("n", [4, 6, 8, 10, 12, 16, 24])
@pytest.mark.parametrize("n_samples", [30, 300])
def test_few_frames_and_samples_never_end_in_a_traceback(n, n_samples):
    for seed in range(3):
        prior, x = fitted(n, seed)
        refined = refine_internal_prior(
            prior, x, evaluate, n_samples=n_samples, generator=stream(seed)
        )
        fresh = refined.sample(200, generator=stream(5))
        assert bool(torch.isfinite(refined.log_prob(fresh)).all())
        assert bool(torch.isfinite(evaluate(fresh)[0]).all())


def test_a_round_that_fails_is_dropped_with_a_warning(caplog):
    prior, x = fitted(60, 1)

    def useless(y: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(y)[0], torch.full_like(y, torch.nan)

    with caplog.at_level(logging.WARNING):
        refined = refine_internal_prior(
            prior, x, useless, rounds=1, n_samples=300, generator=stream(0)
        )
    assert refined is prior
    (line,) = caplog.messages
    assert line.startswith("round 1 of refining the prior was dropped")
    assert "60 frames" in line
    assert "more time" in line


def test_refined_prior_is_the_same_every_time():
    truth = chain_prior()
    x = truth.sample(200, generator=stream(1))
    prior = fit_internal_prior(x, *CHAIN, gradient=-truth.gradient(x))
    random = np.random.default_rng(0)
    found = []
    for _ in range(8):
        # Freed memory with other numbers in it: nothing may be read before it is written.
        for n in (8, 16, 40, 100, 400):
            torch.from_numpy(random.integers(0, 2, 4 * n).astype(np.int32)).clone()
        new = refine_internal_prior(
            prior,
            x,
            lambda y: (-truth.log_prob(y), -truth.gradient(y)),
            rounds=1,
            n_samples=500,
            generator=stream(2),
        )
        found.append(torch.cat([new.coefficients.ravel(), new.cholesky.ravel()]))
    assert all(torch.equal(found[0], other) for other in found)
