"""Path gradients: as unbiased as the plain ones, and silent where the flow is the target."""

from __future__ import annotations

import pytest
import torch
from stand_ins.flows import randomised, stream
from stand_ins.objectives import (
    SIGMA,
    Anisotropic,
    Scaling,
    forward_gradient,
    four_particles,
    gradient_of,
    reverse_gradient,
    scaling_target,
)
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.kernels import prior_score
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.training.divergences import (
    ChartTarget,
    ForwardPathLoss,
    LikelihoodLoss,
    ReverseKLLoss,
    ReversePathLoss,
    _attach,
)
from openmm_eqflow.training.solve import solve
from openmm_eqflow.vector_fields.kernel import KernelField

RATE = torch.tensor([0.1, 0.15], dtype=torch.float64)
N_BATCHES, BATCH, N_STEPS = 60, 400, 4


class ForcesOnly(ReversePathLoss):
    """Power control: the pull of log q left out."""

    def per_sample(self, z: Tensor) -> Tensor:
        y, _ = solve(self.field, z, self.grid, with_divergence=False)
        log_p1, force = self.target.log_prob_and_gradient(y.detach())
        return _attach(-log_p1, -force, y)


def batch_gradients(loss: object, seed: int) -> Tensor:
    """Gradients (N_BATCHES, n_weights) of independent batches."""
    generator = stream(seed)
    return torch.stack(
        [gradient_of(loss(BATCH, generator), loss.field) for _ in range(N_BATCHES)]  # type: ignore[operator, attr-defined]
    )


def off_by(found: Tensor, expected: Tensor) -> float:
    """Largest deviation of the mean in standard errors."""
    error = found.std(0) / len(found) ** 0.5
    return float(((found.mean(0) - expected) / error).abs().max())


@pytest.mark.statistical
def test_reverse_path_gradient_is_unbiased() -> None:
    field, target = Scaling(RATE), scaling_target()
    expected = reverse_gradient(RATE)
    plain = batch_gradients(ReverseKLLoss(field, target, n_steps=N_STEPS), 1)
    path = batch_gradients(ReversePathLoss(field, target, n_steps=N_STEPS), 1)
    assert off_by(plain, expected) < 5
    assert off_by(path, expected) < 5
    assert off_by(batch_gradients(ForcesOnly(field, target, n_steps=N_STEPS), 1), expected) > 30


@pytest.mark.statistical
def test_forward_path_gradient_is_unbiased() -> None:
    field, target = Scaling(RATE), scaling_target()
    expected = forward_gradient(RATE)
    data = Anisotropic().sample(N_BATCHES * BATCH, stream(2))
    plain = LikelihoodLoss(field, target.prior, data, n_steps=N_STEPS)
    path = ForwardPathLoss(field, target, data, n_steps=N_STEPS)
    torch.testing.assert_close(path.score, -data / SIGMA**2)
    found = {}
    for name, loss in (("plain", plain), ("path", path)):
        # every configuration once: independent batches
        rows = torch.arange(len(data)).split(BATCH)
        if name == "plain":
            values = [-plain.log_prob(data[r], plain.data.log_volume[r]).mean() for r in rows]
        else:
            values = [path.per_sample(r).mean() for r in rows]
        found[name] = torch.stack([gradient_of(v, loss.field) for v in values])
    assert off_by(found["plain"], expected) < 5
    assert off_by(found["path"], expected) < 5
    # Power control: data that are no equilibrium samples give another gradient.
    wrong = ForwardPathLoss(field, target, 1.2 * data, n_steps=N_STEPS)
    assert off_by(batch_gradients(wrong, 3), expected) > 30


