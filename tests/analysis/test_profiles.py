"""Weighted histograms, free energies, populations and their errors; exports."""

from __future__ import annotations

import sys
import types

import mdtraj
import numpy as np
import openmm
import pandas as pd
import pytest
from stand_ins.processes import ar1

from openmm_eqflow.analysis import profiles as analysis
from openmm_eqflow.analysis.chains import block_index
from openmm_eqflow.analysis.export import to_series, to_trajectory
from openmm_eqflow.analysis.observables import (
    TwoStates,
    pair_distances,
    ramachandran_pairs,
    torsion_angles,
    two_states,
)
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import load_system


def find_torsions(topology):
    """Torsions of an mdtraj topology."""
    topology = topology.to_openmm()
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    return find_isomers(system, topology).torsions


def peptide(name="alanine-dipeptide"):
    system = load_system(name)
    topology = mdtraj.Topology.from_openmm(system.topology)
    x = np.array(system.positions._value, dtype=np.float32)[None]
    return mdtraj.Trajectory(x, topology)


def test_histogram_of_equal_weights_is_numpys():
    values = np.random.default_rng(1).normal(size=500)
    histogram = analysis.weighted_histogram(values, bins=17, range=(-2.0, 2.0), block_length=1)
    counts, edges = np.histogram(values, bins=17, range=(-2.0, 2.0))
    assert np.allclose(histogram.probability, counts / 500)
    assert np.allclose(histogram.edges, edges)
    assert np.isclose((histogram.density * np.diff(edges)).sum(), counts.sum() / 500)


def test_last_bin_is_closed_and_weight_outside_counts():
    histogram = analysis.weighted_histogram([0.0, 1.0, 2.0, 5.0], bins=[0.0, 1.0, 2.0])
    assert np.allclose(histogram.probability, [0.25, 0.5])


def test_weights_turn_one_gaussian_into_another():
    # Samples of N(0, 1) weighted to N(0.5, 1): log w = x/2 - 1/8.
    x = np.random.default_rng(2).normal(size=40_000)
    profile = analysis.free_energy_profile(
        x, log_weights=0.5 * x - 0.125, bins=24, range=(-1.5, 2.5)
    )
    exact = 0.5 * (profile.centres - 0.5) ** 2
    z = (profile.free_energy - exact) / profile.error
    z -= np.average(z, weights=1 / profile.error)
    assert np.abs(z).max() < 5
    assert profile.block_length == 1
    # Power control: without the weights the profile is wrong.
    plain = analysis.free_energy_profile(x, bins=24, range=(-1.5, 2.5), block_length=1)
    off = (plain.free_energy - exact) / plain.error
    assert np.abs(off - np.average(off, weights=1 / plain.error)).max() > 10


def test_errors_of_a_correlated_chain_cover_the_truth():
    """The spread over independent repeats is what one run's bootstrap says, within a third."""
    estimates, errors = [], []
    for seed in range(40):
        x = ar1(4, 1000, 0.9, seed)
        histogram = analysis.weighted_histogram(
            x.ravel(), chain=np.repeat(np.arange(4), 1000), bins=[0.0, 10.0], n_bootstrap=100
        )
        estimates.append(histogram.probability[0])
        errors.append(histogram.error[0])
    spread = np.std(estimates, ddof=1)
    assert 0.67 < np.mean(errors) / spread < 1.5
    # Power control: blocks far below the correlation time claim too little.
    naive = analysis.weighted_histogram(x.ravel(), bins=[0.0, 10.0], block_length=1).error[0]
    assert naive < 0.6 * spread


def test_blocks_do_not_cross_chains_and_follow_the_correlation():
    slow, fast = ar1(2, 2000, 0.95, 3), ar1(2, 2000, 0.0, 4)
    chain = np.repeat([0, 1], 2000)
    assert analysis.block_length_of(slow.ravel(), chain) > 20
    assert analysis.block_length_of(fast.ravel(), chain) <= 6
    assert analysis.block_length_of([1.0, 1.0, 1.0, 1.0, 1.0]) == 5


def test_map_marginals_are_the_histograms():
    rng = np.random.default_rng(5)
    x, y = rng.uniform(-np.pi, np.pi, size=(2, 3000))
    log_w = rng.normal(size=3000)
    surface = analysis.free_energy_map(x, y, log_weights=log_w, bins=12)
    line = analysis.weighted_histogram(x, log_weights=log_w, bins=12, range=(-np.pi, np.pi))
    assert np.allclose(surface.probability.sum(axis=1), line.probability)
    seen = surface.probability > 0
    relative = surface.probability[seen] / surface.probability.max()
    assert np.allclose(np.exp(-surface.free_energy[seen]), relative)
    assert surface.free_energy.min() == 0.0
    with pytest.raises(ValueError, match="no frame with weight"):
        analysis.free_energy_map(x, y, range=((4.0, 5.0), (4.0, 5.0)))


