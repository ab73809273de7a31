"""From bonds to a path: log Z of a known density at any number of levels; lost modes are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from openmm import unit
from stand_ins import peroxide
from stand_ins.flows import stream

from openmm_eqflow import BoltzmannTarget, load_flow, save_flow
from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.adapt import (
    Adaptation,
    Pilot,
    _even,
    _settled,
    carry,
    floor_weight,
    path_from_chemistry,
    spread_levels,
)
from openmm_eqflow.flows.relaxed import AnnealedPath, Levels
from openmm_eqflow.priors.chemistry import chemical_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity, TorsionGroup
from openmm_eqflow.targets.constraints import Constraints

pytestmark = pytest.mark.statistical


@pytest.fixture(scope="module")
def target() -> BoltzmannTarget:
    return BoltzmannTarget(
        peroxide.system(), peroxide.topology(), 300 * unit.kelvin, peroxide.POSITIONS
    )


@pytest.fixture(scope="module")
def prior(target: BoltzmannTarget) -> InternalCoordinatePrior:
    return chemical_prior(target, seed=1)


@pytest.fixture(scope="module")
def pilot(prior: InternalCoordinatePrior, target: BoltzmannTarget) -> Pilot:
    return carry(prior, target, 500, generator=stream(2))


@pytest.fixture(scope="module")
def made(target: BoltzmannTarget) -> Adaptation:
    return path_from_chemistry(target, ess=0.95, seed=3, n_points=500, max_rounds=2)


def test_an_ess_that_is_none(target: BoltzmannTarget) -> None:
    for ess in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match="above 0 and below 1"):
            path_from_chemistry(target, ess=ess)


@pytest.mark.parametrize("n_levels", [20, 80, pytest.param(320, marks=pytest.mark.slow)])
def test_log_z_is_exact_whatever_the_number_of_levels(
    prior: InternalCoordinatePrior, target: BoltzmannTarget, pilot: Pilot, n_levels: int
) -> None:
    """E[w] = Z; power: without the work of the levels it is not."""
    times, steps = spread_levels(pilot, n_levels)
    path = AnnealedPath(prior, target, Levels(2, times, steps))
    x, log_q = path.sample_and_log_prob(600, generator=stream(n_levels))
    log_w = (-target.reduced_potential(x) - log_q).numpy()
    found, truth = log_z(log_w), peroxide.exact(target.kT).log_z
    assert found.error < 0.05
    assert abs(found.value - truth) < 4.5 * found.error
    for layer in path.layers:  # power: the points are the same, the work is left out
        move = layer.forward
        layer.forward = lambda y, streams, move=move: (move(y, streams)[0], 0.0 * y[:, 0])
    x, log_q = path.sample_and_log_prob(600, generator=stream(n_levels))
    wrong = log_z((-target.reduced_potential(x) - log_q).numpy())
    assert abs(wrong.value - truth) > 4.5 * max(found.error, wrong.error)


def test_rounds_shorten_the_path_to_the_ess_asked_for(
    made: Adaptation, target: BoltzmannTarget
) -> None:
    first, last = made.rounds[0], [r for r in made.rounds if r.kept][-1]
    assert last.length < 0.5 * first.length
    assert last.prior_ess > first.prior_ess + 0.2
    assert made.trials[-1][2] >= 0.93
    x, log_q = made.path.sample_and_log_prob(2000, generator=stream(3))
    found = log_z((-target.reduced_potential(x) - log_q).numpy())
    assert found.error < 0.01
    assert abs(found.value - peroxide.exact(target.kT).log_z) < 4.5 * found.error
    assert made.path.audit_report is not None
    assert made.path.audit_report["passed"]
    assert all(value < 0.05 for value in made.floor.values())


def test_log_z_with_bonds_held_is_that_of_constrained_dynamics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All bonds held, heavy ends: the determinant of the mass metric is worth 0.05 in log Z."""
    held = BoltzmannTarget(
        peroxide.held(), peroxide.topology(), 300 * unit.kelvin, peroxide.held_positions()
    )
    path = path_from_chemistry(held, ess=0.9, seed=1, n_points=400, max_rounds=1).path
    assert path.prior.event_shape == (3,)

    def found() -> tuple[float, float]:
        x, log_q = path.sample_and_log_prob(6000, generator=stream(4))
        estimate = log_z((-held.reduced_potential(x) - log_q).numpy())
        return float(estimate.value), float(estimate.error)

    truth = peroxide.held_exactly(held.kT)[0]
    value, error = found()
    assert error < 0.008
    assert abs(value - truth) < 4 * error
    monkeypatch.setattr(Constraints, "half_log_det", lambda self, x: 0 * x[:, 0, 0])
    monkeypatch.setattr(
        Constraints, "half_log_det_and_gradient", lambda self, x: (0 * x[:, 0, 0], 0 * x)
    )
    value, error = found()  # power: the determinant is left out
    assert not abs(value - truth) < 4 * error


