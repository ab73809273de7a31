"""What an exact divergence costs, by particle number: leave-one-out field and graph network.

For every N, on one device and in one dtype: the leave-one-out field alone, the field with its
exact divergence (D tangents through the readout), and a 4 x 64 EGNN with its exact divergence
((N-1)D batched tangents). Each case runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.parallel import machine_name
from openmm_eqflow.vector_fields.baselines import EGNNField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField

__all__ = [
    "CASES",
    "Timing",
    "run_bench",
    "time_case",
]

CASES = (
    "leave_one_out field",
    "leave_one_out field + divergence",
    "egnn field",
    "egnn field + divergence",
)
PAIRS_PER_BATCH = 8192
TANGENT_BYTES = 2**27


@dataclass(frozen=True)
class Timing:
    """One measured case; times in milliseconds per configuration, memory in MiB."""

    case: str
    n_particles: int
    batch_size: int
    n_repeats: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    peak_memory_mib: float


def _configurations(n_particles: int, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_particles)
    side = round(n_particles ** (1 / 3) + 0.5)
    axis = torch.arange(float(side))
    sites = torch.cartesian_prod(axis, axis, axis)[:n_particles]
    noise = torch.randn(batch_size, n_particles, 3, generator=generator)
    return remove_mean(sites + 0.1 * noise)


def _field(case: str, x: Tensor) -> nn.Module:
    n = x.shape[1]
    torch.manual_seed(0)
    data = torch.cat([x, _configurations(n, 8)])
    if case.startswith("leave_one_out"):
        return LeaveOneOutField.fit(data, classes=[0] * n)
    # as many tangents at once as keep one pair tensor below TANGENT_BYTES
    chunk = max(1, TANGENT_BYTES // (4 * 64 * x.shape[0] * n * n))
    chunk = min(chunk, (n - 1) * 3)
    return EGNNField.fit(data, classes=[0] * n, width=64, n_layers=4, tangent_chunk=chunk)


def time_case(
    case: str,
    n_particles: int,
    *,
    device: str = "cpu",
    n_repeats: int = 7,
    n_threads: int = 1,
    max_seconds: float = 60.0,
) -> Timing:
    """Time one case in float32, after one warm-up call.

    No repeat starts after ``max_seconds``; a case so slow that its warm-up took that long is
    reported by that one call.
    """
    if case not in CASES:
        raise ConfigurationError(f"unknown case {case!r}; known: {', '.join(CASES)}")
    torch.set_num_threads(n_threads)
    on_gpu = torch.device(device).type == "cuda"
    batch_size = max(1, PAIRS_PER_BATCH // n_particles**2)
    x = _configurations(n_particles, batch_size)
    field = _field(case, x).to(device).requires_grad_(False)
    x = x.to(device)
    t = torch.tensor(0.5, device=device)
    call: Callable[[Tensor, Tensor], Any] = field
    if case.endswith("divergence"):
        call = field.with_divergence  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    end = time.perf_counter() + max_seconds
    while len(times) <= n_repeats and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        with torch.no_grad():
            call(t, x)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / batch_size)
    if len(times) > 1:
        del times[0]
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(
        case=case,
        n_particles=n_particles,
        batch_size=batch_size,
        n_repeats=len(times),
        median_ms=statistics.median(times),
        lower_quartile_ms=quartiles[0],
        upper_quartile_ms=quartiles[2],
        peak_memory_mib=peak,
    )


def run_bench(
    json_path: str | Path | None = None,
    sizes: Sequence[int] = (13, 22, 55, 128),
    *,
    device: str = "cpu",
    n_repeats: int = 7,
    n_threads: int = 1,
    max_seconds: float = 60.0,
) -> dict[str, Any]:
    """Measure every case at every size; write JSON if a path is given and return the same.

    Each case takes up to ``n_repeats`` repeats or ``max_seconds``, whichever ends first.

    Returns
    -------
    dict
        ``cases`` (one :class:`Timing` each) and ``ratios`` per size: ``overhead`` = (field +
        divergence) / field, ``speedup`` = EGNN with divergence / leave-one-out with divergence.
    """
    if n_repeats < 1 or any(n < 2 for n in sizes):
        raise ConfigurationError(
            f"need n_repeats >= 1 and sizes >= 2, got {n_repeats} and {list(sizes)}"
        )
    timings: list[Timing] = []
    context = multiprocessing.get_context("spawn")
    for n in sizes:
        for case in CASES:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                job = pool.submit(
                    time_case,
                    case,
                    n,
                    device=device,
                    n_repeats=n_repeats,
                    n_threads=n_threads,
                    max_seconds=max_seconds,
                )
                timings.append(job.result())
    ratios = []
    for n in sizes:
        field, both, _, egnn = (timing for timing in timings if timing.n_particles == n)
        ratios.append(
            {
                "n_particles": n,
                "overhead": both.median_ms / field.median_ms,
                "speedup": egnn.median_ms / both.median_ms,
            }
        )
    name = torch.cuda.get_device_name() if device.startswith("cuda") else machine_name()
    result = {
        "device": device,
        "device_name": name,
        "torch": torch.__version__,
        "dtype": "float32",
        "n_threads": n_threads,
        "cases": [asdict(timing) for timing in timings],
        "ratios": ratios,
    }
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
