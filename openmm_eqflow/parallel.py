"""Threads for whole chunks of work.

Torch splits single operations over threads, which hardly pays for the small matrices of a flow
and is ruinous when other processes want the same cores. Whole chunks side by side do pay: torch,
numba and OpenMM release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["available_threads", "keep_freed_memory", "map_chunks", "one_torch_thread"]

A = TypeVar("A")
B = TypeVar("B")
_MAX_THREADS = 8


def available_threads() -> int:
    """Cores this process may use, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)


def map_chunks(function: Callable[[A], B], chunks: Iterable[A]) -> list[B]:
    """Apply ``function`` to every chunk, in order, on all cores, without gradients."""
    items = list(chunks)
    n = min(available_threads(), len(items))
    if n <= 1:
        with torch.no_grad():
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


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of handing them back to the kernel.

    A training step allocates the same large tensors again and again; page faults would cost up to
    half of its time. Returns False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, 2**31 - 1))
