"""The samplers that ``bench mixing`` compares, each run for a given wall-clock time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from torch import Tensor

from openmm_eqflow.checkpoint import load_flow
from openmm_eqflow.ensemble import ProposalBuffer, StateMemory, flow_step
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.hamiltonian import hamiltonian_step, tune_step_size
from openmm_eqflow.library import MolecularSystem, load_system
from openmm_eqflow.moves import FlowMove
from openmm_eqflow.reference import load_reference, run_reference
from openmm_eqflow.sampling_plan import SamplingPlan
from openmm_eqflow.thermo import positions_in_nm
from openmm_eqflow.workflow import build_target

__all__ = ["run_dynamics", "run_many_chains", "run_on_every_core", "run_openmmtools_chain"]

FloatArray = NDArray[np.float64]
FlowSampler = Callable[
    [MolecularSystem, EquivariantFlow, float, int], tuple[FloatArray, float, int]
]
_N_CHAINS, _N_LEAPFROG, _N_FLOW_STEPS = 64, 4, 8


def run_on_every_core(
    sampler: FlowSampler, system: MolecularSystem, flow: EquivariantFlow, seconds: float, seed: int
) -> tuple[list[FloatArray], float, int]:
    """Run a flow sampler in one single-threaded process per core, as the opponents are.

    Returns
    -------
    frames of every process, the longest time, energy evaluations of all
    """
    if flow.source is None:
        raise ConfigurationError("the flow is not on disk; call save_flow(flow, path) first")
    n = os.cpu_count() or 1
    with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(_worker, sampler, system.directory, flow.source[0], seconds, seed + 1 + k)
            for k in range(n)
        ]
        results = [future.result() for future in futures]
    frames, elapsed, costs = zip(*results, strict=True)
    return list(frames), max(elapsed), sum(costs)


def _worker(
    sampler: FlowSampler, directory: Path, flow_path: str, seconds: float, seed: int
) -> tuple[FloatArray, float, int]:
    torch.set_num_threads(1)
    return sampler(load_system(directory), load_flow(flow_path), seconds, seed)


def run_dynamics(
    system: MolecularSystem, seconds: float, ratio: float | None, seed: int
) -> tuple[list[FloatArray], float, int, SamplingPlan]:
    """Frames per walker, seconds, energy evaluations and plan of MD (ratio 1) or tempering."""
    settings = dict(system.settings.get("reference", {}))
    if ratio is not None:
        settings["max_temperature_ratio"] = ratio
    sampled = replace(system, settings={**system.settings, "reference": settings})
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        n_walkers = os.cpu_count() or 1
        run_reference(sampled, directory, seconds=seconds, n_walkers=n_walkers, seed=seed)
        data = load_reference(directory)
        plan = SamplingPlan.read(directory / "reference" / "plan.json")
    walkers = [data.positions[data.walker == w].astype(np.float64) for w in range(n_walkers)]
    n_steps = plan.steps_per_swap * plan.swaps_per_frame * len(plan.temperatures) * data.n_frames
    return walkers, data.wall_seconds, n_steps, plan


def run_many_chains(
    system: MolecularSystem, flow: EquivariantFlow, seconds: float, seed: int
) -> tuple[FloatArray, float, int]:
    """Frames (n_chains, n_steps, N, D) of a trajectory, then flow steps, and so on.

    Between two local moves log q of every state is known, so a flow step costs one draw.
    """
    generator = torch.Generator().manual_seed(seed)
    start = positions_in_nm(system.positions)[:, : system.n_dims]
    x = torch.from_numpy(start - start.mean(axis=0)).expand(_N_CHAINS, -1, -1).clone()
    with build_target(system) as target:
        size, x = tune_step_size(target, x, n_steps=_N_LEAPFROG, generator=generator)
        buffer = ProposalBuffer(
            flow, target, n_proposals=1, n_predraw=_N_CHAINS * _N_FLOW_STEPS, generator=generator
        )
        memory = StateMemory(capacity=4 * _N_CHAINS)
        kept: list[Tensor] = []
        before, began = target.n_evaluated, time.perf_counter()
        while time.perf_counter() - began < seconds or len(kept) < 16:
            x, _ = hamiltonian_step(
                target, x, step_size=size, n_steps=_N_LEAPFROG, generator=generator
            )
            for _ in range(_N_FLOW_STEPS):
                x, _ = flow_step(flow, target, x, buffer, generator, memory=memory)
                kept.append(x.float())
        elapsed = time.perf_counter() - began
        n_evaluations = target.n_evaluated - before
    return torch.stack(kept, dim=1).double().numpy(), elapsed, n_evaluations


def run_openmmtools_chain(
    system: MolecularSystem, flow: EquivariantFlow, seconds: float, seed: int
) -> tuple[FloatArray, float, int]:
    """Frames (n_steps, N, D) of one MCMCSampler with Langevin dynamics and FlowMove."""
    n_steps = 50
    langevin = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=n_steps)
    flow_move = FlowMove(flow, n_proposals=8, seed=seed)
    sampler = MCMCSampler(
        ThermodynamicState(system.system, system.temperature),
        SamplerState(system.positions),
        SequenceMove([langevin, flow_move]),
    )
    sampler.run(1)
    kept: list[FloatArray] = []
    n_draws, began = flow_move.statistics["n_draws"], time.perf_counter()
    while time.perf_counter() - began < seconds or len(kept) < 16:
        sampler.run(1)
        x = positions_in_nm(sampler.sampler_state.positions)
        kept.append(x[:, : system.n_dims].copy())
    elapsed = time.perf_counter() - began
    n_evaluations = len(kept) * (n_steps + 1) + flow_move.statistics["n_draws"] - n_draws
    return np.stack(kept), elapsed, int(n_evaluations)
