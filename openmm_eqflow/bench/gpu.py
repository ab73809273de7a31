"""What a GPU is good for: samples, energies, fields and training steps per second against the CPU.

Everything is measured in one run on one machine: on ``device`` with as many configurations at once
as its memory holds, on the CPU with two cores. A rate is that of the best of a few repeats
after one that is not counted (it loads, compiles and tunes); on a GPU clocks are read when
it has finished. ``bench gpu --device cpu`` goes through the same steps without a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from openmm_eqflow.analysis.weights import relative_ess
from openmm_eqflow.bench.divergence import CASES, time_case
from openmm_eqflow.files import write_json
from openmm_eqflow.flows.adapt import path_from_chemistry
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.relaxed import AnnealedPath, anneal, relax
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.parallel import machine_name
from openmm_eqflow.runs.directory import STAGES
from openmm_eqflow.runs.stages import build_target, open_run, run_stage
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.energies.contexts import LocalContext, available_platforms
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import list_systems, load_system
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.loop import TrainingSettings, TrainingState
from openmm_eqflow.training.pool import build_pool

__all__ = [
    "run_bench",
    "table",
]

logger = logging.getLogger("openmm_eqflow")
_CPU_CORES = 2
_N_LEVELS = 10  # of the annealed path
_BATCH = 4096  # of a training step
_CPU_SECONDS, _LARGEST = 1.0, 8192
_ENERGIES = 16_384
_FIELDS = (22, 55)  # particles


def run_bench(
    json_path: str | Path | None = None,
    *,
    device: str = "cuda",
    systems: Sequence[str] | None = None,
    seconds: float = 400.0,
    run: str | None = None,
    n: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every shipped flow.

    Parameters
    ----------
    json_path
        Where the result is written, again after every system: what an end cuts off is little.
    device
        ``cuda`` or ``cpu``.
    systems
        Names; by default all that have a flow.
    seconds
        No system is begun later than this after the start.
    run
        Also time the stages of ``openmm-eqflow run`` of this system at the budget ``quick``.
    n
        Samples per repeat on ``device``; by default as many as are carried at once.
    report
        Called with one line per measurement; logged by default.

    Returns
    -------
    dict
        ``device_name``, ``cpu``, versions; ``systems`` by name: ``exact``, ``relaxed``,
        ``annealed``, ``from chemistry``, ``stochastic`` with samples per second (on device and
        CPU), relative ESS of the device's samples and peak memory; ``energies`` per second;
        ``training`` steps per second; ``fields``: ms per configuration; ``run``: seconds of every
        stage.
    """
    say = report or logger.info
    started = time.monotonic()
    shipped = [v for v in list_systems() if (v.directory / "flow.safetensors").is_file()]
    names = systems or [v.name for v in shipped]
    result: dict[str, Any] = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else machine_name(),
        "cpu": f"{machine_name()}, {_CPU_CORES} of them used",
        "torch": torch.__version__,
        "openmm": openmm.version.version,
        "platforms": list(available_platforms()),
        "systems": {},
    }

    def keep() -> None:
        if json_path is not None:
            write_json(Path(json_path), result)

    for name in names:
        if time.monotonic() - started > seconds:
            result.setdefault("left_out", []).append(name)
            continue
        entry: dict[str, Any] = {}
        result["systems"][name] = entry
        try:
            for what, figures in _measured(name, device, n):
                entry[what] = figures
                say(f"{time.monotonic() - started:5.0f} s  {name} {what}: {figures}")
                keep()
        except (RuntimeError, openmm.OpenMMException) as error:
            entry["error"] = " ".join(str(error).split())[:300]
            say(f"{name}: {entry['error']}")
    if time.monotonic() - started < seconds:
        result["fields"] = _fields(device, say)
        keep()
    if run is not None and time.monotonic() - started < seconds:
        result["run"] = _stages(run, device)
        say(f"run {run}: {result['run']}")
    result["seconds"] = time.monotonic() - started
    keep()
    return result


