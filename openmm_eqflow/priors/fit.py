r"""Fit the internal-coordinate prior to frames and forces, and refine it on its own samples.

Fit the internal-coordinate prior to molecular dynamics frames, with or without their forces.

Forces make the fit data-efficient. With :math:`g = \nabla_s \log p(s, \tau)` (the target's score
in internal coordinates) Stein's identity gives, for any fixed symmetric :math:`\Sigma`,

.. math:: E[s + \Sigma g \mid \tau] = E[s \mid \tau], \qquad
          \mathrm{Cov}(s|\tau) = \Sigma + E[r (r + \Sigma g)^T], \quad r = s - \mu(\tau).

Both right-hand sides have (almost) no noise when the stiff modes are nearly harmonic and
:math:`\Sigma` is close to their covariance: control variates from the forces. :math:`\Sigma` is
taken as the inverse of the regression of g on r.

Refine the internal-coordinate prior on its own samples: adaptive importance sampling.

Energies are cheap where frames are dear: a round draws samples from the prior, weighs them
together with the frames for the target (:mod:`openmm_eqflow.analysis.balance`) and fits
everything again,
torsion densities included (population Monte Carlo: Cappé et al. 2004). Rare basins get the weight
the energy gives them, not the one a short simulation happened to visit.

Samples of a prior that was fitted to a handful of frames may be too far from the target to fit
anything to. Such a round fails or describes its own points worse than the prior it started from;
it is dropped with a warning, and that prior stays.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmm_eqflow.analysis.balance import balance_log_weights, bennett_log_z
from openmm_eqflow.errors import TrainingError
from openmm_eqflow.geometry import align_rotations, remove_mean, rotate
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.mixture import StiffMixture
from openmm_eqflow.priors.torsions import TorsionDensity
from openmm_eqflow.priors.zmatrix import ZMatrix
from openmm_eqflow.targets.constraints import Constraints

__all__ = [
    "controlled_covariance",
    "controlled_fit",
    "coupled_pairs",
    "fit_internal_prior",
    "fourier_modes",
    "nearly_linear",
    "refine_internal_prior",
    "refit",
    "ridge_penalty",
    "shrunk_covariance",
    "stiff_score",
    "whitened_mixture",
]

_MAX_MISS = 4.0  # standard deviations between a hot frame's controlled target and the fit
_FORCES_NEED = 1.2  # frames per stiff coordinate and feature
_NEAR = 4.0  # standard deviations from its mean within which an angle that reaches pi is a bend
_SOFT_SPREAD = 0.4  # rad: circular spread above which a torsion is described by its own density


def _circular(tau: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.polar(torch.ones_like(tau), tau).mean(0)
    return torch.angle(mean), torch.sqrt(-2 * torch.log(mean.abs().clamp(1e-12, 1.0)))


def coupled_pairs(zmatrix: ZMatrix, soft: Sequence[int]) -> list[tuple[int, int]]:
    """Soft torsions whose central bonds share an atom."""
    axes = [{zmatrix.rows[k + 3][1], zmatrix.rows[k + 3][2]} for k in soft]
    return [(i, j) for i, j in itertools.combinations(range(len(soft)), 2) if axes[i] & axes[j]]


def fourier_modes(
    n_soft: int, fold: Sequence[int], pairs: Sequence[tuple[int, int]], order: int
) -> Tensor:
    """Integer modes (n_modes, n_soft): harmonics of every torsion, cross terms of ``pairs``."""
    modes: list[list[int]] = []
    for k in range(n_soft):
        # A folded torsion repeats itself: its first harmonic is `fold`.
        for m in range(1, (order if fold[k] == 1 else 1) + 1):
            modes.append([m * fold[k] if j == k else 0 for j in range(n_soft)])
    for i, j in pairs:
        if fold[i] != 1 or fold[j] != 1:
            continue
        for a, b in itertools.product(range(1, order + 1), range(-order, order + 1)):
            if b != 0:
                modes.append([a if k == i else b if k == j else 0 for k in range(n_soft)])
    return torch.tensor(modes, dtype=torch.float64).reshape(len(modes), n_soft)


def _ridge(
    features: Tensor, targets: Tensor, penalty: Tensor, weights: Tensor | None = None
) -> Tensor:
    mass = torch.full_like(features[:, 0], 1 / len(features)) if weights is None else weights
    weighted = features * mass[:, None]
    return torch.linalg.solve(weighted.T @ features + torch.diag(penalty), weighted.T @ targets)


def ridge_penalty(modes: Tensor) -> Tensor:
    """Smoothness penalty of every Fourier feature, growing with its frequency."""
    square = (modes**2).sum(1)
    return 1e-4 * torch.cat([torch.zeros(1, dtype=modes.dtype), square, square])


def fit_internal_prior(
    x: Tensor,
    bonds: Sequence[tuple[int, int]],
    masses: Sequence[float],
    *,
    gradient: Tensor | None = None,
    hot: Tensor | None = None,
    hot_gradient: Tensor | None = None,
    order: int = 3,
    tail_share: float = 0.1,
    tail_scale: float = 1.2,
    constraints: Constraints | None = None,
) -> InternalCoordinatePrior:
    """Fit to frames of the target temperature.

    Parameters
    ----------
    x
        Frames (n_frames, n_particles, 3) in nm.
    bonds, masses
        Molecular graph.
    gradient
        du/dx of the frames (kT/nm); with it the stiff coordinates are fitted with far fewer
        frames. Not used where there are hardly more frames than coordinates.
    hot
        Frames of higher temperatures: the defensive part of the torsion density.
    hot_gradient
        du/dx of ``hot`` at the *target* temperature: then they also teach the mean function, where
        the target's own frames are rare. (For a harmonic mode s + Sigma g is its mean whatever
        distribution s came from.)
    order
        Highest harmonic of the mean function; lowered until the frames can carry it.
    tail_share, tail_scale
        Defensive tail of the stiff residuals.
    constraints
        Bonds that are constrained.

    Raises
    ------
    UnsupportedSystemError
        A constraint is no bond of the Z-matrix.
    """
    x = x.double()
    zmatrix = ZMatrix.from_bonds(x.shape[1], bonds, masses=masses)
    internal = zmatrix.to_internal(x)
    centre, spread = _circular(internal.torsions)
    lead = zmatrix.lead
    soft = [k for k in range(len(lead)) if lead[k] == k and spread[k] > _SOFT_SPREAD]
    fold = [zmatrix.fold[k] for k in soft]
    stiff = [k for k in range(len(lead)) if k not in set(soft)]
    pairs = coupled_pairs(zmatrix, soft)
    tau = internal.torsions[:, soft]
    density = None
    if soft:
        hot_tau = None if hot is None else zmatrix.to_internal(hot.double()).torsions[:, soft]
        density = TorsionDensity.fit(tau, fold=fold, coupled=pairs, extra=hot_tau)
        pairs = [g.members for g in density.groups if len(g.members) == 2]
    while order > 1 and 12 * len(fourier_modes(len(soft), fold, pairs, order)) > len(x):
        order -= 1
    modes = fourier_modes(len(soft), fold, pairs, order)
    n_stiff = 2 * zmatrix.n_particles - 3 + len(stiff)
    if constraints is not None:
        n_stiff -= len(constraints.lengths)
    prior = InternalCoordinatePrior(
        zmatrix,
        soft=soft,
        centre=centre[stiff],
        modes=modes,
        coefficients=torch.zeros(1 + 2 * len(modes), n_stiff),
        cholesky=torch.eye(n_stiff),
        torsions=density,
        tail_share=tail_share,
        tail_scale=tail_scale,
        constraints=constraints,
    )
    prior.bends = nearly_linear(internal.angles)
    s = prior.stiff_vector(internal)
    features = prior.features(tau)
    penalty = ridge_penalty(modes)
    prior.coefficients = _ridge(features, s, penalty)
    residual = s - features @ prior.coefficients
    # A regression on the forces needs more frames than unknowns; below that it diverges.
    if gradient is None or len(x) < _FORCES_NEED * (n_stiff + features.shape[1]):
        covariance = shrunk_covariance(residual, features.shape[1])
    else:
        score = stiff_score(prior, s, tau, gradient.double(), x)
        extra = _Extra.from_frames(prior, hot, hot_gradient)
        covariance = controlled_fit(
            prior, s, features, score, torch.full_like(s[:, 0], 1 / len(s)), penalty, extra
        )
    prior.cholesky = torch.linalg.cholesky(covariance)
    return prior


def nearly_linear(angles: Tensor) -> dict[int, float]:
    r"""Angles whose distribution reaches :math:`\pi`, with the :math:`\kappa` of each."""
    if len(angles) < 2 or not angles.shape[1]:
        return {}
    reach = angles.mean(0) + _NEAR * angles.std(0)
    kappa = 1 / (2 * torch.cos(angles / 2).square()).mean(0)
    return {k: float(kappa[k]) for k in torch.nonzero(reach > torch.pi).flatten().tolist()}


class _Extra(NamedTuple):
    """Hot frames: torsion features, stiff coordinates and scores."""

    features: Tensor
    s: Tensor
    score: Tensor

    @classmethod
    def from_frames(
        cls, prior: InternalCoordinatePrior, x: Tensor | None, gradient: Tensor | None
    ) -> _Extra | None:
        if x is None or gradient is None or not len(x):
            return None
        internal = prior.zmatrix.to_internal(x.double())
        tau = internal.torsions[:, prior.soft]
        s = prior.stiff_vector(internal)
        usable = torch.isfinite(s).all(1) & torch.isfinite(gradient).flatten(1).all(1)
        s, tau, x, gradient = s[usable], tau[usable], x[usable], gradient[usable]
        score = stiff_score(prior, s, tau, gradient.double(), x.double())
        return cls(prior.features(tau), s, score)


def controlled_fit(
    prior: InternalCoordinatePrior,
    s: Tensor,
    features: Tensor,
    score: Tensor,
    weights: Tensor,
    penalty: Tensor,
    extra: _Extra | None = None,
) -> Tensor:
    """Fit mean function (into ``prior``) and return the covariance; see the module docstring.

    ``weights`` (n,) sum to one; ``penalty`` is the ridge of every feature for n = 1.
    """
    residual = s - features @ prior.coefficients
    sigma = covariance = torch.eye(s.shape[1], dtype=s.dtype)
    for _ in range(3):
        sigma = _score_covariance(residual, score, weights)
        joint, targets, mass = features, s + score @ sigma, weights
        if extra is not None:
            hot = extra.s + extra.score @ sigma
            # Close contacts of hot frames are far from harmonic: leave those out.
            miss = (hot - extra.features @ prior.coefficients) / torch.diagonal(sigma).sqrt()
            usable = miss.abs().amax(1) < _MAX_MISS
            share = 0.5 / len(s)
            joint = torch.cat([joint, extra.features[usable]])
            targets = torch.cat([targets, hot[usable]])
            mass = torch.cat([mass, torch.full_like(hot[usable, 0], share)])
        prior.coefficients = _ridge(joint, targets, penalty, mass)
        residual = s - features @ prior.coefficients
        correction = (residual * weights[:, None]).T @ (residual + score @ sigma)
        covariance = sigma + 0.5 * (correction + correction.T)
    return _positive(covariance, sigma)


def controlled_covariance(residual: Tensor, score: Tensor, weights: Tensor) -> Tensor:
    """Covariance of residuals (n, d) about a known mean; see the module docstring."""
    sigma = _score_covariance(residual, score, weights)
    correction = (residual * weights[:, None]).T @ (residual + score @ sigma)
    return _positive(sigma + 0.5 * (correction + correction.T), sigma)


def stiff_score(
    prior: InternalCoordinatePrior, s: Tensor, tau: Tensor, gradient: Tensor, x: Tensor
) -> Tensor:
    r"""Gradient of :math:`-u + \log|dx/d(s,\tau)|` with respect to s at fixed tau (chunked)."""
    scores = []
    # Less at once of a molecule above 28 atoms: the graph is what takes memory.
    size = max(1, min(4096, 4096 * 78 // (s.shape[1] + tau.shape[1])))
    for sc, tc, gc, xc in zip(*(v.split(size) for v in (s, tau, gradient, x)), strict=True):
        point = sc.detach().requires_grad_(True)
        y, log_volume, _ = prior.place(point, tc)
        # Forces come in the frame of the simulation, the chart in its own: rotate.
        rotation = align_rotations(remove_mean(xc), y.detach())
        pulled = (y * rotate(gc, rotation)).sum() - log_volume.sum()
        scores.append(-torch.autograd.grad(pulled, point)[0])
    return torch.cat(scores)


def _score_covariance(residual: Tensor, score: Tensor, weights: Tensor) -> Tensor:
    """Inverse of the symmetrised regression of -score on the residual, kept positive definite."""
    scale = torch.sqrt(weights @ residual**2)
    r, g = residual / scale, score * scale
    weighted = r * weights[:, None]
    second = weighted.T @ r + 1e-3 * torch.eye(r.shape[1], dtype=r.dtype)
    precision = -torch.linalg.solve(second, weighted.T @ g)
    precision = 0.5 * (precision + precision.T)
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(min=1e-2)
    sigma = (vectors / values) @ vectors.T
    return sigma * scale[:, None] * scale


def _positive(covariance: Tensor, fallback: Tensor) -> Tensor:
    """Blend towards ``fallback`` (positive definite) until positive definite."""
    for share in np.linspace(0.0, 1.0, 11):
        blend = (1 - share) * covariance + share * fallback
        factor, info = torch.linalg.cholesky_ex(blend)
        diagonal = torch.diagonal(factor)
        if info == 0 and bool((diagonal > 1e-6 * torch.diagonal(blend).sqrt()).all()):
            return blend
    return fallback


def shrunk_covariance(residual: Tensor, n_features: int) -> Tensor:
    """Ledoit-Wolf type shrinkage of correlations towards the diagonal (Schäfer, Strimmer 2005)."""
    n = len(residual)
    scale = torch.sqrt((residual**2).sum(0) / max(n - n_features, 1))
    r = residual / scale
    corr = r.T @ r / n
    variance = ((r**2).T @ (r**2) / n - corr**2) / max(n - 1, 1)
    off = ~torch.eye(len(corr), dtype=torch.bool)
    shrink = float((variance[off].sum() / (corr[off] ** 2).sum()).clamp(0, 1))
    corr = torch.where(off, (1 - shrink) * corr, torch.ones_like(corr))
    return corr * scale[:, None] * scale

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
            new = refit(prior, x, gradient, weights, order=order, generator=generator)
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


def refit(
    prior: InternalCoordinatePrior,
    x: Tensor,
    gradient: Tensor,
    weights: Tensor,
    *,
    order: int,
    ground: TorsionDensity | None = None,
    share: float = 0.05,
    generator: torch.Generator | None = None,
) -> InternalCoordinatePrior:
    """Fit everything again to weighted points: torsions, means, covariance, components.

    Parameters
    ----------
    prior
        Whose chart and components stay.
    x, gradient, weights
        Points (n, N, 3), du/dx there, and weights (n,) that sum to one.
    order
        Highest harmonic of the mean function.
    ground, share
        Density of the soft torsions that stays in, by default that of ``prior``, and its share;
        of a component of the stiff density a fiftieth of its equal share stays.
    generator
        Random stream.
    """
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
            extra=(ground or prior.torsions).sample(20_000, generator=generator),
            extra_share=share,
        )
        joint = [g.members for g in new.torsions.groups if len(g.members) == 2]
        modes = fourier_modes(prior.n_soft, prior.fold, joint, order)
    new.modes = modes
    s = new.stiff_vector(internal)
    features = new.features(tau)
    new.coefficients = torch.zeros(features.shape[1], s.shape[1], dtype=s.dtype)
    start, penalty = prior.features(tau) @ prior.coefficients, ridge_penalty(modes)
    shifts = None if prior.mixture is None else _Shifts.of(prior, x, weights)
    if shifts is not None:
        features = torch.cat([features, shifts.indicator], 1)
        penalty = torch.cat([penalty, torch.full_like(shifts.indicator[0], 1e-8)])
        for c in shifts.component.unique():
            own = shifts.component == c
            start[own] += (weights[own] @ (s - start)[own]) / weights[own].sum().clamp(min=1e-30)
    # Torch's default, gelsy, starts from pivots it leaves uninitialised: other bits every time.
    new.coefficients = torch.linalg.lstsq(
        features * weights.sqrt()[:, None], start * weights.sqrt()[:, None], driver="gelsd"
    ).solution
    score = stiff_score(new, s, tau, gradient, x)
    trusted = weights if shifts is None else shifts.trusted(weights, s.shape[1])
    covariance = controlled_fit(new, s, features, score, trusted, penalty)
    new.cholesky = torch.linalg.cholesky(covariance)
    if shifts is not None:
        residual = s - features @ new.coefficients
        n_features = features.shape[1] - shifts.indicator.shape[1]
        moved, new.coefficients = new.coefficients[n_features:], new.coefficients[:n_features]
        new.mixture = shifts.mixture(prior, new, moved, residual, score, weights)
    return new


class _Shifts(NamedTuple):
    """Component of every point, as columns that shift the mean of the stiff coordinates.

    The heaviest component has none: its mean is that of the prior.
    """

    component: Tensor
    heaviest: int
    indicator: Tensor
    old: Tensor

    @classmethod
    def of(cls, prior: InternalCoordinatePrior, x: Tensor, weights: Tensor) -> _Shifts:
        assert prior.mixture is not None
        component = prior.components(prior.from_cartesian(x)[0])
        m = len(prior.mixture.weights)
        mass = torch.zeros(m, dtype=weights.dtype).index_add(0, component, weights)
        heaviest = int(mass.argmax())
        others = [c for c in range(m) if c != heaviest]
        indicator = (component[:, None] == torch.tensor(others)).to(weights)
        means = prior.mixture.means @ prior.cholesky.T
        return cls(component, heaviest, indicator, (means - means[heaviest])[others])

    def trusted(self, weights: Tensor, n_stiff: int) -> Tensor:
        """Weights of points, those of components hardly seen set to zero."""
        kept = weights.clone()
        for c in self.component.unique():
            own = self.component == c
            if _few(weights[own], n_stiff):
                kept[own] = 0.0
        return kept / kept.sum() if bool(kept.any()) else weights

    def mixture(
        self,
        prior: InternalCoordinatePrior,
        new: InternalCoordinatePrior,
        moved: Tensor,
        residual: Tensor,
        score: Tensor,
        weights: Tensor,
    ) -> StiffMixture:
        """Components in the whitened coordinates of ``new``; those hardly seen as they were."""
        old, m = prior.mixture, len(self.indicator[0]) + 1
        assert old is not None
        n_stiff = residual.shape[1]
        mass, centres, covariances = [], [], []
        others = iter(range(m - 1))
        for c in range(m):
            own = weights[self.component == c]
            mass.append(float(own.sum()))
            k = None if c == self.heaviest else next(others)
            few = _few(own, n_stiff)
            shift = torch.zeros(n_stiff, dtype=residual.dtype)
            if k is not None:
                shift = self.old[k] if few else moved[k]
            centres.append(shift)
            if few:
                factor = prior.cholesky @ old.factors[c]
                covariances.append(factor @ factor.T)
                continue
            r, g = residual[self.component == c], score[self.component == c]
            covariances.append(controlled_covariance(r, g, own / own.sum()))
        shares = 0.98 * torch.tensor(mass, dtype=residual.dtype) + 0.02 / m
        return whitened_mixture(
            new.cholesky, shares, torch.stack(centres), torch.stack(covariances)
        )


def _few(weights: Tensor, n_stiff: int) -> bool:
    """Whether so few points cannot carry means and covariance of their own."""
    effective = float(weights.sum() ** 2 / weights.square().sum().clamp(min=1e-300))
    return effective < max(30.0, n_stiff)


def whitened_mixture(
    cholesky: Tensor, weights: Tensor, means: Tensor, covariances: Tensor
) -> StiffMixture:
    """Components given by means (m, n_stiff) and covariances in stiff coordinates."""
    solve = torch.linalg.solve_triangular
    factors = solve(cholesky, torch.linalg.cholesky(covariances), upper=False)
    centres = solve(cholesky, means.T, upper=False).T
    return StiffMixture(weights / weights.sum(), centres, factors)
