"""EquivariantFlow: one exact log q per configuration, forwards and backwards."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins.flows import (
    chart_field,
    molecule_flow,
    planar_flow,
    randomised,
    stream,
    uniform_grid,
    water_prior,
)

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.geometry import mean_free_basis, random_rotations, rotate
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.zmatrix import InternalCoordinates
from openmm_eqflow.vector_fields import ChartField
from openmm_eqflow.vector_fields.kernel import KernelField

FLOWS = {"molecule": molecule_flow, "planar": planar_flow}


@pytest.mark.parametrize("name", FLOWS)
def test_round_trip_and_log_q_on_the_shipped_grid(name):
    flow = FLOWS[name]()
    flow.calibrate(32, tolerance=2e-4, generator=stream(9))
    z = flow.prior.sample_latent(100, generator=stream(0))
    with torch.no_grad():
        x, log_q = flow.transform(z)
    keep = torch.isfinite(log_q)
    assert float(keep.double().mean()) > 0.95
    x, log_q = x[keep], log_q[keep]
    assert x.dtype == log_q.dtype == torch.float64
    assert float(x.mean(1).abs().max()) < 1e-12
    z_back, log_q_back = flow.inverse(x)
    with torch.no_grad():
        x_back, _ = flow.transform(z_back)
    # In the chart's own frame on both ways, so positions compare directly.
    gap = (x_back - x).norm(dim=-1).amax(1)
    assert float(torch.quantile(gap, 0.99)) < 1e-6
    assert float(torch.quantile((log_q - log_q_back).abs(), 0.99)) < 1e-3


@pytest.mark.parametrize("name", FLOWS)
def test_round_trip_and_log_q_on_a_fine_grid_in_float64(name):
    flow = FLOWS[name](n_steps=96)
    flow.module.double()
    x, log_q = flow.sample_and_log_prob(40, generator=stream(1))
    keep = torch.isfinite(log_q)
    x, log_q = x[keep], log_q[keep]
    z, log_q_back = flow.inverse(x)
    assert float((log_q - log_q_back).abs().max()) < 1e-8
    with torch.no_grad():
        again, _ = flow.transform(z)
    pairs = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    pairs_again = torch.cdist(again, again, compute_mode="donot_use_mm_for_euclid_dist")
    assert float((pairs - pairs_again).abs().max()) < 1e-6
    torch.testing.assert_close(flow.log_prob(x), log_q_back, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_log_q_is_invariant(name):
    flow = FLOWS[name](n_steps=8)
    flow.module.double()
    x = flow.sample(16, generator=stream(2))
    moved = rotate(x, random_rotations(16, flow.n_dims, generator=stream(3))) + 2.0
    torch.testing.assert_close(flow.log_prob(moved), flow.log_prob(x), atol=1e-9, rtol=0)
    if name == "planar":
        swapped = x[:, [2, 0, 3, 1]]
        torch.testing.assert_close(flow.log_prob(swapped), flow.log_prob(x), atol=1e-9, rtol=0)
    else:  # the chart knows left from right
        mirrored = x * torch.tensor([1.0, 1.0, -1.0])
        assert float((flow.log_prob(mirrored) - flow.log_prob(x)).abs().max()) > 1


@pytest.mark.statistical
def test_samples_have_haar_orientation():
    """First and second moments of all nine entries of a rotation, read off three atoms."""
    flow, n = molecule_flow(n_steps=2), 3_000

    def uniform(x: torch.Tensor) -> bool:
        a, b = x[:, 4] - x[:, 0], x[:, 1] - x[:, 0]
        a = a / a.norm(dim=1, keepdim=True)
        b = b - (a * b).sum(1, keepdim=True) * a
        b = b / b.norm(dim=1, keepdim=True)
        r = torch.stack([a, b, torch.linalg.cross(a, b)], 1).flatten(1)
        second = r.T @ r / n - torch.eye(9, dtype=r.dtype) / 3
        return bool(
            r.mean(0).abs().max() < 5 * (1 / 3 / n) ** 0.5
            and second.abs().max() < 5 * (1 / 5 / n) ** 0.5
        )

    x = flow.sample(n, generator=stream(4))
    assert uniform(x)
    # Power: upside down or not, and turned about one axis only.
    up = x * torch.where(x[:, 4, 2] > x[:, 0, 2], 1.0, -1.0)[:, None, None]
    with torch.no_grad():
        own = flow.transform(flow.prior.sample_latent(n, generator=stream(4)))[0]
    flat = random_rotations(n, 2, generator=stream(5))
    about_z = torch.cat([rotate(own[..., :2], flat), own[..., 2:]], -1)
    assert not any(map(uniform, (up, own, about_z)))


def test_log_q_against_the_jacobian_of_the_discrete_map_for_dw4():
    flow = planar_flow(4, n_steps=24)
    flow.module.double()
    basis = mean_free_basis(4)
    z = flow.prior.sample_latent(2, generator=stream(5))

    def run(w: torch.Tensor) -> torch.Tensor:
        point = (basis @ w.reshape(3, 2))[None]
        return (basis.T @ flow.transform(point)[0][0]).flatten()

    with torch.no_grad():
        _, log_q = flow.transform(z)
    for row in range(2):
        w = (basis.T @ z[row]).flatten()
        jacobian = torch.autograd.functional.jacobian(run, w)
        expected = (
            flow.prior.latent_log_prob(z[row : row + 1])[0] - torch.linalg.slogdet(jacobian)[1]
        )
        assert float(log_q[row]) == pytest.approx(float(expected), abs=1e-6)
        assert abs(float(torch.linalg.slogdet(jacobian)[1])) > 1e-3


def test_integral_of_q_is_one_for_two_particles():
    prior = MeanFreeGaussian(2, 2, 1.0)
    torch.manual_seed(0)
    field = KernelField.fit(prior.sample(400, generator=stream(1)), classes=[0, 0])
    with torch.no_grad():
        field.weight += 0.1 * torch.randn(field.weight.shape, generator=stream(2))
        field.bias += 0.1
    flow = EquivariantFlow(prior, field.requires_grad_(False).double(), grid=uniform_grid(24))
    axis = torch.linspace(-7, 7, 101, dtype=torch.float64)
    w = torch.cartesian_prod(axis, axis)
    x = w[:, None, :] * mean_free_basis(2)[:, 0][None, :, None]
    cell = float(axis[1] - axis[0]) ** 2
    z, log_q = flow.inverse(x)
    assert float(log_q.exp().sum() * cell) == pytest.approx(1.0, abs=1e-3)
    # Power control: the same integral without the log determinant is off.
    assert abs(float(flow.prior.latent_log_prob(z).exp().sum() * cell) - 1) > 1e-2


def test_integral_of_q_is_one_for_a_triatomic_chart_flow():
    prior = water_prior()
    torch.manual_seed(0)
    field = ChartField(3, 0, [], width=12, conditioner_width=8, torsion_width=4)
    flow = EquivariantFlow(prior, randomised(field, 0.05).double(), grid=uniform_grid(8))
    b1 = torch.linspace(0.06, 0.14, 41, dtype=torch.float64)
    b2 = torch.linspace(0.07, 0.15, 41, dtype=torch.float64)
    theta = torch.linspace(1e-3, math.pi - 1e-3, 61, dtype=torch.float64)
    grid = torch.meshgrid(b1, b2, theta, indexing="ij")
    bonds = torch.stack([grid[0].flatten(), grid[1].flatten()], 1)
    internal = InternalCoordinates(bonds, grid[2].reshape(-1, 1), bonds[:, :0])
    x, log_volume = prior.zmatrix.from_internal(internal)
    flow.chunk_size = 8192
    cell = float((b1[1] - b1[0]) * (b2[1] - b2[0]) * (theta[1] - theta[0]))
    log_q = flow.log_prob(x)
    assert float(((log_q + log_volume).exp() * cell).sum()) == pytest.approx(1.0, abs=2e-3)
    # Power control: the same integral without the log determinant of the flow is off.
    z, _ = flow.inverse(x)
    bare = flow.prior.latent_log_prob(z) - prior.from_cartesian(x)[1]
    assert abs(float(((bare + log_volume).exp() * cell).sum()) - 1) > 1e-2


@pytest.mark.parametrize("name", FLOWS)
def test_batch_mates_do_not_matter(name):
    flow = FLOWS[name](n_steps=4)
    x = flow.sample(96, generator=stream(6))
    other = flow.sample(96, generator=stream(7))
    other[:13] = x[:13]
    alone, mixed = flow.log_prob(x), flow.log_prob(other)
    assert torch.equal(alone[:13], mixed[:13])  # bit for bit at one batch size
    for size in (1, 5, 33):
        gap = (flow.log_prob(x[:size]) - alone[:size]).abs().max()
        assert float(gap) < 1e-6, size
    flow.chunk_size = 20
    assert float((flow.log_prob(x) - alone).abs().max()) < 1e-6


def test_chunks_and_seeds():
    flow = molecule_flow(n_steps=2)
    flow.chunk_size = 16
    x, log_q = flow.sample_and_log_prob(50, generator=stream(8))
    again, log_q_again = flow.sample_and_log_prob(50, generator=stream(8))
    assert x.shape == (50, 5, 3)
    assert log_q.shape == (50,)
    assert torch.equal(x, again)
    assert torch.equal(log_q, log_q_again)
    assert not torch.equal(x, flow.sample(50, generator=stream(9)))
    assert not log_q.requires_grad


def test_rsample_is_differentiable():
    """Along a direction of all weights, against finite differences of the same draws."""
    flow = molecule_flow(n_steps=2)
    flow.module.double().requires_grad_(True)
    weights = list(flow.module.parameters())

    def loss() -> torch.Tensor:
        x, log_q = flow.rsample_and_log_prob(4, generator=stream(10))
        return x.square().sum() + log_q.sum()

    loss().backward()
    steps = [torch.randn(p.shape, generator=stream(11), dtype=p.dtype) for p in weights]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(weights, steps, strict=True))
    values = []
    with torch.no_grad():
        for h in (1e-6, -2e-6):  # there, and back across the start
            for p, d in zip(weights, steps, strict=True):
                p += h * d
            values.append(float(loss()))
    assert abs(slope) > 0.1
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert flow.rsample(2, generator=stream(1)).requires_grad


def test_network_precision_does_not_change_the_types():
    flow = molecule_flow(n_steps=4)
    assert flow.dtype == torch.float32
    x, log_q = flow.sample_and_log_prob(8, generator=stream(11))
    assert x.dtype == log_q.dtype == flow.log_prob(x).dtype == torch.float64
    flow.calibrate(32, generator=stream(12))
    assert flow.dtype == torch.float32


def test_calibration_freezes_a_grid_accurate_in_float64():
    """On latents it has not seen, against an eight times finer grid; a coarser one is not."""
    flow = molecule_flow()
    error = flow.calibrate(64, tolerance=1e-3, generator=stream(13))
    assert error <= 1e-3
    assert flow.grid[0] == 0.0
    assert flow.grid[-1] == 1.0
    coarse = flow.n_ode_steps
    assert flow.dtype == torch.float32
    double = molecule_flow()
    double.module.double()
    z = flow.prior.sample_latent(200, generator=stream(14))

    def log_q(grid: tuple[float, ...]) -> torch.Tensor:
        double.grid = grid
        with torch.no_grad():
            return double.transform(z)[1]

    def off(grid: tuple[float, ...]) -> float:
        gap = (log_q(grid) - log_q(uniform_grid(8 * coarse))).abs()
        return float(torch.quantile(gap[torch.isfinite(gap)], 0.99))

    assert off(flow.grid) < 2e-3
    assert off(uniform_grid(coarse // 2)) > 4e-3
    grid = flow.grid
    flow.log_prob(flow.sample(4, generator=stream(15)))
    assert flow.grid == grid
    flow.calibrate(64, tolerance=1e-6, generator=stream(13))
    assert flow.n_ode_steps > coarse


def test_prior_and_field_must_describe_one_space():
    with pytest.raises(ValueError, match=r"prior lives on \(3,\), vector field on \(9,\)"):
        EquivariantFlow(water_prior(), chart_field())
