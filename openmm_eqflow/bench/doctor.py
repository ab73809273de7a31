"""What this machine has for the package: versions, platforms, devices, threads, what is missing.

Nothing heavy is imported before it is asked for, and nothing that is missing stops the rest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "EXTRAS",
    "NEEDED",
    "examine",
    "lines",
]

#: What the package needs, and the module by which each is imported.
NEEDED = {
    name: name
    for name in (
        *("openmm", "torch", "numba", "openmmtools", "mdtraj", "numpy", "scipy", "networkx"),
        *("safetensors", "torchdiffeq", "matplotlib", "jinja2", "click", "rich"),
    )
} | {"pyyaml": "yaml"}
#: Modules and programs of the optional parts, by the name of the extra (``gpu`` aside).
EXTRAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "campaign": (("dask", "distributed", "pyarrow"), ()),
    "free-energy": (("pymbar",), ()),
    "ligand": (("rdkit",), ("antechamber", "parmchk2", "tleap")),
}
_BROKEN = (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError)


def examine() -> dict[str, Any]:
    """Look at this installation and machine.

    Returns
    -------
    dict
        JSON-able: ``python``, ``machine``, ``packages`` (version and error of what is needed),
        ``platforms`` (of OpenMM: whether each runs, else why not) and ``plugins_not_loaded``,
        ``devices`` (as torch sees them; memory in GiB), ``threads``, ``extras`` (what each lacks,
        and the line to install it), ``notes``, and ``problems``: what is needed and broken.

    Examples
    --------
    >>> found = examine()
    >>> found["problems"]
    []
    """
    found: dict[str, Any] = {
        "package": _version("openmm-eqflow"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: _package(name, module) for name, module in NEEDED.items()},
    }
    works = {name for name, entry in found["packages"].items() if entry["error"] is None}
    problems = [
        f"{name} does not work: {entry['error']}; pip install --force-reinstall {name}"
        for name, entry in found["packages"].items()
        if name not in works
    ]
    found["platforms"], found["plugins_not_loaded"] = {}, []
    if "openmm" in works:
        found["platforms"], found["plugins_not_loaded"] = _platforms()
        if found["platforms"].get("Reference") is not None:
            problems.append(
                "OpenMM's Reference platform does not run: reinstall OpenMM "
                "(pip install --force-reinstall openmm)"
            )
    cuda, devices = _devices() if "torch" in works else (None, [])
    found |= {"torch_cuda": cuda, "devices": devices, "threads": _threads(works)}
    found["extras"] = _extras(found)
    found["notes"] = _notes(found)
    found["problems"] = problems
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Render what :func:`examine` found as lines of text."""
    told = [f"openmm-eqflow {found['package']}, Python {found['python']} ({found['executable']})"]
    told += [found["machine"], "", "packages"]
    for name, entry in found["packages"].items():
        told.append(f"  {name:<14} {entry['version'] or 'missing'}{_because(entry['error'])}")
    told += ["", "platforms of OpenMM"]
    for name, error in found["platforms"].items():
        told.append(f"  {name:<14} {'runs' if error is None else 'fails'}{_because(error)}")
    told += [f"  not loaded: {text}" for text in found["plugins_not_loaded"]]
    told += ["", "devices"]
    for device in found["devices"]:
        told.append(
            f"  {device['name']}, {device['memory_gib']:.0f} GiB, CUDA {found['torch_cuda']}"
            f"{_because(device['error'])}"
        )
    if not found["devices"]:
        told.append("  no CUDA device that torch sees: everything runs on the CPU")
    threads = ", ".join(f"{name} {value}" for name, value in found["threads"].items())
    told += ["", f"threads: {threads}", "", "optional parts"]
    for name, entry in found["extras"].items():
        state = "present"
        if entry["missing"]:
            state = f"missing ({', '.join(entry['missing'])}): {entry['install']}"
        told.append(f"  {name:<14} {state}")
    told += [f"note: {text}" for text in found["notes"]]
    return told


