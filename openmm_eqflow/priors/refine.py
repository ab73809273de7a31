r"""Refine the internal-coordinate prior on its own samples: adaptive importance sampling.

Energies are cheap where frames are dear: a round draws samples from the prior, weighs them
together with the frames for the target (:mod:`openmm_eqflow.balance`) and fits everything again,
torsion densities included (population Monte Carlo: Cappé et al. 2004). Rare basins get the weight
the energy gives them, not the one a short simulation happened to visit.

Samples of a prior that was fitted to a handful of frames may be too far from the target to fit
anything to. Such a round fails or describes its own points worse than the prior it started from;
it is dropped with a warning, and that prior stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from openmm_eqflow.balance import balance_log_weights, bennett_log_z
from openmm_eqflow.errors import TrainingError
from openmm_eqflow.priors.fit import (
    controlled_fit,
    coupled_pairs,
    fourier_modes,
    ridge_penalty,
    stiff_score,
)
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity

__all__ = ["refine_internal_prior"]

logger = logging.getLogger(__name__)
_ENOUGH = 2000.0
_WORSE = 1.0  # nats per sample by which a fit must not lose to the prior it replaces
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def refine_internal_prior(
    prior: InternalCoordinatePrior,
    frames: Tensor,
    evaluate: Evaluate,
    *,
    rounds: int = 2,
    n_samples: int = 40_000,
    order: int = 4,
    generator: torch.Generator | None = None,
) -> InternalCoordinatePrior:
    """Return a better prior.

    Parameters
    ----------
    prior
        From :func:`~openmm_eqflow.priors.fit.fit_internal_prior`.
    frames
        Frames of the target (n, N, 3).
    evaluate
        ``x -> (u, du/dx)`` of the target.
    rounds, n_samples
        Rounds and samples per round.
    order
        Highest harmonic of the mean function.
    generator
        Random stream.

    Raises
    ------
    TrainingError
        No sample of the prior has a finite energy.
    """
    for k in range(rounds):
        x, gradient, weights = _weighted_points(
            prior, frames.double(), evaluate, n_samples, generator
        )
        try:
            new = _fit_again(prior, x, gradient, weights, order, generator)
            gain = float(weights @ (new.log_prob(x) - prior.log_prob(x)))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            gain = -torch.inf
        if not gain > -_WORSE:
            logger.warning(
                "round %d of refining the prior was dropped: too little is known from %d frames "
                "and %d samples; give the reference stage more time or raise prior_samples",
                k + 1,
                len(frames),
                n_samples,
            )
            continue
        prior = new
    return prior


def _tempered_weights(relative: Tensor, from_prior: Tensor) -> Tensor:
    """Weights for p_t with the largest t <= 1 whose effective sample size carries a fit.

    Where the prior is poor, the target itself would be fitted to a handful of points; a tempered
    step towards it is better, and the next round starts from there.
    """
    enough = min(_ENOUGH, 0.1 * len(relative))
    times = torch.linspace(1.0, 0.0, 21, dtype=torch.float64)
    candidates = torch.softmax(balance_log_weights(relative, from_prior, times), dim=1)
    effective = 1 / candidates.square().sum(1)
    usable = torch.nonzero(effective >= enough)
    return candidates[int(usable[0])] if len(usable) else candidates[-1]


def _weighted_points(
    prior: InternalCoordinatePrior,
    frames: Tensor,
    evaluate: Evaluate,
    n_samples: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames and samples of the prior, their du/dx and their weights for the target."""
    own, _ = prior.to_cartesian(prior.sample_latent(n_samples, generator=generator))
    x = torch.cat([frames, own])
    from_prior = torch.arange(len(x)) >= len(frames)
    u, gradient = evaluate(x)
    valid = torch.isfinite(u) & torch.isfinite(x).all(2).all(1)
    x, u, gradient, from_prior = x[valid], u[valid], gradient[valid], from_prior[valid]
    if not bool(from_prior.any()):
        raise TrainingError(
            f"the prior fitted to {len(frames)} frames gives no valid configuration; give the "
            "reference stage more time (a larger --budget)"
        )
    relative = -u - prior.log_prob(x)
    relative = relative - bennett_log_z(relative, from_prior)
    return x, gradient, _tempered_weights(relative, from_prior)


def _fit_again(
    prior: InternalCoordinatePrior,
    x: Tensor,
    gradient: Tensor,
    weights: Tensor,
    order: int,
    generator: torch.Generator | None,
) -> InternalCoordinatePrior:
    internal = prior.zmatrix.to_internal(x)
    tau = internal.torsions[:, prior.soft]
    new = prior.copy()
    modes = prior.modes
    if prior.torsions is not None:
        pairs = coupled_pairs(prior.zmatrix, prior.soft)
        # The old density stays in with a small share: what it covered stays covered.
        new.torsions = TorsionDensity.fit(
            tau,
            fold=prior.fold,
            coupled=pairs,
            weights=weights,
            extra=prior.torsions.sample(20_000, generator=generator),
            extra_share=0.05,
        )
        joint = [g.members for g in new.torsions.groups if len(g.members) == 2]
        modes = fourier_modes(prior.n_soft, prior.fold, joint, order)
    new.modes = modes
    s = new.stiff_vector(internal)
    features = new.features(tau)
    new.coefficients = torch.zeros(features.shape[1], s.shape[1], dtype=s.dtype)
    start = prior.features(tau) @ prior.coefficients
    # Torch's default, gelsy, starts from pivots it leaves uninitialised: other bits every time.
    new.coefficients = torch.linalg.lstsq(
        features * weights.sqrt()[:, None], start * weights.sqrt()[:, None], driver="gelsd"
    ).solution
    score = stiff_score(new, s, tau, gradient, x)
    covariance = controlled_fit(new, s, features, score, weights, ridge_penalty(modes))
    new.cholesky = torch.linalg.cholesky(covariance)
    return new
