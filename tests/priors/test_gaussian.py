"""The mean-free Gaussian: normalisation, fit, sampling, state."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import mean_free_basis
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian


def test_normalised_on_the_mean_free_subspace() -> None:
    prior = MeanFreeGaussian(2, 2, 0.4)
    assert isinstance(prior, Prior)
    axis = torch.linspace(-3.0, 3.0, 401, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis)  # coordinates in an orthonormal basis of the subspace
    x = w[:, None, :] * mean_free_basis(2)[:, 0][None, :, None]
    total = prior.log_prob(x).exp().sum() * float(axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("n", "n_dims"), [(4, 2), (13, 3)])
def test_matches_a_gaussian_in_a_mean_free_basis(n: int, n_dims: int) -> None:
    prior = MeanFreeGaussian(n, n_dims, 0.7)
    x = prior.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.float64
    assert x.shape == (20_000, n, n_dims)
    assert float(x.mean(1).abs().max()) < 1e-14
    w = torch.einsum("bnd,nk->bkd", x, mean_free_basis(n)).flatten(1)
    expected = torch.distributions.Normal(0.0, 0.7).log_prob(w).sum(-1)
    torch.testing.assert_close(prior.log_prob(x), expected)
    dimension = (n - 1) * n_dims
    entropy = 0.5 * dimension * math.log(2 * math.pi * math.e * 0.49)
    error = (0.5 * dimension / len(x)) ** 0.5
    assert float(-prior.log_prob(x).mean()) == pytest.approx(entropy, abs=5 * error)
    fitted = MeanFreeGaussian.fit(x + 3.0)
    assert fitted.scale == pytest.approx(0.7, rel=5 * (0.5 / (dimension * len(x))) ** 0.5)


def test_the_chart_is_the_identity() -> None:
    y = MeanFreeGaussian(5, 3, 0.2).sample_latent(6, generator=torch.Generator().manual_seed(1))
    x, log_volume = MeanFreeGaussian(5, 3, 0.2).to_cartesian(y)
    assert torch.equal(x, y)
    assert float(log_volume.abs().max()) == 0.0


@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (3, 0.0), (3, float("nan"))])
def test_bad_arguments(n: int, scale: float) -> None:
    with pytest.raises(ConfigurationError):
        MeanFreeGaussian(n, 3, scale)
    with pytest.raises(ConfigurationError, match="shape"):
        MeanFreeGaussian.fit(torch.zeros(4, 3))
    config, _ = MeanFreeGaussian(3, 2, 1.5).state()
    with pytest.raises(ConfigurationError, match="another prior"):
        MeanFreeGaussian.from_state(config, {"mean": torch.zeros(1)})