def _because(error: str | None) -> str:
    return "" if error is None else f": {error}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, module: str) -> dict[str, str | None]:
    """Version, and why the module cannot be imported."""
    error = None
    try:
        importlib.import_module(module)
    except _BROKEN as broken:
        error = _one_line(broken)
    return {"version": _version(name), "error": error}


def _platforms() -> tuple[dict[str, str | None], list[str]]:
    """Why each platform does not run two particles on a spring (None: it does); plug-ins."""
    import openmm

    system, spring = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(2):
        system.addParticle(1.0)
    spring.addBond(0, 1, 0.1, 1000.0)
    system.addForce(spring)
    found: dict[str, str | None] = {}
    for k in range(openmm.Platform.getNumPlatforms()):
        kind = openmm.Platform.getPlatform(k)
        found[kind.getName()] = None
        try:
            context = openmm.Context(system, openmm.VerletIntegrator(1e-3), kind)
            context.setPositions([openmm.Vec3(0, 0, 0), openmm.Vec3(0.2, 0, 0)])
            energy = context.getState(energy=True).getPotentialEnergy()._value
        except openmm.OpenMMException as error:
            found[kind.getName()] = _one_line(error)
            continue
        if not abs(energy - 5.0) < 1e-3:
            found[kind.getName()] = f"a spring of 5 kJ/mol has {energy:g} kJ/mol"
    failures = openmm.Platform.getPluginLoadFailures()
    where = r"Error loading library \S*/"  # the file's name tells enough
    return found, [" ".join(re.sub(where, "", text).split()) for text in failures]


def _devices() -> tuple[str | None, list[dict[str, Any]]]:
    """CUDA version of torch, and the devices it sees, each with why it cannot compute."""
    import torch

    found: list[dict[str, Any]] = []
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties, error = torch.cuda.get_device_properties(k), None
        try:
            total = float(torch.ones(8, device=f"cuda:{k}").sum())
            error = None if total == 8.0 else f"a sum of eight ones is {total:g}"
        except RuntimeError as broken:
            error = _one_line(broken)
        gib = properties.total_memory / 2**30
        found.append({"name": properties.name, "memory_gib": gib, "error": error})
    return torch.version.cuda, found


def _threads(works: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    if "torch" in works:
        from openmm_eqflow.parallel import available_threads

        found["chunks"] = available_threads()
        found["torch"] = importlib.import_module("torch").get_num_threads()
    if "numba" in works:
        found["numba"] = importlib.import_module("numba").get_num_threads()
    return found


def _extras(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tell what each optional part lacks. Modules are not imported: some print."""
    beside, missing = Path(sys.executable).parent, {}
    for name, (modules, programs) in EXTRAS.items():
        missing[name] = [m for m in modules if importlib.util.find_spec(m) is None]
        missing[name] += [p for p in programs if not (shutil.which(p) or (beside / p).is_file())]
    missing["gpu"] = [] if "CUDA" in found["platforms"] else ["CUDA platform of OpenMM"]
    if found["torch_cuda"] is None:
        missing["gpu"].append("CUDA build of torch")
    return {
        name: {"missing": lacks, "install": f'pip install "openmm-eqflow[{name}]"'}
        for name, lacks in missing.items()
    }


def _notes(found: dict[str, Any]) -> list[str]:
    notes, install = [], found["extras"]["gpu"]["install"]
    if shutil.which("nvidia-smi") and not found["devices"]:
        why = "is built for CPUs" if found["torch_cuda"] is None else "sees no device"
        notes.append(f"there is an NVIDIA driver, but torch {why}: take a CUDA wheel of torch")
    if found["devices"] and "CUDA" not in found["platforms"]:
        notes.append(f"there is a GPU, but OpenMM has no CUDA platform: {install}")
    return notes
