"""Threads for whole chunks of work.

Torch splits single operations over threads, which hardly pays for the small matrices of a flow
and is ruinous when other processes want the same cores. Whole chunks side by side do pay: torch,
numba and OpenMM release the interpreter lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["available_threads", "map_chunks", "one_torch_thread"]

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


def map_chunks(function: Callable[[A], B], chunks: Iterable[A]) -> list[B]:
    """Apply ``function`` to every chunk, in order, on all cores, without gradients."""
    items = list(chunks)
    n = min(available_threads(), len(items))
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


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's own threads out of the way of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
