"""One contract for every Cartesian vector field: exact divergence, symmetries, round trips."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import random_rotations, remove_mean, rotate
from openmm_eqflow.vector_fields import leave_one_out
from openmm_eqflow.vector_fields.base import VectorField, build_vector_field
from openmm_eqflow.vector_fields.baselines import EGNNField, MLPField
from openmm_eqflow.vector_fields.divergence import (
    exact_divergence,
    mean_free_directions,
)
from openmm_eqflow.vector_fields.features import fit_pair_statistics, pair_classes
from openmm_eqflow.vector_fields.kernel import KernelField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField
from openmm_eqflow.vector_fields.radial import RadialSplineField

# a chain 0-1-2-3-4 whose end groups (0, 4) and (1, 3) differ, and a free pair (2, 5)
CLASSES = [0, 1, 2, 2, 1, 0]
BONDS = [[0 if i == j else 1 + (i % 2) * (j % 2) for j in range(6)] for i in range(6)]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}

Case = tuple[str, int, bool]
CASES: list[Case] = [
    (name, n_dims, bonded)
    for name in ("kernel", "egnn", "leave_one_out", "mlp")
    for n_dims, bonded in ((2, False), (3, True))
] + [("radial", 2, False), ("radial", 3, False)]


def data(n: int, n_dims: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = 0.3 * grid[:6, -n_dims:]
    sites = sites + 0.05 * torch.arange(6.0)[:, None]
    noise = 0.03 * torch.randn(n, 6, n_dims, generator=generator)
    return remove_mean((sites + noise).double())


def make(case: Case) -> nn.Module:
    name, n_dims, bonded = case
    x = data(200, n_dims)
    classes = CLASSES if bonded else [0] * 6
    bonds = BONDS if bonded else None
    torch.manual_seed(0)
    if name == "kernel":
        field: nn.Module = KernelField.fit(x, classes=classes, bond_distances=bonds)
    elif name == "egnn":
        field = EGNNField.fit(x, classes=classes, bond_distances=bonds, width=12, n_layers=2)
    elif name == "leave_one_out":
        field = LeaveOneOutField.fit(
            x, classes=classes, bond_distances=bonds, width=12, readout_width=10, n_vectors=5
        )
    elif name == "radial":  # far reach, so that the tails of the tests are not all zero
        field = RadialSplineField(
            n_particles=6, n_dims=n_dims, reach=30.0, n_splines=150, times=[0.0, 0.3, 1.0]
        )
    else:
        field = MLPField.fit(x, width=24, n_layers=2)
    with torch.no_grad():
        for name_, parameter in field.named_parameters():
            if "log_" not in name_ and "centers" not in name_:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return field.double().requires_grad_(False)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}d")
def case(request: pytest.FixtureRequest) -> Case:
    selected: Case = request.param
    return selected


def jacobians(field: nn.Module, t: Tensor, y: Tensor) -> Tensor:
    rows = [
        torch.autograd.functional.jacobian(lambda q, b=b: field(t[b], q[None])[0], y[b])
        for b in range(len(y))
    ]
    size = y[0].numel()
    return torch.stack([row.reshape(size, size) for row in rows])


@pytest.mark.parametrize("where", ["prior", "data", "tail"])
def test_divergence_is_the_trace(case: Case, where: str) -> None:
    field = make(case)
    y = data(4, case[1], seed=1)
    if where == "prior":
        y = remove_mean(0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    elif where == "tail":
        y = y * torch.tensor([5.0, 10.0, 30.0, 100.0])[:, None, None]
    y = y.double()
    t = torch.tensor([0.0, 0.31, 0.77, 1.0], dtype=torch.float64)
    jacobian = jacobians(field, t, y)
    expected = torch.diagonal(jacobian, dim1=1, dim2=2).sum(-1)
    velocity, divergence = field.with_divergence(t, y)
    size = torch.diagonal(jacobian, dim1=1, dim2=2).abs().sum(-1)
    assert (expected.abs() > 1e-6 * size).any()
    error = (divergence - expected).abs() / expected.abs().clamp_min(1e-2 * size)
    assert float(error.max()) < 1e-10
    torch.testing.assert_close(velocity, field(t, y), rtol=1e-9, atol=1e-12)
    tangents = exact_divergence(
        lambda q: field(t, q), y, mean_free_directions(6, case[1], like=y), chunk_size=4
    )[1]
    torch.testing.assert_close(tangents, expected, rtol=1e-9, atol=1e-10 * float(size.max()))


def test_divergence_is_differentiable(case: Case) -> None:
    field = make(case).requires_grad_()
    y = data(2, case[1]).requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64)

    def total(q: Tensor) -> Tensor:
        divergence: Tensor = field.with_divergence(t, q)[1]
        return divergence.sum()

    (gradient,) = torch.autograd.grad(total(y), y)
    step = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = 1e-8
    with torch.no_grad():
        numeric = (total(y + h * step) - total(y - h * step)) / (2 * h)
    assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=1e-5)
    total(y.detach()).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in field.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetries(case: Case, dtype: torch.dtype) -> None:
    field = make(case).to(dtype)
    y = data(3, case[1]).to(dtype)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=dtype)
    velocity, divergence = field.with_divergence(t, y)
    scale = float(velocity.abs().max())
    assert scale > 1e-3

    def check(mapped: Callable[[Tensor], Tensor]) -> float:
        moved, moved_divergence = field.with_divergence(t, mapped(y))
        torch.testing.assert_close(
            moved_divergence, divergence, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype]
        )
        return float((moved - mapped(velocity)).abs().max()) / scale

    assert float(velocity.mean(1).abs().max()) < TOLERANCE[dtype] * scale
    shifted = field(t, y + 0.7)
    assert float((shifted - velocity).abs().max()) < TOLERANCE[dtype] * scale
    if case[0] == "mlp":
        return
    rotation = random_rotations(1, case[1], generator=torch.Generator().manual_seed(4))[0]
    for matrix in (rotation, rotation * torch.tensor([-1.0, *[1.0] * (case[1] - 1)])):
        proper = matrix.to(dtype)
        assert check(lambda q, m=proper: rotate(q, m)) < TOLERANCE[dtype]
    allowed = [5, 4, 2, 3, 1, 0] if not case[2] else list(range(6))
    if case[2]:
        # atoms 0 and 5 share a class, but their bonds differ: only a joint symmetry may pass
        table = pair_classes(CLASSES, BONDS)
        swapped = [0, 1, 2, 3, 4, 5]
        swapped[0], swapped[5] = 5, 0
        assert not torch.equal(table, table[swapped][:, swapped])
    assert check(lambda q: q[:, allowed]) < TOLERANCE[dtype]


def test_declared_permutations_only() -> None:
    x = data(100, 3)
    classes = [0, 1, 1, 1, 2, 3]  # like a methyl: 1, 2, 3 exchangeable
    bonds = [
        [0, 1, 1, 1, 1, 2],
        [1, 0, 2, 2, 2, 3],
        [1, 2, 0, 2, 2, 3],
        [1, 2, 2, 0, 2, 3],
        [1, 2, 2, 2, 0, 1],
        [2, 3, 3, 3, 1, 0],
    ]
    t = torch.tensor(0.3, dtype=torch.float64)
    for cls in (KernelField, EGNNField, LeaveOneOutField):
        torch.manual_seed(1)
        field = cls.fit(x, classes=classes, bond_distances=bonds).double()
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.2)
        field.requires_grad_(False)
        y = data(2, 3, seed=5)
        velocity = field(t, y)
        cycle, swap = [0, 2, 3, 1, 4, 5], [4, 1, 2, 3, 0, 5]
        torch.testing.assert_close(field(t, y[:, cycle]), velocity[:, cycle])
        assert float((field(t, y[:, swap]) - velocity[:, swap]).abs().max()) > 1e-4


def test_batch_independence(case: Case) -> None:
    field = make(case)
    y = data(5, case[1])
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    velocity, divergence = field.with_divergence(t, y)
    for b in range(5):
        alone = field.with_divergence(t[b], y[b : b + 1])
        torch.testing.assert_close(alone[0][0], velocity[b], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone[1][0], divergence[b], rtol=1e-10, atol=1e-10)
    disturbed = y.clone()
    disturbed[1:] += 1.0 + torch.rand(disturbed[1:].shape, dtype=torch.float64)
    again = field.with_divergence(t, disturbed)
    torch.testing.assert_close(again[0][0], velocity[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(again[1][0], divergence[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("single_time", [True, False])
def test_blocks_of_a_batch_change_nothing(
    single_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = make(("leave_one_out", 3, False))
    y = data(7, 3, seed=3)
    t = torch.tensor(0.3, dtype=y.dtype) if single_time else torch.linspace(0, 1, 7).to(y)
    whole, divergence = field.with_divergence(t, y)
    sizes: list[int] = []
    trunk = field.trunk.forward
    monkeypatch.setattr(leave_one_out, "_BLOCK_PAIRS", 2 * 6**2)
    monkeypatch.setattr(field.trunk, "forward", lambda x, *a: sizes.append(len(x)) or trunk(x, *a))
    parts, divergence_of_parts = field.with_divergence(t, y)
    assert sizes == [2, 2, 2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(divergence_of_parts, divergence, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(field(t, y), whole, atol=1e-12, rtol=1e-12)


def test_config_round_trip(case: Case) -> None:
    field = make(case)
    assert isinstance(field, VectorField)
    config = json.loads(json.dumps(field.config))
    rebuilt = build_vector_field(type(field).__name__, config).double()
    rebuilt.load_state_dict(field.state_dict())
    y = data(2, case[1])
    t = torch.tensor(0.6, dtype=torch.float64)
    for a, b in zip(field.with_divergence(t, y), rebuilt.with_divergence(t, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with pytest.raises(TypeError, match="no_such_option"):
        type(field)(**config, no_such_option=1)
    with pytest.raises(ValueError, match="time must be"):
        field(torch.zeros(7, dtype=torch.float64), y)


def test_contacts_are_resolved_whatever_the_size_of_the_cluster() -> None:
    """On a cubic lattice of spacing 2 every nearest neighbour is at 2, in 8 sites and in 64."""
    grids = [torch.cartesian_prod(*[2.0 * torch.arange(k).double()] * 3) for k in (2, 4)]
    made = [
        fit_pair_statistics(torch.stack([x, x]), [0] * len(x), resolve="contacts") for x in grids
    ]
    assert made[0] == made[1]
    assert made[0]["pair_mean"] == [pytest.approx(2.0)]
    assert 0.0 < made[0]["pair_spread"][0] < made[0]["length"] < 1.0
    spreads = [
        fit_pair_statistics(torch.stack([x, x]), [0] * len(x))["pair_spread"][0] for x in grids
    ]
    assert spreads[1] > 1.5 * spreads[0]
    field = LeaveOneOutField.fit(torch.stack([grids[0]] * 2), classes=[0] * 8, resolve="contacts")
    assert field.config["pair_mean"] == made[0]["pair_mean"]
    assert "resolve" not in field.config


def test_divergence_on_several_threads() -> None:
    x = remove_mean(torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(3)))
    field = MLPField.fit(x.double(), width=16).eval()
    t = torch.tensor(0.3)
    expected = field.with_divergence(t, x)[1]
    with ThreadPoolExecutor(4) as executor:
        parts = list(executor.map(lambda part: field.with_divergence(t, part)[1], x.split(1)))
    torch.testing.assert_close(torch.cat(parts), expected)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="6 x 6"):
        pair_classes([0] * 6, [[0]])
    with pytest.raises(ConfigurationError, match="at least two"):
        fit_pair_statistics(torch.zeros(1, 6, 3), [0] * 6)
    with pytest.raises(ConfigurationError, match="resolve is 'contact'"):
        fit_pair_statistics(data(3, 3), [0] * 6, resolve="contact")
    with pytest.raises(ConfigurationError, match="for clusters"):
        fit_pair_statistics(data(3, 3), [0] * 6, [[1] * 6] * 6, resolve="contacts")
    with pytest.raises(ConfigurationError, match="pair classes"):
        EGNNField(classes=[0, 1, 2], n_dims=3, pair_mean=[1.0], pair_spread=[1.0], length=1.0)
    with pytest.raises(ConfigurationError, match="reach"):
        KernelField(classes=[0, 0], n_dims=3, reach=0.0)
    with pytest.raises(ConfigurationError, match="n_layers"):
        MLPField(n_particles=2, n_dims=3, length=1.0, n_layers=0)
