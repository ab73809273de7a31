r"""Base of the openmmtools moves: settings, statistics, storage, and what every move keeps.

openmmtools deep-copies moves freely, stores them every iteration and rebuilds them in a fresh
process, so a move holds only numbers; see :mod:`openmm_eqflow.flow_registry` for the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from openmmtools.cache import ContextCache
from openmmtools.mcmc import MCMCMove
from openmmtools.states import SamplerState, ThermodynamicState
from torch import Tensor

from openmm_eqflow.audit import require_passed_audit
from openmm_eqflow.checkpoint import load_flow
from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.flow_registry import (
    register_flow,
    restore_flow,
    stream_for,
    target_for,
)
from openmm_eqflow.target import BoltzmannTarget
from openmm_eqflow.thermo import positions_in_nm, positions_quantity

__all__ = ["FlowMoveBase"]


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
        require_passed_audit(flow)
        self._flow, self._path, self._sha256 = register_flow(flow)
        self._seed = int(np.random.SeedSequence().entropy % 2**53) if seed is None else int(seed)  # type: ignore[operator]
        self._settings = settings
        self._statistics = dict(self._statistics_zero)
        self._stream = stream_for(self._sha256, self._seed, 0)

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
        self._flow = restore_flow(self._path, self._sha256)
        require_passed_audit(self._flow)
        self._seed = int(serialization.get("seed", 0))
        self._settings = {**self._default_settings(), **serialization.get("settings", {})}
        self._statistics = {**self._statistics_zero, **serialization.get("statistics", {})}
        n_consumed = int(serialization.get("n_consumed", 0))
        self._stream = stream_for(self._sha256, self._seed, n_consumed)

    @classmethod
    @abstractmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        """Return the settings for keys a stored move lacks."""

    def __str__(self) -> str:
        """One line with name, flow and settings."""
        return f"{type(self).__name__}({self._path}, {self._settings})"
