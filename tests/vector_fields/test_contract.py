"""One body for every vector field: exact divergence, symmetries, rows, precision, files.

A new field joins ``MEMBERS``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stand_ins.fields import (
    BONDS,
    CLASSES,
    SIZES,
    cartesian_field,
    chart_points,
    contact_field,
    data,
)
from stand_ins.flows import (
    chain_prior,
    chart_field,
    methanol_prior,
    randomised,
    stream,
    water_prior,
)
from torch import Tensor, nn

from openmm_eqflow.geometry import random_rotations, remove_mean, rotate
from openmm_eqflow.vector_fields import ChartField, ContactField
from openmm_eqflow.vector_fields.base import VectorField, build_vector_field
from openmm_eqflow.vector_fields.divergence import exact_divergence, mean_free_directions
from openmm_eqflow.vector_fields.features import pair_classes
from openmm_eqflow.vector_fields.kernel import KernelField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField
from openmm_eqflow.vector_fields.radial import RadialSplineField

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}
PLACES = ("prior", "data", "tail")


@dataclasses.dataclass(frozen=True)
class Member:
    """A field in float64, points of three kinds, and the period of each torsion of a chart.

    ``permutation`` is one a Cartesian field keeps; ``turns`` says whether it keeps rotations.
    """

    kind: type | None
    make: Callable[[], nn.Module]
    points: Callable[[str, int], Tensor]
    permutation: tuple[int, ...] | None = None
    turns: bool = True
    periods: tuple[float, ...] = ()


def in_space(n_dims: int) -> Callable[[str, int], Tensor]:
    def points(kind: str, n: int) -> Tensor:
        y = data(n, n_dims, seed=1)
        if kind == "prior":
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            return remove_mean(0.3 * noise).double()
        far = torch.tensor([5.0, 10.0, 30.0, 100.0]).repeat(n)[:n]
        return y * far[:, None, None] if kind == "tail" else y

    return points


def cartesian(kind: type | None, name: str, n_dims: int, bonded: bool) -> Member:
    allowed = range(6) if bonded else (5, 4, 2, 3, 1, 0)
    return Member(
        kind,
        lambda: cartesian_field(name, n_dims, bonded),
        in_space(n_dims),
        None if name == "mlp" else tuple(allowed),
        turns=name != "mlp",
    )


def folded() -> nn.Module:
    torch.manual_seed(1)
    field = ChartField(4, 3, [1, 3, 2], width=16, conditioner_width=8, torsion_width=8)
    return randomised(field, 0.3).double()


def free(n_stiff: int, n_soft: int) -> Callable[[str, int], Tensor]:
    def points(kind: str, n: int) -> Tensor:
        y = torch.randn(n, n_stiff + n_soft, generator=stream(3), dtype=torch.float64)
        y[:, :n_stiff] *= 30.0 if kind == "tail" else 1.0
        return y

    return points


def by_atom(field: nn.Module) -> nn.Module:
    """Sum over the pairs as fields of many pairs do."""
    field.by_atom = True  # type: ignore[assignment]
    return field


def without_pairs() -> nn.Module:
    return randomised(ContactField(water_prior().zmatrix.config(), [], 0, [], **SIZES), 0.3)


def contact(
    prior: Callable, periods: tuple[float, ...], change: Callable = lambda field: field
) -> Member:
    return Member(
        ContactField,
        lambda: change(contact_field(prior()).double()),
        lambda kind, n: chart_points(prior(), kind, n),
        periods=periods,
    )


MEMBERS = {
    f"{name}-{n_dims}d": cartesian(kind, name, n_dims, bonded)
    for name, kind in (
        ("kernel", KernelField),
        ("egnn", None),
        ("leave_one_out", LeaveOneOutField),
        ("mlp", None),
        ("radial", RadialSplineField),
    )
    for n_dims, bonded in ((2, False), (3, name != "radial"))
} | {
    "chart": Member(
        ChartField,
        lambda: chart_field(0.4).double(),
        lambda kind, n: chart_points(chain_prior(tail_share=0.1), kind, n),
        periods=(2 * math.pi, 2 * math.pi),
    ),
    "chart-folds": Member(
        ChartField, folded, free(4, 3), periods=(2 * math.pi, 2 * math.pi / 3, math.pi)
    ),
    "chart-stiff": Member(
        ChartField,
        lambda: randomised(
            ChartField(3, 0, [], width=16, conditioner_width=8, torsion_width=8), 0.3
        ).double(),
        free(3, 0),
    ),
    "contact": contact(chain_prior, (2 * math.pi, 2 * math.pi)),
    "contact-methyl": contact(methanol_prior, (2 * math.pi,)),
    "contact-water": contact(water_prior, ()),
    "contact-by-atom": contact(chain_prior, (2 * math.pi, 2 * math.pi), by_atom),
    "contact-methyl-by-atom": contact(methanol_prior, (2 * math.pi,), by_atom),
    "contact-no-pair": Member(ContactField, lambda: without_pairs().double(), free(3, 0)),
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def jacobians(field: nn.Module, t: Tensor, y: Tensor) -> Tensor:
    rows = [
        torch.autograd.functional.jacobian(lambda q, b=b: field(t[b], q[None])[0], y[b])
        for b in range(len(y))
    ]
    size = y[0].numel()
    return torch.stack([row.reshape(size, size) for row in rows])


def times(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.0, 1.0, n, dtype=dtype)


@pytest.mark.parametrize("where", PLACES)
def test_divergence_is_the_trace(member: Member, where: str) -> None:
    field = member.make()
    y, t = member.points(where, 4), times(4)
    diagonal = torch.diagonal(jacobians(field, t, y), dim1=1, dim2=2)
    expected, size = diagonal.sum(-1), diagonal.abs().sum(-1)
    assert bool((expected.abs() > 1e-6 * size).any())
    assert float(size.max()) > 1e-4  # not a small number compared with nothing
    velocity, divergence = field.with_divergence(t, y)
    error = (divergence - expected).abs() / expected.abs().clamp_min(1e-2 * size)
    assert float(error.max()) < 1e-10
    torch.testing.assert_close(velocity, field(t, y), rtol=1e-9, atol=1e-12)
    if y.dim() == 3:  # along tangents of the mean-free subspace: the same number
        directions = mean_free_directions(*y.shape[1:], like=y)
        tangents = exact_divergence(lambda q: field(t, q), y, directions, chunk_size=4)[1]
        torch.testing.assert_close(tangents, expected, rtol=1e-9, atol=1e-10 * float(size.max()))


def test_one_time_for_all_is_the_time_of_each(member: Member) -> None:
    field, y = member.make(), member.points("data", 4)
    one = torch.tensor(0.3, dtype=torch.float64)
    for a, b in zip(
        field.with_divergence(one, y), field.with_divergence(one.repeat(4), y), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    other = field(torch.tensor(0.9, dtype=torch.float64), y)
    assert float((other - field(one, y)).abs().max()) > 1e-6
    complaint = "time must be" if y.dim() == 3 else "size"
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        field(torch.zeros(7, dtype=torch.float64), y)


def test_divergence_is_differentiable(member: Member) -> None:
    """With respect to points and weights, against finite differences."""
    field = member.make().requires_grad_()
    y = member.points("data", 2).requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64)

    def total(q: Tensor) -> Tensor:
        divergence: Tensor = field.with_divergence(t, q)[1]
        return divergence.sum()

    weights = [p for p in field.parameters() if p.requires_grad]
    gradient, *slopes = torch.autograd.grad(total(y), [y, *weights], allow_unused=True)
    step = torch.randn(y.shape, generator=stream(3), dtype=torch.float64)
    h = 1e-7 if y.dim() == 2 else 1e-8
    with torch.no_grad():
        numeric = (total(y + h * step) - total(y - h * step)) / (2 * h)
    assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=1e-5, abs=1e-7)
    found = [(w, s) for w, s in zip(weights, slopes, strict=True) if s is not None]
    assert found
    steps = [torch.randn(w.shape, generator=stream(4), dtype=w.dtype) for w, _ in found]
    expected = sum(float((s * d).sum()) for (_, s), d in zip(found, steps, strict=True))
    h, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(field)
        with torch.no_grad():
            chosen = [
                p
                for p, s in zip(
                    [p for p in moved.parameters() if p.requires_grad], slopes, strict=True
                )
                if s is not None
            ]
            for p, d in zip(chosen, steps, strict=True):
                p.add_(sign * h * d)
            values.append(float(moved.with_divergence(t, y)[1].sum()))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetries(member: Member, dtype: torch.dtype) -> None:
    """Cartesian: translations, O(D), permutations. Chart: the period of every torsion."""
    field = member.make().to(dtype)
    y, t = member.points("data", 3).to(dtype), times(3, dtype)
    velocity, divergence = field.with_divergence(t, y)
    scale = float(velocity.abs().max())
    assert scale > 1e-3
    tolerance = TOLERANCE[dtype]

    def same(mapped: Callable[[Tensor], Tensor], carried: Callable[[Tensor], Tensor]) -> bool:
        moved, moved_divergence = field.with_divergence(t, mapped(y))
        size = float(divergence.abs().max().clamp_min(1.0))
        return (
            float((moved - carried(velocity)).abs().max()) < 2 * tolerance * scale
            and float((moved_divergence - divergence).abs().max()) < 10 * tolerance * size
        )

    def kept(q: Tensor) -> Tensor:
        return q

    for k, period in enumerate(member.periods):
        column = y.shape[1] - len(member.periods) + k

        def turned(q: Tensor, angle: float, column: int = column) -> Tensor:
            q = q.clone()
            q[:, column] += angle
            return q

        assert same(lambda q, p=period: turned(q, p), kept)
        assert not same(lambda q, p=period: turned(q, 0.4 * p), kept)
    if y.dim() == 2:
        return
    assert float(velocity.mean(1).abs().max()) < tolerance * scale
    assert same(lambda q: q + 0.7, kept)
    if not member.turns:
        return
    d = y.shape[2]
    rotation = random_rotations(1, d, generator=stream(4))[0]
    for matrix in (rotation, rotation * torch.tensor([-1.0, *[1.0] * (d - 1)])):
        turn = partial(rotate, rotation=matrix.to(dtype))
        assert same(turn, turn)
        assert not same(turn, kept)
    if member.permutation is not None:
        allowed = list(member.permutation)
        assert same(lambda q: q[:, allowed], lambda v: v[:, allowed])


def test_a_bond_breaks_a_symmetry_of_classes() -> None:
    """Atoms 0 and 5 share a class, but their bonds differ: only a joint symmetry may pass."""
    table = pair_classes(CLASSES, BONDS)
    swapped = [5, 1, 2, 3, 4, 0]
    assert not torch.equal(table, table[swapped][:, swapped])


@pytest.mark.parametrize("where", ["prior", "data"])
def test_single_precision_is_the_same_field(member: Member, where: str) -> None:
    field = member.make()
    y, t = member.points(where, 4), times(4)
    velocity, divergence = field.with_divergence(t, y)
    single = copy.deepcopy(field).float()
    v, div = single.with_divergence(t.float(), y.float())
    assert v.dtype == div.dtype == torch.float32
    assert float((v.double() - velocity).abs().max() / velocity.abs().max()) < 1e-3
    assert float((div.double() - divergence).abs().max() / divergence.abs().max()) < 1e-3
    # Power: the precisions do differ.
    assert not torch.equal(v.double(), velocity)


def test_rows_do_not_see_each_other(member: Member) -> None:
    field, y, t = member.make(), member.points("data", 5), times(5)
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


def test_config_round_trip(member: Member) -> None:
    """Rebuilt from JSON and weights, bit for bit in the float32 of files."""
    field = member.make().float().requires_grad_(False)
    assert isinstance(field, VectorField)
    assert member.kind is None or type(field) is member.kind
    assert field.exact_divergence
    config = json.loads(json.dumps(field.config))
    rebuilt = build_vector_field(type(field).__name__, config)
    rebuilt.load_state_dict(field.state_dict())
    rebuilt.requires_grad_(False)  # matmul folds differently where it tracks gradients
    if hasattr(field, "by_atom"):  # an order of sums that the number of pairs decides
        rebuilt.by_atom = field.by_atom
    assert tuple(rebuilt.event_shape) == tuple(field.event_shape)
    y, t = member.points("data", 4).float(), times(4, torch.float32)
    for a, b in zip(field.with_divergence(t, y), rebuilt.with_divergence(t, y), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="no_such_option"):
        type(field)(**config, no_such_option=1)
