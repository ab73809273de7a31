"""What a reference run samples and how: the settings a user may give, the plan that follows.

``calibration.py`` makes the plan, ``tempering.py`` carries it out.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_eqflow.analysis.observables import Torsion
from openmm_eqflow.errors import CheckpointError, ConfigurationError

__all__ = [
    "ASIDE",
    "ReferenceSettings",
    "SamplingPlan",
    "atoms_in_line",
    "make_context",
    "sampling_system",
    "set_aside_singular_torsions",
]

FloatArray = NDArray[np.float64]
ASIDE = 31  # force group that is not integrated
_IN_LINE = np.radians(165.0)


@dataclass(frozen=True)
class ReferenceSettings:
    """The ``settings: reference:`` section of system.yaml.

    Attributes
    ----------
    max_temperature_ratio
        Hottest temperature over the target's; 1 is plain MD.
    swap_rate
        Lowest acceptable exchange acceptance; the shortest ladder that reaches it is used.
    steps_per_swap, swaps_per_frame
        MD steps between exchange attempts, attempts between stored frames.
    equilibration_frames
        Frame intervals of tempering thrown away at the start of each walker.
    timestep_fs
        Overrides the choice by the largest frequency.
    """

    max_temperature_ratio: float = 2.2
    swap_rate: float = 0.3
    max_temperatures: int = 12
    steps_per_swap: int = 125
    swaps_per_frame: int = 2
    equilibration_frames: int = 40
    friction_per_ps: float = 1.0
    timestep_fs: float | None = None

    @classmethod
    def from_mapping(cls, options: dict[str, Any], where: Path) -> ReferenceSettings:
        """Check keys and values; ``where`` is named in the error."""
        known = {item.name for item in fields(cls)}
        for key, value in options.items():
            if key not in known:
                raise ConfigurationError(
                    f"{where}: unknown key 'settings.reference.{key}'; expected one of "
                    f"{sorted(known)}"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigurationError(
                    f"{where}: key 'settings.reference.{key}' is {value!r}, expected a positive "
                    "number"
                )
        settings = cls(**options)
        if settings.max_temperature_ratio < 1.0:
            raise ConfigurationError(
                f"{where}: key 'settings.reference.max_temperature_ratio' is "
                f"{settings.max_temperature_ratio}, expected at least 1"
            )
        return settings


@dataclass(frozen=True)
class SamplingPlan:
    """Everything a walker needs beside the System and starting positions; stored as plan.json."""

    system_hash: str
    n_dims: int
    temperatures: tuple[float, ...]
    masses: tuple[float, ...]
    timestep_fs: float
    friction_per_ps: float
    platform: str
    steps_per_swap: int
    swaps_per_frame: int
    equilibration_frames: int
    frames_per_chunk: int
    seed: int
    n_walkers: int
    torsions: tuple[Torsion, ...]
    expected_swap_rate: float
    steps_per_second: float
    setup_seconds: float
    version: int = 1

    @property
    def frame_interval_ps(self) -> float:
        """Time between stored frames of one temperature, in ps of the sampling masses."""
        return self.steps_per_swap * self.swaps_per_frame * self.timestep_fs * 1e-3

    def to_json(self) -> dict[str, Any]:
        """Plain containers only."""
        return asdict(self) | {"torsions": [list(torsion) for torsion in self.torsions]}

    @classmethod
    def read(cls, path: Path) -> SamplingPlan:
        """Read plan.json; altered or foreign files are refused."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("version") != 1:
                raise CheckpointError(f"{path} has version {content.get('version')}, expected 1")
            for key in ("temperatures", "masses"):
                content[key] = tuple(float(value) for value in content[key])
            content["torsions"] = tuple(_torsion(entry) for entry in content["torsions"])
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete its folder") from error


def _torsion(entry: list[Any]) -> Torsion:
    """Read a torsion; plans of version 0.1 have its four atoms only."""
    if isinstance(entry[0], str):
        return Torsion(entry[0], tuple(entry[1]), *entry[2:])
    return Torsion("-".join(str(k + 1) for k in entry), tuple(entry))


def sampling_system(
    system: openmm.System, masses: tuple[float, ...] | FloatArray
) -> openmm.System:
    """Copy a System with other masses and without centre-of-mass motion removal.

    The remover is dropped because its step counter would be one more piece of state to store; the
    drift it prevents is taken out of the stored frames.
    """
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for index, mass in enumerate(masses):
        copy.setParticleMass(index, float(mass))
    for index in reversed(range(copy.getNumForces())):
        if isinstance(copy.getForce(index), openmm.CMMotionRemover):
            copy.removeForce(index)
    return copy


def set_aside_singular_torsions(system: openmm.System, positions: FloatArray) -> list[str]:
    """Take torsions about three atoms in line out of the dynamics, and say which (from 1).

    Such a torsion has an energy of a few kJ/mol and no direction: its force grows without bound as
    the atoms come into line, and heats any dynamics. The energy keeps it in a force group that
    :func:`make_context` does not integrate; stretches of dynamics are accepted by it (Duane,
    Kennedy, Pendleton, Roweth 1987), so that frames are distributed as the target says.
    """
    kinds: tuple[Any, ...] = (openmm.PeriodicTorsionForce, openmm.RBTorsionForce)
    aside: list[str] = []
    for force in [f for f in system.getForces() if isinstance(f, kinds)]:
        kept = type(force)()
        kept.setForceGroup(ASIDE)
        for k in range(force.getNumTorsions()):
            parameters = force.getTorsionParameters(k)
            particles, last = list(parameters[:4]), list(parameters[4:])
            strength = last[2:] if isinstance(force, openmm.PeriodicTorsionForce) else last
            straight = max(_angle(positions[particles[:3]]), _angle(positions[particles[1:]]))
            if straight < _IN_LINE or all(value._value == 0.0 for value in strength):
                continue
            kept.addTorsion(*particles, *last)
            nothing = [0.0 * value for value in strength]
            force.setTorsionParameters(k, *particles, *last[: len(last) - len(nothing)], *nothing)
            aside.append("-".join(str(p + 1) for p in particles))
        if kept.getNumTorsions():
            system.addForce(kept)
    return aside


def atoms_in_line(topology: app.Topology, positions: FloatArray) -> bool:
    """Whether three atoms bonded in a row lie nearly on a line."""
    around: dict[int, list[int]] = {}
    for first, second in topology.bonds():
        around.setdefault(first.index, []).append(second.index)
        around.setdefault(second.index, []).append(first.index)
    return any(
        _angle(positions[[a, centre, c]]) > _IN_LINE
        for centre, ends in around.items()
        for a, c in itertools.combinations(ends, 2)
    )


def _angle(x: FloatArray) -> float:
    a, b = x[0] - x[1], x[2] - x[1]
    return float(np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b))


def make_context(
    system: openmm.System,
    platform: str,
    *,
    temperature: float,
    timestep_fs: float,
    friction_per_ps: float,
) -> openmm.Context:
    """One LangevinMiddle Context on one CPU thread (the walkers take the other cores)."""
    integrator = openmm.LangevinMiddleIntegrator(
        temperature * unit.kelvin,
        friction_per_ps / unit.picosecond,
        timestep_fs * unit.femtosecond,
    )
    if any(force.getForceGroup() == ASIDE for force in system.getForces()):
        integrator.setIntegrationForceGroups(set(range(ASIDE)))
    integrator.setConstraintTolerance(1e-7)
    properties = {"Threads": "1", "DeterministicForces": "true"} if platform == "CPU" else {}
    return openmm.Context(
        system, integrator, openmm.Platform.getPlatformByName(platform), properties
    )
