"""Programs: expressions as numbered operations, run with torch or folded with NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.errors import UnsupportedSystemError

__all__ = ["OPERATIONS", "Operation", "Program", "specialise"]


class Operation(NamedTuple):
    """One step: ``op`` applied to earlier results; constants and inputs carry ``value``."""

    op: str
    arguments: tuple[int, ...] = ()
    value: float | str = 0.0


class Program:
    """Operations in evaluation order; ``output`` is the number of the result."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.output = -1
        self._known: dict[Operation, int] = {}

    def add(self, op: str, *arguments: int, value: float | str = 0.0) -> int:
        """Append an operation, or return the equal one already there."""
        operation = Operation(op, arguments, value)
        if operation not in self._known:
            self._known[operation] = len(self.operations)
            self.operations.append(operation)
        return self._known[operation]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order of first use."""
        return [str(o.value) for o in self.operations if o.op == "input"]

    def run(self, inputs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Evaluate with torch; ``like`` gives dtype and device of the constants."""
        results: list[Any] = []
        for op, arguments, value in self.operations:
            if op == "constant":
                results.append(torch.tensor(value, dtype=like.dtype, device=like.device))
            elif op == "input":
                results.append(inputs[str(value)])
            elif op in _TORCH:
                results.append(_TORCH[op](*(results[a] for a in arguments)))
            else:
                msg = f"tabulated function {op} depends on positions"
                raise UnsupportedSystemError(msg)
        return torch.as_tensor(results[self.output])


_TORCH: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg,
    "pow": torch.pow, "sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log, "sin": torch.sin,
    "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos,
    "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh,
    "erf": torch.erf, "erfc": torch.erfc, "abs": torch.abs, "floor": torch.floor,
    "ceil": torch.ceil, "atan2": torch.atan2, "min": torch.minimum, "max": torch.maximum,
    "recip": torch.reciprocal,
    "step": lambda x: (x >= 0).to(x.dtype),
    "delta": lambda x: (x == 0).to(x.dtype),
    "select": lambda c, a, b: torch.where(c != 0, a, b),
}  # fmt: skip


def specialise(
    program: Program,
    values: Mapping[str, NDArray[np.float64] | float],
    tables: Mapping[str, Callable[..., NDArray[np.float64]]] | None = None,
) -> tuple[Program, dict[str, NDArray[np.float64]]]:
    """Fold everything that depends on parameters only.

    Parameters
    ----------
    program
        Parsed expression.
    values
        Parameters: numbers, or arrays with one entry per term.
    tables
        Tabulated functions of NumPy arrays.

    Returns
    -------
    tuple
        The program of what is left and the arrays of its new inputs ``#0``, ``#1``, ...
    """
    out, arrays = Program(), dict[str, NDArray[np.float64]]()
    known: dict[int, NDArray[np.float64]] = {}
    place: dict[int, int] = {}

    def emit(index: int) -> int:
        if index in known and index not in place:
            value = known[index]
            if value.ndim == 0 or (value == value.flat[0]).all():
                place[index] = out.add("constant", value=float(value.flat[0]))
            else:
                name = next((n for n, a in arrays.items() if np.array_equal(a, value)), None)
                name = name or f"#{len(arrays)}"
                arrays[name] = value
                place[index] = out.add("input", value=name)
        return place[index]

    functions = {**_NUMPY, **(tables or {})}
    for index, (op, arguments, value) in enumerate(program.operations):
        if op == "constant":
            known[index] = np.asarray(float(value))
        elif op == "input" and value in values:
            known[index] = np.asarray(values[str(value)], dtype=np.float64)
        elif op == "input":
            place[index] = out.add("input", value=value)
        elif all(a in known for a in arguments):
            with np.errstate(all="ignore"):
                known[index] = np.asarray(functions[op](*(known[a] for a in arguments)))
        else:
            place[index] = out.add(op, *(emit(a) for a in arguments))
    out.output = emit(program.output)
    return out, arrays


def _on_torch(function: Callable[..., Tensor]) -> Callable[..., NDArray[np.float64]]:
    def run(*arguments: NDArray[np.float64]) -> NDArray[np.float64]:
        return function(*(torch.as_tensor(a, dtype=torch.float64) for a in arguments)).numpy()

    return run


#: Every operation a finished program may contain.
OPERATIONS = frozenset(_TORCH) | {"input", "constant"}
_NUMPY = {name: _on_torch(function) for name, function in _TORCH.items()}
