r"""Acceptance of independence proposals, as pure functions of log weights.

A flow proposes :math:`x' \sim q` whatever the current state is, so everything an exact move needs
is :math:`\log w(x) = -u(x) - \log q(x)` of the current state and of the proposals.

Zero weights. A proposal whose log weight is not finite has weight 0: it is never chosen, and it is
counted. For the *current* state ``-inf`` also means weight 0 (u = +inf: the target has no mass
there), so the first valid proposal is taken; ``+inf`` or NaN (the flow gives it no density) means
that no proposal may leave it: the kernel is then the identity outside the flow's support and exact
inside it, which leaves the target invariant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MultipleTryInfo",
    "log_acceptance_ratio",
    "metropolis_accept",
    "multiple_try",
    "multiple_try_probabilities",
]


class MultipleTryInfo(NamedTuple):
    """What one selection did, every field ``(n_chains,)``."""

    accepted: Tensor
    """True where a proposal replaced the current state."""
    move_probability: Tensor
    """Probability of leaving the current state, given these proposals."""
    n_invalid: Tensor
    """Proposals of weight 0 because their log weight was not finite."""
    effective_proposals: Tensor
    """Kish's count of the proposals alone, between 0 and n_proposals."""


def log_acceptance_ratio(log_w_old: Tensor, log_w_new: Tensor) -> Tensor:
    r"""Log of the Metropolis-Hastings ratio of an independence proposal (Hastings 1970).

    .. math:: \log r = \log w(x') - \log w(x), \qquad P(\mathrm{accept}) = \min(1, r)

    Also right for any proposal kernel that is reversible with respect to the density in w, such as
    a move of the latent point that leaves the prior invariant.

    Parameters
    ----------
    log_w_old, log_w_new
        Log weights of the current and the proposed states, of one shape.

    Returns
    -------
    Tensor
        ``-inf`` (reject) if the new weight is not finite or the old one is +inf or NaN; ``+inf``
        (accept) if the old weight is zero and the new one is not.

    Examples
    --------
    >>> log_acceptance_ratio(torch.tensor(1.0), torch.tensor(3.0))
    tensor(2.)
    """
    if log_w_old.shape != log_w_new.shape:
        raise ValueError(
            f"log weights have shapes {tuple(log_w_old.shape)} (old) and {tuple(log_w_new.shape)} "
            "(new); expected equal shapes"
        )
    stay = ~torch.isfinite(log_w_new) | torch.isnan(log_w_old) | (log_w_old == torch.inf)
    return torch.where(stay, -torch.inf, log_w_new - log_w_old)


def metropolis_accept(log_ratio: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Accept with probability min(1, exp(log_ratio)); NaN is rejected. Booleans, same shape."""
    uniform = torch.rand(
        log_ratio.shape, generator=generator, dtype=torch.float64, device=log_ratio.device
    )
    return torch.log(uniform) < log_ratio


def _relative_weights(
    log_w_current: Tensor, log_w_proposals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights over the largest finite one: current (M,), proposals (M, K); and ``frozen`` (M,)."""
    if (
        log_w_proposals.ndim != 2
        or log_w_current.shape != log_w_proposals.shape[:1]
        or log_w_proposals.shape[1] == 0
    ):
        raise ValueError(
            f"log weights have shapes {tuple(log_w_current.shape)} and "
            f"{tuple(log_w_proposals.shape)}; expected (n_chains,) and (n_chains, n_proposals)"
        )
    frozen = torch.isnan(log_w_current) | (log_w_current == torch.inf)
    log_w = torch.cat([log_w_current[:, None], log_w_proposals], dim=1).to(torch.float64)
    log_w = torch.where(torch.isfinite(log_w), log_w, -torch.inf)
    top = log_w.max(dim=1, keepdim=True).values
    w = torch.exp(log_w - torch.where(torch.isfinite(top), top, 0.0))
    return w[:, 0], w[:, 1:], frozen


def multiple_try_probabilities(log_w_current: Tensor, log_w_proposals: Tensor) -> Tensor:
    r"""Give the selection probabilities of the multiple-try Metropolised independence sampler.

    One of the K proposals is chosen with probability proportional to its weight and then accepted
    against the set it would have been proposed from (Liu 2001, section 5.5.1):

    .. math:: P(\text{move to } k) = w_k \min\left(\frac{1}{W}, \frac{1}{W - w_k + w_0}\right),
              \qquad W = \sum_{j=1}^K w_j.

    Every off-diagonal probability is at least that of iterated sampling importance resampling,
    :math:`w_k / (w_0 + W)`, so the asymptotic variance of every average is at most that (Peskun
    1973). With K = 1 it is the Metropolis rule.

    Returns
    -------
    Tensor
        ``(n_chains, n_proposals + 1)``; column 0 is the current state.
    """
    w_current, w, frozen = _relative_weights(log_w_current, log_w_proposals)
    total = w.sum(dim=1, keepdim=True)
    reverse = (total - w).clamp_min(0.0) + w_current[:, None]
    # Where w is positive, so is the larger of the two sums.
    largest = torch.maximum(total, reverse)
    move = torch.where(w > 0.0, w / torch.where(largest > 0.0, largest, 1.0), 0.0)
    return _with_stay(torch.where(frozen[:, None], 0.0, move))


def _with_stay(move: Tensor) -> Tensor:
    stay = (1.0 - move.sum(dim=1, keepdim=True)).clamp_min(0.0)
    return torch.cat([stay, move], dim=1)


def multiple_try(
    log_w_current: Tensor,
    log_w_proposals: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, MultipleTryInfo]:
    r"""Choose among the current state and K independent proposals, for many chains at once.

    Leaves the target of every chain invariant, whatever K and q, because proposals are
    exchangeable with the current state once weighted. Each proposal may be used only once: reuse
    in a later step or for another chain correlates states that are assumed independent.

    Parameters
    ----------
    log_w_current
        ``(n_chains,)`` log weights of the current states.
    log_w_proposals
        ``(n_chains, n_proposals)`` log weights of fresh proposals, distinct for every chain.
    generator
        Source of the uniform numbers, one per chain.

    Returns
    -------
    (Tensor, MultipleTryInfo)
        ``(n_chains,)`` int64: 0 keeps the current state, k picks proposal ``k - 1``; and what
        happened.

    Examples
    --------
    >>> index, info = multiple_try(torch.zeros(1), torch.tensor([[-torch.inf, 50.0]]))
    >>> int(index), int(info.n_invalid)
    (2, 1)
    """
    probabilities = multiple_try_probabilities(log_w_current, log_w_proposals)
    uniform = torch.rand(
        (probabilities.shape[0], 1),
        generator=generator,
        dtype=torch.float64,
        device=probabilities.device,
    )
    # Staying is the last interval, so round-off in the sum can only reject, and a proposal of
    # probability 0 has an empty interval.
    passed = (uniform >= probabilities[:, 1:].cumsum(dim=1)).sum(dim=1)
    n_proposals = log_w_proposals.shape[1]
    index = torch.where(passed < n_proposals, passed + 1, 0)
    _, w, _ = _relative_weights(torch.full_like(log_w_current, -torch.inf), log_w_proposals)
    square = w.square().sum(dim=1)
    effective = torch.where(square > 0.0, w.sum(dim=1) ** 2 / square.clamp_min(1e-300), 0.0)
    return index, MultipleTryInfo(
        accepted=index > 0,
        move_probability=1.0 - probabilities[:, 0],
        n_invalid=(~torch.isfinite(log_w_proposals)).sum(dim=1),
        effective_proposals=effective,
    )
