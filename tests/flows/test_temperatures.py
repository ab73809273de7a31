"""Levels beyond the target, against quadrature at other temperatures."""

from __future__ import annotations

import pytest
import torch
from openmm import unit
from stand_ins import peroxide
from stand_ins.flows import stream

from openmm_eqflow.analysis.temperatures import at_temperatures, thermodynamics
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows import temperatures
from openmm_eqflow.flows.adapt import path_from_chemistry
from openmm_eqflow.flows.path import Path
from openmm_eqflow.flows.relaxed import AnnealedPath
from openmm_eqflow.flows.temperatures import continued
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.targets.target import BoltzmannTarget

pytestmark = pytest.mark.statistical
KELVINS = [220.0, 300.0, 500.0, 900.0]
GAS = 8.31446261815324e-3


def molecule(*, held: bool = False) -> BoltzmannTarget:
    system = peroxide.held() if held else peroxide.system()
    start = peroxide.held_positions() if held else peroxide.POSITIONS
    return BoltzmannTarget(system, peroxide.topology(), 300 * unit.kelvin, start)


def weighted(
    target: BoltzmannTarget, n: int
) -> tuple[AnnealedPath, torch.Tensor, torch.Tensor, torch.Tensor]:
    path = path_from_chemistry(target, ess=0.9, seed=1, n_points=400, max_rounds=2).path
    x, log_q = path.sample_and_log_prob(n, generator=stream(3))
    u = target.reduced_potential(x)
    return path, x, u, -u - log_q


def test_log_z_and_energies_at_other_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    target = molecule()
    path, x, u, log_w = weighted(target, 4000)
    found = continued(path, target, x, log_w, KELVINS, seed=4)
    assert [station.kelvin for station in found] == KELVINS
    assert torch.equal(found[1].log_weight, log_w)
    by_weights = at_temperatures(log_w.numpy(), u.numpy(), 300.0, KELVINS)
    for station, plain in zip(found, by_weights, strict=True):
        row = thermodynamics(station.log_weight.numpy(), station.u.numpy(), 300.0, station.kelvin)
        truth = peroxide.exact(GAS * station.kelvin)
        assert abs(row["log_z"] - truth.log_z) < 4 * row["log_z_error"]
        assert row["log_z_error"] < 0.05
        mean = truth.mean_u * GAS * station.kelvin
        assert abs(row["mean_potential"] - mean) < 4 * row["mean_potential_error"]
        torch.testing.assert_close(target.reduced_potential(station.x), station.u)
        if station.kelvin == 900.0:  # where weights alone do not reach
            assert row["effective_samples"] > 3 * plain["effective_samples"]
    # Power: the same points without the work of the levels.
    hot = found[3]
    row = thermodynamics(log_w.numpy(), hot.u.numpy(), 300.0, 900.0)
    assert abs(row["log_z"] - peroxide.exact(GAS * 900).log_z) > 1.0
    # Power: points that never move keep their weights, and those are spread.
    still = lambda at, start, t, **_: (start, torch.ones(len(start.y)), None)  # noqa: E731
    monkeypatch.setattr(temperatures, "_tuned_step", lambda *_: torch.ones(6))
    monkeypatch.setattr(temperatures, "trajectory", still)
    (fixed,) = continued(path, target, x, log_w, [900.0], seed=4)
    expected = at_temperatures(log_w.numpy(), u.numpy(), 300.0, [900.0])[0]
    row = thermodynamics(fixed.log_weight.numpy(), fixed.u.numpy(), 300.0, 900.0)
    assert row["log_z"] == pytest.approx(expected["log_z"], abs=1e-6)


def test_bonds_held() -> None:
    target = molecule(held=True)
    path, x, _, log_w = weighted(target, 3000)
    (hot,) = continued(path, target, x, log_w, [700.0], seed=5)
    row = thermodynamics(hot.log_weight.numpy(), hot.u.numpy(), 300.0, 700.0)
    log_z, mean = peroxide.held_exactly(GAS * 700)
    assert abs(row["log_z"] - log_z) < 4 * row["log_z_error"] < 0.1
    assert abs(row["mean_potential"] - mean) < 4 * row["mean_potential_error"]
    wrong = peroxide.exact(GAS * 700).log_z  # power: bonds that are free have another log Z
    assert abs(row["log_z"] - wrong) > 4 * row["log_z_error"]


def test_what_is_no_temperature_and_no_weight_is_refused() -> None:
    target = molecule()
    path, x, _, log_w = weighted(target, 20)
    for bad in (float("nan"), 0.0, -300.0, float("inf")):
        with pytest.raises(ConfigurationError, match="above 0 K"):
            continued(path, target, x, log_w, [350.0, bad])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no weight to go on with"):
            continued(path, target, x, torch.full_like(log_w, bad), [350.0])
    dead = torch.where(torch.arange(20) == 3, -torch.inf, log_w)
    (hot,) = continued(path, target, x, dead, [350.0])
    assert torch.isinf(hot.log_weight).tolist() == [k == 3 for k in range(20)]


def test_without_a_chart_there_are_no_levels() -> None:
    target = molecule()
    gaussian = Path(MeanFreeGaussian(4, 3, 0.1), ())
    with pytest.raises(ConfigurationError, match="reweight instead"):
        continued(gaussian, target, torch.zeros(2, 4, 3), torch.zeros(2), [350.0])
