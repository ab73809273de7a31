"""OpenMM's expression language, parsed into a program; nothing is ever passed to ``eval``.

``"k*(d-4)^2; d=sqrt(x1*x1+y1*y1)"`` becomes a list of operations in which every result is used by
number, repeated subexpressions occur once and integer powers are multiplications. The same program
is run with NumPy (folding what depends on parameters only), with torch (differentiable) and by the
compiled kernels. Grammar and precedence follow Lepton, OpenMM's parser: ``-x^2`` is ``-(x^2)`` and
``^`` associates to the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from openmm_eqflow.energies.programs import Operation, Program
from openmm_eqflow.errors import UnsupportedSystemError

__all__ = ["parse"]

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
