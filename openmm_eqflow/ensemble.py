r"""One exact flow step for many independent chains, with proposals drawn in large batches.

``flow_step`` is what ``FlowMove`` does for one chain and what the workflow does for hundreds; it
knows neither OpenMM nor openmmtools.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.metropolis import i_sir

__all__ = [
    "FlowDensity",
    "FlowStepInfo",
    "ProposalBuffer",
    "Proposals",
    "ReducedPotential",
    "StateMemory",
    "StoredProposals",
    "flow_step",
]


class FlowDensity(Protocol):
    """The part of a flow a global move needs; densities as in ``EquivariantFlow``."""

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean-free positions ``(n, N, D)`` and their log q ``(n,)``."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of positions with any centroid, ``(n,)``."""
        ...


class ReducedPotential(Protocol):
    """The part of a target a global move needs."""

    @property
    def kT(self) -> float:
        """Thermal energy in kJ/mol."""
        ...

    def reduced_potential(self, x: Tensor) -> Tensor:
        """u(x) = U(x) / kT, ``(n,)``; +inf for invalid configurations."""
        ...


class Proposals(NamedTuple):
    """Independent draws of the flow: positions (n, N, D), log q (n,) and energies (n,)."""

    positions: Tensor
    log_q: Tensor
    energy: Tensor
    """Potential energy in kJ/mol, so that one draw serves any temperature; +inf if invalid."""


class FlowStepInfo(NamedTuple):
    """What a step did; every tensor but the last two has shape ``(n_chains,)``."""

    accepted: Tensor
    move_probability: Tensor
    n_invalid: Tensor
    effective_proposals: Tensor
    log_weight: Tensor
    """Log weight of the state after the step."""
    log_weight_before: Tensor
    log_weight_proposals: Tensor
    """``(n_chains, n_proposals)``: independent draws, from which log Z follows."""


