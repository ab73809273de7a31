r"""What the openmmtools moves share: loaded flows, targets, random streams, storage, statistics.

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
from abc import abstractmethod
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar, Self

import mpiplus
import numpy as np
import openmm
import torch
from openmmtools.cache import ContextCache
from openmmtools.mcmc import MCMCMove
from openmmtools.states import SamplerState, ThermodynamicState
from torch import Tensor

from openmm_eqflow.checkpoint import load_flow
from openmm_eqflow.ensemble import ProposalBuffer, StateMemory
from openmm_eqflow.errors import AuditError, CheckpointError, ConfigurationError
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.target import BoltzmannTarget
from openmm_eqflow.thermo import positions_in_nm, positions_quantity

__all__ = ["FlowMoveBase", "FlowStream", "check_usable", "target_for"]

_FLOWS: dict[str, EquivariantFlow] = {}
_FINGERPRINTS: dict[str, tuple[tuple[str, int, int], ...]] = {}
_STREAMS: dict[tuple[str, int], FlowStream] = {}
_TARGETS: dict[Hashable, list[BoltzmannTarget]] = {}


def check_usable(flow: EquivariantFlow) -> None:
    """Refuse a flow whose log q may not enter an acceptance ratio.

    Raises
    ------
    AuditError
        Estimated divergence, no audit, or a failed one.
    """
    if not flow.vector_field.exact_divergence:
        raise AuditError(
            f"{type(flow.vector_field).__name__} estimates its divergence, which biases every "
            "acceptance; use a field with exact_divergence = True"
        )
    report = flow.audit_report
    if report is None:
        raise AuditError(
            "the flow was never audited, so the accuracy of its log q is unknown; run the audit "
            "and save the flow again"
        )
    if not report.get("passed", False):
        raise AuditError(
            f"the flow failed its audit ({report}); use more ODE steps or float64 weights, audit "
            "and save it again"
        )


def _fingerprint(path: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and modification times of a flow's files: cheap enough for every copy."""
    stem = Path(path)
    files = sorted(stem.parent.glob(f"{stem.stem}.*")) if stem.parent.is_dir() else []
    return tuple((f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files if f.is_file())


def _identity(flow: EquivariantFlow, weights_sha256: str) -> str:
    """SHA-256 of everything log q depends on: weights, prior, field and time grid.

    The weights' own hash is in the JSON file, which also holds the grid; hashing the content
    rather than that file lets its metadata be edited without breaking stored runs.
    """
    content = [
        weights_sha256,
        type(flow.prior).__name__,
        flow.prior.state()[0],
        type(flow.vector_field).__name__,
        flow.vector_field.config,
        list(flow.grid),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _register(flow: EquivariantFlow) -> tuple[str, str]:
    if flow.source is None:
        raise ConfigurationError(
            "the flow is not on disk; a move stores only its path and hash, so call "
            "save_flow(flow, path) first"
        )
    path, sha256 = str(Path(flow.source[0]).absolute()), _identity(flow, flow.source[1])
    _FLOWS.setdefault(sha256, flow)
    _FINGERPRINTS[path] = _fingerprint(path)
    return path, sha256


def _restore_flow(path: str, sha256: str) -> EquivariantFlow:
    """Flow of a stored move, verified against its hash unless its files are untouched."""
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
    _register(flow)
    return _FLOWS[sha256]


def _system_key(state: ThermodynamicState) -> Hashable:
    """Identify the potential of a state without building its System (1.5 ms), if possible.

    openmmtools' own context cache uses the same hash. States with further parameters
    (alchemical and other compound states) change the energy without changing it.
    """
    if type(state) is ThermodynamicState and state.pressure is None:
        return state._standard_system_hash
    xml = openmm.XmlSerializer.serialize(state.get_system(remove_thermostat=True))
    return hashlib.sha256(xml.encode()).hexdigest()


def target_for(state: ThermodynamicState, x: Tensor) -> tuple[BoltzmannTarget, int]:
    """Target of a thermodynamic state in the chirality sector of ``x`` (N, D).

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
        self.n_consumed = n_consumed
        communicator = mpiplus.get_mpicomm()
        rank = 0 if communicator is None else int(communicator.rank)
        entropy = np.random.SeedSequence([seed, n_consumed, rank])
        self.generator = torch.Generator().manual_seed(
            int(entropy.generate_state(1, np.uint64)[0])
        )
        self.buffers: dict[Hashable, ProposalBuffer] = {}
        self.memories: dict[Hashable, StateMemory] = {}


class FlowMoveBase(MCMCMove):
    """A Monte Carlo move of an openmmtools sampler that proposes with a flow.

    Subclasses declare their settings and statistics and implement ``_propose``.

    Parameters
    ----------
    flow
        A saved and audited flow, or its path.
    seed
        Seed of the move's own random stream; None draws one. Moves that run side by side need
        different seeds, or be copies of one move.
    settings
        Numbers that define the move; stored with it.
    """

    _statistics_zero: ClassVar[dict[str, int | float]] = {
        "n_proposed": 0,
        "n_accepted": 0,
        "n_invalid": 0,
    }

    def __init__(
        self, flow: EquivariantFlow | str | Path, seed: int | None, **settings: int | float | str
    ) -> None:
        super().__init__()
        if not isinstance(flow, EquivariantFlow):
            flow = load_flow(flow)
        check_usable(flow)
        self._path, self._sha256 = _register(flow)
        self._flow = _FLOWS[self._sha256]
        self._seed = int(np.random.SeedSequence().entropy % 2**53) if seed is None else int(seed)  # type: ignore[operator]
        self._settings = settings
        self._statistics = dict(self._statistics_zero)
        self._stream = self._attach(0)

    def _attach(self, n_consumed: int) -> FlowStream:
        key = (self._sha256, self._seed)
        if key not in _STREAMS:
            _STREAMS[key] = FlowStream(self._seed, n_consumed)
        return _STREAMS[key]

    @property
    def flow(self) -> EquivariantFlow:
        """The flow; shared, not a copy."""
        return self._flow

    @property
    def statistics(self) -> dict[str, int | float]:
        """Counts and sums since the start, plain numbers; see the class docstring."""
        return dict(self._statistics)

    @statistics.setter
    def statistics(self, value: dict[str, int | float]) -> None:
        self._statistics = {**self._statistics_zero, **value}

    def reset_statistics(self) -> None:
        """Forget all counts."""
        self._statistics = dict(self._statistics_zero)

    def apply(
        self,
        thermodynamic_state: ThermodynamicState,
        sampler_state: SamplerState,
        context_cache: ContextCache | None = None,
    ) -> None:
        """Make one move: positions change or stay bit for bit; velocities always stay.

        Parameters
        ----------
        thermodynamic_state
            Any state of a supported System; its own temperature enters the weights.
        sampler_state
            Changed in place.
        context_cache
            Not used: energies come from the package's own evaluators.

        Raises
        ------
        UnsupportedSystemError, ConfigurationError
            The System is not supported, or is not the flow's size.
        """
        positions = positions_in_nm(sampler_state.positions)
        n, d = self._flow.n_particles, self._flow.n_dims
        if positions.shape[0] != n:
            raise ConfigurationError(
                f"the sampler state has {positions.shape[0]} particles, the flow {self._path} has "
                f"{n}; load the flow of this system"
            )
        x = torch.from_numpy(positions[:, :d].copy())
        target, identity = target_for(thermodynamic_state, x)
        new = self._propose(x[None], target, identity)
        self._stream.n_consumed += 1
        if new is not None:
            moved = positions.copy()
            moved[:, :d] = new[0].numpy()
            sampler_state.positions = positions_quantity(moved)

    @abstractmethod
    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        """Return new positions (1, N, D), or None if the state stays; count statistics."""

    def _count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._statistics[name] += amount

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy settings and statistics; share flow and stream."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._settings = dict(self._settings)
        other._statistics = dict(self._statistics)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Path, hash and numbers: YAML-safe and small, because it is written every iteration."""
        return {
            "flow_path": self._path,
            "flow_sha256": self._sha256,
            "seed": self._seed,
            "n_consumed": self._stream.n_consumed,
            "settings": dict(self._settings),
            "statistics": dict(self._statistics),
        }

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        """Rebuild from :meth:`__getstate__`.

        Raises
        ------
        CheckpointError
            The flow's file is missing, altered or not named.
        """
        path, sha256 = serialization.get("flow_path"), serialization.get("flow_sha256")
        if not path or not sha256:
            raise CheckpointError(
                "a stored move names no flow (flow_path, flow_sha256); it was not written by "
                f"{type(self).__name__}"
            )
        self._path, self._sha256 = str(path), str(sha256)
        self._flow = _restore_flow(self._path, self._sha256)
        check_usable(self._flow)
        self._seed = int(serialization.get("seed", 0))
        self._settings = {**self._default_settings(), **serialization.get("settings", {})}
        self._statistics = {**self._statistics_zero, **serialization.get("statistics", {})}
        self._stream = self._attach(int(serialization.get("n_consumed", 0)))

    @classmethod
    @abstractmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        """Return the settings for keys a stored move lacks."""

    def __str__(self) -> str:
        """One line with name, flow and settings."""
        return f"{type(self).__name__}({self._path}, {self._settings})"
