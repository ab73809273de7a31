"""OpenMM's expression language, parsed into programs; nothing is ever passed to Python.

Programs: expressions as numbered operations, run with torch or folded with NumPy.

OpenMM's expression language, parsed into a program; nothing is ever passed to ``eval``.

``"k*(d-4)^2; d=sqrt(x1*x1+y1*y1)"`` becomes a list of operations in which every result is used by
number, repeated subexpressions occur once and integer powers are multiplications. The same program
is run with NumPy (folding what depends on parameters only), with torch (differentiable) and by the
compiled kernels. Grammar and precedence follow Lepton, OpenMM's parser: ``-x^2`` is ``-(x^2)`` and
``^`` associates to the right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.errors import UnsupportedSystemError

__all__ = [
    "OPERATIONS",
    "Operation",
    "Program",
    "parse",
    "specialise",
]


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
            if value.ndim == 0 or (value.size and (value == value.flat[0]).all()):
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

_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|([A-Za-z_]\w*)|(.))"
)
_ARITY = {
    **dict.fromkeys(
        ("sqrt exp log sin cos tan asin acos atan sinh cosh tanh erf erfc").split(), 1
    ),
    **dict.fromkeys("step delta square cube recip abs floor ceil sec csc cot".split(), 1),
    **dict.fromkeys(("atan2", "min", "max"), 2),
    "select": 3,
}
#: Functions of particle names: each distinct call is an input of the program.
_GEOMETRY = {"distance": 2, "angle": 3, "dihedral": 4}
_MAX_INTEGER_POWER = 64


class _Parser:
    """Recursive descent over one expression and its ``name=...`` definitions."""

    def __init__(self, text: str, tables: Mapping[str, int], points: int) -> None:
        main, *definitions = [part for part in text.split(";") if part.strip()]
        self._text = text
        self._definitions: dict[str, str] = {}
        for definition in definitions:
            name, _, body = definition.partition("=")
            self._definitions[name.strip()] = body
        self._values: dict[str, int | None] = {}
        self._tables = tables
        self._points = points
        self.program = Program()
        self.program.output = self._whole(main)

    def _fail(self, what: str) -> UnsupportedSystemError:
        return UnsupportedSystemError(f"{what} in expression {self._text!r}")

    def _whole(self, text: str) -> int:
        tokens = [(m[1], m[2], m[3]) for m in _TOKEN.finditer(text.strip())]
        outer = getattr(self, "_tokens", []), getattr(self, "_at", 0)
        self._tokens, self._at = tokens, 0
        result = self._sum()
        if self._at != len(tokens):
            raise self._fail(f"unexpected {self._peek()!r}")
        self._tokens, self._at = outer
        return result

    def _peek(self) -> str:
        if self._at >= len(self._tokens):
            return ""
        number, name, symbol = self._tokens[self._at]
        return number or name or symbol

    def _take(self, wanted: str) -> bool:
        if self._peek() != wanted:
            return False
        self._at += 1
        return True

    def _expect(self, wanted: str) -> None:
        if not self._take(wanted):
            raise self._fail(f"expected {wanted!r}, found {self._peek()!r}")

    def _sum(self) -> int:
        left = self._product()
        while self._peek() in ("+", "-"):
            op = "add" if self._peek() == "+" else "sub"
            self._at += 1
            left = self.program.add(op, left, self._product())
        return left

    def _product(self) -> int:
        left = self._signed()
        while self._peek() in ("*", "/"):
            divide = self._peek() == "/"
            self._at += 1
            right = self._signed()
            right = self._reciprocal(right) if divide else right
            one = self.program.operations[left] == Operation("constant", (), 1.0)
            left = right if one else self.program.add("mul", left, right)
        return left

    def _reciprocal(self, x: int) -> int:
        """1/x, shared among all quotients; 1/x^2 is (1/x)^2. A division costs ten products."""
        op, arguments, value = self.program.operations[x]
        if op == "constant" and float(value) != 0.0:
            return self.program.add("constant", value=1.0 / float(value))
        if op == "mul" and arguments[0] == arguments[1]:
            root = self._reciprocal(arguments[0])
            return self.program.add("mul", root, root)
        return self.program.add("recip", x)

    def _signed(self) -> int:
        if self._take("-"):
            inner = self._signed()
            operation = self.program.operations[inner]
            if operation.op == "constant":
                return self.program.add("constant", value=-float(operation.value))
            return self.program.add("neg", inner)
        if self._take("+"):
            return self._signed()
        base = self._atom()
        if self._take("^"):
            return self._power(base, self._signed())
        return base

    def _power(self, base: int, exponent: int) -> int:
        operation = self.program.operations[exponent]
        if operation.op == "constant":
            value = float(operation.value)
            if value.is_integer() and 0 < abs(value) <= _MAX_INTEGER_POWER:
                result = self._integer_power(base, int(abs(value)))
                return result if value > 0 else self._reciprocal(result)
            if value == 0.5:
                return self.program.add("sqrt", base)
        return self.program.add("pow", base, exponent)

    def _integer_power(self, base: int, n: int) -> int:
        if n == 1:
            return base
        half = self._integer_power(base, n // 2)
        square = self.program.add("mul", half, half)
        return self.program.add("mul", square, base) if n % 2 else square

    def _atom(self) -> int:
        if self._take("("):
            inner = self._sum()
            self._expect(")")
            return inner
        if self._at >= len(self._tokens):
            raise self._fail("unexpected end")
        number, name, symbol = self._tokens[self._at]
        self._at += 1
        if number:
            return self.program.add("constant", value=float(number))
        if not name:
            raise self._fail(f"unexpected {symbol!r}")
        return self._call(name) if self._take("(") else self._name(name)

    def _name(self, name: str) -> int:
        if name not in self._definitions:
            return self.program.add("input", value=name)
        if name in self._values:
            value = self._values[name]
            if value is None:
                raise self._fail(f"{name} is defined by itself")
            return value
        self._values[name] = None
        result = self._values[name] = self._whole(self._definitions[name])
        return result

    def _call(self, name: str) -> int:
        if name in _GEOMETRY and self._points:
            particles = []
            while not self._take(")"):
                particles.append(self._peek())
                self._at += 1
                self._take(",")
            if len(particles) != _GEOMETRY[name] or not all(
                re.fullmatch(r"p[1-9]\d*", p) for p in particles
            ):
                raise self._fail(f"unsupported arguments of {name}")
            return self.program.add("input", value=f"{name}({','.join(particles)})")
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._expect(")")
        arity = _ARITY.get(name, self._tables.get(name))
        if arity is None:
            raise self._fail(f"unknown function {name!r}")
        if len(arguments) != arity:
            raise self._fail(f"{name} got {len(arguments)} arguments, takes {arity}")
        add, (first, *_) = self.program.add, arguments
        if name == "recip":
            return self._reciprocal(first)
        if name in ("square", "cube"):
            return self._integer_power(first, 2 if name == "square" else 3)
        if name in ("sec", "csc", "cot"):
            op = {"sec": "cos", "csc": "sin", "cot": "tan"}[name]
            return self._reciprocal(add(op, first))
        return add(name, *arguments)


def parse(text: str, *, tables: Mapping[str, int] | None = None, points: int = 0) -> Program:
    """Parse an expression.

    Parameters
    ----------
    text
        OpenMM expression with definitions after semicolons.
    tables
        Number of arguments of every tabulated function.
    points
        Particles of a compound bond (0: no geometric functions).

    Raises
    ------
    UnsupportedSystemError
        Syntax error, or a function this package does not know.
    """
    return _Parser(text, tables or {}, points).program
