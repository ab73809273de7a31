"""Flows on disk: safetensors for numbers, JSON for words, SHA-256 over both; no pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.files import atomic_path, plain_json, write_json
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.relaxed import AnnealedPath, RelaxedFlow
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.targets.library import SYSTEM_FILE, systems_directory
from openmm_eqflow.vector_fields import build_vector_field

__all__ = [
    "file_sha256",
    "load_flow",
    "load_tensors",
    "save_flow",
    "save_tensors",
]

FORMAT = "openmm_eqflow.flow/1"
_PRIORS: dict[str, Any] = {
    "MeanFreeGaussian": MeanFreeGaussian,
    "InternalCoordinatePrior": InternalCoordinatePrior,
}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Write named tensors and a JSON-able dictionary as one safetensors file, atomically."""
    # Copies, because the format refuses tensors that share memory (as buffers of modules may).
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(plain, temporary, {"json": json.dumps(metadata or {})})
        except SafetensorError as error:  # a full disk, in the words of another library
            raise OSError(f"{path} cannot be written ({error})") from error
        temporary.chmod(0o644)  # safetensors makes its files private


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises
    ------
    CheckpointError
        Missing, truncated or foreign file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get("json", "{}"))
            return {key: handle.get_tensor(key) for key in handle.keys()}, metadata
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): the file is missing, truncated or not a "
            "safetensors file; delete it and run the stage again"
        ) from error


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record in canonical form, its own hash left out."""
    content = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(path: str | Path) -> tuple[Path, Path]:
    """Numbers and words of a flow; dots in its name are part of the name."""
    name = str(path)
    for suffix in (".safetensors", ".json"):
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return Path(f"{name}.safetensors"), Path(f"{name}.json")


def _shipped(path: str | Path) -> str | Path:
    """Path of a shipped flow if ``path`` is the name of a system, else ``path``."""
    if isinstance(path, str) and Path(path).name == path:
        folder = systems_directory() / path
        if (folder / SYSTEM_FILE).is_file():
            return folder / "flow"
    return path


def save_flow(
    flow: FlowPath, stem: str | Path, metadata: dict[str, Any] | None = None
) -> Path:
    """Write ``stem``.safetensors and ``stem``.json; return the path of the former.

    The JSON names prior, field, grid, audit, the SHA-256 of the numbers and that of its own
    content, so that neither file can be altered or exchanged unnoticed.

    Parameters
    ----------
    flow
        Any flow of this package.
    stem
        Path such as ``run/flow``; one of the two suffixes at its end is taken off.
    metadata
        JSON-able facts to keep: system hash, temperature, recipe, metrics.
    """
    path, words = _files(stem)
    prior_config, prior_tensors = flow.prior.state()
    tensors = {f"prior.{k}": v for k, v in prior_tensors.items()}
    maps = flow.maps
    tensors |= {f"field.{k}": v for k, v in maps.module.state_dict().items()}
    layers, layer_tensors = flow.stored_layers()
    tensors |= {f"layers.{k}": v for k, v in layer_tensors.items()}
    save_tensors(path, tensors)
    record = {
        "format": FORMAT,
        "sha256": file_sha256(path),
        "prior": {"kind": type(flow.prior).__name__, "config": prior_config},
        "vector_field": {
            "kind": type(maps.vector_field).__name__,
            "config": maps.vector_field.config,
        },
        "grid": list(maps.grid),
        "inverse_corrections": maps.inverse_corrections,
        "chunk_size": maps.chunk_size,
        "audit": flow.audit_report,
        "metadata": metadata or {},
    }
    if layers is not None:
        record["layers"] = ({"kind": flow.kind} if flow.kind else {}) | layers
    record = plain_json(record)
    write_json(words, record | {"record_sha256": _digest(record)})
    flow.metadata = dict(metadata or {})
    flow.source = (str(path), record["sha256"])
    return path


def load_flow(path: str | Path, *, device: str | torch.device = "cpu") -> Any:
    """Load a flow.

    Parameters
    ----------
    path
        Path of a flow (with or without suffix), or the name of a shipped system that has one. A
        name wins over a file of the same name; write ``./name`` for the file.
    device
        Of the network.

    Raises
    ------
    CheckpointError
        A file is missing, truncated, altered (hash) or of another format.
    """
    weights, words = _files(_shipped(path))
    for needed in (weights, words):
        if not needed.is_file():
            raise CheckpointError(f"{needed} does not exist; train a flow first, or give its path")
    try:
        record = json.loads(words.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{words} is not valid JSON ({error}); restore the file") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{words} is not of format {FORMAT}; retrain with this version")
    if record.get("record_sha256") != _digest(record):
        raise CheckpointError(
            f"{words} was altered (its content does not match its SHA-256); restore the file or "
            "train again"
        )
    digest = file_sha256(weights)
    if digest != record["sha256"]:
        raise CheckpointError(
            f"{weights} was altered or truncated: SHA-256 {digest[:12]}..., {words.name} expects "
            f"{record['sha256'][:12]}...; restore both files or train again"
        )
    tensors, _ = load_tensors(weights)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        prior: Prior = _PRIORS[record["prior"]["kind"]].from_state(
            record["prior"]["config"], part("prior.")
        )
        spec = record["vector_field"]
        field = build_vector_field(spec["kind"], spec["config"])
        field.load_state_dict(part("field."))
        flow = _MAKERS[_kind(record)](prior, field.to(device).eval(), record, part("layers."))
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigurationError) as error:
        raise CheckpointError(
            f"{words} does not describe a flow of this version ({' '.join(str(error).split())}); "
            "train again"
        ) from error
    flow.audit_report = record["audit"]
    flow.metadata = record["metadata"]
    flow.source = (str(weights), digest)
    return flow


def _kind(record: dict[str, Any]) -> str:
    layers = record.get("layers")
    return "" if layers is None else str(layers.get("kind", "stochastic"))


def _plain(
    prior: Prior, field: Any, record: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> EquivariantFlow:
    return EquivariantFlow(
        prior,
        field,
        grid=tuple(record["grid"]),
        inverse_corrections=record.get("inverse_corrections", 0),
        chunk_size=record["chunk_size"],
    )


def _relaxed(
    prior: Prior, field: Any, record: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> RelaxedFlow:
    flow = _plain(prior, field, record, tensors)
    return RelaxedFlow.from_layers(flow, record["layers"], tensors)


def _annealed(
    prior: Prior, field: Any, record: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> AnnealedPath:
    flow = _plain(prior, field, record, tensors)
    return AnnealedPath.from_layers(flow, record["layers"], tensors)


def _stochastic(
    prior: Any, field: Any, record: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> StochasticFlow:
    return StochasticFlow.from_layers(prior, field, record)


#: Classes of flows by the kind of their layers; files of stochastic flows name none.
_MAKERS: dict[str, Any] = {
    "": _plain,
    "annealed": _annealed,
    "relaxed": _relaxed,
    "stochastic": _stochastic,
}