def test_a_mode_that_the_prior_lost_shows_in_the_weight_of_the_floor(
    made: Adaptation, prior: InternalCoordinatePrior, target: BoltzmannTarget
) -> None:
    """Half of the torsion's density is taken out; the path still has log Z, and the floor says."""
    assert prior.torsions is not None
    good = made.path.prior
    assert good.torsions is not None
    centres = good.torsions.centres
    table = torch.where(centres > 0, good.torsions.tables[0], 0.0)
    share = 0.02
    table = (1 - share) * table / table.sum() + share / len(table)
    group = good.torsions.groups[0]
    lost = good.copy()
    lost.torsions = TorsionDensity(
        [TorsionGroup(group.members, group.fold, group.width, 0.0)], [table]
    )
    pilot = carry(lost, target, 2000, generator=stream(5))
    times, steps = spread_levels(pilot, 10)
    path = AnnealedPath(lost, target, Levels(3, times, steps))
    x, log_q = path.sample_and_log_prob(4000, generator=stream(6))
    log_w = -target.reduced_potential(x) - log_q
    y = lost.from_cartesian(x)[0]
    (weight,) = floor_weight(lost, prior.torsions, share, y, log_w).values()
    assert weight > 0.2
    found = log_z(log_w.numpy())
    assert found.error < 0.2  # less than the log 2 of a mode that were never found again
    assert abs(found.value - peroxide.exact(target.kT).log_z) < 5 * found.error
    (whole,) = made.floor.values()
    assert not whole > 0.2  # power: of the prior that lost nothing it is small


def test_the_path_is_saved_and_loaded(made: Adaptation, tmp_path: Path) -> None:
    save_flow(made.path, tmp_path / "flow", made.record())
    again = load_flow(tmp_path / "flow")
    assert isinstance(again, AnnealedPath)
    assert again.metadata["trials"][-1]["ess"] >= 0.93
    x, log_q = made.path.sample_and_log_prob(16, generator=stream(7))
    y, same = again.sample_and_log_prob(16, generator=stream(7))
    torch.testing.assert_close(y, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(same, log_q, atol=1e-7, rtol=0)
    levels = made.path.levels._replace(steps=1.01 * made.path.levels.steps)
    other = AnnealedPath(made.path.prior, made.path.target, levels)  # power: steps are in it
    assert not torch.equal(other.sample_and_log_prob(16, generator=stream(7))[0], x)


def test_the_floor_has_both_sides_of_an_amide() -> None:
    """And of torsions that turn freely, or whose half turn is none, what it had."""
    n = 72
    amide, flat = torch.zeros(n), torch.full((n,), 1 / n)
    amide[0], amide[n // 2] = 0.95, 0.05
    groups = [
        TorsionGroup((0,), (1,), 0.25, 0.0),
        TorsionGroup((1,), (1,), 0.25, 1.0),
        TorsionGroup((2,), (2,), 0.25, 0.0),
    ]
    even = _even(TorsionDensity(groups, [amide, flat, amide]))
    torch.testing.assert_close(even.tables[0][[0, n // 2]], torch.full((2,), 0.5).double())
    torch.testing.assert_close(even.tables[1], flat.double())
    torch.testing.assert_close(even.tables[2], amide.double())


def test_more_levels_are_asked_for_only_while_they_help() -> None:
    def trials(*rows: tuple[int, float]) -> list:
        return [(k, 1000, ess, 0.0) for k, ess in rows]

    assert not _settled(trials((12, 0.53), (48, 0.59)))
    assert not _settled(trials((12, 0.53), (48, 0.59), (192, 0.865)))
    assert _settled(trials((192, 0.865), (240, 0.863), (300, 0.867)))
    assert not _settled(trials((36, 0.845), (53, 0.858), (70, 0.877)))  # slow, but it goes on
    assert not _settled(trials((5, 0.9), (6, 1.0), (7, 1.0)))
