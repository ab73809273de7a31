"""Systems by name or by folder: ``systems/<name>/system.yaml`` plus coordinates.

A folder describes its potential in exactly one of three ways::

    forcefield: [amber99sbildn.xml, amber99_obc.xml]   # openmm.app.ForceField files
    system_xml: system.xml                             # a serialised OpenMM System
    model: {name: lennard-jones, n_particles: 13}      # a formula of model_systems.py

Force fields are always applied with ``NoCutoff``, ``constraints=None`` and flexible water: a flow
moves every bond, and OpenMM adds no energy for a stretched constraint.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import openmm
import yaml
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnknownSystemError
from openmm_eqflow.targets.constraints import constrained
from openmm_eqflow.targets.forcefield import build_from_forcefield, load_pdb, load_system_xml
from openmm_eqflow.targets.model_systems import MODEL_DIMENSIONS, build_model
from openmm_eqflow.targets.support import complete_bonds
from openmm_eqflow.units import kt_in_kj_mol, temperature_quantity

__all__ = [
    "SYSTEM_FILE",
    "MolecularSystem",
    "SystemInfo",
    "check_temperature",
    "list_systems",
    "load_system",
    "systems_directory",
]

SYSTEM_FILE = "system.yaml"
_TEMPERATURES = (1.0, 10_000.0)  # kelvin
Kind = Literal["molecule", "cluster", "harmonic"]
_POTENTIALS = ("forcefield", "system_xml", "model")
_REQUIRED: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "kind": (str,),
    "coordinates": (str,),
    "temperature_kelvin": (int, float),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "forcefield": (list,),
    "system_xml": (str,),
    "bond_orders": (list,),
    "model": (dict,),
    "settings": (dict,),
}


@dataclass(frozen=True)
class SystemInfo:
    """One line of the list of systems; cheap, no OpenMM object is built."""

    name: str
    kind: Kind
    temperature_kelvin: float
    description: str
    directory: Path


@dataclass(frozen=True, eq=False)
class MolecularSystem:
    """A potential, a starting structure and a temperature.

    Attributes
    ----------
    system, topology, positions, temperature
        OpenMM objects; positions always have three columns.
    n_dims
        Dimensions the flow sees: 2 for planar models (z = 0), else 3.
    settings
        Overrides of later stages, one mapping per stage (``reference: {...}``).
    """

    name: str
    kind: Kind
    system: openmm.System
    topology: app.Topology
    positions: unit.Quantity
    temperature: unit.Quantity
    n_dims: int
    directory: Path
    description: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def n_particles(self) -> int:
        """Number of particles."""
        return int(self.system.getNumParticles())


def systems_directory() -> Path:
    """Folder of the shipped systems: inside an installed wheel, else beside the sources."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "systems", package.parent / "systems"):
        if any(candidate.glob(f"*/{SYSTEM_FILE}")):
            return candidate
    raise ConfigurationError(
        f"the folder of shipped systems is missing (looked beside and in {package}); "
        "reinstall openmm_eqflow"
    )


def list_systems() -> list[SystemInfo]:
    """All shipped systems, sorted by name."""
    return [
        _info(_read(path), path.parent)
        for path in sorted(systems_directory().glob(f"*/{SYSTEM_FILE}"))
    ]


def load_system(name_or_path: str | Path) -> MolecularSystem:
    """Load a shipped system by name, or any folder that holds a ``system.yaml``.

    A shipped name wins over a folder of the same name; write ``./name`` for the folder.

    Raises
    ------
    UnknownSystemError
        Neither a shipped name nor a folder with a system.yaml.
    ConfigurationError
        A key of system.yaml is missing, unknown or of the wrong type, or its files do not fit.

    Examples
    --------
    >>> load_system("lj13").n_particles
    13
    """
    if isinstance(name_or_path, str):
        shipped = systems_directory() / name_or_path / SYSTEM_FILE
        # A name is one path component: "../x" or "" must not reach into the shipped folder.
        if Path(name_or_path).name == name_or_path and shipped.is_file():
            return _build(_read(shipped), shipped.parent)
    directory = Path(name_or_path)
    if directory.name == SYSTEM_FILE:
        directory = directory.parent
    if (directory / SYSTEM_FILE).is_file():
        return _build(_read(directory / SYSTEM_FILE), directory)
    names = [info.name for info in list_systems()]
    near = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.5)
    listed = f"shipped systems: {', '.join(names)}."
    hint = f"did you mean {' or '.join(near)}?" if near else listed
    extra = f" (the folder exists but has no {SYSTEM_FILE})" if directory.is_dir() else ""
    raise UnknownSystemError(
        f"no system {str(name_or_path)!r}{extra}; {hint} "
        "For your own molecule: openmm-eqflow init FOLDER --pdb FILE; a run is its directory"
    )


def _refuse_equal_keys(node: yaml.Node | None) -> None:
    """Name a key that stands twice in a mapping: YAML takes the last without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                what = f"key {key.value!r} stands twice"
                raise yaml.MarkedYAMLError(None, None, what, key.start_mark)
            seen.add(str(key.value))
            _refuse_equal_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_equal_keys(value)


def _read(path: Path) -> dict[str, Any]:
    """Parse system.yaml against the schema; every complaint names the key and the file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        _refuse_equal_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path}: not valid YAML ({' '.join(str(error).split())})"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path}: expected a mapping of keys, got {type(content).__name__}"
        )
    known = {**_REQUIRED, **_OPTIONAL}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {sorted(known)}"
            raise ConfigurationError(f"{path}: unknown key {key!r}; {hint}")
    for key in _REQUIRED:
        if key not in content:
            raise ConfigurationError(f"{path}: key {key!r} is missing")
    for key, value in content.items():
        if not isinstance(value, known[key]) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in known[key])
            raise ConfigurationError(
                f"{path}: key {key!r} is {value!r} ({type(value).__name__}), expected {wanted}"
            )
    _check_values(content, path)
    return content


