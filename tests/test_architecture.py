"""The shape of the code: layers, who may import OpenMM, sizes, and the map of the package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest

import openmm_eqflow

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent / "openmm_eqflow"

# Imports go strictly down this list (sideways only without a cycle).
LAYERS = tuple(
    text.split()
    for text in (
        # 0 exceptions, rigid motions, files, threads, progress bars
        "errors geometry atomic machine parallel distributed memory progress",
        # 1 fields and their divergences, ODE solves, symmetry, charts: no data, no energies
        "vector_fields.* divergence integrate zmatrix balance "
        "force_terms automorphisms symmetry topology_record system_identity",
        # 2 densities
        "priors.* flow stochastic.*",
        # 3 pure functions of weights, chains and losses; units; what a system is; settings
        "metropolis ensemble hamiltonian latent latent_kernel losses.* audit log_weights "
        "pareto diagnostics bootstrap convergence free_energy observables analysis export "
        "thermo model_systems forcefield library recipes ladder chunks sampling_plan",
        # 4 energies, reference data, training, files of flows
        "energies.* target own_system checkpoint training training_state training_log precision "
        "objectives fitting fitting_layers relaxed evaluation "
        "reference calibration implicit_solvent tempering tempering_worker walker_pool sampling "
        "flow_registry",
        # 5 moves of other samplers
        "moves flow_move_base local_moves replica_exchange",
        # 6 runs, reports, command line, benchmarks
        "rundir outputs flow_choice workflow main_job report.* compare card publish cli "
        "cli_measure bench.*",
    )
)

OPENMM = (
    "thermo symmetry force_terms topology_record system_identity energies.* target "
    "model_systems forcefield library own_system reference calibration implicit_solvent tempering "
    "tempering_worker sampling_plan moves flow_move_base flow_registry local_moves "
    "replica_exchange workflow rundir outputs publish bench.*"
).split()


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def layer(module: str) -> int:
    if module.endswith(".__init__"):
        module = module.removesuffix("__init__") + "x"
    found = [k for k, patterns in enumerate(LAYERS) if any(fnmatch(module, p) for p in patterns)]
    assert len(found) == 1, f"{module} is in layers {found}: name it in exactly one"
    return found[0]


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


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_go_down(module):
    for other in internal(module):
        assert layer(other) <= layer(module), f"{module} imports {other} from a higher layer"


def test_imports_have_no_cycle():
    graph = nx.DiGraph((m, other) for m in MODULES if m != "__init__" for other in internal(m))
    cycles = list(nx.simple_cycles(graph))
    assert not cycles


def test_every_name_in_the_list_exists():
    for pattern in [*(p for patterns in LAYERS for p in patterns), *OPENMM]:
        assert any(fnmatch(m, pattern) for m in MODULES), f"no module {pattern}"


def test_only_the_named_modules_import_openmm():
    for module, tree in TREES.items():
        uses = any(name.split(".")[0] in ("openmm", "openmmtools") for name in imported(tree))
        allowed = any(fnmatch(module, pattern) for pattern in OPENMM)
        assert allowed or not uses, f"{module} imports openmm"


def test_units_are_converted_in_one_place():
    for module, tree in TREES.items():
        if module == "thermo" or "kelvin" not in MODULES[module].read_text():
            continue
        for node in ast.walk(tree):
            number = isinstance(node, ast.Constant) and isinstance(node.value, float)
            assert not (number and abs(node.value - 8.314e-3) < 1e-5), f"{module} has its own kB"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small_and_plain(module):
    path = MODULES[module]
    assert len(path.read_text().splitlines()) <= 300, f"{module}: split it"
    assert path.stem not in ("utils", "helpers", "misc", "common")


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


def test_map_is_there():
    assert len(rows()) >= 15


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1])
def test_map_resolves(row):
    _, dotted, test = row
    path = dotted.split(".")
    for stop in range(len(path), 0, -1):
        if ".".join(path[:stop]) in MODULES:
            found = importlib.import_module("openmm_eqflow." + ".".join(path[:stop]))
            for attribute in path[stop:]:
                found = getattr(found, attribute)
            assert found.__doc__
            break
    else:
        pytest.fail(f"no module for {dotted}")
    file, name = test.split("::")
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


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
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "alanine-dipeptide" in run.stdout
