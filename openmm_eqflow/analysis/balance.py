r"""Samples of several densities used together: free energies and the balance heuristic.

With :math:`n_0` samples of a normalised p_0 and :math:`n_1` of p_1 / Z,
:math:`\log w = \log p_1 - \log p_0` and :math:`\alpha = n_0/(n_0+n_1)`, the pooled points
represent the mixture :math:`\alpha p_0 + (1-\alpha) p_1/Z`, so that

.. math:: \omega_t \propto \frac{w^t}{\alpha + (1-\alpha)\, w/Z}

weighs them for :math:`p_t \propto p_0^{1-t} p_1^t` (Veach, Guibas 1995): bounded wherever p_0 is
too thin.

Nothing changes for samples of any number of levels :math:`t_l` of that path, because p_t is p_0
times :math:`w^t`: with shares :math:`\alpha_l` and free energies :math:`F_l = \log Z_{t_l}`

.. math:: \omega_t \propto \frac{w^t}{\sum_l \alpha_l\, e^{t_l \log w - F_l}},
    \qquad e^{F_l} = \frac 1n \sum_i \frac{w_i^{t_l}}{\sum_k \alpha_k\, e^{t_k \log w_i - F_k}}

(MBAR: Shirts, Chodera 2008, doi 10.1063/1.2978177, equation 11, here in the one dimension log w;
for the levels 0 and 1 alone it is Bennett's ratio).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openmm_eqflow.errors import TrainingError

__all__ = [
    "balance_log_weights",
    "bennett_log_z",
    "path_free_energies",
    "path_weights",
]

_TOLERANCE = 1e-9  # of the free energies, kT
_MAX_ROUNDS = 100


def bennett_log_z(log_weight: Tensor, from_prior: Tensor) -> Tensor:
    r"""Bennett acceptance ratio (Bennett 1976): log Z from both kinds of samples.

    Parameters
    ----------
    log_weight
        :math:`\log w`, (n,); -inf is a weight of zero.
    from_prior
        True where the sample came from p_0, (n,). Without others this is plain averaging.

    Raises
    ------
    TrainingError
        No sample came from p_0.
    """
    if not bool(from_prior.any()):
        raise TrainingError(
            f"none of {len(log_weight)} points is a sample of the prior: all that were drawn lie "
            "far from the reference frames, to too few of which the prior was fitted; give the "
            "reference stage more time (a larger --budget)"
        )
    forward, backward = log_weight[from_prior], log_weight[~from_prior]
    log_z = torch.logsumexp(forward, 0) - math.log(len(forward))
    if not len(backward):
        return log_z
    # A frame counts as one sample: autocorrelation only makes this conservative.
    shift = math.log(len(backward) / len(forward))
    for _ in range(200):
        a = torch.nn.functional.logsigmoid(forward - log_z + shift)
        b = torch.nn.functional.logsigmoid(-(backward - log_z + shift))
        step = torch.logsumexp(a, 0) - torch.logsumexp(b, 0)
        log_z = log_z + 0.5 * step
        if abs(float(step)) < 1e-10:
            break
    return log_z


def balance_log_weights(relative: Tensor, from_prior: Tensor, times: Tensor) -> Tensor:
    """Unnormalised log weights (n_times, n) of pooled points for p_t.

    ``relative`` is log w - log Z.
    """
    alpha = float(from_prior.double().mean())
    mixture = torch.full_like(relative, alpha).log()
    if alpha < 1:
        mixture = torch.logaddexp(mixture, relative + math.log(1 - alpha))
    return times[:, None] * relative - mixture


def path_free_energies(log_weight: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Free energies of the levels of a path from samples of all of them.

    Minimises the convex function :math:`\sum_i \log \sum_l n_l e^{t_l \log w_i - F_l}
    + \sum_l n_l F_l` by Newton steps, halved where they would go up.

    Parameters
    ----------
    log_weight
        :math:`\log w`, (n,), finite.
    level
        Level t of every sample, (n,); some must be 0.

    Returns
    -------
    tuple of Tensor
        Levels in ascending order, their shares :math:`\alpha`, and F in kT with F(0) = 0; each
        (n_levels,) float64.

    Raises
    ------
    ValueError
        No sample has level 0, or a log weight is not finite.
    """
    log_w = log_weight.double()
    levels, place, counts = torch.unique(level.double(), return_inverse=True, return_counts=True)
    if float(levels[0]) != 0:
        raise ValueError(f"the lowest level is {float(levels[0])}, expected samples of level 0")
    if not bool(torch.isfinite(log_w).all()):
        raise ValueError("log weights are not all finite; leave out samples of weight zero")
    share = counts.double() / len(log_w)
    mean = torch.zeros_like(levels).index_add_(0, place, log_w) / counts
    # Thermodynamic integration is close enough for Newton to converge at once.
    start = 0.5 * (mean[1:] + mean[:-1]) * levels.diff()
    free = torch.cat([levels.new_zeros(1), start.cumsum(0)])

    def terms(free: Tensor) -> tuple[float, Tensor]:
        """Value of the function per sample, and the log probability of every level."""
        joint = share.log() - free + log_w[:, None] * levels
        norm = torch.logsumexp(joint, 1, keepdim=True)
        return float(norm.mean() + share @ free), joint - norm

    value, log_p = terms(free)
    for _ in range(_MAX_ROUNDS if len(levels) > 1 else 0):
        p = log_p.exp()
        gradient = share - p.mean(0)
        hessian = torch.diag(p.mean(0)) - p.T @ p / len(p)
        step = torch.linalg.lstsq(hessian[1:, 1:], gradient[1:, None], driver="gelsd").solution
        size = 1.0
        for _ in range(30):
            trial = free.clone()
            trial[1:] -= size * step[:, 0]
            new, trial_p = terms(trial)
            if new <= value + 1e-14 * abs(value):
                break
            size /= 2
        moved = float((trial - free).abs().max())
        free, value, log_p = trial, new, trial_p
        if moved < _TOLERANCE:
            break
    return levels, share, free


def path_weights(log_weight: Tensor, level: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weigh samples of several levels of the path for every p_t.

    Parameters
    ----------
    log_weight
        :math:`\log w`, (n,).
    level
        Level t of every sample, (n,): 0 from p_0, 1 from p_1.
    times
        Times t, (n_times,).

    Returns
    -------
    tuple of Tensor
        :math:`\log w - \log Z` (n,), and weights (n_times, n) that sum to one for every time.
    """
    if bool(((level == 0) | (level == 1)).all()):
        from_prior = level == 0
        relative = log_weight - bennett_log_z(log_weight, from_prior)
        return relative, torch.softmax(balance_log_weights(relative, from_prior, times), dim=1)
    levels, share, free = path_free_energies(log_weight, level)
    mixture = torch.logsumexp(share.log() - free + log_weight[:, None] * levels, 1)
    weights = torch.softmax(times[:, None] * log_weight - mixture, dim=1)
    log_z = torch.logsumexp(log_weight - mixture, 0) - math.log(len(log_weight))
    return log_weight - log_z, weights
