"""Basins of a report, their structures, and the drawing, on runs with known answers."""

from __future__ import annotations

import dataclasses

import mdtraj
import networkx as nx
import numpy as np
import pytest
from openmm import app
from stand_ins.runs import PHI_POSITIVE, write_run

from openmm_eqflow.report import figures_drawing
from openmm_eqflow.report.data import load_run
from openmm_eqflow.report.populations import define_states
from openmm_eqflow.report.structures import basin_grid, find_basins, model_atoms, pdb_text
from openmm_eqflow.report.theme import new_figure
from openmm_eqflow.targets.forcefield import load_pdb
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.units import positions_in_nm


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(write_run(tmp_path_factory.mktemp("basins") / "run", n_steps=200))


def _phi(run):
    return next(k for k, t in enumerate(run.chain.torsions) if t.name == "φ")


def _left(run):
    """Share of all basins whose structure has phi > 0, and the error of the largest."""
    basins = find_basins(run, define_states(run))
    left = [b for b in basins if b.angles[_phi(run)] > 0.0]
    return sum(float(b.share.value) for b in left), max(float(b.share.error) for b in basins)


def test_basins_have_the_population_that_was_drawn(run):
    basins = find_basins(run, define_states(run))
    shares = [float(b.share.value) for b in basins]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)
    share, error = _left(run)
    assert abs(share - PHI_POSITIVE) < 5.0 * error
    # Power: the mirror image has the other population.
    mirror = dataclasses.replace(run.chain, x=run.chain.x * np.float32([-1.0, 1.0, 1.0]))
    share, error = _left(dataclasses.replace(run, chain=mirror))
    assert abs(share - PHI_POSITIVE) > 5.0 * error


def test_a_structure_is_a_frame_of_its_basin(run, tmp_path):
    states = define_states(run)
    basins = find_basins(run, states)
    (tmp_path / "basins.pdb").write_text(pdb_text(run, basins))
    trajectory = mdtraj.load(tmp_path / "basins.pdb")
    assert trajectory.n_frames == len(basins) > 1
    for k, basin in enumerate(basins):
        frame = mdtraj.Trajectory(run.chain.x[basin.frame], run.chain.topology)
        assert mdtraj.rmsd(trajectory[k], frame)[0] < 2e-4
        # Superposed, never mirrored: angles are those of the frame.
        np.testing.assert_array_equal(basin.angles, run.chain.angles[basin.frame])
        np.testing.assert_allclose(
            mdtraj.compute_phi(trajectory[k])[1][0, 0], basin.angles[_phi(run)], atol=0.02
        )


def test_structures_lie_on_the_first_as_well_as_they_can(run):
    heavy = [a.index for a in run.chain.topology.atoms if a.element.number > 1]
    shown = mdtraj.Trajectory(
        np.array([b.x for b in find_basins(run, define_states(run))]), run.chain.topology
    )
    least = mdtraj.rmsd(shown, shown, 0, atom_indices=heavy)
    apart = np.sqrt(np.square(shown.xyz - shown.xyz[:1])[:, heavy].sum(2).mean(1))
    np.testing.assert_allclose(apart, least, atol=2e-4)
    assert apart.max() > 0.02


def test_the_grid_points_to_the_basin_under_it(run):
    states = define_states(run)
    basins = find_basins(run, states)
    phi = _phi(run)
    grid = np.array(basin_grid(run, states, basins, (phi,)))
    sign = [b.angles[phi] > 0.0 for b in basins]
    seen = np.flatnonzero(grid >= 0)
    assert {bool(sign[grid[i]]) for i in seen} == {True, False}
    assert all(sign[grid[i]] == (i >= len(grid) // 2) for i in seen)
    assert np.array(basin_grid(run, states, basins, (phi, phi))).shape == (36, 36)


def test_bonds_of_the_view_are_those_of_the_topology(run):
    atoms = model_atoms(run)
    assert sum(len(a["bonds"]) for a in atoms) == 2 * run.chain.topology.n_bonds
    assert all(k in atoms[j]["bonds"] for k, a in enumerate(atoms) for j in a["bonds"])
    assert {a["elem"] for a in atoms} == {"H", "C", "N", "O"}


def test_cluster_has_one_structure_of_lowest_energy(tmp_path):
    run = load_run(write_run(tmp_path / "run", "lj13"))
    (basin,) = find_basins(run, define_states(run))
    assert basin.frame == int(np.argmin(run.chain.u))
    assert float(basin.share.value) == pytest.approx(1.0)


def test_springs_cross_no_bonds_of_fused_rings():
    graph = nx.Graph([(k, (k + 1) % 10) for k in range(10)] + [(0, 5), (2, 10), (7, 11)])
    assert figures_drawing._crossings(graph, figures_drawing._springs(graph)) == 0
    # Power: places by chance do cross.
    places = nx.random_layout(graph, seed=1)
    assert figures_drawing._crossings(graph, places) > 0


def test_a_word_of_the_drawing_covers_no_other():
    _, axes = new_figure(height=3.0)
    axes.set_xlim(-2.0, 2.0)
    axes.set_ylim(-2.0, 2.0)
    word = axes.text(0.0, 0.0, "ω (15-17)", va="center", fontsize=7.5)
    b, c, nothing = np.array([-0.5, 0.0]), np.array([0.5, 0.0]), np.zeros((0, 2))
    place = figures_drawing._place_beside
    first = place(word, b, c, 1.0, [], nothing)
    # On the other side of the bond, then where neither a word nor a bond is.
    second = place(word, b, c, 1.0, [first], nothing)
    inked = np.array([[second.x0 + 1.0, second.y0 + 1.0]])
    third = place(word, b, c, 1.0, [first], inked)
    # Power: the boxes would meet had the words of before not been looked at.
    assert first.overlaps(place(word, b, c, 1.0, [], nothing))
    for box in (second, third):
        assert not box.overlaps(first)
    assert not third.contains(*inked[0])


def test_side_chains_have_names(request):
    path = request.path.parent.parent / "data" / "phe-dipeptide.pdb"
    topology, positions = load_pdb(path)
    system = app.ForceField("amber14-all.xml").createSystem(topology)
    x = positions_in_nm(positions)
    names = {t.name for t in find_isomers(system, topology, x).torsions}
    assert {"φ", "ψ", "χ1", "χ2"} <= names
