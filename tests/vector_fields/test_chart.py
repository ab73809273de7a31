"""ChartField: both parts of the trace, identity at the start, products kept with the weights."""

from __future__ import annotations

import copy
import itertools

import torch
from stand_ins.fields import chart_points
from stand_ins.flows import chain_prior, chart_field, stream

from openmm_eqflow.vector_fields.chart import ChartField


def test_stiff_and_soft_coordinates_are_in_the_trace():
    y, t = chart_points(chain_prior(), "data", 6), torch.tensor(0.3).double()
    whole = chart_field(0.4).double().with_divergence(t, y)[1]
    for name in ("torsion_out", "w2"):
        part = chart_field(0.4).double()
        getattr(part, name).zero_()
        assert float((part.with_divergence(t, y)[1] - whole).abs().min()) > 1e-6, name


def test_untrained_field_is_the_identity():
    torch.manual_seed(0)
    field = ChartField(4, 1, [1], width=8).requires_grad_(False)
    v, div = field.with_divergence(torch.tensor(0.5), torch.randn(3, 5, generator=stream(0)))
    assert float(v.abs().max()) == 0.0
    assert float(div.abs().max()) == 0.0


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
