r"""Exact moves in the latent space of a flow: local steps and annealed proposals.

Local steps walk in the latent space with a :class:`~openmm_eqflow.latent_kernel.LatentKernel`;
annealed proposals are annealed importance sampling (Neal 2001) from the flow to the target inside
independence sampling on the space of paths. Both serve many chains at once and know no OpenMM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_eqflow.geometry import align_rotations, random_rotations, remove_mean, rotate
from openmm_eqflow.latent_kernel import LatentKernel, LatentState
from openmm_eqflow.metropolis import i_sir

__all__ = ["AnnealedStepInfo", "LatentStepInfo", "annealed_step", "latent_step"]


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
    index, info = i_sir(log_path[:m], log_w_proposals, generator, metropolized=True)

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