def test_population_of_a_state_never_seen_has_an_error():
    estimate, ess = analysis.population(np.zeros(100, dtype=bool), chain=np.repeat([0, 1], 50))
    assert estimate.value == 0.0
    assert estimate.error > 0.1
    assert ess == 2.0


def test_population_is_named_and_can_be_unpacked():
    found = analysis.population([True, False] * 50)
    assert (found.value, found.error) == found.estimate
    assert tuple(found) == (found.estimate, found.ess)


@pytest.mark.statistical
def test_block_bootstrap_and_autocorrelation_errors_agree_on_a_known_chain():
    r"""Signs of a Gaussian chain: covariance arcsin(rho^k) / 2 pi, so the error is known."""
    n_chains, n, rho = 4, 5000, 0.9
    lag = np.arange(1, n)
    covariance = 0.25 + 2.0 * ((1.0 - lag / n) * np.arcsin(rho**lag)).sum() / (2.0 * np.pi)
    exact = np.sqrt(covariance / (n_chains * n))
    chain = np.repeat(np.arange(n_chains), n)
    for seed in range(5):
        x = ar1(n_chains, n, rho, seed).ravel()
        inside = x > 0.0
        blocks = block_index(x.size, analysis.block_length_of(inside, chain), chain)
        size = np.bincount(blocks)
        means = np.bincount(blocks, weights=inside) / size
        variance = np.average((means - inside.mean()) ** 2, weights=size) / (size.size - 1)
        histogram = analysis.weighted_histogram(x, chain=chain, bins=[0.0, 20.0], n_bootstrap=1000)
        errors = {
            "blocks": np.sqrt(variance),
            "bootstrap": histogram.error[0],
            "autocorrelation": analysis.population(inside, chain=chain).error,
            "weighted": analysis.population(
                inside, log_weights=np.zeros(x.size), chain=chain
            ).error,
        }
        for name, error in errors.items():
            assert error == pytest.approx(exact, rel=0.2), name
        assert max(errors.values()) < 1.2 * min(errors.values())
        # Power control: the same frames in random order have no correlation.
        shuffled = np.random.default_rng(seed).permutation(inside)
        assert analysis.population(shuffled, chain=chain).error < 0.4 * exact


def test_population_error_of_weighted_samples():
    rng = np.random.default_rng(6)
    log_w = rng.normal(scale=0.5, size=5000)
    inside = rng.random(5000) < 0.2
    estimate, ess = analysis.population(inside, log_weights=log_w)
    assert abs(estimate.value - 0.2) < 5 * estimate.error
    assert estimate.error == pytest.approx(np.sqrt(0.16 / ess), rel=0.2)


