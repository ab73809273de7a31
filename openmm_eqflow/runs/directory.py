"""The run directory: what it holds, which stages are complete, and that it is the right one."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from openmm import unit

from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.files import write_json, write_text
from openmm_eqflow.parallel import is_main, world_size
from openmm_eqflow.priors.zmatrix import ZMatrix
from openmm_eqflow.seeds import EarlierSeed
from openmm_eqflow.targets.constraints import constraint_lengths
from openmm_eqflow.targets.library import MolecularSystem, load_system, systems_directory
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.training.precision import resolve_device
from openmm_eqflow.training.recipes import Recipe, make_recipe
from openmm_eqflow.units import masses_in_dalton

__all__ = [
    "STAGES",
    "RunConfig",
    "RunDirectory",
    "package_versions",
]

STAGES = ("reference", "train", "sample", "report")
_OUTPUTS = {
    "reference": ("reference.npz", "reference.dcd"),
    "train": ("flow.safetensors", "flow.json"),
    "sample": ("samples.npz", "samples.dcd", "topology.pdb", "metrics.json"),
    "report": ("report.html",),
}
_FOLLOWING_WORK = {"reference": ("training",), "train": ("evaluation", "samples")}
_PACKAGES = ("openmm", "openmmtools", "mdtraj", "torch", "torchdiffeq", "numpy", "scipy")


def package_versions() -> dict[str, str]:
    """Versions of what results depend on; Python's is the last entry."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions | {"python": platform.python_version()}


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; written to config.yaml."""

    system: str
    system_hash: str
    temperature_kelvin: float
    budget: str
    seed: int
    device: str
    recipe: Recipe
    streams: str = "named"

    @property
    def root(self) -> int:
        """Seed of all random streams; a run of version 0.1 goes on with those it began with."""
        return self.seed if self.streams == "named" else EarlierSeed(self.seed)


class RunDirectory:
    """One run on disk.

    Parameters
    ----------
    path
        Folder; created by :meth:`create`.
    config
        Its config.yaml.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self._held = False

    @classmethod
    def create(
        cls,
        path: Path,
        system: MolecularSystem,
        target: BoltzmannTarget,
        *,
        budget: str | None,
        seed: int | None,
        device: str | None = None,
        method: str | None = None,
        ess: float | None = None,
        check_with_md: int | None = None,
    ) -> RunDirectory:
        """Make a run directory, or open the existing one if it is of the same run.

        ``None`` means what an existing run was made with, else standard, 0 and auto; of
        ``method``, ``ess`` and ``check_with_md`` what the recipe has.

        Raises
        ------
        ConfigurationError
            The folder belongs to another system, temperature, budget or seed, or the seed is no
            seed.
        """
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigurationError(f"seed is {seed}, expected 0 to 2^32 - 1")
        kelvin = float(system.temperature.value_in_unit(unit.kelvin))
        shipped = system.directory.parent == systems_directory()
        source = system.name if shipped else str(system.directory.resolve())
        if (path / "config.yaml").is_file():
            run = cls.open(path)
            recipe = run.config.recipe
            wanted = {
                "system_hash": (run.config.system_hash, target.system_hash),
                "temperature_kelvin": (run.config.temperature_kelvin, kelvin),
                "budget": (run.config.budget, budget),
                "seed": (run.config.seed, seed),
                "method": (recipe.method, method),
                "ess": (recipe.ess, ess),
                "check_with_md": (recipe.check_with_md, check_with_md),
            }
            for key, (found, asked) in wanted.items():
                value = found if asked is None else asked
                if found != value:
                    raise ConfigurationError(
                        f"{path} belongs to another run: its {key.replace('_', ' ')} is "
                        f"{_short(found)}, now {_short(value)}; choose another --out or delete it"
                    )
            run.use_device(device)
            return run
        # A run killed while it wrote config.yaml leaves a hidden temporary file, which is no run.
        if path.exists() and any(not p.name.startswith(".") for p in path.iterdir()):
            raise ConfigurationError(
                f"{path} exists and is no run directory (no config.yaml); choose another --out"
            )
        chosen = budget or "standard"
        if (
            method is None
            and world_size() > 1
            and not any("method" in section for section in system.settings.values())
        ):
            method = "tempering"  # an annealed run works in one process
        recipe = make_recipe(
            system.kind,
            chosen,  # type: ignore[arg-type]
            system.settings,
            system.n_particles,
            method,
            ess,
            check_with_md,
        )
        if recipe.prior == "internal":  # refused now, not after the reference data are made
            bonds = [(bond[0].index, bond[1].index) for bond in system.topology.bonds()]
            masses = [float(m) for m in masses_in_dalton(system.system)]
            chart = ZMatrix.from_bonds(system.n_particles, bonds, masses=masses)
            chart.fixed_bonds(constraint_lengths(system.system))
        config = RunConfig(
            source,
            target.system_hash,
            kelvin,
            chosen,
            0 if seed is None else seed,
            resolve_device(device or "auto"),
            recipe,
        )
        run = cls(path, config)
        run._write_config()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory."""
        file = path / "config.yaml"
        if not file.is_file():
            raise ConfigurationError(
                f"{path} is no run directory (no config.yaml); start with: openmm-eqflow run NAME"
            )
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            content["versions"]["python"]  # the last entry: a truncated file can still be YAML
            config = RunConfig(
                system=str(content["system"]),
                system_hash=str(content["system_hash"]),
                temperature_kelvin=float(content["temperature_kelvin"]),
                budget=str(content["budget"]),
                seed=int(content["seed"]),
                device=str(content["device"]),
                recipe=Recipe.from_dict(content["recipe"]),
                streams=str(content.get("streams", "counted")),
            )
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{file} is malformed ({type(error).__name__}: {error}); restore it or start anew"
            ) from error
        return cls(path, config)

    def use_device(self, device: str | None) -> None:
        """Train on another device from now on, and say so in config.yaml.

        Where a network is trained is no part of a run's identity. A complete training stage
        leaves nothing to move: the entry keeps saying where the flow was trained.

        Raises
        ------
        ConfigurationError
            There is no such device here.
        """
        chosen = self.config.device if device is None else resolve_device(device)
        if self.is_complete("train"):
            return
        if chosen == self.config.device:
            resolve_device(chosen)  # perhaps made on another machine
            return
        self.config = replace(self.config, device=chosen)
        if is_main():
            file = self.path / "config.yaml"
            content = yaml.safe_load(file.read_text(encoding="utf-8")) | {"device": chosen}
            write_text(file, yaml.safe_dump(content, sort_keys=False))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes; within this object it can be nested.

        The lock is the kernel's, on the file ``.lock``, which says who holds it: it ends with the
        process, however that ends, and a file left over locks nothing. Under torchrun rank 0
        holds it for all.

        Raises
        ------
        ConfigurationError
            Another process works here; the message names it.
        """
        if self._held or not is_main():
            yield
            return
        import fcntl

        file = self.path / ".lock"
        with file.open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before may have taken the file away between the two lines above.
                stale = not file.exists() or not os.path.samestat(
                    os.fstat(handle.fileno()), file.stat()
                )
            except BlockingIOError:
                stale = True
            if stale:
                handle.seek(0)
                raise ConfigurationError(
                    f"{self.path} is in use by {handle.read() or 'another process'}; wait for it, "
                    "stop it, or choose another --out"
                )
            handle.truncate(0)
            started = datetime.now().isoformat(" ", "seconds")
            handle.write(f"process {os.getpid()} on {platform.node()} since {started}")
            handle.flush()
            self._held = True
            try:
                yield
            finally:
                self._held = False
                file.unlink(missing_ok=True)

    def metrics(self) -> dict[str, Any]:
        """All figures of the report (metrics.json of the sampling stage)."""
        self.require("sample")
        content: dict[str, Any] = json.loads(
            (self.path / "metrics.json").read_text(encoding="utf-8")
        )
        return content

    def _write_config(self) -> None:
        c = self.config
        content = {
            "system": c.system,
            "system_hash": c.system_hash,
            "temperature_kelvin": c.temperature_kelvin,
            "budget": c.budget,
            "seed": c.seed,
            "streams": c.streams,
            "device": c.device,
            "recipe": c.recipe.to_dict(),
            "versions": package_versions(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False))

    # -- stages -------------------------------------------------------------------------------

    def load_system(self) -> MolecularSystem:
        """Load the system of the run."""
        return load_system(self.config.system)

    def is_complete(self, stage: str) -> bool:
        """Whether a stage finished and its files are still there."""
        return (self.path / "stages" / f"{stage}.json").is_file() and all(
            (self.path / name).is_file() for name in _OUTPUTS[stage]
        )

    def finish(self, stage: str, facts: dict[str, Any]) -> None:
        """Mark a stage complete; later ones that were complete are made again."""
        for later in STAGES[STAGES.index(stage) + 1 :]:
            (self.path / "stages" / f"{later}.json").unlink(missing_ok=True)
        # What a later stage had begun belongs to the data or the flow that were replaced.
        for folder in _FOLLOWING_WORK.get(stage, ()):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        write_json(self.path / "stages" / f"{stage}.json", facts)

    def require(self, stage: str) -> None:
        """Raise unless ``stage`` is complete."""
        if not self.is_complete(stage):
            raise CheckpointError(
                f"{self.path} has no complete {stage!r} stage; run: openmm-eqflow {stage} "
                f"{quote(str(self.path))}"
            )

    def log_to_file(self) -> logging.Handler:
        """Append the package's log to run.log."""
        handler: logging.Handler = logging.NullHandler()
        if is_main():
            handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("openmm_eqflow")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        return handler


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 20 else text[:12] + "..."
