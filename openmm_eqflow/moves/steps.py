r"""Exact steps of many chains at once: flow proposals, latent kernels, annealed paths.

One exact flow step for many independent chains, with proposals drawn in large batches.

``flow_step`` is what ``FlowMove`` does for one chain and what the workflow does for hundreds; it
knows neither OpenMM nor openmmtools.

Markov kernels in the latent space of a flow.

With x = T(z) the target's density in the latent space is

.. math:: \pi(z) \propto p_0(z)\, w(z), \qquad w(z) = e^{-u(T(z))} / q(T(z)),

the prior times the importance weight: a good flow makes w flat, so steps that would be refused in
Cartesian coordinates are accepted here. Between prior and target lie

.. math:: \gamma_\beta(z) = p_0(z)\, w(z)^\beta, \qquad 0 \le \beta \le 1.

The kernels are preconditioned Crank-Nicolson (Cotter, Roberts, Stuart, White 2013) or Metropolised
Langevin (Roberts, Tweedie 1996) with respect to :math:`\gamma_\beta`.

Exact moves in the latent space of a flow: local steps and annealed proposals.

Local steps walk in the latent space with a :class:`~openmm_eqflow.moves.steps.LatentKernel`;
annealed proposals are annealed importance sampling (Neal 2001) from the flow to the target inside
independence sampling on the space of paths. Both serve many chains at once and know no OpenMM.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import align_rotations, random_rotations, remove_mean, rotate
from openmm_eqflow.moves.metropolis import metropolis_accept, multiple_try
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity

__all__ = [
    "AnnealedStepInfo",
    "FlowDensity",
    "FlowStepInfo",
    "KernelKind",
    "LatentFlow",
    "LatentKernel",
    "LatentState",
    "LatentStepInfo",
    "ProposalBuffer",
    "Proposals",
    "ReducedPotential",
    "StateMemory",
    "StoredProposals",
    "annealed_step",
    "flow_step",
    "latent_step",
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
        key = self._key(positions)
        self._known[key] = (log_q, energy)
        self._known.move_to_end(key)  # a state that stays is not the oldest
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
    (:func:`~openmm_eqflow.moves.metropolis.multiple_try_probabilities`; K = 1 is plain
    Metropolis). A
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
    index, info = multiple_try(log_w_current, log_w_proposals, generator)

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
        log_weight_proposals=log_w_proposals,
    )

KernelKind = Literal["pcn", "langevin"]
_REDRAW_PROBABILITY = 0.25


class LatentFlow(Protocol):
    """The part of a flow a latent move needs."""

    prior: Prior

    def transform(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent points to mean-free positions and log q, differentiable."""
        ...

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to latent points and log q, without gradients."""
        ...


class LatentState(NamedTuple):
    """Points with what the kernels need; the gradients are zero unless the kernel uses them."""

    z: Tensor
    x: Tensor
    log_prior: Tensor
    log_weight: Tensor
    grad_log_prior: Tensor
    grad_log_weight: Tensor

    def where(self, mask: Tensor, other: LatentState) -> LatentState:
        """Rows of ``self`` where ``mask``, else of ``other``."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return LatentState(*(pick(a, b) for a, b in zip(self, other, strict=True)))


