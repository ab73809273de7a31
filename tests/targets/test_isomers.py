"""Torsions, rings, double bonds and centres from bonds alone; what was seen in one state only."""

from __future__ import annotations

import numpy as np
import pytest
from stand_ins import DATA, small_molecules
from stand_ins.runs import write_run
from stand_ins.small_molecules import written

from openmm_eqflow.analysis.convergence import assess, features
from openmm_eqflow.analysis.isomers import isomer_populations
from openmm_eqflow.analysis.observables import Torsion, seen_once, slow_coordinates, torsion_angles
from openmm_eqflow.report.data import load_run
from openmm_eqflow.report.populations import compare_ensembles
from openmm_eqflow.report.tables import sector
from openmm_eqflow.report.verdict import judge
from openmm_eqflow.targets.forcefield import build_from_forcefield, load_pdb
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.units import positions_in_nm


def proline(isomer):
    topology, positions = load_pdb(DATA / f"pro-dipeptide{isomer}.pdb")
    system = build_from_forcefield(topology, ["amber14-all.xml"])
    return system, topology, positions_in_nm(positions)


@pytest.mark.parametrize(
    ("name", "bonds", "rings", "n_centres"),
    [
        # central bond -> (kind, fold)
        ("BUTANE", {(0, 1): ("single", 3), (1, 2): ("single", 1), (2, 3): ("single", 3)}, [], 0),
        ("BUTENE", {(0, 1): ("single", 3), (1, 2): ("double", 1), (2, 3): ("single", 3)}, [], 0),
        ("ISOBUTENE", {(0, 1): ("double", 2)}, [], 0),
        ("ETHENE", {(0, 1): ("double", 2)}, [], 0),
        ("TERT_BUTANOL", {(0, 4): ("single", 3)}, [], 0),
        ("TOLUENE", {(0, 6): ("single", 6)}, [], 0),
        (
            "METHYL_ACETATE",
            {(0, 1): ("single", 3), (1, 3): ("ester", 1), (3, 4): ("single", 3)},
            [],
            0,
        ),
        ("FORMIC_ACID", {(0, 2): ("ester", 1)}, [], 0),
        ("CYCLOHEXANE", {}, [True], 0),
        ("METHYLCYCLOHEXANE", {(0, 6): ("single", 3)}, [False], 0),
        ("DIMETHYLCYCLOHEXANE", {(0, 6): ("single", 3)}, [False], 2),
        ("DIFLUOROBUTANE", {(1, 2): ("single", 1)}, [], 2),
        ("VALINE", {(1, 3): ("amide", 1), (5, 7): ("amide", 1), (4, 9): ("single", 1)}, [], 1),
    ],
)
def test_what_there_is(name, bonds, rings, n_centres):
    topology, system = getattr(small_molecules, name)
    found = find_isomers(system, topology, small_molecules.embed(system))
    turning = {t.atoms[1:3]: (t.kind, t.fold) for t in found.torsions if t.kind != "ring"}
    assert bonds.items() <= turning.items()
    if name != "VALINE":
        assert all(fold == 3 for bond, (_, fold) in turning.items() if bond not in bonds)
    even = [{t.even for t in found.torsions if t.ring == k} for k in range(len(found.rings))]
    assert even == [{flag} for flag in rings]
    assert len(found.centres) == n_centres


@pytest.mark.parametrize(("isomer", "word"), [("", "trans"), ("-cis", "cis")])
def test_isomers_of_proline_are_named_as_in_iupac_and_counted_from_one(isomer, word):
    system, topology, x = proline(isomer)
    found = find_isomers(system, topology, x)
    text = " ".join(found.lines(topology, x, annealed=False))
    by_path = " ".join(found.lines(topology, x, annealed=True))
    assert f"Sampled on both sides: amide ω (5-7) {word}" in by_path
    assert "Kept as in the structure: centre CA (17). Other" in by_path
    assert f"amide ω (5-7) {word}" in text
    assert "amide ω (19-21) trans" in text
    assert "centre CA (17)" in text
    assert "ring N-CD-CG-CB-CA (7-8-11-14-17)" in text
    ring = [t for t in found.torsions if t.kind == "ring"]
    assert ring[0].atoms == (6, 7, 10, 13)
    # They are slow coordinates, and the reference's convergence looks at them.
    named = slow_coordinates(x[None], torsion_angles(x[None], found.torsions), found.torsions)
    assert {f"{f} {t.name}" for t in ring for f in ("cos", "sin")} <= set(named)
    assert {n for n in named if "ring" in n} < set(features(x[None], np.zeros(1), found.torsions))


