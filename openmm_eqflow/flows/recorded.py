"""A function of a batch on a GPU as one launch: recorded once for a size, then replayed.

Value and score of both ends of a path are some three hundred small kernels. Where a batch is not
huge a GPU waits for Python to launch them; a CUDA graph holds them all, and is launched at once.
"""

from __future__ import annotations

import logging
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

    Only on a GPU is anything recorded, of sizes that come again and again. What the function does
    besides, such as counting, has to be work on tensors that stay; one that asks for a number on
    the way cannot be recorded, and is called as it is.

    Parameters
    ----------
    function
        Without gradients.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function = function
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._calls: tuple[tuple[Any, ...], int] = ((), 0)
        self._pool: Any = None
        self._never = False

    def __call__(self, y: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the function at ``y``."""
        if not y.is_cuda or self._never or not len(y):
            return self.function(y)
        key = (y.device, y.dtype, *y.shape)
        if key not in self._graphs:
            self._calls = (key, self._calls[1] + 1 if self._calls[0] == key else 1)
            if self._calls[1] <= _BEFORE or not self._record(key, y):
                return self.function(y)
        self._graphs.move_to_end(key)
        graph, given, found = self._graphs[key]
        given.copy_(y)
        graph.replay()
        return tuple(v.clone() for v in found)

    def _record(self, key: tuple[Any, ...], y: Tensor) -> bool:
        """Record a size; False where that cannot be done, then or ever."""
        while len(self._graphs) >= _KEPT:
            self._graphs.popitem(last=False)
        try:
            with torch.cuda.device(y.device), torch.no_grad():
                given, graph = y.detach().clone(), torch.cuda.CUDAGraph()
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    self.function(given)
                torch.cuda.current_stream().wait_stream(aside)
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    found = self.function(given)
        except RuntimeError as error:
            self._never = True
            logger.debug("not recorded: %s", error)
            return False
        self._graphs[key] = _Graph(graph, given, found)
        return True
