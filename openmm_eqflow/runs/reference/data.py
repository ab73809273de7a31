"""Reference data: parallel tempering on two cores, resumable, one call.

The folder given to :func:`run_reference` receives::

    reference.npz, reference.dcd       energies and frames at the target temperature
    reference/plan.json, system.xml    what is sampled and how (``sampling_plan.py``)
    reference/walker-0/chunk-*.npz     all temperatures, from which an interrupted run goes on

Two walkers run independent ladders in their own processes; how far they disagree tells how far the
run is from converged.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

from openmm_eqflow.analysis.convergence import assess, features
from openmm_eqflow.analysis.observables import Torsion, seen_once, torsion_angles
from openmm_eqflow.analysis.weights import systematic
from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.files import write_dcd, write_json, write_npz, write_text
from openmm_eqflow.runs.reference.calibration import make_plan
from openmm_eqflow.runs.reference.plan import ReferenceSettings, SamplingPlan
from openmm_eqflow.runs.reference.pool import WalkerPool
from openmm_eqflow.runs.reference.tempering import Chunk, chunk_paths, last_state, read_chunk
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.targets.support import check_system
from openmm_eqflow.targets.target import system_sha256
from openmm_eqflow.units import kelvin, kt_in_kj_mol, positions_in_nm, temperature_quantity

__all__ = [
    "ReferenceData",
    "load_reference",
    "run_reference",
]

Progress = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """Frames of a parallel-tempering run; walkers one after the other, each in time order.

    Of an annealed path: frames drawn by weight, independent, of one temperature and one "walker".

    Attributes
    ----------
    all_positions
        ``(n_temperatures, n_frames, n_particles, n_dims)`` float32 nm, centroid removed.
    all_energies
        ``(n_temperatures, n_frames)`` potential energies in kJ/mol.
    temperatures
        ``(n_temperatures,)`` K, ascending; the first is the target.
    walker
        ``(n_frames,)`` which walker made the frame.
    frame_interval_ps
        Time between frames of a walker (of the sampling masses: no kinetics).
    wall_seconds
        Longest walker, over all attempts.
    convergence
        See :func:`openmm_eqflow.analysis.convergence.assess`.
    method
        ``tempering`` or ``annealing``.
    """

    all_positions: NDArray[np.float32]
    all_energies: NDArray[np.float64]
    temperatures: NDArray[np.float64]
    walker: NDArray[np.int64]
    frame_interval_ps: float
    wall_seconds: float
    system_hash: str
    platform: str
    convergence: dict[str, Any] = field(repr=False)
    method: str = "tempering"

    @property
    def positions(self) -> NDArray[np.float32]:
        """Frames at the target temperature, ``(n_frames, n_particles, n_dims)`` nm."""
        target: NDArray[np.float32] = self.all_positions[0]
        return target

    @property
    def energies(self) -> NDArray[np.float64]:
        """Potential energies of ``positions`` in kJ/mol."""
        target: NDArray[np.float64] = self.all_energies[0]
        return target

    @property
    def reduced_energies(self) -> NDArray[np.float64]:
        """``energies`` in kT of the target temperature."""
        kt = kt_in_kj_mol(temperature_quantity(float(self.temperatures[0])))
        result: NDArray[np.float64] = self.energies / kt
        return result

    @property
    def n_frames(self) -> int:
        """Number of frames at each temperature."""
        return int(self.all_positions.shape[1])


def run_reference(
    system: MolecularSystem,
    directory: Path,
    *,
    seconds: float,
    max_frames: int | None = None,
    n_walkers: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> ReferenceData:
    """Make reference data, or continue where an earlier call stopped.

    Parameters
    ----------
    system
        What to sample; ``system.settings["reference"]`` overrides :class:`ReferenceSettings`.
    directory
        The run directory.
    seconds
        Wall-clock budget, earlier attempts included. A run that already used it returns at once.
    max_frames
        Stop earlier once all walkers together have so many frames of the target temperature.
    n_walkers
        Independent ladders, one process each.
    seed
        Of the walkers. Given plan.json, whole chunks depend on nothing else (Reference platform).
    progress
        Called with the fraction done and a short text, from this thread.

    Raises
    ------
    ConfigurationError
        The directory holds data of another system, temperature or seed.
    EnergyError, CheckpointError
        A walker failed; its message in one line.
    """
    if not seconds > 0.0:
        raise ValueError(f"seconds is {seconds}, expected a positive number")
    if n_walkers < 1 or (max_frames is not None and max_frames < n_walkers):
        raise ValueError(
            f"got n_walkers {n_walkers} and max_frames {max_frames}, expected >= 1 each"
        )
    report = progress or (lambda fraction, text: None)
    folder = Path(directory) / "reference"
    report(0.0, "choosing platform, time step and temperatures")
    plan = _plan(system, folder, n_walkers=n_walkers, seed=seed)
    quota = [
        10**9 if max_frames is None else max_frames // n_walkers + (w < max_frames % n_walkers)
        for w in range(n_walkers)
    ]
    if not all(_finished(folder, w, seconds, quota[w]) for w in range(n_walkers)):
        temperatures = f"{len(plan.temperatures)} temperature" + "s" * (len(plan.temperatures) > 1)
        with WalkerPool(folder, quota, seconds=seconds) as pool:
            pool.wait(
                lambda fraction, frames: report(fraction, f"{frames} frames, {temperatures}")
            )
    data = load_reference(directory)
    _export(data, Path(directory))
    report(1.0, f"{data.n_frames} frames")
    return data


def _finished(folder: Path, walker: int, seconds: float, quota: int) -> bool:
    state = last_state(folder, walker)
    return state is not None and (state.wall_seconds >= seconds or state.n_frames >= quota)


def _plan(system: MolecularSystem, folder: Path, *, n_walkers: int, seed: int) -> SamplingPlan:
    """Read the plan of an earlier attempt, or make one."""
    system_hash = system_sha256(system.system)
    path = folder / "plan.json"
    if path.is_file():
        plan = SamplingPlan.read(path)
        wanted = (system_hash, kelvin(system.temperature), n_walkers, seed)
        found = (plan.system_hash, plan.temperatures[0], plan.n_walkers, plan.seed)
        names = ("System", "temperature", "number of walkers", "seed")
        for name, want, have in zip(names, wanted, found, strict=True):
            if want != have:
                raise ConfigurationError(
                    f"{folder} holds data of another {name} ({have}, now {want}); "
                    "use another directory"
                )
        return plan
    check_system(system.system)
    where = system.directory / "system.yaml"
    settings = ReferenceSettings.from_mapping(dict(system.settings.get("reference", {})), where)
    if folder.exists():
        # Without a plan nothing in here was finished.
        shutil.rmtree(folder)
    plan, sampled, starts = make_plan(
        system,
        settings,
        system_hash=system_hash,
        torsions=_slow_torsions(system) if system.kind == "molecule" else (),
        seed=seed,
        n_walkers=n_walkers,
    )
    write_text(folder / "system.xml", openmm.XmlSerializer.serialize(sampled))
    write_npz(folder / "start.npz", {"positions": starts})
    # Last, because its presence says that the others are there.
    write_json(path, plan.to_json())
    return plan


def _slow_torsions(system: MolecularSystem) -> tuple[Torsion, ...]:
    """Torsions of a molecule but those of methyls and their like."""
    start = positions_in_nm(system.positions)
    found = find_isomers(system.system, system.topology, start).torsions
    return tuple(t for t in found if t.fold < 3)


def load_reference(directory: Path) -> ReferenceData:
    """Load all finished frames of a run directory, also of an unfinished run.

    Raises
    ------
    CheckpointError
        No finished chunk, or a damaged file (named).
    """
    folder = Path(directory) / "reference"
    if not (folder / "plan.json").is_file():
        weighted = _weighted(Path(directory) / "reference.npz")
        if weighted is not None:
            return weighted
        raise CheckpointError(f"{directory} has no reference data; run the reference stage first")
    plan = SamplingPlan.read(folder / "plan.json")
    chunks = [
        [read_chunk(path) for path in chunk_paths(folder, walker)]
        for walker in range(plan.n_walkers)
    ]
    flat = [chunk for walker in chunks for chunk in walker]
    if not flat:
        raise CheckpointError(f"{folder} has no finished chunk yet; continue the reference stage")
    frames = np.concatenate([chunk.frames for chunk in flat])
    energies = np.concatenate([chunk.energies for chunk in flat])
    counts = [sum(len(chunk.frames) for chunk in walker) for walker in chunks]
    return ReferenceData(
        all_positions=np.ascontiguousarray(frames.swapaxes(0, 1)),
        all_energies=np.ascontiguousarray(energies.T),
        temperatures=np.array(plan.temperatures),
        walker=np.repeat(np.arange(plan.n_walkers), counts),
        frame_interval_ps=plan.frame_interval_ps,
        wall_seconds=max(chunk.state.wall_seconds for chunk in flat),
        system_hash=plan.system_hash,
        platform=plan.platform,
        convergence=_convergence(plan, [walker for walker in chunks if walker]),
    )


def _weighted(file: Path) -> ReferenceData | None:
    """Frames of equal weight from the weighted points that an annealed run has left."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            if "log_weight" not in archive:
                return None
            held = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); run the stage again") from error
    generator = child(int(held["seed"]), "annealed reference")
    rows = systematic(held["log_weight"], float(torch.rand((), generator=generator)))
    kelvins = held["temperatures"]
    kt = kt_in_kj_mol(temperature_quantity(float(kelvins[0])))
    return ReferenceData(
        all_positions=held["positions"][rows][None],
        all_energies=kt * held["u"][rows][None],
        temperatures=kelvins,
        walker=np.zeros(len(rows), dtype=np.int64),
        frame_interval_ps=0.0,
        wall_seconds=float(held["seconds"]),
        system_hash=str(held["system_hash"]),
        platform="path",
        convergence={},
        method="annealing",
    )