@pytest.mark.parametrize("name", ["METHYL_ACETATE", "FORMIC_ACID"])
def test_sides_of_an_ester(name: str) -> None:
    """Z has what the oxygen carries beside the carbonyl oxygen, whatever else the carbon has."""
    topology, system = getattr(small_molecules, name)
    x = small_molecules.embed(system)
    (torsion,) = (t for t in find_isomers(system, topology, x).torsions if t.kind == "ester")
    carried = torsion.atoms[3]
    gap = {}
    for state in ("Z", "E"):
        angle = np.pi if state == "Z" else 0.0
        turned = small_molecules.turned(x, system, torsion.atoms, angle)
        rows = isomer_populations((torsion,), turned[None], None, 2.5)
        assert [r["state"] for r in rows if r["population"] == 1.0] == [state]
        carbonyl = 2 if name == "METHYL_ACETATE" else 1
        gap[state] = np.linalg.norm(turned[carried] - turned[carbonyl])
    assert gap["Z"] < gap["E"] - 0.05


def test_the_chairs_of_cyclohexane_are_one_state():
    topology, system = small_molecules.CYCLOHEXANE
    x = small_molecules.embed(system)
    found = find_isomers(system, topology, x)
    # The mirror image is the other chair up to labels: no coordinate may tell them apart.
    both = np.stack([x, -x])
    angles = torsion_angles(both, found.torsions)
    for values in slow_coordinates(both, angles, found.torsions).values():
        assert values[0] == pytest.approx(values[1], abs=1e-9)
    labelled = torsion_angles(both, [t.atoms for t in found.torsions])
    assert np.abs(labelled[0] - labelled[1]).min() > 1.0
    assert not seen_once(found.torsions, np.repeat(angles, 50, axis=0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("METHYLCYCLOHEXANE", ["C7 on C1"]),
        ("METHYLPIPERIDINE", ["C7 on N1"]),
        ("CYCLOHEXANE", []),
        ("FORMYLPIPERIDINE", []),
        ("TOLUENE", []),
    ],
)
def test_substituents_of_rings(name: str, expected: list[str]) -> None:
    topology, system = getattr(small_molecules, name)
    assert [t.name for t in find_isomers(system, topology).sides] == expected


def test_sides_of_trans_and_cis() -> None:
    """The chairs of the trans isomer differ; those of the cis one only in labels."""
    topology, system = small_molecules.DIMETHYLCYCLOHEXANE
    counts = {
        seed: len(find_isomers(system, topology, small_molecules.embed(system, seed)).sides)
        for seed in (0, 1)
    }
    assert counts == {0: 2, 1: 0}


@pytest.mark.parametrize("name", ["METHYLCYCLOHEXANE", "METHYLPIPERIDINE"])
def test_axial_and_equatorial(name: str) -> None:
    """Axial bonds stand on the ring's mean plane; a chair's flip exchanges them."""
    topology, system = getattr(small_molecules, name)
    (side,) = find_isomers(system, topology).sides
    seen = set()
    for seed in range(40):
        x = small_molecules.embed(system, seed)
        ring = x[:6] - x[:6].mean(axis=0)
        normal = np.linalg.svd(ring)[2][2]
        heights = ring @ normal
        if not (heights * heights[0] * (-1.0) ** np.arange(6) > 1e-4).all():
            continue  # no chair
        arm = x[6] - x[0]
        upright = abs(arm @ normal) / np.linalg.norm(arm) > 0.6
        rows = {r["state"]: r["population"] for r in isomer_populations((side,), x[None], None, 1)}
        assert rows == {"equatorial": 1.0 - upright, "axial": float(upright)}
        seen.add(bool(upright))
    assert seen == {False, True}


