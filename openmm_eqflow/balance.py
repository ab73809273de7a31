r"""Samples of two densities used together: Bennett's log Z and the balance heuristic.

With :math:`n_0` samples of a normalised p_0 and :math:`n_1` of p_1 / Z,
:math:`\log w = \log p_1 - \log p_0` and :math:`\alpha = n_0/(n_0+n_1)`, the pooled points
represent the mixture :math:`\alpha p_0 + (1-\alpha) p_1/Z`, so that

.. math:: \omega_t \propto \frac{w^t}{\alpha + (1-\alpha)\, w/Z}

weighs them for :math:`p_t \propto p_0^{1-t} p_1^t` (Veach, Guibas 1995): bounded wherever p_0 is
too thin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["balance_log_weights", "bennett_log_z"]


def bennett_log_z(log_weight: Tensor, from_prior: Tensor) -> Tensor:
    r"""Bennett acceptance ratio (Bennett 1976): log Z from both kinds of samples.

    Parameters
    ----------
    log_weight
        :math:`\log w`, (n,); -inf is a weight of zero.
    from_prior
        True where the sample came from p_0, (n,). Without others this is plain averaging.
    """
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
