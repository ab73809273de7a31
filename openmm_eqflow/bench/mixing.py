r"""How fast do samplers mix? Effective samples per second of every sampler, side by side.

The samplers that ``bench mixing`` compares, each run for a given wall-clock time.

How fast do samplers mix? Effective samples per second: Langevin, parallel tempering, flow.

Every method gets the same wall-clock time, one after the other, on the same machine and from the
same structure. Langevin dynamics and parallel tempering use the reference stage's own code
(fastest platform, repartitioned masses, one process per core), which is a strong opponent. The
flow enters twice: as many chains of Hamiltonian moves and flow steps, and as ``FlowMove`` after
``LangevinDynamicsMove`` in one openmmtools ``MCMCSampler``.

The coordinate is the slowest one: the indicator :math:`\phi > 0` of the first residue that has a
phi, else the slowest observable of the tempering run. Its effective samples come from the
autocorrelation (:func:`~openmm_eqflow.analysis.chains.autocorrelation_ess`; independent walkers
are
added up), bounded by the number of transitions (:func:`summarise`). The relative error is the
larger of :math:`\sqrt{10 / \mathrm{ESS}}` (Madras, Sokal 1988, J. Stat. Phys. 50, 109; a window
of five correlation times) and, for an indicator, the Poisson error of its visits. A method whose
indicator never changed is given three transitions (95 % upper limit), so that the ratio to it is
a lower limit.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from openmm import app, unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from torch import Tensor

from openmm_eqflow.analysis.chains import autocorrelation_ess
from openmm_eqflow.analysis.convergence import features
from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_json
from openmm_eqflow.flows.kernels import tune_step_size
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.chains import local_move
from openmm_eqflow.moves.flow_moves import FlowMove
from openmm_eqflow.moves.steps import ProposalBuffer, StateMemory, flow_step
from openmm_eqflow.parallel import machine_name
from openmm_eqflow.runs.reference.data import load_reference, run_reference
from openmm_eqflow.runs.reference.plan import SamplingPlan
from openmm_eqflow.runs.stages import build_target, flow_of
from openmm_eqflow.seeds import child, child_seed
from openmm_eqflow.targets.library import MolecularSystem, load_system
from openmm_eqflow.units import positions_in_nm

__all__ = [
    "MixingResult",
    "phi_torsion",
    "run_bench",
    "run_dynamics",
    "run_many_chains",
    "run_on_every_core",
    "run_openmmtools_chain",
]

FloatArray = NDArray[np.float64]
FlowSampler = Callable[
    [MolecularSystem, FlowPath, float, int], tuple[FloatArray, float, int]
]
_N_CHAINS, _N_LEAPFROG, _N_FLOW_STEPS = 64, 4, 8


def run_on_every_core(
    sampler: FlowSampler, system: MolecularSystem, flow: FlowPath, seconds: float, seed: int
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
            pool.submit(
                _worker,
                sampler,
                system.directory,
                flow.source[0],
                seconds,
                child_seed(seed, "worker", k),
            )
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
    system: MolecularSystem, flow: FlowPath, seconds: float, seed: int
) -> tuple[FloatArray, float, int]:
    """Frames (n_chains, n_steps, N, D) of a trajectory, then flow steps, and so on.

    Between two local moves log q of every state is known, so a flow step costs one draw.
    """
    generator = child(seed, "chains")
    start = positions_in_nm(system.positions)[:, : system.n_dims]
    x = torch.from_numpy(start - start.mean(axis=0)).expand(_N_CHAINS, -1, -1).clone()
    with build_target(system) as target:
        step = local_move(flow, target, x, _N_LEAPFROG, generator)
        size, x = tune_step_size(step, x)
        buffer = ProposalBuffer(
            flow, target, n_proposals=1, n_predraw=_N_CHAINS * _N_FLOW_STEPS, generator=generator
        )
        memory = StateMemory(capacity=4 * _N_CHAINS)
        kept: list[Tensor] = []
        before, began = target.n_evaluated, time.perf_counter()
        while time.perf_counter() - began < seconds or len(kept) < 16:
            x, _ = step(x, step_size=size)
            for _ in range(_N_FLOW_STEPS):
                x, _ = flow_step(flow, target, x, buffer, generator, memory=memory)
                kept.append(x.float())
        elapsed = time.perf_counter() - began
        n_evaluations = target.n_evaluated - before
    return torch.stack(kept, dim=1).double().numpy(), elapsed, n_evaluations


def run_openmmtools_chain(
    system: MolecularSystem, flow: FlowPath, seconds: float, seed: int
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
Observable = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class MixingResult:
    """One method: time, cost, effective samples of the coordinate, and its mean."""

    method: str
    seconds: float
    n_samples: int
    n_energy_evaluations: int
    n_transitions: int | None
    effective_samples: float
    effective_samples_error: float
    effective_samples_is_upper_limit: bool
    mean: float
    mean_error: float

    @property
    def per_second(self) -> float:
        """Effective samples per wall-second."""
        return self.effective_samples / self.seconds


def phi_torsion(topology: app.Topology) -> tuple[int, int, int, int] | None:
    """Atoms C-N-CA-C of the first backbone phi, or None."""
    residues = list(topology.residues())
    named = [{atom.name: atom.index for atom in residue.atoms()} for residue in residues]
    for before, here in itertools.pairwise(named):
        if "C" in before and {"N", "CA", "C"} <= here.keys():
            return before["C"], here["N"], here["CA"], here["C"]
    return None


def summarise(
    method: str,
    chains: list[FloatArray],
    seconds: float,
    n_evaluations: int,
    population: float,
    *,
    pooled: bool = False,
) -> MixingResult:
    r"""Effective samples of independent chains of one coordinate.

    A chain that has hardly visited a rare state looks uncorrelated to itself. The number N of
    transitions in n steps cannot be fooled like that: a two-state chain of population p has lag-1
    autocorrelation :math:`1 - k`, :math:`k = N / (2 p (1 - p) n)`, so that
    :math:`\mathrm{ESS} \le n k / (2 - k)`, with p from the method that knows it best. For an
    indicator the smaller number counts.

    Parameters
    ----------
    population
        p; not used for other coordinates.
    pooled
        The chains are many and short, so their autocorrelation is averaged; otherwise each is
        long enough for its own and the numbers add up.
    """
    values = np.concatenate(chains)
    if pooled:
        ess = autocorrelation_ess(np.stack(chains))
    else:
        ess = sum(autocorrelation_ess(chain) for chain in chains)
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    n_transitions, is_limit, relative_error = None, False, 0.0
    if binary:
        n_transitions = sum(int(np.count_nonzero(np.diff(chain))) for chain in chains)
        # A transition in and one out make a visit.
        relative_error = 1.0 / math.sqrt(max(n_transitions / 2.0, 1.0))
        is_limit = n_transitions == 0
        if is_limit:
            n_transitions_counted, ess = 3, math.inf
        else:
            n_transitions_counted = n_transitions
        if 0.0 < population < 1.0:
            k = n_transitions_counted / (2.0 * population * (1.0 - population) * values.size)
            ess = min(ess, values.size * k / max(2.0 - k, 1e-9))
        elif is_limit:
            ess = 3.0
    relative_error = max(relative_error, math.sqrt(10.0 / ess)) if ess > 0.0 else math.inf
    spread = float(values.std(ddof=1))
    return MixingResult(
        method=method,
        seconds=seconds,
        n_samples=values.size,
        n_energy_evaluations=n_evaluations,
        n_transitions=n_transitions,
        effective_samples=float(ess),
        effective_samples_error=float(ess * relative_error),
        effective_samples_is_upper_limit=is_limit,
        mean=float(values.mean()),
        mean_error=spread / math.sqrt(ess) if ess > 0.0 and spread > 0.0 else math.inf,
    )


def _observable(
    system: MolecularSystem, plan: SamplingPlan, tempering: list[FloatArray]
) -> tuple[str, Observable]:
    """Name and function of the slowest coordinate."""
    phi = phi_torsion(system.topology)
    if phi is not None:
        return "phi > 0", lambda x: (torsion_angles(x, [phi])[:, 0] > 0.0).astype(np.float64)

    def named(x: FloatArray) -> dict[str, FloatArray]:
        return features(x, np.zeros(len(x)), plan.torsions)

    sizes: dict[str, float] = {}
    for walker in tempering:
        for name, series in named(walker).items():
            sizes[name] = sizes.get(name, 0.0) + autocorrelation_ess(series)
    moving = {name: size for name, size in sizes.items() if size > 0.0}
    slowest = min(moving, key=lambda name: moving[name])
    return slowest, lambda x: named(x)[slowest]


def _equal_length(parts: list[FloatArray]) -> list[FloatArray]:
    """Cut the chains of all processes (n_chains, n_steps, N, D) to the shortest."""
    n_steps = min(part.shape[1] for part in parts)
    return [part[:, :n_steps] for part in parts]


def _setup_seconds(name_or_run: str, flow: FlowPath) -> float | None:
    """Wall time of reference data and training, if it was recorded."""
    stages = [Path(name_or_run) / "stages" / f"{stage}.json" for stage in ("reference", "train")]
    if all(path.is_file() for path in stages):
        facts = [json.loads(path.read_text(encoding="utf-8")) for path in stages]
        return float(sum(f["seconds"] for f in facts))
    recorded = flow.metadata.get("setup_seconds")
    return None if recorded is None else float(recorded)


def run_bench(
    name_or_run: str, *, json_path: Path, seconds: float = 100.0, seed: int = 0
) -> dict[str, Any]:
    """Run all methods for ``seconds`` each and write the comparison as JSON.

    Parameters
    ----------
    name_or_run
        A shipped system with a flow, or a run directory with a trained one.
    json_path
        Where the result goes.
    seconds
        Sampling time per method; setup, calibration and equilibration are not counted.
    seed
        Seed of all methods.

    Returns
    -------
    dict
        Per method the fields of :class:`MixingResult` and rates; ``speedup`` of both flow methods
        over both opponents with its error; ``break_even_seconds``, the sampling time of the
        opponent after which reference data and training have paid for themselves.
    """
    system, flow, _ = flow_of(name_or_run, "cpu")
    tempering, pt_seconds, pt_cost, plan = run_dynamics(system, seconds, None, seed)
    name, observable = _observable(system, plan, tempering)
    walkers, md_seconds, md_cost, _ = run_dynamics(system, seconds, 1.0, seed)
    md = [observable(x) for x in walkers]
    parts, chains_seconds, chains_cost = run_on_every_core(
        run_many_chains, system, flow, seconds, seed
    )
    chains = [observable(x) for part in _equal_length(parts) for x in part]
    rows, single_seconds, single_cost = run_on_every_core(
        run_openmmtools_chain, system, flow, seconds, seed
    )
    tempered = [observable(x) for x in tempering]
    single = [observable(x) for x in rows]
    population = float(np.mean(chains))
    results = [
        summarise("parallel_tempering", tempered, pt_seconds, pt_cost, population),
        summarise("langevin", md, md_seconds, md_cost, population),
        summarise("flow_chains", chains, chains_seconds, chains_cost, population, pooled=True),
        summarise("langevin_flow_move", single, single_seconds, single_cost, population),
    ]
    by_name = {r.method: r for r in results}
    setup = _setup_seconds(name_or_run, flow)
    record: dict[str, Any] = {
        "system": system.name,
        "coordinate": name,
        "seconds_per_method": seconds,
        "seed": seed,
        "n_cpus": os.cpu_count(),
        "machine": machine_name(),
        "setup_seconds": setup,
        "methods": {
            r.method: {
                **{k: v if v != math.inf else None for k, v in asdict(r).items()},
                "per_second": r.per_second,
                "per_energy_evaluation": r.effective_samples / r.n_energy_evaluations,
            }
            for r in results
        },
        "speedup": {
            f"{ours} / {theirs}": _ratio(by_name[ours], by_name[theirs], setup)
            for ours in ("flow_chains", "langevin_flow_move")
            for theirs in ("langevin", "parallel_tempering")
        },
    }
    write_json(json_path, record)
    return record


def _ratio(ours: MixingResult, theirs: MixingResult, setup: float | None) -> dict[str, Any]:
    ratio = ours.per_second / theirs.per_second if theirs.per_second > 0.0 else math.inf
    relative = [
        r.effective_samples_error / r.effective_samples if r.effective_samples else math.inf
        for r in (ours, theirs)
    ]
    gain = 1.0 - theirs.per_second / ours.per_second if ours.per_second > 0.0 else 0.0
    finite = math.isfinite(ratio) and all(math.isfinite(r) for r in relative)
    return {
        "ratio": ratio if math.isfinite(ratio) else None,
        "error": ratio * math.hypot(*relative) if finite else None,
        "is_lower_limit": theirs.effective_samples_is_upper_limit,
        "break_even_seconds": setup / gain if setup is not None and gain > 0.0 else None,
    }