def _measured(name: str, device: str, n: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    flow, twin = load_flow(name, device=device), load_flow(name)
    with build_target(load_system(name)) as target, build_target(load_system(name)) as other:
        molecule = len(flow.prior.event_shape) == 1
        kind = "exact" if flow.has_density else "stochastic"
        yield kind, _samples(flow, target, n) | _on_cpu(twin, other)
        if molecule:
            relaxed, annealed = relax(flow, target), _annealed(flow, target, device)
            yield "relaxed", _samples(relaxed, target, n) | _on_cpu(relax(twin, other), other)
            on_cpu = _on_cpu(_annealed(twin, other, "cpu"), other)
            yield "annealed", _samples(annealed, target, n) | on_cpu
            yield "from chemistry", _from_chemistry(target, device, n)
            yield "training", _training(flow, target)
        yield "energies", _energies(target, device)


def _annealed(flow: Any, target: BoltzmannTarget, device: str) -> AnnealedPath:
    return anneal(flow.prior, target, n_levels=_N_LEVELS, device=device)


def _from_chemistry(target: BoltzmannTarget, device: str, n: int | None) -> dict[str, Any]:
    """Time a path from bonds alone, and its samples."""
    begun = time.perf_counter()
    made = path_from_chemistry(target, device=device)
    found = {"seconds_to_path": time.perf_counter() - begun}
    found["n_levels"] = len(made.path.levels.times)
    return found | _samples(made.path, target, n)


def _draw(path: FlowPath, target: BoltzmannTarget, n: int, seed: int) -> np.ndarray:
    """Log weights of ``n`` samples: positions, log q-hat and energies."""
    stream = child(seed, "evaluation", device=path.device)
    x, log_q = path.sample_and_log_prob(n, generator=stream)
    log_w: np.ndarray = (-target.reduced_potential(x) - log_q).cpu().numpy()
    return log_w


def _samples(flow: FlowPath, target: BoltzmannTarget, n: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    on_gpu = flow.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    flow.gpu_chunk_size = n
    m = flow._chunk()
    log_w: list[np.ndarray] = []
    found["at_once"] = m
    found["per_second"] = _rate(lambda k: log_w.append(_draw(flow, target, m, k)), m, repeats=2)
    weights = np.concatenate(log_w[1:])
    found["relative_ess"], found["n"] = float(relative_ess(weights)), len(weights)
    if on_gpu:
        found["peak_memory_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def _on_cpu(twin: FlowPath, target: BoltzmannTarget) -> dict[str, Any]:
    with _two_cores():
        # A cluster's kernels want whole chunks, one for each core.
        few = 16 * _CPU_CORES if len(twin.prior.event_shape) == 1 else 64 * _CPU_CORES
        _draw(twin, target, 16, 0)
        while True:
            begun = time.perf_counter()
            _draw(twin, target, few, 1)
            spent = time.perf_counter() - begun
            if spent > _CPU_SECONDS or few >= _LARGEST:
                break
            few *= 4
    return {"per_second_cpu": few / spent, "n_cpu": few}


def _rate(work: Callable[[int], object], n: int, *, repeats: int = 3) -> float:
    """``n`` over the seconds of the best of ``repeats``, after one that is not counted."""
    best = float("inf")
    for k in range(repeats + 1):
        begun = time.perf_counter()
        work(k)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if k > 0:
            best = min(best, time.perf_counter() - begun)
    return n / best


@contextlib.contextmanager
def _two_cores() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:_CPU_CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _energies(target: BoltzmannTarget, device: str) -> dict[str, Any]:
    """Energies with forces per second, around the reference positions."""
    start = np.zeros((target.n_particles, 3))
    positions = _positions(target)
    start[:, : positions.shape[1]] = positions
    x = start + 0.005 * np.random.default_rng(0).normal(size=(_ENERGIES, *start.shape))
    found: dict[str, Any] = {}
    evaluator = target.evaluator
    if isinstance(evaluator, TorchEnergy):
        on = torch.from_numpy(x).to(device)
        found["torch"] = _rate(lambda k: evaluator.energies_and_forces_tensor(on), len(x))
        few = x[:1024]
        with _two_cores():
            found["compiled_two_cores"] = _rate(
                lambda k: evaluator.energies_and_forces(few), len(few)
            )
    xml = openmm.XmlSerializer.serialize(target.system)
    for platform in ("CUDA", "CPU"):
        if platform not in available_platforms():
            continue
        try:
            context = LocalContext(xml, platform)
            found[f"openmm_{platform}"] = _rate(partial(_computed, context, x[:256]), 256)
        except openmm.OpenMMException as error:
            found[f"openmm_{platform}"] = str(error)[:120]
    return found


def _computed(context: LocalContext, x: np.ndarray, k: int) -> object:
    return context.compute(x, True)


def _positions(target: BoltzmannTarget) -> np.ndarray:
    """Return the reference positions of a target, or a lattice where it has none."""
    if target.positions is not None:
        return np.asarray(target.positions)
    side = int(np.ceil(target.n_particles ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return 1.1 * grid[: target.n_particles].astype(float)


def _training(flow: Any, target: BoltzmannTarget) -> dict[str, Any]:
    """Count steps of the Liouville loss per second, backward pass and optimiser included."""
    generator = child(0, "pool")
    cpu = flow.prior.to("cpu")
    pool = build_pool(cpu, target, n_prior=2 * _BATCH, generator=generator)
    state = TrainingState(flow.module.train(), TrainingSettings(seconds=1.0, n_shards=1))
    objective = LiouvilleLoss(flow.module, pool)

    def step(k: int) -> None:
        for _ in range(10):
            state.gradient(objective, _BATCH)
            state.optimiser.step()

    return {"steps_per_second": _rate(step, 10), "batch": _BATCH}


def _fields(device: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Field and exact divergence of leave-one-out fields and of an EGNN, ms per configuration."""
    rows = []
    for size in _FIELDS:
        for case in CASES:
            timing = time_case(case, size, device=device, n_repeats=3, max_seconds=15.0)
            rows.append({"case": case, "n_particles": size, "median_ms": timing.median_ms})
            say(f"field {rows[-1]}")
    return rows


def _stages(name: str, device: str) -> dict[str, float]:
    """Seconds of every stage of a quick run."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(name, Path(folder) / "run", budget="quick", seed=0, device=device)
        for stage in STAGES:
            begun = time.monotonic()
            run_stage(run, stage)
            seconds[stage] = time.monotonic() - begun
        seconds["relative_ess"] = run.metrics()["relative_ess"]
    return seconds


def _cpu_cells(v: dict[str, Any]) -> str:
    if "per_second_cpu" not in v:
        return "|"
    return f"{v['per_second_cpu']:,.0f} | {v['per_second'] / v['per_second_cpu']:.0f}"


def table(result: dict[str, Any]) -> str:
    """Write the JSON of :func:`run_bench` as tables in Markdown."""
    lines = [
        f"{result['device_name']}; {result['cpu']}; torch {result['torch']}, OpenMM "
        f"{result['openmm']}.",
        "",
        "| system | samples | per second | two CPU cores | ratio | relative ESS (n) | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in result["systems"].items():
        for what, v in entry.items():
            if "per_second" not in v:
                continue
            memory = f"{v['peak_memory_GiB']:.1f} GiB" if "peak_memory_GiB" in v else ""
            lines.append(
                f"| {name} | {what} | {v['per_second']:,.0f} | {_cpu_cells(v)} | "
                f"{v['relative_ess']:.3f} ({v['n']:,}) | {memory} |"
            )
    lines += [
        "",
        "| system | energies with forces: torch | compiled, two cores | OpenMM CUDA | OpenMM CPU "
        "| training steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in result["systems"].items():
        e, steps = entry.get("energies", {}), entry.get("training", {}).get("steps_per_second")
        cells = [
            f"{e[k]:,.0f}" if isinstance(e.get(k), float) else ""
            for k in ("torch", "compiled_two_cores", "openmm_CUDA", "openmm_CPU")
        ]
        cells.append("" if steps is None else f"{steps:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
