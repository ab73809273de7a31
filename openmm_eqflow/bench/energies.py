"""Energies per second: OpenMM's platforms, the context pool and TorchEnergy, system by system.

Every figure is the best of a few short blocks (other work on the machine can only make a block
slower), on configurations displaced by 0.005 nm from the system's coordinates. ``speedup``
compares TorchEnergy on one thread at a batch of 512 with the faster of OpenMM's Reference and CPU
(one thread) platforms in the same run.
"""

from __future__ import annotations

import json
import os
import platform as host
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_eqflow.parallel import machine_name
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.energies.compiled import HAVE_NUMBA
from openmm_eqflow.targets.energies.contexts import ContextPool, LocalContext, available_platforms
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import list_systems, load_system

__all__ = [
    "BATCHES",
    "run_bench",
]

BATCHES = (1, 64, 512, 4096)
_COMPARED = 512
Rates = dict[str, float]


def run_bench(
    systems: Sequence[str] | None = None,
    json_path: str | Path | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    seconds: float = 0.3,
    n_threads: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time the energies of shipped systems.

    Parameters
    ----------
    systems
        Names or folders; default every shipped system.
    json_path
        Where to write the result.
    batches
        Batch sizes for TorchEnergy.
    seconds
        Time spent on each figure.
    n_threads
        Threads of TorchEnergy and workers of the pool in the figures marked ``all_cores``;
        default one per core.
    report
        Called with one line per system.

    Returns
    -------
    dict
        ``machine`` and, per system, evaluations per second ``{"energy": .., "energy_force": ..}``
        under ``platforms``, ``context_pool``, ``torch`` and ``torch_all_cores`` (per batch size)
        and ``torch_eager`` (without compiled kernels), plus ``speedup``.
    """
    n_threads = n_threads or os.cpu_count() or 1
    result: dict[str, Any] = {"machine": _machine(n_threads), "systems": {}}
    for name in systems or [info.name for info in list_systems()]:
        entry = _bench_system(name, batches, seconds, n_threads)
        result["systems"][name] = entry
        if report is not None:
            report(_line(name, entry))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _bench_system(
    name: str, batches: Sequence[int], seconds: float, n_threads: int
) -> dict[str, Any]:
    molecule = load_system(name)
    start = np.array(molecule.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    rng = np.random.default_rng(0)
    x = start + 0.005 * rng.normal(size=(max(*batches, _COMPARED), *start.shape))
    xml = openmm.XmlSerializer.serialize(molecule.system)
    entry: dict[str, Any] = {"n_particles": len(start), "platforms": {}}
    for platform in available_platforms():
        # A GPU platform may be installed without a device.
        try:
            context = LocalContext(xml, platform)
        except openmm.OpenMMException as error:
            entry["platforms"][platform] = {"unavailable": str(error)}
            continue
        entry["platforms"][platform] = _context_rates(context, x, seconds)
    with ContextPool(molecule.system, n_workers=n_threads, positions=start) as pool:
        entry["context_pool"] = {
            "platform": pool.platform,
            "n_workers": pool.n_workers,
            **_evaluator_rates(pool, x[:_COMPARED], seconds),
        }
    began = time.perf_counter()
    one = TorchEnergy(molecule.system, positions=start, n_threads=1)
    entry["construction_seconds"] = time.perf_counter() - began
    entry["compiled_forces"] = list(one.compiled_forces)
    sizes = sorted({*batches, _COMPARED})
    entry["torch"] = {str(n): _evaluator_rates(one, x[:n], seconds) for n in sizes}
    many = TorchEnergy(molecule.system, positions=start, n_threads=n_threads)
    entry["torch_all_cores"] = {str(n): _evaluator_rates(many, x[:n], seconds) for n in sizes}
    many.close()
    eager = TorchEnergy(molecule.system, positions=start, compiled=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entry["torch_eager"] = {str(_COMPARED): _evaluator_rates(eager, x[:_COMPARED], seconds)}
    torch.set_num_threads(threads)
    entry["speedup"] = {
        what: entry["torch"][str(_COMPARED)][what]
        / max(entry["platforms"][p][what] for p in ("Reference", "CPU"))
        for what in ("energy", "energy_force")
    }
    return entry


def _best(run: Callable[[], object], n: int, seconds: float) -> float:
    run()
    best, end = np.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or not np.isfinite(best):
        run()
        best = min(best, time.perf_counter() - start)
    return float(n / best)


def _context_rates(context: LocalContext, x: FloatArray, seconds: float) -> Rates:
    few = x[:32]
    return {
        "energy": _best(lambda: context.compute(few, False), len(few), seconds),
        "energy_force": _best(lambda: context.compute(few, True), len(few), seconds),
    }


def _evaluator_rates(evaluator: ContextPool | TorchEnergy, x: FloatArray, seconds: float) -> Rates:
    return {
        "energy": _best(lambda: evaluator.energies(x), len(x), seconds),
        "energy_force": _best(lambda: evaluator.energies_and_forces(x), len(x), seconds),
    }


def _machine(n_threads: int) -> dict[str, Any]:
    return {
        "processor": machine_name(),
        "n_threads": n_threads,
        "python": host.python_version(),
        "openmm": openmm.version.version,
        "torch": torch.__version__,
        "numba": HAVE_NUMBA,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _line(name: str, entry: dict[str, Any]) -> str:
    compared, best = entry["torch"][str(_COMPARED)], entry["speedup"]
    return (
        f"{name:26s} {compared['energy']:10.0f} E/s ({best['energy']:.1f}x OpenMM) "
        f"{compared['energy_force']:10.0f} E+F/s ({best['energy_force']:.1f}x)"
    )
