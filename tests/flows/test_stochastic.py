"""Stochastic flows: kernels, maps, the fit, files and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stand_ins.stochastic import END, PAIR, PATH, batch_of, gas, make_pair_flow

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.bench.layers import run_bench
from openmm_eqflow.errors import AuditError, CheckpointError, ConfigurationError, TrainingError
from openmm_eqflow.flows import softcore_kernels as kernels
from openmm_eqflow.flows.audit import audit, map_in_float64, path_errors, require_passed_audit
from openmm_eqflow.flows.softcore_fit import fit_path, spline_tables
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.moves.registry import register_flow
from openmm_eqflow.moves.steps import LatentKernel
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.runs.fit import train_stochastic_flow
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.training.recipes import STOCHASTIC_OPTIONS, make_recipe
from openmm_eqflow.vector_fields.radial import RadialSplineField

OPTIONS = dict(STOCHASTIC_OPTIONS) | {"n_fit": 1024, "stride": 0.06, "n_splines": 40, "reach": 4.0}


@pytest.fixture(scope="module")
def pair_flow() -> StochasticFlow:
    return make_pair_flow()


@pytest.fixture(scope="module")
def lj13_flow() -> StochasticFlow:
    with build_target(load_system("lj13")) as target:
        options = OPTIONS | {"n_levels": 150, "n_leapfrog": 8}
        flow, _ = train_stochastic_flow(options, target, seed=0)
    return flow


# -- kernels -----------------------------------------------------------------------------------


def test_last_level_is_the_openmm_system() -> None:
    x = 1.2 * gas(64, 13)
    with build_target(load_system("lj13")) as target:
        u, gradient = target.reduced_potential_and_gradient(torch.from_numpy(x))
    batch = batch_of(x)
    batch.set_level(END)
    calm = (u < 1e4).numpy()
    assert calm.sum() > 10
    np.testing.assert_allclose(batch.u[calm], u.numpy()[calm], rtol=1e-4, atol=1e-3)
    force = -np.moveaxis(gradient.numpy(), 0, -1)[..., calm]
    np.testing.assert_allclose(batch.force[..., calm], force, rtol=1e-3, atol=2e-2)


def test_forces_are_minus_the_gradient_on_every_level() -> None:
    x = gas(8, 5)
    for level in PATH.levels(np.array([0.0, 0.4, 0.8])):
        batch = batch_of(x)
        batch.set_level(level)
        h = 1e-2
        for i, m in ((0, 0), (3, 2)):
            shift = np.zeros_like(x)
            shift[:, i, m] = h
            high, low = (batch_of(x + s * shift).energy(level).astype(float) for s in (1, -1))
            slope = (high - low) / (2 * h)
            assert np.abs(slope).max() > 0.1
            np.testing.assert_allclose(-batch.force[i, m], slope, rtol=2e-2, atol=2e-2)


def field_with(weights: NDArray[np.float64], n_particles: int) -> RadialSplineField:
    field = RadialSplineField(
        n_particles=n_particles, n_dims=3, reach=4.0, n_splines=weights.shape[-1]
    ).double()
    with torch.no_grad():
        field.weight.copy_(torch.from_numpy(weights).expand(2, -1))
    return field.requires_grad_(False)


def test_kernel_of_the_field_is_the_field() -> None:
    weights = np.random.default_rng(3).standard_normal(20)
    x = gas(32, 7)
    v, div = field_with(weights, 7).with_divergence(torch.tensor(0.2), torch.from_numpy(x))
    batch = batch_of(x)
    velocity, work = np.empty_like(batch.x), np.empty((3, 32), np.float32)
    divergence = np.empty(32, np.float32)
    kernels.push(batch.x, spline_tables(weights), 0.2, velocity, divergence, work, True)
    np.testing.assert_allclose(np.moveaxis(velocity, -1, 0), v.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(divergence, div.numpy(), rtol=1e-4, atol=1e-3)


def test_regressors_are_divergence_minus_work() -> None:
    x = gas(16, 6)
    level = PATH.levels(np.array([0.3]))[0]
    batch = batch_of(x)
    batch.set_level(level)
    out = np.empty((16, 20))
    kernels.regressors(batch.x, batch.force, 0.2, 20, out)
    gradient = -np.moveaxis(batch.force, -1, 0).astype(float)
    for m in (0, 5, 11, 19):
        unit = np.eye(20)[m]
        v, div = field_with(unit, 6).with_divergence(torch.tensor(0.0), torch.from_numpy(x))
        expected = div.numpy() - (v.numpy() * gradient).sum((1, 2))
        np.testing.assert_allclose(out[:, m], expected, rtol=1e-3, atol=1e-3)


# -- maps --------------------------------------------------------------------------------------


def test_map_determinant_and_inverse(lj13_flow: StochasticFlow) -> None:
    determinant, inverse, gap = path_errors(lj13_flow, 8, torch.Generator().manual_seed(0))
    assert float(determinant.max()) < 5e-3  # kT over the whole path; 0.01 is the audit's limit
    assert float(inverse.max()) < 1e-4
    assert float(gap.max()) < 1e-6
    # Power: the determinants are not small, so that leaving one out would show.
    assert max(abs(float(t[:, 0].sum())) for t in lj13_flow.levels.tables) > 0.05
    batch = batch_of(gas(8, 13))
    total = sum(
        np.abs(batch.transport(table, lj13_flow.levels.spacing)).mean()
        for table in lj13_flow.levels.tables
    )
    assert total > 1.0


def test_too_few_levels_fail_the_audit(pair_flow: StochasticFlow) -> None:
    coarse = pair_flow.on_levels(6)
    report = audit(coarse, n=32, generator=torch.Generator().manual_seed(0))
    assert report["against_jacobian"]["p99"] > 0.01
    with pytest.raises(AuditError, match="log q is off by"):
        require_passed_audit(coarse)
    fine = audit(pair_flow, n=32, generator=torch.Generator().manual_seed(0))
    assert fine["passed"]


def test_map_in_float64_is_that_of_the_kernels(lj13_flow: StochasticFlow) -> None:
    batch = batch_of(gas(16, 13))
    before = torch.from_numpy(batch.positions())
    k = 60
    batch.transport(lj13_flow.levels.tables[k], lj13_flow.levels.spacing)
    after = map_in_float64(lj13_flow, k)(before)
    moved = float((after - before).abs().max())
    assert moved > 1e-4
    np.testing.assert_allclose(batch.positions(), after.numpy(), atol=1e-6)


def test_maps_and_energies_are_equivariant(lj13_flow: StochasticFlow) -> None:
    rng = np.random.default_rng(4)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]  # proper or not
    order = rng.permutation(13)
    x = gas(16, 13)
    y = x[:, order] @ rotation.T
    one, two = batch_of(x), batch_of(y)
    for k in (10, 60, 120):
        ladjs = [b.transport(lj13_flow.levels.tables[k], lj13_flow.levels.spacing).copy()
                 for b in (one, two)]  # fmt: skip
        np.testing.assert_allclose(*ladjs, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one.positions()[:, order] @ rotation.T, two.positions(), atol=3e-6)
    level = PATH.levels(np.array([0.4]))[0]
    np.testing.assert_allclose(one.energy(level), two.energy(level), rtol=1e-4, atol=1e-3)


# -- the fit -----------------------------------------------------------------------------------


@pytest.mark.statistical
def test_field_earns_its_place(lj13_flow: StochasticFlow) -> None:
    """The same levels without the field are worse."""
    bare = lj13_flow.without_field()
    found = []
    with build_target(load_system("lj13")) as target:
        for flow in (lj13_flow, bare):
            x, log_q = flow.sample_and_log_prob(2048, generator=torch.Generator().manual_seed(7))
            log_w = (-target.reduced_potential(x) - log_q).numpy()
            found.append(relative_ess(log_w))
    assert found[0] > 0.2
    assert found[0] > 2 * found[1]


@pytest.mark.statistical
def test_more_levels_leave_less(lj13_flow: StochasticFlow) -> None:
    finer = lj13_flow.on_levels(2 * len(lj13_flow.grid))
    same = lj13_flow.on_levels(len(lj13_flow.grid))
    assert same.grid == lj13_flow.grid
    np.testing.assert_array_equal(same.timesteps, lj13_flow.timesteps)
    with build_target(load_system("lj13")) as target:
        found = []
        for flow in (lj13_flow, finer):
            x, log_q = flow.sample_and_log_prob(1024, generator=torch.Generator().manual_seed(8))
            found.append(float((-target.reduced_potential(x) - log_q).std()))
    assert found[1] < 0.85 * found[0]


def test_bench_takes_the_flow_apart(tmp_path) -> None:
    result = run_bench("lj13", n_levels=(60,), n_samples=512, json_path=tmp_path / "layers.json")
    assert json.loads((tmp_path / "layers.json").read_text()) == json.loads(json.dumps(result))
    names = [case["name"] for case in result["cases"]]
    assert names == ["field and Monte Carlo", "Monte Carlo alone", "prior"]
    assert result["cases"][0]["n_levels"] == 60
    assert result["cases"][0]["relative_ess"] > result["cases"][1]["relative_ess"]
    with pytest.raises(ConfigurationError, match="no cluster"):
        run_bench("toluene")


def test_fit_leaves_less_to_do() -> None:
    batches = [batch_of(gas(128, 5, k), k) for k in range(3)]
    seen: list[float] = []
    fit = fit_path(
        PATH,
        batches,
        spacing=0.2,
        n_splines=20,
        stride=0.1,
        n_leapfrog=4,
        progress=lambda t, text: seen.append(t),
    )
    assert fit.times[0] == 0.0
    assert fit.times[-1] == 1.0
    assert seen == fit.times.tolist()
    steps = np.diff(fit.times)
    assert (fit.residual[:-1] * steps).sum() < 0.7 * (fit.spread[:-1] * steps).sum()
    assert 0.6 < fit.acceptance[len(fit.times) // 2 :].mean() < 0.99


def test_fit_that_diverges_says_so() -> None:
    batches = [batch_of(np.full((64, 4, 3), np.nan)) for _ in range(2)]
    with pytest.raises(TrainingError, match="level 0"):
        fit_path(PATH, batches, spacing=0.2, n_splines=20, stride=0.1, n_leapfrog=2)


# -- files, refusals, recipes ------------------------------------------------------------------


def test_file_keeps_the_flow(pair_flow: StochasticFlow, tmp_path) -> None:
    audit(pair_flow, n=4, generator=torch.Generator().manual_seed(0))
    save_flow(pair_flow, tmp_path / "flow", {"system": "pair"})
    again = load_flow(tmp_path / "flow")
    assert isinstance(again, StochasticFlow)
    assert again.audit_report == pair_flow.audit_report
    for a, b in zip(
        pair_flow.sample_and_log_prob(40, generator=torch.Generator().manual_seed(0)),
        again.sample_and_log_prob(40, generator=torch.Generator().manual_seed(0)),
        strict=True,
    ):
        assert torch.equal(a, b)
    other = StochasticFlow(
        pair_flow.prior,  # type: ignore[arg-type]
        pair_flow.vector_field,  # type: ignore[arg-type]
        path=pair_flow.path,
        grid=pair_flow.grid,
        timesteps=pair_flow.timesteps.tolist(),
        n_leapfrog=pair_flow.n_leapfrog + 1,
    )
    save_flow(other, tmp_path / "other", {})
    assert register_flow(again)[2] != register_flow(other)[2]
    words = (tmp_path / "flow.json").read_text()
    (tmp_path / "flow.json").write_text(words.replace('"n_leapfrog": 6', '"n_leapfrog": 7'))
    with pytest.raises(CheckpointError, match="was altered"):
        load_flow(tmp_path / "flow")


def test_what_has_no_latent_point_is_refused(pair_flow: StochasticFlow) -> None:
    x = PAIR.draw(2, 0)
    for method in ("transform", "inverse", "latent_and_log_prob"):
        with pytest.raises(ConfigurationError, match="no latent point"):
            getattr(pair_flow, method)(x)
    with pytest.raises(ConfigurationError, match="no latent point"):
        pair_flow.rsample_and_log_prob(2)
    with pytest.raises(ConfigurationError, match="no latent point"):
        LatentKernel(pair_flow, PAIR, 0.5).current(x)  # type: ignore[arg-type]


def test_other_systems_are_refused() -> None:
    with (
        build_target(load_system("harmonic")) as target,
        pytest.raises(ConfigurationError, match="no lennard-jones cluster"),
    ):
        train_stochastic_flow(OPTIONS, target, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (0.0, 0.5)}, "increase up to t = 1"),
        ({"grid": (0.0, 0.0, 1.0)}, "increase up to t = 1"),
        ({"timesteps": [0.1]}, "as many positive timesteps"),
        ({"n_leapfrog": 0}, "at least one leapfrog step"),
        ({"prior": MeanFreeGaussian(2, 3, 2.0)}, "scale 1"),
    ],
)
def test_parts_that_do_not_fit(
    pair_flow: StochasticFlow, changes: dict[str, object], message: str
) -> None:
    parts: dict[str, object] = {
        "prior": pair_flow.prior,
        "vector_field": pair_flow.vector_field,
        "path": PATH,
        "grid": pair_flow.grid,
        "timesteps": pair_flow.timesteps.tolist(),
        "n_leapfrog": 3,
    }
    with pytest.raises(ConfigurationError, match=message):
        StochasticFlow(**(parts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"n_level": 3}, "n_levels"),
        ({"n_levels": 1}, "at least 2"),
        ({"stride": 0}, "above 0"),
        ({"n_leapfrog": 1.5}, "whole number"),
        (3, "a mapping"),
    ],
)
def test_recipe_entries(entry: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_recipe("cluster", "quick", {"recipe": {"stochastic": entry}})


def test_defaults_of_a_recipe() -> None:
    recipe = make_recipe("cluster", "quick", {"recipe": {"stochastic": {"n_levels": 7}}})
    assert recipe.stochastic_options() == dict(STOCHASTIC_OPTIONS) | {"n_levels": 7}
    assert make_recipe("cluster", "quick").stochastic is None
