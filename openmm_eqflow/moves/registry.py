r"""What the openmmtools moves share within a process: loaded flows, targets, random streams.

openmmtools deep-copies moves freely (some containers through ``__getstate__``), stores them every
iteration and rebuilds them in a fresh process. A move therefore holds only numbers; what is large
or must not be duplicated lives in registries of the process:

* flows by the SHA-256 of their content, so weights are neither copied nor stored;
* targets by the System, so energies are set up once;
* streams of random numbers and pending proposals by (flow, seed). All copies of a move draw from
  one stream: two copies with a stream each would use the same proposals twice, in different
  replicas, and replicas would no longer be independent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from pathlib import Path

import mpiplus  # type: ignore[import-untyped]
import numpy as np
import openmm
import torch
from openmmtools.states import ThermodynamicState
from torch import Tensor

from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.steps import ProposalBuffer, StateMemory
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "FlowStream",
    "register_flow",
    "restore_flow",
    "stream_for",
    "target_for",
]

_FLOWS: dict[str, FlowPath] = {}
_FINGERPRINTS: dict[str, tuple[tuple[str, int, int], ...]] = {}
_STREAMS: dict[tuple[str, int], FlowStream] = {}
_TARGETS: dict[Hashable, list[BoltzmannTarget]] = {}


def _fingerprint(path: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and modification times of a flow's files: cheap enough for every copy."""
    stem = Path(path)
    files = sorted(stem.parent.glob(f"{stem.stem}.*")) if stem.parent.is_dir() else []
    return tuple((f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files if f.is_file())


def _identity(flow: FlowPath, weights_sha256: str) -> str:
    """SHA-256 of everything log q depends on: weights, prior, field and time grid.

    The weights' own hash is in the JSON file, which also holds the grid; hashing the content
    rather than that file lets its metadata be edited without breaking stored runs.
    """
    content = [
        weights_sha256,
        type(flow.prior).__name__,
        flow.prior.state()[0],
        type(flow.maps.vector_field).__name__,
        flow.maps.vector_field.config,
        list(flow.maps.grid),
    ]
    layers, _ = flow.stored_layers()
    if layers is not None:
        content.append(layers)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def register_flow(flow: FlowPath) -> tuple[FlowPath, str, str]:
    """Return the process's copy of a saved flow, its path and its identity."""
    if flow.source is None:
        raise ConfigurationError(
            "the flow is not on disk; a move stores only its path and hash, so call "
            "save_flow(flow, path) first"
        )
    path, sha256 = str(Path(flow.source[0]).absolute()), _identity(flow, flow.source[1])
    _FLOWS.setdefault(sha256, flow)
    _FINGERPRINTS[path] = _fingerprint(path)
    return _FLOWS[sha256], path, sha256


def restore_flow(path: str, sha256: str) -> FlowPath:
    """Find the flow of a stored move; verified against its hash unless its files are untouched.

    Raises
    ------
    CheckpointError
        The files are missing or altered.
    """
    known, now = _FLOWS.get(sha256), _fingerprint(path)
    if known is not None and (not now or now == _FINGERPRINTS.get(path)):
        return known
    if not now:
        raise CheckpointError(
            f"the flow {path} of a stored move is missing; put it back, or load a copy with the "
            f"SHA-256 {sha256[:12]}... into a FlowMove before resuming"
        )
    flow = load_flow(path)
    weights_sha256 = "" if flow.source is None else flow.source[1]
    found = _identity(flow, weights_sha256)
    if found != sha256:
        raise CheckpointError(
            f"the flow {path} was altered: its SHA-256 is {found[:12]}..., the stored move was "
            f"made with {sha256[:12]}...; put the original files back"
        )
    return register_flow(flow)[0]


def _system_key(state: ThermodynamicState) -> Hashable:
    """Identify the potential of a state without building its System (1.5 ms), if possible.

    openmmtools' own context cache uses the same hash. States with further parameters
    (alchemical and other compound states) change the energy without changing it.
    """
    if type(state) is ThermodynamicState and state.pressure is None:
        return int(state._standard_system_hash)
    xml = openmm.XmlSerializer.serialize(state.get_system(remove_thermostat=True))
    return hashlib.sha256(xml.encode()).hexdigest()


def target_for(state: ThermodynamicState, x: Tensor) -> tuple[BoltzmannTarget, int]:
    """Find the target of a thermodynamic state in the chirality sector of ``x`` (N, D).

    Built once per System and sector; returned at the state's temperature, with an identity that
    does not depend on the temperature.

    Raises
    ------
    UnsupportedSystemError
        The System has no density on the mean-free subspace (barostat, constraints, ...).
    """
    targets = _TARGETS.setdefault((_system_key(state), x.shape[1]), [])
    found = next((t for t in targets if bool(t.in_sector(x[None])[0])), None)
    if found is None:
        found = BoltzmannTarget(
            targets[0].system if targets else state.get_system(remove_thermostat=True),
            None,
            state.temperature,
            x.numpy(),
            n_dims=x.shape[1],
            evaluator=targets[0].evaluator if targets else "auto",
        )
        targets.append(found)
    return found.at_temperature(state.temperature), id(found)


class FlowStream:
    """Random numbers, pending proposals and known states, shared by all copies of a move.

    Parameters
    ----------
    seed
        Seed of the move.
    n_consumed
        Steps already taken from this stream in an earlier process. It enters the seed, so a
        resumed run never sees an earlier part of its own stream again.
    """

    def __init__(self, seed: int, n_consumed: int) -> None:
        self.seed = seed
        self.begin_after(n_consumed)

    def begin_after(self, n_consumed: int) -> None:
        """Start a stream of its own for the steps after ``n_consumed``; forget pending draws."""
        self.n_consumed = n_consumed
        communicator = mpiplus.get_mpicomm()
        rank = 0 if communicator is None else int(communicator.rank)
        entropy = np.random.SeedSequence([self.seed, n_consumed, rank])
        self.generator = torch.Generator().manual_seed(
            int(entropy.generate_state(1, np.uint64)[0])
        )
        self.buffers: dict[Hashable, ProposalBuffer] = {}
        self.memories: dict[Hashable, StateMemory] = {}


def stream_for(sha256: str, seed: int, n_consumed: int) -> FlowStream:
    """Find the stream of a flow and seed, at least ``n_consumed`` steps after its beginning.

    A script that resumes a run may have built a move with the same flow and seed before the stored
    one is read: the stream then exists, at its beginning, and would repeat the draws of the first
    part of the run. It goes on after the stored number of steps instead. A copy made in this
    process never has more steps than the stream it shares.
    """
    stream = _STREAMS.setdefault((sha256, seed), FlowStream(seed, n_consumed))
    if stream.n_consumed < n_consumed:
        stream.begin_after(n_consumed)
    return stream