def _check_values(content: Mapping[str, Any], path: Path) -> None:
    if content["kind"] not in get_args(Kind):
        raise ConfigurationError(
            f"{path}: key 'kind' is {content['kind']!r}, expected one of {get_args(Kind)}"
        )
    check_temperature(content["temperature_kelvin"], f"{path}: key 'temperature_kelvin'")
    given = [key for key in _POTENTIALS if key in content]
    if len(given) != 1:
        raise ConfigurationError(
            f"{path}: expected exactly one of the keys {list(_POTENTIALS)}, got {given or 'none'}"
        )
    forcefield = content.get("forcefield")
    if forcefield is not None and not (
        forcefield and all(isinstance(item, str) for item in forcefield)
    ):
        raise ConfigurationError(
            f"{path}: key 'forcefield' is {forcefield!r}, expected a list of file names"
        )
    model = content.get("model")
    if model is not None and (
        set(model) != {"name", "n_particles"}
        or model["name"] not in MODEL_DIMENSIONS
        or type(model["n_particles"]) is not int
    ):
        raise ConfigurationError(
            f"{path}: key 'model' is {model!r}, expected name (one of "
            f"{sorted(MODEL_DIMENSIONS)}) and n_particles (an integer)"
        )
    for stage, options in content.get("settings", {}).items():
        if not (isinstance(stage, str) and isinstance(options, dict)):
            raise ConfigurationError(
                f"{path}: key 'settings.{stage}' is {options!r}, expected a mapping of options"
            )


def check_temperature(degrees: float, name: str) -> None:
    """Refuse temperatures at which a molecule is no molecule, or does not move; ``name`` it.

    Raises
    ------
    ConfigurationError
        With the range.
    """
    low, high = _TEMPERATURES
    if not low <= degrees <= high:
        raise ConfigurationError(
            f"{name} is {degrees:g} K, expected a number of kelvin from {low:g} to {high:g}"
        )


def _info(content: Mapping[str, Any], directory: Path) -> SystemInfo:
    return SystemInfo(
        name=content["name"],
        kind=content["kind"],
        temperature_kelvin=float(content["temperature_kelvin"]),
        description=content.get("description", ""),
        directory=directory,
    )


def _build(content: Mapping[str, Any], directory: Path) -> MolecularSystem:
    info = _info(content, directory)
    temperature = temperature_quantity(info.temperature_kelvin)
    topology, positions = load_pdb(_existing(directory, content, "coordinates"))
    n_dims = 3
    if "forcefield" in content:
        files = [
            str(directory / name) if (directory / name).is_file() else name
            for name in content["forcefield"]
        ]
        system = build_from_forcefield(topology, files)
    elif "system_xml" in content:
        system = load_system_xml(_existing(directory, content, "system_xml"))
    else:
        model = content["model"]
        n_dims = MODEL_DIMENSIONS[model["name"]]
        try:
            system = build_model(model["name"], model["n_particles"], kt_in_kj_mol(temperature))
        except ValueError as error:
            raise ConfigurationError(f"{directory / SYSTEM_FILE}: key 'model': {error}") from error
    n_atoms, n_particles = topology.getNumAtoms(), system.getNumParticles()
    if n_atoms != n_particles:
        raise ConfigurationError(
            f"{directory / content['coordinates']} has {n_atoms} atoms but the System has "
            f"{n_particles} particles; both must describe the same molecule in the same order"
        )
    if info.kind == "molecule":
        complete_bonds(topology, system)
        _set_orders(topology, content.get("bond_orders", []), directory / SYSTEM_FILE)
    if system.getNumConstraints():
        positions = constrained(system, positions)
    return MolecularSystem(
        name=info.name,
        kind=info.kind,
        system=system,
        topology=topology,
        positions=positions,
        temperature=temperature,
        n_dims=n_dims,
        directory=directory,
        description=info.description,
        settings={stage: dict(options) for stage, options in content.get("settings", {}).items()},
    )


def _set_orders(topology: app.Topology, orders: list[Any], path: Path) -> None:
    """Give bonds the orders of system.yaml, which PDB files do not have."""
    bonds = {frozenset((bond[0].index, bond[1].index)): bond for bond in topology.bonds()}
    for row in orders:
        numbers = row if isinstance(row, list) and all(type(n) is int for n in row) else []
        bond = bonds.get(frozenset(numbers[:2])) if len(numbers) == 3 else None
        if bond is None:
            raise ConfigurationError(
                f"{path}: key 'bond_orders' has {row!r}, expected [atom, atom, order] of a bond, "
                "atoms counted from 0"
            )
        bond.order = numbers[2] or None  # aromatic, between 1 and 2: mdtraj knows no such number


def _existing(directory: Path, content: Mapping[str, Any], key: str) -> Path:
    path = directory / str(content[key])
    if not path.is_file():
        raise ConfigurationError(
            f"{directory / SYSTEM_FILE}: key {key!r} names {content[key]!r}, which is not a file"
        )
    return path
