"""The shape of the code: order of packages, who may import OpenMM, and the map of the package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest
from stand_ins import ROOT, TESTS

import openmm_eqflow

PACKAGE = ROOT / "openmm_eqflow"

# Packages (and modules beside them) from the bottom up: imports go strictly down this list.
# ``__init__`` and the names stored by old moves aside, which load nothing until they are used.
ORDER = (
    "errors units geometry files parallel seeds analysis targets.energies targets priors "
    "vector_fields flows training moves runs.reference runs report bench cli"
).split()
# Beside each other at the bottom: no order among them, but no cycle either.
FOUNDATION = {"errors", "units", "geometry", "files", "parallel", "seeds"}
# Upward imports that are left, each to be removed: (module, what it imports).
DEBTS = {
    ("runs.stages", "report.__init__"),  # the last stage writes the report
}
# Only these may import OpenMM or openmmtools.
OPENMM = ("units", "targets.*", "moves.*", "runs.*", "bench.*")
OLD_NAMES = {"__init__", "local_moves"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def package(module: str) -> str:
    """Entry of ORDER a module belongs to: the longest that fits."""
    fits = [p for p in ORDER if f"{module}.".startswith(f"{p}.")]
    assert fits, f"{module} is in no package: name it in ORDER"
    return max(fits, key=len)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal(module: str) -> set[str]:
    """Modules of this package that ``module`` imports, its own package's __init__ aside."""
    found = set()
    for name in imported(TREES[module]):
        if not name.startswith("openmm_eqflow."):
            continue
        path = name.removeprefix("openmm_eqflow.").split(".")
        for stop in range(len(path), 0, -1):
            target = ".".join(path[:stop])
            if target in MODULES:
                found.add(target)
                break
            if f"{target}.__init__" in MODULES:
                if target != module.rsplit(".", 1)[0]:
                    found.add(f"{target}.__init__")
                break
    return found - {module}


def upward(module: str) -> set[tuple[str, str]]:
    """Imports of a module that do not go down."""
    mine, found = package(module), set()
    for other in internal(module) - OLD_NAMES:
        theirs = package(other)
        beside = mine == theirs or {mine, theirs} <= FOUNDATION
        if not beside and ORDER.index(theirs) >= ORDER.index(mine):
            found.add((module, other))
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if m not in OLD_NAMES])
def test_imports_go_down(module):
    assert upward(module) <= DEBTS


def test_the_list_of_debts_is_up_to_date():
    assert set().union(*(upward(m) for m in MODULES if m not in OLD_NAMES)) == DEBTS


def test_imports_have_no_cycle():
    graph = nx.DiGraph((m, other) for m in MODULES if m != "__init__" for other in internal(m))
    # runs and report: see DEBTS
    graph.remove_edges_from(DEBTS)
    cycles = list(nx.simple_cycles(graph))
    assert not cycles


def test_every_package_in_the_list_exists():
    assert {package(m) for m in MODULES if m not in OLD_NAMES} == set(ORDER)
    for pattern in OPENMM:
        assert any(fnmatch(m, pattern) for m in MODULES), f"no module {pattern}"


def test_rooms_are_few():
    """At most seven modules at the top, and eleven packages."""
    top = {m for m in MODULES if "." not in m} - {"__init__", "local_moves"}
    assert len(top) <= 7
    packages = {m.split(".")[0] for m in MODULES if "." in m}
    assert len(packages) <= 11


def test_only_the_named_modules_import_openmm():
    for module, tree in TREES.items():
        uses = any(name.split(".")[0] in ("openmm", "openmmtools") for name in imported(tree))
        allowed = any(fnmatch(module, pattern) for pattern in OPENMM)
        assert allowed or not uses, f"{module} imports openmm"


def test_units_are_converted_in_one_place():
    for module, tree in TREES.items():
        if module == "units":
            continue
        for node in ast.walk(tree):
            number = isinstance(node, ast.Constant) and isinstance(node.value, float)
            close = number and any(abs(node.value / kb - 1) < 1e-4 for kb in (8.314e-3, 8.314))
            assert not close, f"{module} has its own kB"


@pytest.mark.parametrize("module", MODULES)
def test_files_have_names_that_say_something(module):
    assert MODULES[module].stem not in ("utils", "helpers", "misc", "common")


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("torch", "load"),
    ("torch", "save"),
}