class LatentKernel:
    r"""A Markov kernel reversible with respect to :math:`p_0 w^\beta`, for rows of their own beta.

    ``"pcn"`` proposes :math:`z' = \sqrt{1-s^2}\,z + s\,\xi` in the Gaussian coordinates (all of a
    mean-free Gaussian, the whitened residuals of the internal-coordinate prior), which leaves that
    Gaussian invariant, and a symmetric step of s radians in soft torsions or, one time in four, a
    fresh draw of the torsions from the prior, which is how barriers are crossed; any difference
    between the prior and the proposal's own reversible measure enters the acceptance.
    ``"langevin"`` adds half a step
    along the gradient and corrects for the asymmetry; its drift is truncated, which stays exact
    because the drift is a function of the state.

    Parameters
    ----------
    flow, target
        What defines w.
    step
        s, between 0 and 1.
    kind
        ``"pcn"`` or ``"langevin"``.
    """

    def __init__(
        self,
        flow: LatentFlow,
        target: ReducedPotential,
        step: float,
        kind: KernelKind = "pcn",
    ) -> None:
        if not 0.0 < step <= 1.0:
            raise ValueError(f"step is {step}; expected a number above 0 and at most 1")
        if kind not in ("pcn", "langevin"):
            raise ValueError(f"kind is {kind!r}; expected 'pcn' or 'langevin'")
        if not getattr(flow, "has_density", True):
            raise ConfigurationError(
                "a flow with Monte Carlo layers has no latent point: take a flow of maps only for "
                "latent and annealed moves"
            )
        self.flow, self.target, self.step, self.kind = flow, target, float(step), kind
        prior: object = flow.prior
        gaussian = torch.zeros(flow.prior.event_shape, dtype=torch.bool)
        self._mean_free, self._scale = False, 1.0
        self._torsions: TorsionDensity | None = None
        if isinstance(prior, MeanFreeGaussian):
            gaussian[:] = True
            self._mean_free, self._scale = True, prior.scale
        elif isinstance(prior, InternalCoordinatePrior):
            gaussian[: prior.n_stiff] = True
            self._torsions = prior.torsions
        self._gaussian = gaussian

    def state(self, z: Tensor) -> LatentState:
        """Map latent points and evaluate everything the kernel needs."""
        langevin = self.kind == "langevin"
        with torch.set_grad_enabled(langevin):
            point = z.detach().requires_grad_(langevin)
            log_prior = self.flow.prior.latent_log_prob(point)
            x, log_q = self.flow.transform(point)
            log_weight = -self.target.reduced_potential(x) - log_q
            g0 = gw = torch.zeros_like(z)
            if langevin:
                (g0,) = torch.autograd.grad(log_prior.sum(), point, retain_graph=True)
                (gw,) = torch.autograd.grad(
                    torch.where(torch.isfinite(log_weight), log_weight, 0.0).sum(), point
                )
        log_weight = log_weight.detach()
        log_weight = torch.where(torch.isfinite(log_weight), log_weight, -torch.inf)
        finite = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in (g0, gw)]
        return LatentState(z.detach(), x.detach(), log_prior.detach(), log_weight, *finite)

    def current(self, positions: Tensor) -> LatentState:
        """State of given configurations; log weight +inf where the flow does not reach them."""
        z, log_q = self.flow.inverse(positions)
        if self.kind == "langevin":
            state = self.state(torch.nan_to_num(z))
        else:
            log_prior, zero = self.flow.prior.latent_log_prob(z), torch.zeros_like(z)
            state = LatentState(z, positions, log_prior, log_q, zero, zero)
        log_weight = -self.target.reduced_potential(positions) - log_q
        unreached = ~torch.isfinite(log_q) | ~torch.isfinite(z).flatten(1).all(dim=1)
        log_weight = torch.where(unreached, torch.inf, log_weight)
        return state._replace(x=positions, log_weight=log_weight)

    def __call__(
        self, state: LatentState, beta: Tensor, generator: torch.Generator | None = None
    ) -> tuple[LatentState, Tensor, Tensor]:
        """One Metropolised step: new state, accepted (n,) and invalid proposals (n,)."""
        noise = torch.randn(state.z.shape, generator=generator, dtype=torch.float64)
        noise = self._scale * (remove_mean(noise) if self._mean_free else noise)
        if self.kind == "pcn":
            new, log_ratio = self._propose_pcn(state, noise, generator)
        else:
            forward = state.z + self._drift(state, beta)
            new = self.state(forward + self.step * noise)
            backward = new.z + self._drift(new, beta)
            log_ratio = self._log_normal(state.z - backward) - self._log_normal(new.z - forward)
        invalid = ~torch.isfinite(new.log_weight)
        # A zero weight is left at the first chance; a state out of the flow's reach never is.
        gain = torch.where(invalid, -torch.inf, new.log_weight - state.log_weight)
        log_ratio = log_ratio + new.log_prior - state.log_prior + beta * gain
        accepted = metropolis_accept(log_ratio, generator) & ~invalid
        accepted &= state.log_weight < torch.inf
        return new.where(accepted, state), accepted, invalid

    def _propose_pcn(
        self, state: LatentState, noise: Tensor, generator: torch.Generator | None
    ) -> tuple[LatentState, Tensor]:
        """Proposals and the log ratio of their reversible measure, old over new."""
        shrink = torch.where(self._gaussian, math.sqrt(1.0 - self.step**2), 1.0)
        z = shrink * state.z + self.step * noise
        redrawn = torch.zeros(z.shape[0], dtype=torch.bool)
        if self._torsions is not None:
            chance = torch.rand(z.shape[0], generator=generator, dtype=torch.float64)
            redrawn = chance < _REDRAW_PROBABILITY
            tau = self._torsions.sample(z.shape[0], generator=generator).to(z.dtype)
            z[:, ~self._gaussian] = torch.where(redrawn[:, None], tau, z[:, ~self._gaussian])
        new = self.state(z)
        log_ratio = self._log_reference(state.z) - self._log_reference(z)
        if self._torsions is not None:
            old, fresh = (
                self._torsions.log_prob(point[:, ~self._gaussian]) for point in (state.z, z)
            )
            log_ratio = log_ratio + torch.where(redrawn, old - fresh, 0.0)
        return new, log_ratio

    def _log_reference(self, z: Tensor) -> Tensor:
        square = torch.where(self._gaussian, (z / self._scale).square(), 0.0)
        return -0.5 * square.flatten(1).sum(dim=1)

    def _log_normal(self, displacement: Tensor) -> Tensor:
        width = self.step * self._scale
        return -0.5 * (displacement / width).square().flatten(1).sum(dim=1)

    def _drift(self, state: LatentState, beta: Tensor) -> Tensor:
        beta = beta.reshape(-1, *[1] * (state.z.ndim - 1))
        gradient = state.grad_log_prior + beta * state.grad_log_weight
        if self._mean_free:
            gradient = remove_mean(gradient)
        drift = 0.5 * (self.step * self._scale) ** 2 * gradient
        limit = self.step * self._scale * math.sqrt(float(drift[0].numel()))
        norm = drift.flatten(1).norm(dim=1).reshape(beta.shape)
        tamed: Tensor = drift * (limit / norm.clamp_min(1e-300)).clamp(max=1.0)
        return tamed


