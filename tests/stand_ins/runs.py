"""Run directories with known answers, written without any simulation or training."""

from __future__ import annotations

import dataclasses
import types

import mdtraj
import networkx as nx
import numpy as np

from openmm_eqflow.analysis.weights import (
    log_z,
    max_weight_share,
    pareto_k,
    relative_ess,
    relative_ess_with_error,
)
from openmm_eqflow.files import write_json, write_npz
from openmm_eqflow.moves.chains import ChainSamples
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.runs.reference.plan import SamplingPlan
from openmm_eqflow.runs.reference.tempering import Chunk, WalkerState, write_chunk
from openmm_eqflow.runs.stages import chain_metrics, write_trajectory
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.model_systems import harmonic_log_z, harmonic_stiffness
from openmm_eqflow.targets.symmetry import bond_graph
from openmm_eqflow.targets.target import system_sha256
from openmm_eqflow.units import kelvin, kt_in_kj_mol

PHI_POSITIVE = 0.2


def _rotate(x, axis_start, axis_end, atoms, angle):
    """Rotate ``atoms`` of (n, N, 3) about a bond by ``angle`` (n,) (Rodrigues)."""
    axis = x[:, axis_end] - x[:, axis_start]
    axis = axis / np.linalg.norm(axis, axis=1, keepdims=True)
    v = x[:, atoms] - x[:, axis_end][:, None]
    k = axis[:, None]
    c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    turned = v * c + np.cross(np.broadcast_to(k, v.shape), v) * s
    turned += k * (v * k).sum(-1, keepdims=True) * (1 - c)
    x[:, atoms] = turned + x[:, axis_end][:, None]


