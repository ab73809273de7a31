"""Threads, processes, and the machine they run on.

The machine that a measurement was taken on, in words.

Threads for whole chunks of work.

Torch splits single operations over threads, which hardly pays for the small matrices of a flow
and is ruinous when other processes want the same cores. Whole chunks side by side do pay: torch,
numba and OpenMM release the interpreter lock.

Kernels for a GPU in Triton, which comes with torch for CUDA.

Several processes as one: ``torchrun --nproc-per-node K -m openmm_eqflow.cli train RUN``.

Gloo between CPUs, NCCL between GPUs. Rank 0 decides (clock, stop, what is complete), writes every
file and shares what must be the same everywhere; without torchrun every function here does what
one process would. All processes see the same files. A process that fails ends the others through
torchrun.

Equality: a global batch is a fixed number of shards, each with a stream seeded from the stored
one; rank r of K works on shards r, r + K, ... and gradients are summed over all. The loss curve
thus depends on the number of shards, not on how many threads or processes share them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "available_threads",
    "clock",
    "in_rounds",
    "is_main",
    "machine_name",
    "main_first",
    "map_chunks",
    "one_torch_thread",
    "process_group",
    "rank",
    "share",
    "share_tensors",
    "sum_over_processes",
    "triton_kernels",
    "world_size",
]


def machine_name() -> str:
    """Processor and number of logical cores, such as ``"AMD EPYC, 2 cores"``."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        text = information.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

A = TypeVar("A")
B = TypeVar("B")
_MAX_THREADS = 8


def available_threads(*, together: bool = False) -> int:
    """Cores this process may use, at most 8; its share of them where torchrun started several.

    ``together`` gives the number all processes of this machine have, as one would.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cores = min(cores, _MAX_THREADS)
    if together or "TORCHELASTIC_RUN_ID" not in os.environ:
        return cores
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def map_chunks(
    function: Callable[[A], B], chunks: Iterable[A], *, threads: int | None = None
) -> list[B]:
    """Apply ``function`` to every chunk, in order, without gradients.

    On all cores; with ``threads=1`` one after the other, as a GPU wants them.
    """
    items = list(chunks)
    n = min(threads or available_threads(), len(items))
    if n <= 1:
        # A chunk is too little work for torch's own threads, which wait for each other spinning.
        with torch.no_grad(), one_torch_thread():
            return [function(item) for item in items]

    def quiet(item: A) -> B:
        # Both settings are per thread.
        torch.set_num_threads(1)
        with torch.no_grad():
            return function(item)

    with one_torch_thread(), ThreadPoolExecutor(n) as executor:
        return list(executor.map(quiet, items))


@cache
def triton_kernels(module: str) -> Any:
    """Import a module of kernels in Triton; None where there is no compiler for them."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(module)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Rank 0 works alone at times (reference data, calibration); torchrun ends ranks that wait in vain.
_PATIENCE = timedelta(days=7)
_LETTING_GO = 0.5  # s


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if _active() else 0


def is_main() -> bool:
    """Whether this process decides and writes."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun nothing happens."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) < 2:
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    try:
        yield
    except SystemExit as stop:
        if not stop.code:
            _leave()
        raise
    # Not after an error: others may be waiting in a collective, and torchrun ends them.
    _leave()


def _leave() -> None:
    dist.destroy_process_group()
    # Gloo's threads let go of the last tensors after the result is out, for which they need the
    # interpreter lock: in an interpreter that is shutting down that aborts the process.
    time.sleep(_LETTING_GO)


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in rank 0 before all others, which then find its files."""
    if not is_main():
        share(None)
    yield
    if is_main():
        share(None)


def _broadcast(tensor: Tensor, source: int) -> Tensor:
    dist.broadcast(tensor, source)
    return tensor


def share(value: Any, source: int = 0) -> Any:
    """Return the JSON-able ``value`` of process ``source`` in every process."""
    if world_size() == 1:
        return value
    words = json.dumps(value).encode() if rank() == source else b""
    length = int(_broadcast(torch.tensor([len(words)]), source))
    buffer = torch.zeros(length, dtype=torch.uint8)
    if rank() == source:
        buffer = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    return json.loads(_broadcast(buffer, source).numpy().tobytes())


def share_tensors(tensors: dict[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
    """Return the named ``tensors`` of process ``source`` in every process, on the CPU elsewhere.

    Other processes pass anything, None say.
    """
    if world_size() == 1:
        return tensors or {}
    plan, own = None, tensors or {}
    if rank() == source:
        plan = [[k, str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in own.items()]
    shared = {}
    for name, dtype, shape in share(plan, source):
        value = torch.empty(shape, dtype=getattr(torch, dtype))
        if rank() == source:
            value = own[name].detach().cpu().contiguous()
        if value.numel():
            raw = value.reshape(-1).view(torch.uint8)  # bytes: every backend carries them
            _broadcast(raw, source)
            value = raw.view(value.dtype).reshape(shape)
        shared[name] = value
    return own if rank() == source else shared


def sum_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of ``tensors`` (one device and dtype) over all processes."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([v.detach().reshape(-1) for v in tensors])
    dist.all_reduce(flat)
    parts = flat.split([v.numel() for v in tensors])
    return [part.reshape(v.shape) for part, v in zip(parts, tensors, strict=True)]


def clock() -> float:
    """Monotonic seconds of rank 0: what the clock decides, it decides for all."""
    now = time.monotonic()
    if world_size() == 1:
        return now
    return float(_broadcast(torch.tensor([now], dtype=torch.float64), 0))


def in_rounds(
    function: Callable[[A], dict[str, Tensor]], items: Sequence[A]
) -> Iterator[dict[str, Tensor]]:
    """Yield ``function(item)`` in order, in every process; process k mod K works on item k."""
    size = world_size()
    for start in range(0, len(items), size):
        mine = start + rank()
        own = function(items[mine]) if mine < len(items) else None
        for k in range(start, min(start + size, len(items))):
            yield share_tensors(own, source=k - start)
