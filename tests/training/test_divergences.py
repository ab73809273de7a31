"""Likelihood and reverse KL: exact gradients through the solve, bounded memory and energies."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins.flows import (
    EstimatedField,
    chain_prior,
    chart_field,
    randomised,
    stream,
    uniform_grid,
)
from stand_ins.objectives import (
    SIGMA,
    Anisotropic,
    Scaling,
    four_particles,
    gradient_of,
    prior,
    scaling_target,
)
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.flows.flow import EquivariantFlow, rk4
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.training.divergences import (
    ChartTarget,
    LikelihoodLoss,
    ReverseKLLoss,
    bound_energy,
)
from openmm_eqflow.training.loop import TrainingSettings, train
from openmm_eqflow.training.solve import follow, solve, transport_score
from openmm_eqflow.vector_fields import LeaveOneOutField
from openmm_eqflow.vector_fields.baselines import EGNNField, MLPField
from openmm_eqflow.vector_fields.kernel import KernelField

PLANE = MeanFreeGaussian(4, 2, 1.5)


def cartesian(kind: str) -> nn.Module:
    torch.manual_seed(0)
    data = PLANE.sample(100, generator=stream(1))
    classes = [0] * 4
    field: nn.Module
    if kind == "kernel":
        field = KernelField.fit(data, classes=classes, n_rbf=6, n_times=3)
    elif kind == "egnn":
        field = EGNNField.fit(data, classes=classes, width=6, n_layers=1, n_rbf=4)
    elif kind == "leave-one-out":
        field = LeaveOneOutField.fit(
            data, classes=classes, width=6, readout_width=6, n_vectors=3, n_rbf=4
        )
    else:
        field = MLPField.fit(data, width=8, n_layers=1)
    return randomised(field, 0.05).requires_grad_(True).double()


def case(kind: str) -> tuple[nn.Module, object, Tensor]:
    """Field, prior and some points of the chart."""
    if kind == "chart":
        chain = chain_prior(tail_share=0.1)
        field = chart_field(0.1).requires_grad_(True).double()
        return field, chain, chain.sample_latent(5, generator=stream(2))
    return cartesian(kind), PLANE, PLANE.sample_latent(5, generator=stream(2))


@pytest.mark.parametrize("kind", ["chart", "kernel", "egnn", "leave-one-out", "mlp"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_discrete_map(kind: str, reverse: bool) -> None:
    field, own_prior, y = case(kind)
    flow = EquivariantFlow(own_prior, field, grid=uniform_grid(3))  # type: ignore[arg-type]
    weights = torch.randn(y.shape, generator=stream(3), dtype=torch.float64)

    def outcome(end: Tensor, ladj: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        loss = (weights * end).sum() + (torch.arange(5.0).double() * ladj).sum()
        (slope,) = torch.autograd.grad(loss, start, retain_graph=True)
        return end.detach(), ladj.detach(), slope, gradient_of(loss, field)

    one, two = (y.clone().requires_grad_(True) for _ in range(2))
    plain = outcome(*rk4(flow._field, one, flow.grid, reverse=reverse), one)
    ours = outcome(*solve(field, two, flow.grid, reverse=reverse), two)
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert float(plain[3].abs().max()) > 1e-3  # there is something to compare


def kept_bytes(run: object) -> int:
    """Bytes autograd keeps for a backward pass."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return total


def test_memory_does_not_grow_with_the_steps() -> None:
    field, own_prior, _ = case("kernel")
    y = own_prior.sample_latent(50, generator=stream(2))  # type: ignore[attr-defined]
    flow = EquivariantFlow(own_prior, field)  # type: ignore[arg-type]
    state = y.numel() * y.element_size()
    few, many = (kept_bytes(lambda n=n: solve(field, y, uniform_grid(n))) for n in (2, 20))
    assert many - few <= 18 * state * 1.01
    # Power control: without checkpoints every step keeps its whole graph.
    few, many = (kept_bytes(lambda n=n: rk4(flow._field, y, uniform_grid(n))) for n in (2, 20))
    assert many - few > 100 * 18 * state


