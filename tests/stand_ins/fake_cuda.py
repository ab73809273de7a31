"""A GPU that is not there: torch's fake tensors on device cuda, for tests of where tensors live.

Shapes, types and devices are worked out, numbers are not. Mixing devices raises, and so does any
copy from the CPU: in the step loop each is a hidden synchronisation.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_CACHES = {"_plans": {}, "_kept": None}


class _Indexing(TorchFunctionMode):
    """The operators that indexing stands for: Python's own asks for the real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.__invert__:
            return torch.ops.aten.bitwise_not(args[0])
        if func is Tensor.contiguous:
            return torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.copy_:
            if args[0].device != args[1].device:
                raise RuntimeError(f"{args[1].device} copied to {args[0].device}")
            return torch.ops.aten.copy_(*args)
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    n_axes = sum(k is not None and k is not Ellipsis for k in index)
    dim, tensors = 0, []
    for k in index:
        if k is Ellipsis:
            skipped = x.ndim - dim - n_axes
            dim += skipped
            continue
        if k is None:
            x = torch.ops.aten.unsqueeze(x, dim)
            dim += 1
            continue
        n_axes -= 1
        if isinstance(k, slice):
            x = torch.ops.aten.slice(x, dim, k.start, k.stop, 1 if k.step is None else k.step)
        elif isinstance(k, int):
            x = torch.ops.aten.select(x, dim, k)
            continue
        elif isinstance(k, Tensor):
            if k.device != x.device:
                raise RuntimeError(f"{x.device} indexed by {k.device}: a hidden copy")
            tensors.append((dim, k))
        else:
            raise RuntimeError(f"{x.device} indexed by a {type(k).__name__}: a hidden copy")
        dim += 1
    if not tensors:
        return x
    whole: list[Tensor | None] = [None] * (max(d for d, _ in tensors) + 1)
    for d, k in tensors:
        whole[d] = k
    return torch.ops.aten.index(x, whole)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Fake tensors, also on device cuda, inside the block; kernels in Triton want real ones."""
    without = mock.patch("openmm_eqflow.flows.softcore_torch._fused", return_value=None)
    nor = mock.patch("openmm_eqflow.targets.energies.torch_energy._fused", return_value=None)
    with without, nor, FakeTensorMode(allow_non_fake_inputs=True), _Indexing():
        yield


def on_fake_cuda(thing: Any, memo: dict[int, Any] | None = None) -> Any:
    """Copy of an object of this package with all its tensors on the fake GPU."""
    memo = {} if memo is None else memo
    if id(thing) in memo:
        return memo[id(thing)]
    made = thing
    if isinstance(thing, Tensor):
        made = torch.empty(thing.shape, dtype=thing.dtype, device="cuda")
        if isinstance(thing, nn.Parameter):
            made = nn.Parameter(made, requires_grad=False)
    elif isinstance(thing, dict):
        made = {k: on_fake_cuda(v, memo) for k, v in thing.items()}
    elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
        made = type(thing)(*(on_fake_cuda(v, memo) for v in thing))
    elif isinstance(thing, list | tuple):
        made = type(thing)(on_fake_cuda(v, memo) for v in thing)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith(
        ("openmm_eqflow", "torch.nn")
    ):
        made = copy.copy(thing)
        memo[id(thing)] = made
        for key, value in thing.__dict__.items():
            new = copy.copy(_CACHES[key]) if key in _CACHES else on_fake_cuda(value, memo)
            if dataclasses.is_dataclass(made):
                object.__setattr__(made, key, new)
            else:
                made.__dict__[key] = new
    memo[id(thing)] = made
    return made