class LatentStepInfo(NamedTuple):
    """What local steps did, every field ``(n_chains,)``."""

    n_accepted: Tensor
    n_invalid: Tensor
    log_weight: Tensor


class AnnealedStepInfo(NamedTuple):
    """What an annealed step did; the first four ``(n_chains,)``."""

    accepted: Tensor
    n_invalid: Tensor
    effective_proposals: Tensor
    bridge_acceptance: Tensor
    """Accepted fraction of the kernel steps along the proposals' paths."""
    log_weight_proposals: Tensor
    """Path weights ``(n_chains, n_proposals)``: their mean estimates Z without bias."""


def latent_step(
    kernel: LatentKernel,
    positions: Tensor,
    n_repeats: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, LatentStepInfo]:
    r"""``n_repeats`` local latent steps of every chain, with one inverse flow at the start.

    The new configuration is turned to best overlap with the old one (Kabsch) at the old centroid.
    Best overlap is mutual and, for given shapes, a fixed rotation, so detailed balance holds on
    the full space too.

    Parameters
    ----------
    kernel
        Holds flow, target and step.
    positions
        ``(n_chains, n_particles, n_dims)`` nm, float64, any centroid.
    n_repeats
        Steps; each costs one forward flow and one energy per chain.
    """
    positions = positions.to(torch.float64)
    state = kernel.current(positions)
    beta = torch.ones(positions.shape[0], dtype=torch.float64)
    n_accepted = torch.zeros(positions.shape[0], dtype=torch.int64)
    n_invalid = torch.zeros_like(n_accepted)
    for _ in range(n_repeats):
        centroid = state.x.mean(dim=-2, keepdim=True)
        new, accepted, invalid = kernel(state, beta, generator)
        shape = new.x - new.x.mean(dim=-2, keepdim=True)
        aligned = rotate(shape, align_rotations(shape, state.x - centroid)) + centroid
        state = new._replace(x=torch.where(accepted[:, None, None], aligned, state.x))
        n_accepted += accepted
        n_invalid += invalid
    return state.x, LatentStepInfo(n_accepted, n_invalid, state.log_weight)


