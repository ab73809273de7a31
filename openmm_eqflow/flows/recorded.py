"""A function of a batch on a GPU as one launch: recorded once for a size, then replayed.

Value and score of both ends of a path are some three hundred small kernels. Where a batch is not
huge a GPU waits for Python to launch them; a CUDA graph holds them all, and is launched at once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Recorded",
]

logger = logging.getLogger(__name__)
_BEFORE = 2  # calls of one size before it is recorded
_KEPT = 3  # sizes


class _Graph(NamedTuple):
    graph: Any
    given: Tensor
    found: tuple[Tensor, ...]


class Recorded:
    """A function of one tensor (n, ...) to several, with the same values whether replayed or not.

    Only on a GPU is anything recorded, of sizes that come again and again. What the function reads
    has to stay where it is, and what it does besides, such as counting, has to be work on tensors
    that stay; it asks for no number on the way, and for no gradient.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._calls: tuple[tuple[Any, ...], int] = ((), 0)
        self._pool: Any = None
        self._never = False
        self._lock = threading.Lock()

    def __call__(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], y: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluate a function, the same in every call, at ``y``."""
        if not y.is_cuda or self._never or not len(y):
            return function(y)
        key = (y.device, y.dtype, *y.shape)
        with self._lock:  # what is given and found stays where it is
            if key not in self._graphs:
                self._calls = (key, self._calls[1] + 1 if self._calls[0] == key else 1)
                if self._calls[1] <= _BEFORE or not self._record(function, key, y):
                    return function(y)
            self._graphs.move_to_end(key)
            graph, given, found = self._graphs[key]
            given.copy_(y.detach())
            graph.replay()
            return tuple(v.clone() for v in found)

    def _record(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], key: tuple[Any, ...], y: Tensor
    ) -> bool:
        """Record a size; False where that cannot be done, then or ever."""
        before = torch.cuda.current_stream(y.device)
        while len(self._graphs) >= _KEPT:
            self._graphs.popitem(last=False)
        try:
            with torch.cuda.device(y.device), torch.no_grad():
                given, graph = y.detach().clone(), torch.cuda.CUDAGraph()
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    function(given)
                torch.cuda.current_stream().wait_stream(aside)
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    found = function(given)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that ends early leaves its own
            self._graphs.clear()
            self._never = True
            logger.debug("not recorded: %s", error)
            return False
        self._graphs[key] = _Graph(graph, given, found)
        return True