def test_split_r_hat_sees_chains_that_disagree():
    agree = ar1(8, 400, 0.3, 7)
    assert analysis.split_r_hat(agree) < 1.02
    assert analysis.split_r_hat(agree + np.arange(8)[:, None]) > 1.5
    assert analysis.split_r_hat(np.ones((4, 10))) == 1.0
    assert np.isnan(analysis.split_r_hat(np.ones((4, 3))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_weights": [0.0]}, "expected"),
        ({"log_weights": [np.nan, 0.0, 0.0]}, "NaN"),
        ({"log_weights": [-np.inf] * 3}, "every weight is zero"),
        ({"chain": [0, 1]}, "chain has shape"),
        ({"block_length": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        analysis.weighted_histogram([1.0, 2.0, 3.0], **arguments)


def test_profile_along_any_function_of_a_trajectory():
    frame = peptide()
    rng = np.random.default_rng(8)
    noise = rng.normal(scale=0.01, size=(200, frame.n_atoms, 3)).astype(np.float32)
    trajectory = mdtraj.Trajectory(frame.xyz + noise, frame.topology)
    profile = analysis.free_energy_profile(trajectory, mdtraj.compute_rg, bins=5)
    same = analysis.free_energy_profile(mdtraj.compute_rg(trajectory), bins=5)
    for name in ("centres", "free_energy", "error"):
        np.testing.assert_array_equal(getattr(profile, name), getattr(same, name))
    other = analysis.free_energy_profile(trajectory, lambda t: mdtraj.compute_phi(t)[1], bins=5)
    assert not np.allclose(other.centres, profile.centres)  # power: another function
    assert profile.free_energy.min() == 0.0
    with pytest.raises(ValueError, match="needs a function"):
        analysis.free_energy_profile(trajectory)


def test_torsions_of_a_peptide_have_their_names():
    frame = peptide()
    torsions = find_torsions(frame.topology)
    names = [t.name for t in torsions]
    assert names[:2] == ["φ", "ψ"]
    assert sum(name.startswith("ω") for name in names) == 2
    assert sorted(t.fold for t in torsions) == [1, 1, 1, 1, 3, 3, 3]
    angles = torsion_angles(frame.xyz, torsions)
    assert angles[0, 0] == pytest.approx(float(mdtraj.compute_phi(frame)[1][0, 0]), abs=1e-6)
    assert angles[0, 1] == pytest.approx(float(mdtraj.compute_psi(frame)[1][0, 0]), abs=1e-6)
    assert np.abs(angles[0, 4:]).max() <= np.pi / 3
    (pair,) = ramachandran_pairs(torsions)
    assert pair.phi == torsions[0]


def test_every_residue_of_a_longer_peptide_is_paired():
    torsions = find_torsions(peptide("ala3").topology)
    assert [p.residue for p in ramachandran_pairs(torsions)] == ["Ala2", "Ala3", "Ala4"]


def test_methyl_of_toluene_is_its_only_torsion():
    (torsion,) = find_torsions(peptide("toluene").topology)
    assert torsion.fold == 6  # of three methyl hydrogens and of the ring's two faces


def test_two_states_finds_a_minority_across_the_boundary():
    rng = np.random.default_rng(9)
    angle = np.concatenate([rng.normal(0.0, 0.3, 9000), rng.normal(np.pi, 0.3, 1000)])
    angle = (angle + np.pi) % (2 * np.pi) - np.pi
    states = two_states(angle)
    assert states is not None
    assert states.contains(angle).mean() == pytest.approx(0.1, abs=0.005)
    assert two_states(rng.normal(0.0, 0.3, 5000)) is None


def test_arc_may_wrap():
    arc = TwoStates(3.0, -3.0)
    assert arc.contains(np.array([3.1, -3.1, 0.0, 2.9])).tolist() == [True, True, False, False]


def test_pair_distances():
    x = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    assert np.allclose(pair_distances(x), [[5.0, 1.0, np.sqrt(18.0)]])


def test_colvar_carries_the_weights(tmp_path):
    log_w = np.array([0.0, -1.0, -np.inf])
    path = analysis.write_colvar(
        tmp_path / "COLVAR",
        {"phi": [0.1, 0.2, 0.3]},
        log_weights=log_w,
        kt=2.494339,
        periodic=("phi",),
    )
    lines = path.read_text().splitlines()
    assert lines[0] == "#! FIELDS time phi flow.bias"
    assert lines[1:3] == ["#! SET min_phi -pi", "#! SET max_phi pi"]
    table = np.loadtxt(path)
    assert table.shape == (2, 3)
    # PLUMED: weight = exp(bias / kT).
    assert np.allclose(np.exp(table[:, 2] / 2.494339), np.exp(log_w[:2]))
    with pytest.raises(ValueError, match="must exist"):
        analysis.write_colvar(path, {"": [1.0]})


def test_colvar_gives_torsions_names_plumed_can_read(tmp_path):
    columns = {"ω (4-6)": [0.1], "φ Ala2": [0.2], "C-CT": [0.3], "d.x": [0.4]}
    path = analysis.write_colvar(tmp_path / "COLVAR", columns, periodic=("ω (4-6)", "φ Ala2"))
    first, *others = path.read_text(encoding="utf-8").splitlines()
    assert first == "#! FIELDS time omega_4_6 phi_Ala2 C_CT d.x flow.bias"
    assert others[0] == "#! SET min_omega_4_6 -pi"
    assert path.read_text(encoding="utf-8").isascii()
    with pytest.raises(ValueError, match="must exist and differ"):
        analysis.write_colvar(tmp_path / "COLVAR", {"a b": [1.0], "a-b": [2.0]})


def test_series_are_cut_by_chain_with_weights_of_mean_one():
    log_w = np.log([1.0, 2.0, 3.0, 4.0, 2.0])
    columns = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [5.0, 4.0, 3.0, 2.0, 1.0]}
    series = to_series(columns, chain=[1, 0, 1, 0, 1], log_weights=log_w)
    assert [v.tolist() for v in series.values] == [
        [[2.0, 4.0], [4.0, 2.0]],
        [[1.0, 5.0], [3.0, 3.0], [5.0, 1.0]],
    ]
    both = np.concatenate(series.weights)
    assert both.mean() == pytest.approx(1.0)
    mean = np.average(np.concatenate(series.values), weights=both, axis=0)
    expected = np.average(np.column_stack(list(columns.values())), weights=np.exp(log_w), axis=0)
    assert np.allclose(mean, expected)
    assert len(to_series(columns).values) == 1
    with pytest.raises(ValueError, match="no columns"):
        to_series({})
    with pytest.raises(ValueError, match="expected"):
        to_series(columns, log_weights=[0.0])


def test_frames_drawn_by_weight_give_weighted_averages():
    frame = peptide()
    rng = np.random.default_rng(11)
    x = frame.xyz + rng.normal(scale=0.02, size=(4000, frame.n_atoms, 3)).astype(np.float32)
    phi = mdtraj.compute_phi(mdtraj.Trajectory(x, frame.topology))[1][:, 0]
    log_w = 3.0 * (phi - phi.mean()) / phi.std()
    drawn = to_trajectory(x, frame.topology, log_w, n_frames=4000, seed=2)
    mean = mdtraj.compute_phi(drawn)[1].mean()
    weights = np.exp(log_w - log_w.max())
    assert mean == pytest.approx(np.average(phi, weights=weights), abs=0.005)
    # Power control: without the weights the average is another one.
    assert abs(phi.mean() - mean) > 0.05
    by_ess = to_trajectory(x, frame.topology, log_w)
    assert by_ess.n_frames == int(weights.sum() ** 2 / np.square(weights).sum())
    assert to_trajectory(x, frame.topology).n_frames == 4000
    with pytest.raises(ValueError, match="positions have shape"):
        to_trajectory(x[:, :3], frame.topology)
    with pytest.raises(ValueError, match="n_frames is 0"):
        to_trajectory(x, frame.topology, n_frames=0)


def test_inference_data_gets_chains_and_lp(monkeypatch):
    arviz = types.ModuleType("arviz")
    arviz.from_dict = lambda groups: groups
    monkeypatch.setitem(sys.modules, "arviz", arviz)
    data = analysis.to_inference_data(
        {"phi": np.arange(6.0)},
        [0, 0, 0, 1, 1, 1],
        reduced_potential=np.arange(6.0) ** 2,
        log_weights=-np.arange(6.0),
    )
    assert data["posterior"]["phi"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert data["sample_stats"]["lp"].tolist() == [[0.0, -1.0, -4.0], [-9.0, -16.0, -25.0]]
    assert data["sample_stats"]["log_weight"].tolist() == [[0.0, -1.0, -2.0], [-3.0, -4.0, -5.0]]
    with pytest.raises(ValueError, match="one length"):
        analysis.to_inference_data({"phi": np.arange(3.0)}, [0, 0, 1])


def test_without_arviz_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        analysis.to_inference_data({"a": [1.0]}, [0])


@pytest.mark.statistical
@pytest.mark.parametrize(("state", "weights"), [(0.9, 0.0), (0.0, 0.9), (0.9, 0.9)])
def test_population_errors_of_weighted_chains_cover_the_truth(state, weights):
    """Correlation of the state, of the weights or of both: z has about unit spread."""
    z, naive = [], []
    for seed in range(60):
        x, log_w = ar1(4, 1000, state, seed), 0.4 * ar1(4, 1000, weights, 1000 + seed)
        chain = np.repeat(np.arange(4), 1000)
        log_w = 0.4 * log_w.ravel() / log_w.std()
        estimate, ess = analysis.population(x.ravel() > 0, log_weights=log_w, chain=chain)
        assert ess < 4000
        z.append((estimate.value - 0.5) / estimate.error)
        # Power control: as if the samples were independent.
        error = analysis.population(x.ravel() > 0, log_weights=log_w)[0].error
        naive.append((estimate.value - 0.5) / error)
    assert 0.7 < np.std(z) < 1.3  # neither too small nor too large
    if state:
        assert np.std(naive) > 1.6


def test_omega_of_proline_runs_over_the_alpha_carbon():
    """Proline's nitrogen has a delta carbon of lower index: over it, trans shows at 0 degrees."""
    table = pd.DataFrame(
        [
            (i, name, element, residue, "ACE" if residue == 1 else "PRO", 0)
            for i, (name, element, residue) in enumerate(
                [
                    ("O", "O", 1), ("C", "C", 1), ("CH3", "C", 1), ("N", "N", 2), ("CD", "C", 2),
                    ("CA", "C", 2), ("CB", "C", 2), ("CG", "C", 2), ("C", "C", 2), ("OXT", "O", 2),
                ]
            )
        ],
        columns=["serial", "name", "element", "resSeq", "resName", "chainID"],
    )  # fmt: skip
    bonds = [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (5, 6), (6, 7), (7, 4), (5, 8), (8, 9)]
    topology = mdtraj.Topology.from_dataframe(table, np.array(bonds))
    omega = next(t for t in find_torsions(topology) if set(t.atoms[1:3]) == {1, 3})
    assert omega.name == "ω"
    assert omega.atoms in ((2, 1, 3, 5), (5, 3, 1, 2))
