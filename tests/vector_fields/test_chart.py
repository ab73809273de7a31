"""ChartField: exact trace everywhere, periodic torsions, rebuilt from its configuration."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from stand_ins.flows import chain_prior, chart_field, randomised, stream

from openmm_eqflow.vector_fields import VectorField, build_vector_field
from openmm_eqflow.vector_fields.chart import ChartField


def points(kind: str, n: int = 6) -> torch.Tensor:
    if kind == "prior":
        return chain_prior(tail_share=0.1).sample_latent(n, generator=stream(2))
    if kind == "data":  # shifted and correlated, as frames look in the chart
        y = torch.randn(n, 9, generator=stream(3), dtype=torch.float64)
        y[:, :7] = 0.6 * y[:, :7] + 0.8 * y[:, :1] + 0.3
        return y
    y = 30.0 * torch.randn(n, 9, generator=stream(4), dtype=torch.float64)  # 30 sigma
    y[:, 7:] = (y[:, 7:] + math.pi) % (2 * math.pi) - math.pi
    return y


def full_trace(field: ChartField, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Trace of the autograd Jacobian and the sum of the absolute diagonal (the scale)."""
    diagonals = []
    for row in range(len(y)):
        time = t if t.dim() == 0 else t[row]
        jacobian = torch.autograd.functional.jacobian(
            lambda q, time=time: field(time, q[None])[0], y[row]
        )
        diagonals.append(torch.diagonal(jacobian))
    diagonal = torch.stack(diagonals)
    return diagonal.sum(1), diagonal.abs().sum(1)


@pytest.mark.parametrize("kind", ["prior", "data", "tail"])
@pytest.mark.parametrize("scalar_time", [True, False])
def test_divergence_is_the_trace(kind, scalar_time):
    field = chart_field(0.4).double()
    y = points(kind)
    t = torch.tensor(0.3).double() if scalar_time else torch.linspace(0, 1, 6).double()
    v, div = field.with_divergence(t, y)
    torch.testing.assert_close(v, field(t, y), rtol=0, atol=0)
    trace, scale = full_trace(field, t, y)
    assert float(((div - trace).abs() / scale).max()) < 1e-10
    # Not a small number compared with nothing: both parts contribute.
    assert float(trace.abs().min()) > 1e-3
    stiff_only = chart_field(0.4).double()
    stiff_only.torsion_out.zero_()
    assert float((stiff_only.with_divergence(t, y)[1] - div).abs().min()) > 1e-6


@pytest.mark.parametrize(("n_stiff", "fold"), [(3, []), (5, [3]), (4, [1, 3, 2])])
def test_divergence_for_any_number_of_torsions(n_stiff, fold):
    torch.manual_seed(1)
    field = ChartField(n_stiff, len(fold), fold, width=16, conditioner_width=8, torsion_width=8)
    field = randomised(field, 0.3).double()
    y = torch.randn(4, n_stiff + len(fold), generator=stream(0), dtype=torch.float64)
    t = torch.tensor(0.7, dtype=torch.float64)
    trace, scale = full_trace(field, t, y)
    assert float(((field.with_divergence(t, y)[1] - trace).abs() / scale).max()) < 1e-10


def test_divergence_is_differentiable():
    field = chart_field(0.3).double().requires_grad_(True)
    y = points("prior", 2)
    t = torch.tensor(0.5, dtype=torch.float64)
    _, div = field.with_divergence(t, y)
    (gradient,) = torch.autograd.grad(div.sum(), field.w1)
    h = 1e-6
    with torch.no_grad():
        field.w1[3, 4] += h
        up = field.with_divergence(t, y)[1].sum()
        field.w1[3, 4] -= 2 * h
        down = field.with_divergence(t, y)[1].sum()
    assert float((up - down) / (2 * h)) == pytest.approx(float(gradient[3, 4]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_periodic_in_the_torsions(fold):
    torch.manual_seed(0)
    field = ChartField(4, 2, [fold, 1], width=16, conditioner_width=8, torsion_width=8)
    field = randomised(field, 0.3).double()
    y = torch.randn(5, 6, generator=stream(1), dtype=torch.float64)
    t = torch.tensor(0.2, dtype=torch.float64)
    for column, period in ((4, 2 * math.pi / fold), (5, 2 * math.pi)):
        turned = y.clone()
        turned[:, column] += period
        for one, two in zip(
            field.with_divergence(t, y), field.with_divergence(t, turned), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        turned[:, column] += 0.4 * period
        assert float((field(t, turned) - field(t, y)).abs().max()) > 1e-3


def test_untrained_field_is_the_identity():
    torch.manual_seed(0)
    field = ChartField(4, 1, [1], width=8).requires_grad_(False)
    v, div = field.with_divergence(torch.tensor(0.5), torch.randn(3, 5, generator=stream(0)))
    assert float(v.abs().max()) == 0.0
    assert float(div.abs().max()) == 0.0


def test_rebuilt_from_its_configuration():
    field = chart_field(0.3)
    assert isinstance(field, VectorField)
    assert field.exact_divergence
    again = build_vector_field("ChartField", json.loads(json.dumps(field.config)))
    again.load_state_dict(field.state_dict())
    again.requires_grad_(False)  # matmul folds its operands differently where it tracks gradients
    y = points("prior").float()
    t = torch.linspace(0, 1, 6)
    for one, two in zip(field.with_divergence(t, y), again.with_divergence(t, y), strict=True):
        assert torch.equal(one, two)


def test_kept_products_follow_the_weights() -> None:
    torch.manual_seed(3)
    field = ChartField(n_stiff=4, n_soft=1, fold=[1], width=8).double()
    t, y = torch.tensor(0.3, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)

    def divergence() -> torch.Tensor:
        with torch.no_grad():
            kept = field.with_divergence(t, y)[1]
        torch.testing.assert_close(kept, field.with_divergence(t, y)[1], rtol=0, atol=0)
        return kept

    seen = [divergence()]
    with torch.no_grad():
        for weight in (field.w0, field.w1, field.w2, field.w3):
            weight += 0.1 * torch.randn_like(weight)
            seen.append(divergence())
    other = ChartField(n_stiff=4, n_soft=1, fold=[1], width=8).double()
    field.load_state_dict(other.state_dict())
    seen.append(divergence())
    # w1 acts through w2, which starts at zero: the first two changes leave no trace.
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen[2:]))
    assert copy.deepcopy(field).float().with_divergence(t.float(), y.float())[1].dtype == (
        torch.float32
    )