def molecule_frames(system, n, rng):
    """Alanine dipeptide with phi > 0 in a fifth of the frames; energies of chi-squared form."""
    topology = mdtraj.Topology.from_openmm(system.topology)
    start = np.array(system.positions._value)
    x = np.repeat(start[None], n, axis=0) + rng.normal(scale=0.003, size=(n, *start.shape))
    if topology.n_atoms == 22:
        now = mdtraj.compute_phi(mdtraj.Trajectory(start[None], topology))[1][0, 0]
        positive = rng.random(n) < PHI_POSITIVE
        wanted = np.where(positive, 1.0, -1.4) + rng.normal(scale=0.2, size=n)
        # Everything beyond CA turns with C; the sign of the turn is checked by a test.
        beyond = [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
        _rotate(x, 6, 8, beyond, wanted - now)
    return x - x.mean(1, keepdims=True), 0.5 * rng.chisquare(60, size=n) - 50.0


def turned_frames(system, n, rng):
    """Any molecule, three tenths of it turned by half a turn about its first torsion."""
    x, u = molecule_frames(system, n, rng)
    start = np.array(system.positions._value)
    torsion = find_isomers(system.system, system.topology, start).torsions[0]
    graph = bond_graph(system.system, system.topology)
    b, c = torsion.atoms[1:3]
    graph.remove_edge(b, c)
    beyond = sorted(nx.node_connected_component(graph, c) - {c})
    _rotate(x, b, c, beyond, np.pi * (rng.random(n) < 0.3))
    return x - x.mean(1, keepdims=True), u


def harmonic_frames(system, n, rng):
    """Exact Boltzmann samples of the harmonic model."""
    stiffness = harmonic_stiffness(system.n_particles)
    laplacian = np.diag(stiffness.sum(axis=1)) - stiffness
    values, vectors = np.linalg.eigh(laplacian)
    z = rng.normal(size=(n, system.n_particles - 1, 3))
    x = np.einsum("ik,nkd->nid", vectors[:, 1:] / np.sqrt(values[1:]), z)
    return x, 0.5 * np.square(z).sum(axis=(1, 2))


def cluster_frames(system, n, rng):
    """Points about the starting structure; every pair distance either short or long."""
    start = np.array(system.positions._value)[:, : system.n_dims]
    x = np.repeat(start[None], n, axis=0) + rng.normal(scale=0.15, size=(n, *start.shape))
    x[:, 0] += (rng.random(n) < 0.3)[:, None] * 1.5
    return x - x.mean(1, keepdims=True), 0.5 * rng.chisquare(6, size=n) - 20.0


FRAMES = {"molecule": molecule_frames, "harmonic": harmonic_frames, "cluster": cluster_frames}


def write_run(
    path,
    name="alanine-dipeptide",
    *,
    reference=True,
    stuck=False,
    spread=0.3,
    n_chains=8,
    n_steps=100,
    n_flow=1500,
    n_reference=400,
    n_invalid=0,
    budget="quick",
    seed=0,
    draw=None,
):
    """Write a run; ``stuck`` chains never move, ``spread`` is the sd of the flow's log weights."""
    rng = np.random.default_rng(seed)
    system = load_system(name)
    system_hash = system_sha256(system.system)
    run = RunDirectory.create(
        path,
        system,
        types.SimpleNamespace(system_hash=system_hash),
        budget=budget,
        seed=seed,
        device="cpu",
        method="tempering",
    )
    draw = draw or FRAMES[system.kind]
    if reference:
        _write_reference(run, system, system_hash, draw, n_reference, rng)

    audit = {
        "n": 100,
        "n_ode_steps": 4,
        "tolerance": 0.01,
        "grid_and_precision": {"median": 1e-5, "p99": 1e-4, "max": 2e-4},
        "sampling_against_log_prob": {"median": 1e-6, "p99": 1e-5, "max": 2e-5},
        "round_trip": {"median": 1e-7, "p99": 1e-6, "max": 2e-6},
        "round_trip_nm": {"median": 1e-8, "p99": 1e-7, "max": 2e-7},
        "log_q_error_p99": 1e-4,
        "passed": True,
    }
    kind = "InternalCoordinatePrior" if system.kind == "molecule" else "MeanFreeGaussian"
    write_json(path / "flow.json", {"prior": {"kind": kind, "config": {}}, "audit": audit})
    (path / "flow.safetensors").write_bytes(b"")
    history = [
        {"step": k, "seconds": 10.0 * k, "loss": 1.0 / (k + 1), "relative_ess": 0.1 * k}
        for k in range(6)
    ]
    facts = {"history": history, "n_steps": 6, "audit": audit, "seconds": 60.0}
    run.finish("train", facts if reference else {"adopted": name})

    # Flow samples from the target itself: the weights are noise of mean one.
    x, u = draw(system, n_flow, rng)
    exact = harmonic_log_z(system.n_particles) if system.kind == "harmonic" else 5.0
    log_w = exact + spread * rng.normal(size=n_flow) - 0.5 * spread**2
    log_w[:n_invalid] = -np.inf
    u[:n_invalid] = np.inf
    valid = np.isfinite(u)
    log_q = np.zeros(n_flow)
    log_q[valid] = -u[valid] - log_w[valid]
    prior = exact + 1.5 * rng.normal(size=n_flow)
    write_npz(
        path / "flow_samples.npz",
        {
            "u": u,
            "log_q": log_q,
            "log_weight": log_w,
            "prior_log_weight": prior,
            "positions": x[:1000].astype(np.float32),
        },
    )
    chains = _chains(system, draw, n_chains, n_steps, exact, spread, stuck, rng)
    arrays = {f.name: getattr(chains, f.name) for f in dataclasses.fields(chains)}
    write_npz(path / "samples" / "chunk-00000.npz", arrays)
    write_trajectory(path, system, chains)
    ess, estimate, k = relative_ess_with_error(log_w), log_z(log_w), pareto_k(log_w)
    metrics = {
        "system": name,
        "n_samples": n_flow,
        "seed": seed + 11,
        "relative_ess": ess.value,
        "relative_ess_error": ess.error if np.isfinite(ess.error) else None,
        "prior_relative_ess": relative_ess(prior),
        "pareto_k": k if np.isfinite(k) else None,
        "max_weight_share": max_weight_share(log_w),
        "log_z": estimate.value if np.isfinite(estimate.value) else None,
        "log_z_error": estimate.error if np.isfinite(estimate.error) else None,
        "test_nll": None,
        "test_nll_error": None,
        "n_invalid": n_invalid,
        "seconds_per_sample": 1e-3,
        "log_q_error_p99": 1e-4,
        "n_ode_steps": 4,
        "n_threads": 1,
        "device": "cpu",
        "chain": chain_metrics(chains)
        if n_steps >= 4
        else {
            "n_samples": n_chains * n_steps,
            "n_chains": n_chains,
            "n_steps": n_steps,
            "acceptance": 1.0,
            "longest_stuck": 0,
            "max_log_weight_gap": 0.0,
        },
    }
    write_json(path / "metrics.json", metrics)
    write_json(path / "stages" / "sample.json", {"seconds": 12.0})
    return path


def _chains(system, draw, n_chains, n_steps, exact, spread, stuck, rng):
    n = n_chains if stuck else n_chains * n_steps
    x, u = draw(system, n, rng)
    log_w = exact + spread * rng.normal(size=n)
    if stuck:
        x = np.repeat(x[None], n_steps, axis=0)
        u = np.repeat(u[None], n_steps, axis=0) + 0.1 * rng.normal(size=(n_steps, n_chains))
        log_w = np.repeat(log_w[None], n_steps, axis=0) + 30.0
    shape = (n_steps, n_chains)
    return ChainSamples(
        positions=x.reshape(*shape, *x.shape[-2:]).astype(np.float32),
        reduced_potential=u.reshape(shape),
        log_q=-(u + log_w).reshape(shape),
        log_weight=log_w.reshape(shape),
        accepted=np.zeros(shape, dtype=bool) if stuck else rng.random(shape) < 0.8,
        local_acceptance=np.full(n_steps, 0.9),
        proposal_log_weight=exact + spread * rng.normal(size=(*shape, 4)),
    )


def _write_reference(run, system, system_hash, draw, n, rng):
    kt = kt_in_kj_mol(system.temperature)
    plan = SamplingPlan(
        system_hash=system_hash,
        n_dims=system.n_dims,
        temperatures=(kelvin(system.temperature),),
        masses=(12.0,) * system.n_particles,
        timestep_fs=2.0,
        friction_per_ps=1.0,
        platform="Reference",
        steps_per_swap=125,
        swaps_per_frame=2,
        equilibration_frames=10,
        frames_per_chunk=n,
        seed=0,
        n_walkers=2,
        torsions=(),
        expected_swap_rate=1.0,
        steps_per_second=1e4,
        setup_seconds=1.0,
    )
    folder = run.path / "reference"
    for walker in range(2):
        x, u = draw(system, n // 2, rng)
        state = WalkerState(
            positions=np.zeros((1, system.n_particles, 3)),
            velocities=np.zeros((1, system.n_particles, 3)),
            order=np.zeros(1, dtype=np.int64),
            next_chunk=1,
            n_frames=n // 2,
            wall_seconds=9.0,
        )
        chunk = Chunk(
            frames=x[:, None].astype(np.float32),
            energies=kt * u[:, None],
            replica=np.zeros((n // 2, 1), dtype=np.int64),
            attempts=np.zeros(0, dtype=np.int64),
            accepted=np.zeros(0, dtype=np.int64),
            state=state,
        )
        write_chunk(folder, walker, chunk)
    write_json(folder / "plan.json", plan.to_json())
    (run.path / "reference.dcd").write_bytes(b"")
    (run.path / "reference.npz").write_bytes(b"")
    data = load_reference(run.path)
    facts = {
        "n_frames": data.n_frames,
        "temperatures_kelvin": data.temperatures.tolist(),
        "frame_interval_ps": data.frame_interval_ps,
        "platform": data.platform,
        "wall_seconds": data.wall_seconds,
        "convergence": data.convergence,
        "seconds": 10.0,
    }
    run.finish("reference", facts)