@pytest.mark.parametrize("kind", ["chart", "leave-one-out"])
def test_likelihood_is_the_flows_own(kind: str) -> None:
    field, own_prior, y = case(kind)
    x = own_prior.to_cartesian(y)[0]  # type: ignore[attr-defined]
    loss = LikelihoodLoss(field, own_prior, x, n_steps=6)  # type: ignore[arg-type]
    flow = EquivariantFlow(own_prior, field, grid=uniform_grid(6))  # type: ignore[arg-type]
    value = float(loss.validation(4096, stream(4)))
    assert value == pytest.approx(-float(flow.log_prob(x).mean()), abs=1e-9)
    assert float(loss(64, stream(4)).detach()) == float(loss(64, stream(4)).detach())


def test_likelihood_finds_the_spread_of_the_data() -> None:
    data = Anisotropic().sample(4000, stream(5))
    field = Scaling(torch.zeros(2, dtype=torch.float64))
    loss = LikelihoodLoss(field, prior(), data[:3000], held_out=data[3000:], n_steps=4)
    settings = TrainingSettings(
        seconds=1e6, max_steps=200, batch_size=256, learning_rate=0.03, warmup_steps=5, average=0.9
    )
    result = train(field, loss, settings)
    # Fitted by maximum likelihood, the rates are the log standard deviations: 2 n (N-1) normals.
    error = (2 * 2 * 3000) ** -0.5
    found = result.average.rate.detach()
    assert float((found - SIGMA.log()).abs().max()) < 5 * error
    assert float(found.abs().max()) > 20 * error


def test_reverse_kl_takes_forces_from_openmm() -> None:
    field, own_prior, _ = case("leave-one-out")
    with four_particles() as target:
        loss = ReverseKLLoss(
            field,
            ChartTarget(own_prior, target, energy_high=1e6),  # type: ignore[arg-type]
            n_steps=4,
        )
        z = loss.latents(16, stream(6))
        slope = gradient_of(loss.per_sample(z).mean(), field)
        # Finite differences along a random direction, same latents.
        direction = torch.randn(len(slope), generator=stream(7), dtype=torch.float64)
        values = []
        for h in (1e-5, -1e-5):
            moved = [p.detach().clone() for p in field.parameters()]
            vector = h * direction
            with torch.no_grad():
                for p in field.parameters():
                    p += vector[: p.numel()].reshape(p.shape)
                    vector = vector[p.numel() :]
                values.append(float(loss.per_sample(z).mean()))
                for p, q in zip(field.parameters(), moved, strict=True):
                    p.copy_(q)
        expected = (values[0] - values[1]) / 2e-5
        assert float(slope @ direction) == pytest.approx(expected, rel=1e-4)
        flow = EquivariantFlow(own_prior, field, grid=uniform_grid(4))  # type: ignore[arg-type]
        with torch.no_grad():
            x, log_q = flow.transform(z)
        by_hand = log_q + target.reduced_potential(x)
        torch.testing.assert_close(loss.per_sample(z).detach(), by_hand, rtol=1e-6, atol=1e-5)


def test_energy_is_bounded_and_its_slope_follows() -> None:
    u = torch.tensor([-3.0, 9.0, 10.0, 12.0, 1e6, 1e25, math.inf, math.nan], dtype=torch.float64)
    bounded, slope = bound_energy(u, 10.0)
    torch.testing.assert_close(bounded[:3], u[:3])
    torch.testing.assert_close(slope[:3], torch.ones(3).double())
    assert float(bounded[3]) == pytest.approx(10 + math.log(3))
    assert float(slope[3]) == pytest.approx(1 / 3)
    cap = 10 + math.log1p(1e20)
    torch.testing.assert_close(bounded[5:], torch.full((3,), cap).double())
    assert not bool(slope[5:].any())
    assert bool((bounded.diff()[:5] > 0).all())


class Holed(Anisotropic):
    """No finite energy where the first particle is on the right."""

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, du = super().reduced_potential_and_gradient(x)
        hole = x[:, 0, 0] > 0
        return torch.where(hole, torch.inf, u), torch.where(hole[:, None, None], 0.0, du)


