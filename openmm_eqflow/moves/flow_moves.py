r"""Moves for openmmtools that propose with a flow and accept exactly.

Base of the openmmtools moves: settings, statistics, storage, and what every move keeps.

openmmtools deep-copies moves freely, stores them every iteration and rebuilds them in a fresh
process, so a move holds only numbers; see :mod:`openmm_eqflow.moves.registry` for the rest.

Moves for when global proposals are refused too often: latent steps and annealed proposals.

FlowMove: global moves of an openmmtools sampler, proposed by a flow and exactly accepted.

>>> from openmm_eqflow import FlowMove, load_flow                              # doctest: +SKIP
>>> from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove            # doctest: +SKIP
>>> move = SequenceMove([LangevinDynamicsMove(), FlowMove(load_flow("flow"))]) # doctest: +SKIP

Training on the samples of a chain must stop before production: a proposal that depends on the
chain's past loses detailed balance.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from openmm import unit
from openmmtools.cache import ContextCache
from openmmtools.mcmc import MCMCMove
from openmmtools.states import SamplerState, ThermodynamicState
from torch import Tensor

from openmm_eqflow.analysis.weights import Estimate
from openmm_eqflow.errors import CheckpointError, ConfigurationError
from openmm_eqflow.flows.audit import require_passed_audit
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.registry import register_flow, restore_flow, stream_for, target_for
from openmm_eqflow.moves.steps import (
    FlowStepInfo,
    KernelKind,
    LatentFlow,
    LatentKernel,
    ProposalBuffer,
    StateMemory,
    annealed_step,
    flow_step,
    latent_step,
)
from openmm_eqflow.priors.base import check_space
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import positions_in_nm, positions_quantity

__all__ = [
    "AnnealedMove",
    "FlowMove",
    "FlowMoveBase",
    "LatentMove",
]


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
        self, flow: FlowPath | str | Path, seed: int | None, **settings: int | float | str
    ) -> None:
        super().__init__()
        found = flow if isinstance(flow, FlowPath) else load_flow(flow)
        require_passed_audit(found)
        self._flow, self._path, self._sha256 = register_flow(found)
        self._seed = int(np.random.SeedSequence().entropy % 2**53) if seed is None else int(seed)  # type: ignore[operator]
        self._settings = settings
        self._statistics = dict(self._statistics_zero)
        self._stream = stream_for(self._sha256, self._seed, 0)

    @property
    def flow(self) -> FlowPath:
        """The flow; shared, not a copy."""
        return self._flow

    @property
    def statistics(self) -> dict[str, int | float]:
        """Counts and sums since the start, plain numbers; see the class docstring."""
        return dict(self._statistics)

    @statistics.setter
    def statistics(self, value: dict[str, int | float]) -> None:
        self._statistics = {**self._statistics_zero, **value}

    @property
    def n_proposed(self) -> int:
        """Moves (steps of a :class:`LatentMove`) proposed; openmmtools' own moves have both."""
        return int(self._statistics["n_proposed"])

    @property
    def n_accepted(self) -> int:
        """Of these accepted."""
        return int(self._statistics["n_accepted"])

    def reset_statistics(self) -> None:
        """Forget all counts."""
        self._statistics = dict(self._statistics_zero)

    def apply(
        self,
        thermodynamic_state: ThermodynamicState,
        sampler_state: SamplerState,
        context_cache: ContextCache | None = None,
    ) -> None:
        """Make one move: positions change or stay bit for bit.

        Velocities stay; with constraints, which bind them to the positions, they are drawn anew
        when the positions change.

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
        check_space(self._flow.prior, target)
        new = self._propose(x[None], target, identity)
        self._stream.n_consumed += 1
        if new is not None:
            moved = positions.copy()
            moved[:, :d] = new[0].numpy()
            sampler_state.positions = positions_quantity(moved)
            if target.constraints is not None and sampler_state.velocities is not None:
                velocities = target.constraints.velocities(
                    moved, target.kT, self._stream.generator
                )
                sampler_state.velocities = velocities * unit.nanometer / unit.picosecond

    @abstractmethod
    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        """Return new positions (1, N, D), or None if the state stays; count statistics."""

    def _n_applied(self) -> int:
        """Count the moves made since the statistics began, in all processes."""
        return int(self._statistics["n_proposed"])

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
            # Under MPI other processes take steps too: the statistics, which openmmtools gathers,
            # know of them, this process's stream does not.
            "n_consumed": max(self._stream.n_consumed, self._n_applied()),
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


class LatentMove(FlowMoveBase):
    r"""Walk in the flow's latent space: local in z, often far in x, exactly accepted.

    See :func:`~openmm_eqflow.moves.steps.latent_step`. The centroid, the velocities and the
    chirality
    are kept, the orientation as far as the shapes allow.

    Parameters
    ----------
    flow, seed
        As for :class:`~openmm_eqflow.moves.flow_moves.FlowMove`.
    step
        Size of a latent step, in (0, 1]: 1 draws the Gaussian coordinates afresh.
    n_repeats
        Steps per move; the inverse flow is paid once.
    kernel
        ``"pcn"``, or ``"langevin"``, which follows the gradient at a higher cost per step.

    Attributes
    ----------
    statistics
        ``n_proposed`` and ``n_accepted`` latent steps; ``n_invalid`` of zero weight.
    """

    def __init__(
        self,
        flow: FlowPath | str | Path,
        step: float = 0.3,
        n_repeats: int = 4,
        kernel: KernelKind = "pcn",
        seed: int | None = None,
    ) -> None:
        if n_repeats < 1:
            raise ValueError(f"n_repeats is {n_repeats}; expected at least 1")
        super().__init__(flow, seed, step=float(step), n_repeats=int(n_repeats), kernel=kernel)

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"step": 0.3, "n_repeats": 4, "kernel": "pcn"}

    def _n_applied(self) -> int:
        return int(self._statistics["n_proposed"]) // int(self._settings["n_repeats"])

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        n_repeats = int(self._settings["n_repeats"])
        kernel = _kernel(self, target)
        new, info = latent_step(kernel, x, n_repeats, self._stream.generator)
        n_accepted = int(info.n_accepted[0])
        self._count(n_proposed=n_repeats, n_accepted=n_accepted, n_invalid=int(info.n_invalid[0]))
        return new if n_accepted else None


class AnnealedMove(FlowMoveBase):
    r"""Offer the ends of short annealed paths from the flow to the target.

    See :func:`~openmm_eqflow.moves.steps.annealed_step`: a path of T latent steps at rising
    :math:`\beta` carries the weight of annealed importance sampling, the current state gets a
    reversed path, and the choice is exact on the space of paths. Worth its T + 1 flow and energy
    evaluations where the weights of plain proposals spread over many kT.

    Parameters
    ----------
    flow, seed
        As for :class:`~openmm_eqflow.moves.flow_moves.FlowMove`.
    n_proposals, n_bridge
        Paths offered per move, and steps T of each.
    step, kernel
        As for :class:`LatentMove`.

    Attributes
    ----------
    statistics
        ``n_proposed`` moves, ``n_accepted`` of them; ``n_draws`` paths, ``n_invalid`` of zero
        weight; ``effective_proposals`` and ``bridge_acceptance``, means over the moves.
    """

    _statistics_zero: ClassVar[dict[str, int | float]] = {
        "n_proposed": 0,
        "n_accepted": 0,
        "n_draws": 0,
        "n_invalid": 0,
        "effective_proposals": 0.0,
        "bridge_acceptance": 0.0,
    }

    def __init__(
        self,
        flow: FlowPath | str | Path,
        n_proposals: int = 8,
        n_bridge: int = 4,
        step: float = 0.3,
        kernel: KernelKind = "pcn",
        seed: int | None = None,
    ) -> None:
        if n_proposals < 1 or n_bridge < 0:
            raise ValueError(
                f"n_proposals = {n_proposals}, n_bridge = {n_bridge}; expected at least 1 and 0"
            )
        super().__init__(
            flow,
            seed,
            n_proposals=int(n_proposals),
            n_bridge=int(n_bridge),
            step=float(step),
            kernel=kernel,
        )

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"n_proposals": 8, "n_bridge": 4, "step": 0.3, "kernel": "pcn"}

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        n_proposals, n_bridge = (int(self._settings[k]) for k in ("n_proposals", "n_bridge"))
        kernel = _kernel(self, target)
        new, info = annealed_step(kernel, x, n_proposals, n_bridge, self._stream.generator)
        s, n = self._statistics, self._statistics["n_proposed"] + 1
        for name, value in (
            ("effective_proposals", info.effective_proposals),
            ("bridge_acceptance", info.bridge_acceptance),
        ):
            s[name] += (float(value[0]) - s[name]) / n
        accepted = bool(info.accepted[0])
        self._count(
            n_proposed=1,
            n_accepted=int(accepted),
            n_draws=n_proposals,
            n_invalid=int(info.n_invalid[0]),
        )
        return new if accepted else None


def _kernel(move: FlowMoveBase, target: BoltzmannTarget) -> LatentKernel:
    settings = move._settings
    kind = cast(KernelKind, settings["kernel"])
    return LatentKernel(cast(LatentFlow, move.flow), target, float(settings["step"]), kind)


class FlowMove(FlowMoveBase):
    r"""Replace the configuration by one of several flow samples, exactly.

    .. math:: \log w(x) = -u(x) - \log q(x), \quad u = U / RT \text{ at the state's temperature};

    the choice among the current state and K fresh samples is the multiple-try Metropolised
    independence sampler (:func:`~openmm_eqflow.moves.metropolis.multiple_try_probabilities`),
    which
    leaves :math:`e^{-u}` invariant whatever the flow; K = 1 is plain Metropolis. Samples are
    drawn and evaluated ``n_predraw`` at a time and each is used once. The centroid and the
    velocities are kept (momenta are independent of positions), and so is the chirality of the
    current state: mirror images have zero weight. For a planar flow z stays as it is.

    Parameters
    ----------
    flow
        A saved and audited :class:`~openmm_eqflow.flows.path.Path`, or the path of one.
    n_proposals
        K, samples offered per move.
    n_predraw
        Samples drawn together.
    seed
        Seed of the move's own random stream; None draws one.

    Raises
    ------
    AuditError
        The flow's log q is estimated or was not found accurate.
    ConfigurationError
        The flow is not on disk.

    Attributes
    ----------
    statistics
        ``n_proposed`` moves tried, ``n_accepted`` of them accepted; ``n_draws`` samples offered,
        ``n_invalid`` of them of zero weight (failed energy, wrong chirality, outside the chart);
        ``mean_log_weight`` of the valid ones; ``effective_proposals``, the mean Kish count among
        the K of a move; ``log_weight_scale``, ``sum_weight`` and ``sum_square_weight``, the sums
        of :math:`w e^{-c}` and its square with c the scale, for :meth:`log_z`.
    """

    _statistics_zero: ClassVar[dict[str, int | float]] = {
        "n_proposed": 0,
        "n_accepted": 0,
        "n_draws": 0,
        "n_invalid": 0,
        "mean_log_weight": 0.0,
        "effective_proposals": 0.0,
        "log_weight_scale": 0.0,
        "sum_weight": 0.0,
        "sum_square_weight": 0.0,
    }

    def __init__(
        self,
        flow: FlowPath | str | Path,
        n_proposals: int = 8,
        n_predraw: int = 512,
        seed: int | None = None,
    ) -> None:
        if n_proposals < 1 or n_predraw < 1:
            raise ValueError(
                f"n_proposals = {n_proposals} and n_predraw = {n_predraw}; both must be at least 1"
            )
        super().__init__(flow, seed, n_proposals=int(n_proposals), n_predraw=int(n_predraw))

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"n_proposals": 8, "n_predraw": 512}

    @property
    def n_proposals(self) -> int:
        """Samples offered per move."""
        return int(self._settings["n_proposals"])

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        stream, n_predraw = self._stream, int(self._settings["n_predraw"])
        key = (identity, self.n_proposals, n_predraw)
        if key not in stream.buffers:
            stream.buffers[key] = ProposalBuffer(
                self._flow,
                target,
                n_proposals=self.n_proposals,
                n_predraw=n_predraw,
                generator=stream.generator,
            )
        memory = stream.memories.setdefault(identity, StateMemory())
        new, info = flow_step(
            self._flow, target, x, stream.buffers[key], stream.generator, memory=memory
        )
        self._record(info)
        return new if bool(info.accepted[0]) else None

    def _record(self, info: FlowStepInfo) -> None:
        s = self._statistics
        log_w = info.log_weight_proposals[0]
        valid = log_w[torch.isfinite(log_w)]
        n_valid = int(s["n_draws"] - s["n_invalid"])
        if valid.numel():
            total = n_valid + valid.numel()
            change = float(valid.sum()) - valid.numel() * s["mean_log_weight"]
            s["mean_log_weight"] += change / total
            top = float(valid.max())
            if n_valid == 0 or top > s["log_weight_scale"]:
                factor = math.exp(s["log_weight_scale"] - top) if n_valid else 0.0
                s["sum_weight"] *= factor
                s["sum_square_weight"] *= factor**2
                s["log_weight_scale"] = top
            w = torch.exp(valid - s["log_weight_scale"])
            s["sum_weight"] += float(w.sum())
            s["sum_square_weight"] += float(w.square().sum())
        effective = float(info.effective_proposals[0])
        s["effective_proposals"] += (effective - s["effective_proposals"]) / (s["n_proposed"] + 1)
        self._count(
            n_proposed=1,
            n_accepted=int(info.accepted[0]),
            n_draws=log_w.numel(),
            n_invalid=int(info.n_invalid[0]),
        )

    def log_z(self) -> Estimate:
        r"""Log Z of the state this move served, with its error, from the samples it was offered.

        :math:`\hat Z` is the mean weight of all ``n_draws`` samples, which are independent draws
        of the flow; Z is the integral of :math:`e^{-u}` over the mean-free subspace (nm), in the
        chirality sector of the chain. Only for a move that served one thermodynamic state.
        """
        return log_z_from_statistics(self._statistics)


def log_z_from_statistics(statistics: dict[str, int | float]) -> Estimate:
    """Log Z and its delta-method error from the statistics of a ``FlowMove``."""
    n, total = statistics["n_draws"], statistics["sum_weight"]
    if n < 2 or total <= 0.0:
        return Estimate(-math.inf, math.inf)
    inverse_ess = statistics["sum_square_weight"] / total**2
    error = math.sqrt(max(inverse_ess - 1.0 / n, 0.0) * n / (n - 1))
    return Estimate(statistics["log_weight_scale"] + math.log(total / n), error)
