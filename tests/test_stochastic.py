"""Stochastic flows: kernels, maps, levels, and weights that are exact on paths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

from openmm_eqflow.audit import audit
from openmm_eqflow.bench.layers import run_bench
from openmm_eqflow.checkpoint import load_flow, save_flow
from openmm_eqflow.diagnostics import log_z, relative_ess
from openmm_eqflow.ensemble import StateMemory, flow_step
from openmm_eqflow.errors import CheckpointError, ConfigurationError, TrainingError
from openmm_eqflow.fitting_layers import train_stochastic_flow
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.flow_registry import register_flow
from openmm_eqflow.hamiltonian import hamiltonian_step
from openmm_eqflow.latent_kernel import LatentKernel
from openmm_eqflow.library import load_system
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.recipes import STOCHASTIC_OPTIONS, make_recipe
from openmm_eqflow.stochastic import kernels
from openmm_eqflow.stochastic.annealing import Batch
from openmm_eqflow.stochastic.audit import map_in_float64, path_errors
from openmm_eqflow.stochastic.fit import fit_path, spline_tables
from openmm_eqflow.stochastic.flow import StochasticFlow
from openmm_eqflow.stochastic.path import SoftCorePath
from openmm_eqflow.vector_fields.radial import RadialSplineField
from openmm_eqflow.workflow import build_target

PATH = SoftCorePath()
END = PATH.levels(np.array([1.0]))[0]
OPTIONS = dict(STOCHASTIC_OPTIONS) | {"n_fit": 1024, "stride": 0.06, "n_splines": 40, "reach": 4.0}


def gas(n: int, n_particles: int, seed: int = 0) -> NDArray[np.float64]:
    x = np.random.default_rng(seed).standard_normal((n, n_particles, 3))
    return x - x.mean(1, keepdims=True)


def batch_of(x: NDArray[np.float64], seed: int = 1) -> Batch:
    return Batch(x, np.random.default_rng(seed))


# -- the pair, whose density is known by quadrature --------------------------------------------


class Pair:
    """Two particles at the end of the path: u = 2 (d^-12 - 2 d^-6) + d^2 / 4, kT = 1."""

    kT = 1.0

    def reduced_potential(self, x: Tensor) -> Tensor:
        return self.of_distance((x[:, 0] - x[:, 1]).norm(dim=-1))

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            u = self.reduced_potential(y)
            (gradient,) = torch.autograd.grad(u.sum(), y)
        return u.detach(), gradient

    @staticmethod
    def of_distance(d: Tensor) -> Tensor:
        return 2 * (d**-12 - 2 * d**-6) + 0.25 * d**2

    def weight(self, d: float) -> float:
        """Unnormalised density of the distance; mean-free subspace: d^3y = d^3r / 8^(1/2)."""
        return 4 * math.pi * d**2 * math.exp(-float(self.of_distance(torch.tensor(d, dtype=torch.float64)))) / 8**0.5

    def log_z(self) -> float:
        return math.log(quad(self.weight, 0.3, 15, limit=200)[0])

    def mean(self, function: Callable[[float], float]) -> float:
        top = quad(lambda d: function(d) * self.weight(d), 0.3, 15, limit=200)[0]
        return float(top / quad(self.weight, 0.3, 15, limit=200)[0])

    def draw(self, n: int, seed: int) -> Tensor:
        """Exact samples by inversion of the distance's cumulative density."""
        grid = np.linspace(0.3, 15, 20_001)
        density = np.array([self.weight(d) for d in grid])
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        rng = np.random.default_rng(seed)
        d = np.interp(rng.random(n) * cumulative[-1], cumulative, grid)
        direction = rng.standard_normal((n, 3))
        half = 0.5 * d[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        return torch.from_numpy(np.stack([half, -half], 1))


PAIR = Pair()


@pytest.fixture(scope="module")
def pair_flow() -> StochasticFlow:
    """Timesteps short enough for a pair at its hard core, levels enough for the determinants."""
    batches = [batch_of(gas(256, 2, k), k) for k in range(3)]
    fit = fit_path(PATH, batches, spacing=0.2, n_splines=30, stride=0.1, n_leapfrog=4)
    fit = fit._replace(timesteps=0.3 * fit.timesteps)
    return StochasticFlow.from_fit(
        PATH, fit, n_particles=2, reach=6.0, n_levels=60, n_leapfrog=6, chunk_size=256
    )


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
    np.testing.assert_allclose(
        one.positions()[:, order] @ rotation.T, two.positions(), atol=3e-6
    )
    level = PATH.levels(np.array([0.4]))[0]
    np.testing.assert_allclose(one.energy(level), two.energy(level), rtol=1e-4, atol=1e-3)


# -- Monte Carlo layers ------------------------------------------------------------------------


@pytest.mark.statistical
def test_trajectories_leave_the_level_invariant() -> None:
    exact = quad(PAIR.weight, 0.3, 1.1)[0] / quad(PAIR.weight, 0.3, 15, limit=200)[0]

    def share_of_close_pairs(accept_all: bool) -> tuple[float, float]:
        batch = batch_of(PAIR.draw(8192, 0).numpy())
        if accept_all:

            class Zeros:
                standard_normal = staticmethod(batch.rng.standard_normal)

                @staticmethod
                def random(n: int, dtype: object) -> NDArray[np.float32]:
                    return np.zeros(n, np.float32)

            batch.rng = Zeros()  # type: ignore[assignment]
        batch.set_level(END)
        shares = [batch.relax(END, 0.07, 4) for _ in range(40)]
        assert accept_all or 0.5 < np.mean(shares) < 0.99  # the rejections matter
        x = batch.positions()
        close = np.linalg.norm(x[:, 0] - x[:, 1], axis=1) < 1.1
        return float(close.mean()), float(close.std() / np.sqrt(len(close)))

    mean, error = share_of_close_pairs(False)
    assert abs(mean - exact) < 5 * error
    mean, error = share_of_close_pairs(True)
    assert abs(mean - exact) > 5 * error


def test_overflow_is_rejected() -> None:
    x = gas(16, 5)
    batch = batch_of(x)
    batch.set_level(END)
    before = batch.x.copy()
    assert batch.relax(END, 1e6, 3) == 0.0
    np.testing.assert_array_equal(batch.x, before)
    again = np.empty_like(batch.u)
    again[:] = batch.u
    batch.set_level(END)
    np.testing.assert_array_equal(batch.u, again)


# -- weights -----------------------------------------------------------------------------------


@pytest.mark.statistical
def test_weights_forwards_and_backwards_give_log_z(pair_flow: StochasticFlow) -> None:
    exact = PAIR.log_z()
    x, log_q = pair_flow.sample_and_log_prob(5000, generator=torch.Generator().manual_seed(1))
    u = PAIR.reduced_potential(x)
    ours = log_z((-u - log_q).numpy())
    assert abs(ours.value - exact) < 4 * ours.error
    # Backwards from exact samples: E[1 / w] = 1 / Z.
    y = PAIR.draw(5000, 2)
    inverse = (PAIR.reduced_potential(y) + pair_flow.log_prob(y)).numpy()
    back = log_z(inverse)
    assert abs(-back.value - exact) < 4 * back.error
    # Power: log q dropped, its sign turned.
    for lie in (-u, -u + log_q):
        wrong = log_z(lie.numpy())
        assert abs(wrong.value - exact) > 4 * wrong.error


@pytest.mark.statistical
def test_log_z_without_the_determinants_is_wrong(
    pair_flow: StochasticFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Batch.transport
    monkeypatch.setattr(Batch, "transport", lambda self, *rest: 0.0 * honest(self, *rest))
    x, log_q = pair_flow.sample_and_log_prob(5000, generator=torch.Generator().manual_seed(1))
    wrong = log_z((-PAIR.reduced_potential(x) - log_q).numpy())
    assert abs(wrong.value - PAIR.log_z()) > 4 * wrong.error


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_chains_that_accept_by_paths_are_exact(pair_flow: StochasticFlow, factor: float) -> None:
    """Metropolis over (x, path), local moves in between; power control: log q times 0 or -1."""

    class Altered:
        def sample_and_log_prob(
            self, n: int, *, generator: torch.Generator | None = None
        ) -> tuple[Tensor, Tensor]:
            x, log_q = pair_flow.sample_and_log_prob(n, generator=generator)
            return x, factor * log_q

        def log_prob(self, x: Tensor) -> Tensor:
            return factor * pair_flow.log_prob(x)

    generator = torch.Generator().manual_seed(5)
    x = PAIR.draw(2000, 6)
    memory = StateMemory()
    means, moved = [], []
    for step in range(24):
        if step % 3 == 2:  # new states: their paths are drawn backwards
            x, _ = hamiltonian_step(PAIR, x, step_size=0.1, n_steps=3, generator=generator)
        x, info = flow_step(Altered(), PAIR, x, 1, generator, memory=memory)
        moved.append(float(info.accepted.double().mean()))
        if step >= 8:
            means.append((x[:, 0] - x[:, 1]).norm(dim=-1).numpy())
    per_chain = np.mean(means, axis=0)
    error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
    gap = abs(per_chain.mean() - PAIR.mean(lambda d: d))
    if factor == 1.0:
        assert np.mean(moved) > 0.3
        assert gap < 5 * error
    else:
        assert gap > 5 * error


def test_same_seed_same_paths(pair_flow: StochasticFlow) -> None:
    one, two, other = (
        pair_flow.sample_and_log_prob(300, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    x = one[0][:20]
    assert torch.equal(pair_flow.log_prob(x), pair_flow.log_prob(x))
    assert float(x.mean(1).abs().max()) < 1e-12
    # log q-hat has the mean of its density's logarithm from below, not log q of the sample's path.
    assert not torch.equal(pair_flow.log_prob(x), one[1][:20])


# -- the fit -----------------------------------------------------------------------------------


@pytest.mark.statistical
def test_field_earns_its_place(lj13_flow: StochasticFlow) -> None:
    """Same levels without the field, the field without Monte Carlo, the prior: all are worse."""
    bare = lj13_flow.without_field()
    field_alone = EquivariantFlow(lj13_flow.prior, lj13_flow.vector_field)
    found = []
    with build_target(load_system("lj13")) as target:
        for flow in (lj13_flow, bare, field_alone):
            x, log_q = flow.sample_and_log_prob(2048, generator=torch.Generator().manual_seed(7))
            log_w = (-target.reduced_potential(x) - log_q).numpy()
            found.append(relative_ess(log_w))
    assert found[0] > 0.2
    assert found[0] > 2 * found[1]
    assert found[0] > 10 * found[2]


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
    assert names == ["field and Monte Carlo", "Monte Carlo alone", "field alone", "prior"]
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