def annealed_step(
    kernel: LatentKernel,
    positions: Tensor,
    n_proposals: int = 1,
    n_bridge: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, AnnealedStepInfo]:
    r"""Offer every chain K endpoints of annealed paths from the flow to the target.

    A path starts at :math:`z_0 \sim p_0`, step k is the kernel of
    :math:`\beta_k = k/(T+1)`, k = 1..T, and its weight is that of annealed importance sampling,

    .. math:: \log W = \sum_{k=0}^{T} (\beta_{k+1} - \beta_k) \log w(z_k)
                     = \frac{1}{T+1} \sum_{k=0}^{T} \log w(z_k).

    The current state gets a path too: it is :math:`z_T`, and the kernels run in reverse order give
    z_{T-1}, ..., z_0, a draw of the auxiliary variables from their conditional, since every kernel
    is its own reversal. Choosing among the paths by W is then an independence step that leaves the
    extended target, and so its marginal in z_T, invariant.

    Parameters
    ----------
    kernel
        Reversible kernel; its step also sets the bridges.
    positions
        ``(n_chains, n_particles, n_dims)`` nm, float64, any centroid.
    n_proposals, n_bridge
        K paths per chain of T kernel steps each.
    """
    positions = positions.to(torch.float64)
    m, k = positions.shape[0], n_proposals
    current = kernel.current(positions)
    fresh = kernel.state(kernel.flow.prior.sample_latent(m * k, generator=generator))
    state = LatentState(*(torch.cat(pair) for pair in zip(current, fresh, strict=True)))
    total = state.log_weight.clone()
    n_moved = torch.zeros(m * k, dtype=torch.float64)
    up = torch.arange(1, n_bridge + 1, dtype=torch.float64) / (n_bridge + 1)
    for beta_up, beta_down in zip(up, up.flip(0), strict=True):
        beta = torch.cat([beta_down.expand(m), beta_up.expand(m * k)])
        state, accepted, _ = kernel(state, beta, generator)
        total = total + state.log_weight
        n_moved += accepted[m:]
    log_path = total / (n_bridge + 1)
    log_w_proposals = log_path[m:].reshape(m, k)
    index, info = multiple_try(log_path[:m], log_w_proposals, generator)

    rows = torch.arange(m) * k + (index - 1).clamp_min(0)
    shape = remove_mean(state.x[m:][rows])
    rotation = random_rotations(m, positions.shape[2], generator=generator)
    placed = rotate(shape, rotation) + positions.mean(dim=-2, keepdim=True)
    new_positions = torch.where(info.accepted[:, None, None], placed, positions)
    return new_positions, AnnealedStepInfo(
        accepted=info.accepted,
        n_invalid=info.n_invalid,
        effective_proposals=info.effective_proposals,
        bridge_acceptance=n_moved.reshape(m, k).mean(dim=1) / max(n_bridge, 1),
        log_weight_proposals=log_w_proposals,
    )
