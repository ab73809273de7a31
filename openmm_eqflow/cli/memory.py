"""How the C library handles freed memory; imports nothing, so that --help stays quick."""

from __future__ import annotations

import ctypes

__all__ = [
    "keep_freed_memory",
]


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