def test_invalid_samples_are_counted_and_kept() -> None:
    field = Scaling(torch.zeros(2, dtype=torch.float64))
    target = ChartTarget(prior(), Holed(), energy_high=50.0)
    loss = ReverseKLLoss(field, target, n_steps=2)
    z = loss.latents(400, stream(8))
    value = loss.per_sample(z).detach()
    hole = z[:, 0, 0] > 0
    assert target.n_invalid == int(hole.sum()) > 100
    assert bool(torch.isfinite(value).all())
    # Each counts with the cap, far above any other: dropped samples would leave the mean low.
    cap = 50 + math.log1p(1e20)
    expected = prior().latent_log_prob(z) + torch.where(
        hole, cap, Anisotropic().reduced_potential_and_gradient(z)[0]
    )
    torch.testing.assert_close(value, expected)
    # Their gradient is that of the entropy alone, -(N - 1) per axis; the others feel the force.
    only = gradient_of(loss.per_sample(z)[hole].mean(), field)
    torch.testing.assert_close(only, torch.full((2,), -2.0).double())
    others = gradient_of(loss.per_sample(z)[~hole].mean(), field)
    assert float((others - only).abs().min()) > 0.1
    with pytest.raises(TrainingError, match=r"none of \d+ samples .* finite energy; start from"):
        loss.per_sample(z[hole])


def test_points_off_the_chart_count_as_invalid() -> None:
    chain = chain_prior()

    class Flat:
        def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x)

    target = ChartTarget(chain, Flat(), energy_high=10.0)
    y = chain.sample_latent(6, generator=stream(9))
    y[2, 0] = -1e4  # a negative bond length
    value, gradient = target.log_prob_and_gradient(y)
    assert target.n_invalid == 1
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())
    assert not bool(gradient[2].any())
    with pytest.raises(ValueError, match="energy_high is inf"):
        ChartTarget(chain, Flat(), energy_high=math.inf)


def test_score_of_the_flow() -> None:
    # Along the flow the score of q is carried exactly, up to the error of the grid.
    field, own_prior, z = case("chart")
    grid = uniform_grid(24)
    with torch.enable_grad():
        point = z.clone().requires_grad_(True)
        log_p0 = own_prior.latent_log_prob(point)  # type: ignore[attr-defined]
        (score,) = torch.autograd.grad(log_p0.sum(), point)
    y, carried, ladj, _ = transport_score(field, z, score, grid)
    flow = EquivariantFlow(own_prior, field, grid=grid)  # type: ignore[arg-type]
    point = y.clone().requires_grad_(True)
    back, ladj_back = rk4(flow._field, point, grid, reverse=True)
    log_q = own_prior.latent_log_prob(back) - ladj_back  # type: ignore[attr-defined]
    (exact,) = torch.autograd.grad(log_q.sum(), point)
    torch.testing.assert_close(carried, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj, ladj_back.detach(), rtol=0, atol=1e-5)
    assert float((carried - score).abs().max()) > 0.1  # power: it did change
    z_back, score_back, _, _ = transport_score(field, y, carried, grid, reverse=True)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(score_back, score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["chart", "leave-one-out"])
def test_a_known_trajectory_has_the_gradient_of_its_solve(kind: str, reverse: bool) -> None:
    field, _, z = case(kind)
    grid = uniform_grid(3)
    pull = torch.randn(z.shape, generator=stream(5), dtype=torch.float64)
    states = transport_score(field, z, pull, grid, reverse=reverse).states
    end, _ = solve(field, z, grid, reverse=reverse, with_divergence=False)
    again = follow(field, states, grid, reverse=reverse)
    assert states.shape == (4, *z.shape)
    torch.testing.assert_close(again, end, rtol=0, atol=1e-11)
    expected = gradient_of((end * pull).sum(), field)
    found = gradient_of((again * pull).sum(), field)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    # power: another trajectory has another gradient
    other = follow(field, states * 1.1, grid, reverse=reverse)
    assert float((gradient_of((other * pull).sum(), field) - expected).abs().max()) > 1e-3


def test_refusals() -> None:
    field, own_prior, y = case("mlp")
    noisy = EstimatedField(field)
    for build in (
        lambda: LikelihoodLoss(noisy, own_prior, y),  # type: ignore[arg-type]
        lambda: ReverseKLLoss(noisy, scaling_target()),
    ):
        with pytest.raises(ConfigurationError, match="EstimatedField estimates its divergence"):
            build()
    with pytest.raises(ConfigurationError, match="1 of 5 configurations are outside the chart"):
        LikelihoodLoss(field, own_prior, y.clone().index_fill(0, torch.tensor(2), torch.nan))  # type: ignore[arg-type]
