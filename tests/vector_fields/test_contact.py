"""ContactField and its geometry: exact derivative and trace, saved, chosen by a recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_ins.fields import SIZES, chart_points, contact_field
from stand_ins.flows import chain_prior, methanol_prior, stream, water_prior

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.runs.fit import build_field
from openmm_eqflow.training.recipes import make_recipe
from openmm_eqflow.vector_fields import ContactField, VectorField
from openmm_eqflow.vector_fields.chart_geometry import ChartGeometry

PRIORS = {"chain": chain_prior, "methanol": methanol_prior, "water": water_prior}


@pytest.mark.parametrize("kind", ["prior", "data", "tail"])
@pytest.mark.parametrize("name", PRIORS)
def test_derivative_of_the_positions(name: str, kind: str) -> None:
    prior = PRIORS[name]()
    geometry = ChartGeometry.of(prior).double()
    # Buffers are made in float32; not rounded here, so that the maps are one.
    geometry.load_state_dict(
        {
            "modes": prior.modes,
            "mean": prior.coefficients,
            "factor": prior.cholesky,
            "centre": prior.centre,
        }
    )
    y = chart_points(prior, kind)
    x, jacobian = geometry(y)
    torch.testing.assert_close(x, prior.to_cartesian(y)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, geometry.positions(y), rtol=0, atol=0)
    for row in range(len(y)):
        exact = torch.autograd.functional.jacobian(
            lambda q: geometry.positions(q[None])[0], y[row]
        )
        # Up to a common motion: compare what distances see.
        for i, j in [(0, 1), (0, 2), (1, 2), *([(0, 3), (2, 4)] if x.shape[1] > 4 else [])]:
            r = x[row, i] - x[row, j]
            ours = r @ (jacobian[row, i] - jacobian[row, j])
            theirs = r @ (exact[i] - exact[j])
            scale = float(theirs.abs().max())
            assert float((ours - theirs).abs().max()) < 1e-9 * max(scale, 1e-3)
            assert scale > 1e-5


@pytest.mark.parametrize("name", PRIORS)
def test_pull_back_is_the_transpose_of_the_derivative(name: str) -> None:
    geometry = ChartGeometry.of(PRIORS[name]()).double()
    y = chart_points(PRIORS[name](), "prior")
    x, jacobian = geometry(y)
    n, h = len(y), 3
    # Gradients of functions of distances: no net force, no net torque.
    weight = torch.randn(h, x.shape[1], x.shape[1], generator=stream(8), dtype=torch.float64)
    pulls = torch.einsum("hij,nijc->nich", weight + weight.mT, x[:, :, None] - x[:, None])
    columns = torch.randn(geometry.n_stiff, h, generator=stream(9), dtype=torch.float64)
    again, motion = geometry.linearise(y)
    along, soft = geometry.pull_back(motion, pulls, columns)
    assert torch.equal(again, x)
    full = torch.einsum("nach,nacd->ndh", pulls, jacobian)
    torch.testing.assert_close(along, (full[:, : geometry.n_stiff] * columns).sum(1))
    torch.testing.assert_close(soft, full[:, geometry.n_stiff :])
    assert soft.shape == (n, geometry.n_soft, h)


def test_many_pairs_are_summed_by_atom() -> None:
    prior = chain_prior()
    few = contact_field(prior)
    assert not few.by_atom  # arithmetic of small molecules, bit for bit
    pairs = [[0, 3], [0, 4], [1, 4]] * 150
    many = ContactField(prior.zmatrix.config(), prior.soft, 3, pairs, **SIZES)
    assert many.by_atom
    gradients = []
    for by_atom in (False, True):
        few.by_atom = by_atom
        few.double().requires_grad_(True)
        v, div = few.with_divergence(torch.tensor(0.3).double(), chart_points(prior, "prior"))
        loss = (div + v.sum(1)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(few.parameters())))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert float(gradients[0][0].abs().max()) > 0


def test_trace_sees_the_distances_in_both_parts() -> None:
    prior = chain_prior()
    y, t = chart_points(prior, "prior"), torch.tensor(0.4).double()
    field = contact_field(prior).double()
    div = field.with_divergence(t, y)[1]
    for name in ("contact_out", "contact_torsion"):
        other = contact_field(prior).double()
        getattr(other, name).zero_()
        assert float((other.with_divergence(t, y)[1] - div).abs().min()) > 1e-6, name


def test_untrained_field_is_the_identity() -> None:
    prior = chain_prior()
    field = ContactField.fit(prior, n_samples=200, **SIZES).requires_grad_(False)
    v, div = field.with_divergence(torch.tensor(0.5), chart_points(prior, "prior").float())
    assert float(v.abs().max()) == 0.0
    assert float(div.abs().max()) == 0.0


def test_pairs_are_those_that_can_meet() -> None:
    field = ContactField.fit(chain_prior(), n_samples=500, **SIZES)
    found = set(map(tuple, field.config["pairs"]))
    assert (0, 4) in found  # turned towards each other by the torsions
    assert (0, 1) not in found  # a bond
    assert (1, 3) not in found  # held by bonds and an angle
    assert isinstance(field, VectorField)
    assert field.exact_divergence


def test_a_flow_with_it_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    prior = chain_prior(tail_share=0.1)
    field = contact_field(prior, 0.1)
    flow = EquivariantFlow(prior, field, grid=tuple(k / 8 for k in range(9)))
    save_flow(flow, tmp_path / "flow")
    loaded = load_flow(tmp_path / "flow")
    loaded.module.requires_grad_(False)  # matmul folds differently where it tracks gradients
    x, log_q = flow.sample_and_log_prob(20, generator=stream(5))
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
    # The inverse is that of the same map (eight steps, float32 network).
    assert float((loaded.log_prob(x) - log_q).abs().max()) < 1e-2


def test_recipe_chooses_it() -> None:
    prior = chain_prior()
    target = SimpleNamespace(symmetry=None)
    recipe = make_recipe("molecule", "thorough", {"recipe": {"field": SIZES}})
    frames = torch.zeros(1, 5, 3)
    field = build_field(recipe, prior, target, frames)  # type: ignore[arg-type]
    assert isinstance(field, ContactField)
    assert field.contact_out.shape == (7, 6)
    plain = {k: v for k, v in SIZES.items() if k not in ("contacts", "n_rbf")}
    recipe = make_recipe("molecule", "standard", {"recipe": {"field": plain}})
    assert not isinstance(build_field(recipe, prior, target, frames), ContactField)  # type: ignore[arg-type]