def test_torsions_seen_in_one_state():
    rng = np.random.default_rng(0)
    torsions = [
        Torsion("ω", (0, 1, 2, 3), 1, "amide"),
        Torsion("C=C", (0, 1, 2, 3), 1, "double"),
        Torsion("C-C", (0, 1, 2, 3)),
        Torsion("φ", (0, 1, 2, 3)),
        Torsion("methyl", (0, 1, 2, 3), 3),
        Torsion("ring a", (0, 1, 2, 3), 1, "ring", 0),
        Torsion("ring b", (1, 2, 3, 0), 1, "ring", 0),
    ]
    one = 0.1 * rng.normal(size=(1000, len(torsions))) + np.array([3, 3, 1, -1, 0, 1, -1])
    names = [[t.name for t in members] for members in seen_once(torsions, one)]
    assert names == [["ω"], ["C=C"], ["C-C"], ["φ"], ["ring a", "ring b"]]
    # Power: a hundredth of the frames in a second state is enough.
    two = one.copy()
    two[:10] += np.array([3, 3, 2, 2, 0, -2, 0])
    assert not seen_once(torsions, two)
    two[:6, 0] = 3.0
    assert [t.name for (t,) in seen_once(torsions, two)] == ["ω"]


def test_a_reference_seen_in_one_state_is_not_converged():
    rng = np.random.default_rng(1)
    walkers = [{"potential_energy": rng.normal(size=1000)} for _ in range(2)]
    facts = {"replica": [np.zeros((1000, 1), int)] * 2, "frame_interval_ps": 1.0}
    counts = {"attempts": np.zeros(0, int), "accepted": np.zeros(0, int)}
    whole = assess(walkers, **facts, **counts)
    assert whole["converged"]
    assert whole["mixed"]
    part = assess(walkers, one_state=["ω"], **facts, **counts)
    assert not part["converged"]
    assert part["mixed"]
    assert part["one_state"] == ["ω"]


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("BUTENE", "C2-C3"),
        ("BUTANE", "C2-C3"),
        ("METHYLCYCLOHEXANE", "ring C1-C2-C3-C4-C5-C6 (1-2-3-4-5-6)"),
        ("TOLUENE", None),
        ("CYCLOHEXANE", None),
    ],
)
def test_one_isomer_alone_is_never_converged(tmp_path, name, once):
    """Chains, flow and reference agree on the one state that all of them started in."""
    system = written(tmp_path / "in", name)
    run = load_run(write_run(tmp_path / "run", str(system.directory)))
    verdict = judge(run, compare_ensembles(run))
    if once is None:
        assert verdict.word == "Converged"
        assert verdict.sentence.startswith("Converged: ")
        return
    assert verdict.word == "Confined"
    assert verdict.sampling == "fair"
    assert f"{once} was seen in one state only" in verdict.sentence
    assert "Converged" not in verdict.sentence
    assert any(line == f"Seen in one state only: {once}." for line in sector(run))


def test_flips_of_like_groups_are_no_populations(tmp_path):
    """A phenyl turned by half has two labellings but one state, a butane has two states."""
    rng = np.random.default_rng(2)
    for fold, n_rows in ((2, 0), (1, 1)):
        torsion = Torsion("C-C", (0, 1, 2, 3), fold)
        angle = np.where(rng.random(4000) < 0.3, 0.5, 0.5 - np.pi) + 0.1 * rng.normal(size=4000)
        x = quads(angle)
        system = written(tmp_path / f"in-{fold}", "BUTANE")
        run = load_run(write_run(tmp_path / f"run-{fold}", str(system.directory)))
        rows = compare_ensembles(with_frames(run, x, torsion))
        assert sum(row.state for row in rows) == n_rows


def quads(angle):
    """Four atoms with a dihedral, ``(n, 4, 3)``."""
    x = np.zeros((len(angle), 4, 3))
    x[:, 0] = [0.1, 0.0, 0.1]
    x[:, 2] = [0.0, 0.0, -0.15]
    x[:, 3] = np.stack([0.1 * np.cos(angle), 0.1 * np.sin(angle), 0.0 * angle - 0.2], axis=1)
    return x.astype(np.float32)


def with_frames(run, x, torsion):
    """The run with other frames in every ensemble."""
    import dataclasses

    n = len(x)
    ensembles = {
        key: dataclasses.replace(
            getattr(run, key),
            x=x,
            u=np.zeros(n),
            log_weight=None,
            chain=np.arange(n) % 4,
            torsions=(torsion,),
        )
        for key in ("reference", "chain", "flow")
    }
    return dataclasses.replace(run, **ensembles)
