"""What a run is said to cost, and the ceiling of a quick one."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stand_ins import DATA
from stand_ins.small_molecules import written

from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.runs import forecast as module
from openmm_eqflow.runs import stages
from openmm_eqflow.runs.forecast import describe_system, forecast, measure, pool_bytes
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.training.pool import Pool, build_pool, join_pools
from openmm_eqflow.training.recipes import make_recipe

#: Seconds of an energy with forces and of a chart with its gradient, 72 atoms on a busy core.
SLOW = (7e-4, 7e-4)


def large(n_particles=72):
    return SimpleNamespace(n_particles=n_particles, settings={})


def test_a_quick_run_counts_fewer_points_of_a_large_molecule():
    small, same, big, huge = (
        make_recipe("molecule", "quick", None, n, "tempering") for n in (0, 22, 72, 500)
    )
    assert small == same
    for key in ("prior_samples", "n_pool", "chunk", "n_evaluate", "n_samples"):
        assert getattr(huge, key) <= getattr(big, key) < getattr(small, key)
    assert big.n_pool == round(60_000 * (28 / 72) ** 1.5)
    assert huge.n_evaluate == 1000
    # Only quick has a ceiling, and what a user asks for stands.
    standard = [make_recipe("molecule", "standard", None, n, "tempering") for n in (0, 72)]
    assert standard[0] == standard[1]
    asked = make_recipe("molecule", "quick", {"quick": {"n_pool": 77_000}}, 72)
    assert asked.n_pool == 77_000
    assert make_recipe("cluster", "quick", None, 72) == make_recipe("cluster", "quick")


def test_the_ceiling_is_ten_minutes_and_two_gigabytes():
    for n, costs in ((72, SLOW), (120, (2e-3, 1.5e-3))):
        cast = forecast(large(n), make_recipe("molecule", "quick", None, n), "quick", costs)
        assert cast.minutes < 12.0
        assert cast.gigabytes < 2.0
    # Power: without it the same run takes what it took.
    quick = make_recipe("molecule", "quick", method="tempering")
    before = forecast(large(), quick, "standard", SLOW)
    assert before.minutes > 12.0
    assert before.gigabytes > 2.5


@pytest.mark.parametrize(("budget", "times"), [("quick", [1, 2]), ("standard", [1, 2, 4])])
def test_a_quick_reference_is_not_extended_for_long(monkeypatch, tmp_path, budget, times):
    asked = []

    def short(*_, seconds, **__):
        asked.append(seconds)
        return SimpleNamespace(
            n_frames=10, temperatures=torch.zeros(1), frame_interval_ps=1.0, platform="CPU",
            wall_seconds=seconds, convergence={},
        )  # fmt: skip

    monkeypatch.setattr(stages, "run_reference", short)
    recipe = make_recipe("molecule", budget, method="tempering")
    run = SimpleNamespace(
        config=SimpleNamespace(recipe=recipe, budget=budget, seed=0),
        path=tmp_path,
        load_system=lambda: None,
    )
    stages._reference(run, lambda *_: None)
    assert asked == [k * recipe.reference_seconds for k in times]


def test_memory_of_a_pool_is_counted_right():
    system = load_system("toluene")
    flow = load_flow(system.directory / "flow.safetensors")
    with stages.build_target(system) as target:
        stream = torch.Generator().manual_seed(0)
        pool = join_pools(build_pool(flow.prior, target, n_prior=300, generator=stream))
    assert isinstance(pool, Pool)
    found = sum(column.numel() * column.element_size() for column in pool)
    assert found == pytest.approx(pool_bytes(len(pool.y), system.n_particles), rel=0.01)


@pytest.mark.parametrize("method", ["tempering", "annealing"])
def test_costs_are_measured_and_go_into_the_forecast(method):
    system = load_system("alanine-dipeptide")
    energy, chart = measure(system)
    assert 1e-7 < energy < 1e-2
    assert 1e-7 < chart < 1e-2
    recipe = make_recipe("molecule", "standard", method=method)
    isomers = find_isomers(system.system, system.topology)
    cast = forecast(system, recipe, "standard", (energy, chart), isomers)
    seconds = recipe.train_seconds
    seconds += recipe.reference_seconds if method == "tempering" else 0.0
    assert cast.minutes > 0.5 * seconds / 60.0
    slower = forecast(system, recipe, "standard", (10 * energy, 10 * chart), isomers)
    assert slower.minutes > cast.minutes
    assert slower.n_frames <= cast.n_frames
    longer = replace(recipe, train_seconds=recipe.train_seconds + 600.0)
    more = forecast(system, longer, "standard", (energy, chart), isomers)
    assert more.minutes == pytest.approx(cast.minutes + 10.0)


def test_init_names_isomers_minutes_memory_and_size(tmp_path, monkeypatch):
    made = written(tmp_path / "in", "BUTENE")
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", lambda system: SLOW)
        lines, warnings = describe_system(made)
    text = " ".join(lines)
    assert "double bond C2-C3" in text
    told = re.findall(r"(quick|standard|thorough) (\d+) min and (\d+\.\d) GB", text)
    assert [budget for budget, _, _ in told] == ["quick", "standard", "thorough"]
    minutes = [int(m) for _, m, _ in told]
    assert minutes == sorted(set(minutes))
    for budget, *figures in told:
        cast = forecast(made, make_recipe("molecule", budget, None, 12), budget, SLOW)
        assert figures == [f"{cast.minutes:.0f}", f"{cast.gigabytes:.1f}"]
    assert "Size: small (12 atoms, 0 torsions that turn)" in text
    assert not any("atoms with" in w for w in warnings)
    assert describe_system(load_system("dw4")) == ([], [])
    proline = init_system(
        tmp_path / "pro", pdb=DATA / "pro-dipeptide-cis.pdb", forcefield=["amber14-all.xml"]
    )
    assert "Sampled on both sides: amide ω (5-7) cis" in " ".join(describe_system(proline)[0])
    tempered = replace(proline, settings={"recipe": {"method": "tempering"}})
    assert "Kept as in the structure: amide ω (5-7) cis" in " ".join(describe_system(tempered)[0])


def test_a_large_molecule_is_warned_of(monkeypatch, tmp_path):
    made = init_system(
        tmp_path / "pro", pdb=DATA / "pro-dipeptide.pdb", forcefield=["amber14-all.xml"]
    )
    monkeypatch.setattr(module, "measure", lambda system: SLOW)
    monkeypatch.setattr(module, "_MEDIUM", 10)
    monkeypatch.setattr(module, "_LARGE", 20)
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)
    made = replace(made, settings={"recipe": {"method": "tempering"}})
    lines, warnings = describe_system(made)
    assert "Size: large (26 atoms, 1 torsion that turns)" in " ".join(lines)
    assert [key in " ".join(warnings) for key in ("few effective", "reference frames", "GB")] == [
        True, True, True,
    ]  # fmt: skip


def test_which_molecules_are_annealed_and_how_much_is_asked_of_them():
    small, dear, large_one = (make_recipe("molecule", "standard", None, n) for n in (22, 42, 72))
    assert small.method == dear.method == "annealing"
    assert large_one.method == "tempering"
    assert dear.ess < small.ess
    assert dear.n_points > small.n_points
    assert make_recipe("molecule", "standard", None, 42, ess=0.9).ess == 0.9
    kept = make_recipe("molecule", "standard", {"standard": {"n_points": 100}}, 42)
    assert kept.n_points == 100  # what a user asks for stands
    dynamics = make_recipe("molecule", "standard", {"recipe": {"reference_seconds": 9}}, 42)
    assert dynamics.method == "tempering"
    # The card of a shipped system names a command that goes on meaning what it meant.
    shipped = load_system("ala3")
    recipe = make_recipe("molecule", "thorough", shipped.settings, shipped.n_particles)
    assert recipe.method == "tempering"