class ProposalBuffer:
    """Flow samples with log q and energy, drawn in batches and handed out exactly once.

    Parameters
    ----------
    flow, target
        Source of the draws and of their energies.
    n_proposals
        Proposals per chain and step.
    n_predraw
        Smallest batch: drawing hundreds together costs little more than drawing a few.
    generator
        Own random stream of the buffer.

    Attributes
    ----------
    n_drawn, n_used, n_invalid
        Counts since the start.
    """

    def __init__(
        self,
        flow: FlowDensity,
        target: ReducedPotential,
        *,
        n_proposals: int = 8,
        n_predraw: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        if n_proposals < 1 or n_predraw < 1:
            raise ValueError(
                f"n_proposals = {n_proposals} and n_predraw = {n_predraw}; both must be at least 1"
            )
        self.flow = flow
        self.target = target
        self.n_proposals = n_proposals
        self.n_predraw = n_predraw
        self.generator = generator
        self.n_drawn = 0
        self.n_used = 0
        self.n_invalid = 0
        self._pending: Proposals | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ProposalBuffer:
        # A copy with its own pending draws would use every one of them a second time.
        return self

    def take(self, n: int) -> Proposals:
        """Hand out the next ``n`` draws, drawing a batch first if too few are left."""
        n_left = 0 if self._pending is None else self._pending.log_q.shape[0]
        if self._pending is None or n_left < n:
            fresh = draw_proposals(
                self.flow, self.target, max(self.n_predraw, n - n_left), self.generator
            )
            self.n_drawn += fresh.log_q.shape[0]
            self.n_invalid += int((~torch.isfinite(fresh.energy + fresh.log_q)).sum())
            self._pending = fresh if self._pending is None else _joined(self._pending, fresh)
        pending = self._pending
        self._pending = Proposals(*(values[n:] for values in pending))
        self.n_used += n
        return Proposals(*(values[:n] for values in pending))

    def discard(self) -> None:
        """Forget the draws that were not handed out."""
        self._pending = None


class StoredProposals(ProposalBuffer):
    """Independent draws made earlier (by an evaluation, say), each handed out once, in order."""

    def __init__(self, proposals: Proposals, *, n_proposals: int) -> None:
        self.proposals, self.n_proposals = proposals, n_proposals
        self.n_used = 0

    @property
    def n_left(self) -> int:
        """Draws not handed out yet."""
        return int(self.proposals.log_q.shape[0]) - self.n_used

    def skip(self, n: int) -> None:
        """Count ``n`` draws as used (they were, before a restart)."""
        self.n_used += min(n, self.n_left)

    def take(self, n: int) -> Proposals:
        """Hand out the next ``n`` draws."""
        if n > self.n_left:
            raise ValueError(f"{n} draws wanted, {self.n_left} left; check n_left first")
        rows = slice(self.n_used, self.n_used + n)
        self.n_used += n
        return Proposals(*(values[rows] for values in self.proposals))


def _joined(first: Proposals, second: Proposals) -> Proposals:
    return Proposals(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def draw_proposals(
    flow: FlowDensity,
    target: ReducedPotential,
    n: int,
    generator: torch.Generator | None = None,
) -> Proposals:
    """Draw ``n`` independent proposals and evaluate their energies together."""
    positions, log_q = flow.sample_and_log_prob(n, generator=generator)
    return Proposals(positions, log_q, target.reduced_potential(positions) * target.kT)


class StateMemory:
    """Log q and energy of recent chain states, looked up by their exact positions.

    A state that did not move since the last step (a rejection, or a pure flow chain) need not be
    integrated backwards again. The key is every bit of the positions, so a state changed by a
    local move, a swap or a restart is never confused with another.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._known: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    @staticmethod
    def _key(positions: Tensor) -> bytes:
        return positions.detach().cpu().contiguous().numpy().tobytes()

    def get(self, positions: Tensor) -> tuple[float, float] | None:
        """``(log_q, energy)`` of one configuration (N, D), or None."""
        return self._known.get(self._key(positions))

    def put(self, positions: Tensor, log_q: float, energy: float) -> None:
        """Remember one configuration; the oldest is forgotten beyond ``capacity``."""
        self._known[self._key(positions)] = (log_q, energy)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)


def _current_log_q_and_energy(
    flow: FlowDensity, target: ReducedPotential, positions: Tensor, memory: StateMemory | None
) -> tuple[Tensor, Tensor]:
    n_chains = positions.shape[0]
    log_q = torch.full((n_chains,), torch.nan, dtype=torch.float64)
    energy = torch.full((n_chains,), torch.nan, dtype=torch.float64)
    unknown = []
    for i in range(n_chains):
        known = None if memory is None else memory.get(positions[i])
        if known is None:
            unknown.append(i)
        else:
            log_q[i], energy[i] = known
    if unknown:
        x = positions[unknown]
        log_q[unknown] = flow.log_prob(x).to("cpu", torch.float64)
        energy[unknown] = target.reduced_potential(x).to("cpu", torch.float64) * target.kT
    return log_q, energy


def flow_step(
    flow: FlowDensity,
    target: ReducedPotential,
    positions: Tensor,
    proposals: ProposalBuffer | int,
    generator: torch.Generator | None = None,
    *,
    memory: StateMemory | None = None,
) -> tuple[Tensor, FlowStepInfo]:
    r"""Offer every chain fresh flow samples; exact for :math:`e^{-u}` whatever the flow.

    Each of M chains chooses among its state and its own K draws by multiple-try Metropolis
    (:func:`~openmm_eqflow.metropolis.multiple_try_probabilities`; K = 1 is plain Metropolis). A
    chosen draw is placed at the centroid of the state it replaces, because the densities live on
    the mean-free subspace; a state that stays is returned bit for bit.

    Parameters
    ----------
    flow, target
        Proposal density and target, for the same particles.
    positions
        ``(n_chains, n_particles, n_dims)`` in nm, float64, any centroid.
    proposals
        A buffer of pre-drawn proposals, or a number K of proposals to draw now per chain.
    generator
        Source of the choices (and of the draws, if ``proposals`` is a number).
    memory
        Optional memory of log q of states that did not move.

    Returns
    -------
    (Tensor, FlowStepInfo)
        New positions, same shape, and what happened.
    """
    n_chains = positions.shape[0]
    positions = positions.to("cpu", torch.float64)
    if isinstance(proposals, int):
        k = proposals
        drawn = draw_proposals(flow, target, n_chains * k, generator)
    else:
        k = proposals.n_proposals
        drawn = proposals.take(n_chains * k)
    drawn = Proposals(*(values.to("cpu", torch.float64) for values in drawn))
    log_q, energy = _current_log_q_and_energy(flow, target, positions, memory)
    log_w_current = -energy / target.kT - log_q
    log_w_proposals = (-drawn.energy / target.kT - drawn.log_q).reshape(n_chains, k)
    index, info = i_sir(log_w_current, log_w_proposals, generator, metropolized=True)

    rows = torch.arange(n_chains) * k + (index - 1).clamp_min(0)
    accepted = info.accepted
    centroid = positions.mean(dim=-2, keepdim=True)
    chosen = drawn.positions[rows] + centroid
    new_positions = torch.where(accepted[:, None, None], chosen, positions)
    new_log_q = torch.where(accepted, drawn.log_q[rows], log_q)
    new_energy = torch.where(accepted, drawn.energy[rows], energy)
    if memory is not None:
        for i in range(n_chains):
            memory.put(new_positions[i], float(new_log_q[i]), float(new_energy[i]))
    return new_positions, FlowStepInfo(
        accepted=accepted,
        move_probability=info.move_probability,
        n_invalid=info.n_invalid,
        effective_proposals=info.effective_proposals,
        log_weight=-new_energy / target.kT - new_log_q,
        log_weight_before=log_w_current,
        log_weight_proposals=log_w_proposals,
    )