def test_path_gradient_vanishes_sample_by_sample_at_the_optimum() -> None:
    field, target = Scaling(SIGMA.log()), scaling_target()
    data = Anisotropic().sample(30, stream(4))
    reverse, path = (kind(field, target, n_steps=16) for kind in (ReverseKLLoss, ReversePathLoss))
    forward = ForwardPathLoss(field, target, data, n_steps=16)
    plain = LikelihoodLoss(field, target.prior, data, n_steps=16)
    z = path.latents(30, stream(5))

    def largest(values: Tensor) -> float:
        return max(float(gradient_of(v, field).abs().max()) for v in values.split(1))

    assert largest(path.per_sample(z)) < 1e-5
    assert largest(forward.per_sample(torch.arange(30))) < 1e-5
    # Power control: the plain gradients are far from zero for every single sample.
    for values in (
        reverse.per_sample(z),
        -plain.log_prob(data, torch.zeros(30)),
    ):
        smallest = min(float(gradient_of(v, field).abs().max()) for v in values.split(1))
        assert smallest > 0.05
    # and away from the optimum the path gradient is there
    moved = ReversePathLoss(Scaling(RATE), target, n_steps=16)
    values = moved.per_sample(z)
    assert min(float(gradient_of(v, moved.field).abs().max()) for v in values.split(1)) > 0.05


def test_values_are_those_of_the_plain_objectives() -> None:
    field, target = Scaling(RATE), scaling_target()
    z = ReverseKLLoss(field, target).latents(20, stream(6))
    kinds = (ReverseKLLoss, ReversePathLoss)
    values = [kind(field, target).per_sample(z).detach() for kind in kinds]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    data = Anisotropic().sample(20, stream(7))
    plain = LikelihoodLoss(field, target.prior, data)
    path = ForwardPathLoss(field, target, data)
    torch.testing.assert_close(
        path.per_sample(torch.arange(20)).detach(),
        -plain.log_prob(plain.data.y, plain.data.log_volume).detach(),
    )
    assert float(path.validation(99, stream(8))) == float(plain.validation(99, stream(8)))


@pytest.mark.statistical
def test_network_and_openmm_forces() -> None:
    own_prior = MeanFreeGaussian(4, 2, 1.5)
    data = own_prior.sample(100, generator=stream(1))
    field = KernelField.fit(data, classes=[0] * 4, n_rbf=6, n_times=3)
    randomised(field, 0.05).requires_grad_(True).double()
    with four_particles() as openmm_target:
        target = ChartTarget(own_prior, openmm_target, energy_high=200.0)
        plain, path, blind = (
            kind(field, target, n_steps=6) for kind in (ReverseKLLoss, ReversePathLoss, ForcesOnly)
        )
        z = plain.latents(40 * 50, stream(9))
        found: dict[str, list[Tensor]] = {"plain": [], "path": [], "blind": []}
        for part in z.split(50):
            for name, loss in (("plain", plain), ("path", path), ("blind", blind)):
                found[name].append(gradient_of(loss.per_sample(part).mean(), field))
    directions = torch.randn(len(found["plain"][0]), 6, generator=stream(10)).double()
    columns = {k: torch.stack(v) @ directions for k, v in found.items()}
    # The same latents: only the score term tells the two apart, and its mean is zero.
    zero = torch.zeros(6, dtype=torch.float64)
    assert off_by(columns["path"] - columns["plain"], zero) < 5
    assert off_by(columns["blind"] - columns["plain"], zero) > 10


def test_data_off_the_target_are_refused() -> None:
    class Holed(Anisotropic):
        def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u, du = super().reduced_potential_and_gradient(x)
            u[::7] = torch.inf
            return u, du

    target = ChartTarget(scaling_target().prior, Holed(), energy_high=10.0)
    data = Anisotropic().sample(14, stream(11))
    with pytest.raises(ConfigurationError, match="2 of 14 data have no finite energy"):
        ForwardPathLoss(Scaling(RATE), target, data)


def test_score_of_the_prior() -> None:
    target = scaling_target()
    z = target.prior.sample_latent(5, generator=stream(12))
    log_p, score = prior_score(target.prior, z)
    torch.testing.assert_close(score, -z)
    torch.testing.assert_close(log_p, target.prior.latent_log_prob(z))
