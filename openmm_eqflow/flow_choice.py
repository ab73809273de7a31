"""Which flow is meant: the one of a run directory, or the one that ships with a system."""

from __future__ import annotations

from pathlib import Path

import torch

from openmm_eqflow.checkpoint import load_flow, save_flow
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.fitting import split_frames
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.library import MolecularSystem, load_system
from openmm_eqflow.precision import resolve_device
from openmm_eqflow.reference import load_reference
from openmm_eqflow.rundir import RunDirectory
from openmm_eqflow.system_identity import system_sha256

__all__ = ["adopt_shipped_flow", "card_of", "flow_of", "own_flow", "shipped_flow"]


def shipped_flow(system: MolecularSystem) -> Path | None:
    """Flow that ships with a system, if there is one."""
    path = system.directory / "flow.safetensors"
    return path if path.is_file() else None


def adopt_shipped_flow(run: RunDirectory) -> None:
    """Copy the flow that ships with the run's system into the run directory.

    Raises
    ------
    ConfigurationError
        No flow ships with it.
    """
    system = run.load_system()
    if (source := shipped_flow(system)) is None:
        raise ConfigurationError(
            f"no flow ships with {system.name!r}; train one: openmm-eqflow run {run.config.system}"
        )
    flow = load_flow(source)
    save_flow(flow, run.path / "flow", flow.metadata)
    run.finish("train", {"adopted": system.name})


def flow_of(
    name_or_run: str, device: str = "auto"
) -> tuple[MolecularSystem, EquivariantFlow, torch.Tensor | None]:
    """System, flow and test frames (if any) of a run directory or a shipped system."""
    path = Path(name_or_run)
    where = resolve_device(device)
    if (path / "config.yaml").is_file():
        run = RunDirectory.open(path)
        run.require("train")
        test = split_frames(load_reference(path))[1] if run.is_complete("reference") else None
        system = run.load_system()
        return system, own_flow(path / "flow", system_sha256(system.system), where), test
    system = load_system(name_or_run)
    if (source := shipped_flow(system)) is None:
        raise ConfigurationError(
            f"no flow ships with {system.name!r}; train one first: openmm-eqflow run {name_or_run}"
        )
    return system, own_flow(source, system_sha256(system.system), where), None


def card_of(name: str) -> Path:
    """Card beside the flow of a system.

    Raises
    ------
    ConfigurationError
        ``name`` is a run directory, whose figures are its own, or there is no card.
    """
    if (Path(name) / "config.yaml").is_file():
        raise ConfigurationError(
            f"{name} is a run and has no card; write one: openmm-eqflow publish {name} --out DIR"
        )
    card = load_system(name).directory / "card.md"
    if not card.is_file():
        raise ConfigurationError(
            f"{card} does not exist; write one: openmm-eqflow publish RUN --out {card.parent}"
        )
    return card


def own_flow(path: Path, system_hash: str, device: str = "cpu") -> EquivariantFlow:
    """Load a flow and make sure that it was trained for this System."""
    flow = load_flow(path, device=device)
    if (made_for := flow.metadata.get("system_hash")) != system_hash:
        raise ConfigurationError(
            f"the flow {path} was trained for another System "
            f"({str(made_for)[:12]}..., now {system_hash[:12]}...); train it anew"
        )
    return flow