def _convergence(plan: SamplingPlan, chunks: list[list[Chunk]]) -> dict[str, Any]:
    flat = [chunk for walker in chunks for chunk in walker]
    angles = torsion_angles(np.concatenate([chunk.frames[:, 0] for chunk in flat]), plan.torsions)
    return assess(
        [
            features(
                np.concatenate([chunk.frames[:, 0] for chunk in walker]),
                np.concatenate([chunk.energies[:, 0] for chunk in walker]),
                plan.torsions,
            )
            for walker in chunks
        ],
        one_state=[members[0].name for members in seen_once(plan.torsions, angles)],
        replica=[np.concatenate([chunk.replica for chunk in walker]) for walker in chunks],
        attempts=np.sum([chunk.attempts for chunk in flat], axis=0),
        accepted=np.sum([chunk.accepted for chunk in flat], axis=0),
        frame_interval_ps=plan.frame_interval_ps,
    )


def _export(data: ReferenceData, directory: Path) -> None:
    """Write what a person opens: target-temperature frames (dcd, in angstrom) and all energies."""
    write_dcd(directory / "reference.dcd", data.positions)
    write_npz(
        directory / "reference.npz",
        {
            "energies": data.energies,
            "all_energies": data.all_energies,
            "temperatures": data.temperatures,
            "walker": data.walker,
            "frame_interval_ps": np.array(data.frame_interval_ps),
        },
    )