@pytest.mark.parametrize("module", MODULES)
def test_no_code_from_files_and_no_swallowed_errors(module):
    tree = TREES[module]
    roots = {name.split(".")[0] for name in imported(tree)}
    assert not roots & {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{module}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES, (
                f"{module}:{node.lineno}"
            )
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.ExceptHandler):
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            assert node.type is not None, f"{module}:{node.lineno} bare except"
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert not broad or raises, f"{module}:{node.lineno} swallows every error"


def rows() -> list[list[str]]:
    """Rows of the map, split where the table's ruler says."""
    lines = (openmm_eqflow.__doc__ or "").splitlines()
    rulers = [k for k, line in enumerate(lines) if line.startswith("====")]
    assert len(rulers) == 3
    return [line.rsplit(None, 2) for line in lines[rulers[1] + 1 : rulers[2]]]


def home(dotted: str) -> tuple[str, list[str]]:
    """Module of a dotted path, and the names inside it."""
    path = dotted.split(".")
    for stop in range(len(path), 0, -1):
        if ".".join(path[:stop]) in MODULES:
            return ".".join(path[:stop]), path[stop:]
    pytest.fail(f"no module for {dotted}")


def test_map_names_what_carries_an_equation():
    """Every prior, every field but the baselines, every loss."""
    named = {name for row in rows() for name in home(row[1])[1]}
    classes = {
        module: [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for module, tree in TREES.items()
    }
    wanted = set()
    for module, found in classes.items():
        for node in found:
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            field = "register_vector_field" in map(ast.unparse, node.decorator_list)
            if field and module != "vector_fields.baselines":
                wanted.add(node.name)
            if module.startswith("priors.") and {"to_cartesian", "from_state"} <= methods:
                wanted.add(node.name)
            if module.startswith("training.") and node.name.endswith("Loss"):
                wanted.add(node.name)
    wanted.remove("ScheduledLoss")  # its row is that of Schedule
    assert len(wanted) >= 10
    assert wanted <= named, f"without a row in the map: {sorted(wanted - named)}"


def marks(decorated: Iterable[ast.expr]) -> set[str]:
    """Names of pytest's marks among decorators."""
    return {
        node.attr
        for decorator in decorated
        for node in ast.walk(decorator)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }


def names_behind(file: Path, name: str) -> set[str]:
    """Names that a function uses, those of what it calls in its file and in stand_ins included."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    places: dict[str, tuple[Path, str]] = {}
    bodies: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("stand_ins."):
            origin = TESTS.joinpath(*str(node.module).split(".")).with_suffix(".py")
            places |= {a.asname or a.name: (origin, a.name) for a in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        bodies.setdefault(part.id, []).append(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bodies.setdefault(node.name, []).append(node)
    found, todo = set(), {name}
    while todo:
        found |= todo
        used = {
            getattr(node, key)
            for here in todo
            for body in bodies.get(here, ())
            for node in ast.walk(body)
            for kind, key in ((ast.Name, "id"), (ast.arg, "arg"), (ast.Attribute, "attr"))
            if isinstance(node, kind)
        }
        todo = used - found
    for here in found & places.keys():
        found |= names_behind(*places[here])
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1])
def test_map_resolves(row):
    """The object has a docstring; its test exists, uses it, and belongs to the default command."""
    _, dotted, test = row
    module, attributes = home(dotted)
    found = importlib.import_module(f"openmm_eqflow.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    assert found.__doc__
    file, name = test.split("::")
    assert attributes[0] in names_behind(TESTS / f"{file}.py", name), f"{test} never uses it"
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    of_file = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n)
    ]
    assert "slow" not in marks([*function.decorator_list, *of_file])


def test_tests_mirror_the_packages():
    """A folder of tests for every package, a file beside them for a module at the top."""
    folders = {p.name for p in TESTS.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    packages = {m.split(".")[0] for m in MODULES if "." in m}
    assert folders == packages | {"project"}
    top = {m for m in MODULES if "." not in m}
    assert {p.stem.removeprefix("test_") for p in TESTS.glob("test_*.py")} <= top


def test_public_names_resolve():
    names = openmm_eqflow.__all__
    assert len(names) == len(set(names)) <= 15
    assert set(dir(openmm_eqflow)) == set(names) == set(openmm_eqflow._HOMES)
    for name in names:
        value = getattr(openmm_eqflow, name)
        assert value.__name__ == name
        assert value.__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = openmm_eqflow.no_such_name


def test_help_does_not_load_torch_or_openmm():
    code = (
        "import sys; sys.argv = ['openmm-eqflow', '--help']\n"
        "from openmm_eqflow.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'openmm', 'mdtraj', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "alanine-dipeptide" in run.stdout
