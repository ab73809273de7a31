r"""Prior and target as densities of the chart, with gradients that do not come from autograd.

Energies of an OpenMM System are not torch-differentiable in general: u and du/dx come from
``target.reduced_potential_and_gradient`` and enter autograd as a custom function.

A sample of an unconverged flow can have any energy, +inf (wrong hand, overlap beyond floating
point) included. Leaving such samples out would bias the objective silently, so they are kept and
the energy is bounded, as in Noé, Olsson, Köhler, Wu 2019 (Boltzmann generators, doi
10.1126/science.aaw1147, supplement):

.. math::
    u_{reg} = u \ (u \le u_h), \qquad u_h + \log(u - u_h + 1) \ (u_h < u < u_m), \qquad
    u_h + \log(u_m - u_h + 1) \ (u \ge u_m),

forces scaled accordingly (zero above :math:`u_m`: such a sample contributes its capped value and
its entropy, no force). Training thus sees another target where u > u_h; weights and log Z never
do, they use u itself. Samples off the support are counted in ``n_invalid``.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.errors import TrainingError
from openmm_eqflow.losses.pool import Target, latent_target, prior_score
from openmm_eqflow.priors.base import Prior

__all__ = ["ChartTarget", "bound_energy", "prior_score"]

_ENERGY_MAX = 1e20  # kT


def bound_energy(u: Tensor, energy_high: float) -> tuple[Tensor, Tensor]:
    """Bounded energy (n,) and its slope du_reg / du (n,); see the module docstring."""
    excess = (torch.nan_to_num(u, nan=torch.inf) - energy_high).clamp(0, _ENERGY_MAX)
    bounded = torch.where(excess > 0, energy_high + torch.log1p(excess), u)
    slope = torch.where(excess < _ENERGY_MAX, 1 / (1 + excess), torch.zeros_like(excess))
    return bounded, slope


class ChartTarget:
    """Log density of the target in the chart of a prior, energies bounded.

    Parameters
    ----------
    prior, target
        The chart, and what gives energies and forces.
    energy_high
        Reduced energy from which on the logarithm holds, kT: well above thermal energies.

    Raises
    ------
    ValueError
        ``energy_high`` is not finite.
    """

    def __init__(self, prior: Prior, target: Target, *, energy_high: float) -> None:
        if not math.isfinite(energy_high):
            raise ValueError(f"energy_high is {energy_high}, expected a finite number of kT")
        self.prior, self.target, self.energy_high = prior, target, energy_high
        self.n_evaluated = self.n_invalid = self.n_bounded = 0
        self._lock = threading.Lock()  # shards of a batch run in threads, evaluators may not

    def log_prob_and_gradient(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`-u_{reg}(x(y)) + \mathrm{log\_volume}(y)` (n,) and its gradient.

        Raises
        ------
        TrainingError
            Not one point of the batch has a finite energy.
        """
        high = self.energy_high
        invalid = torch.zeros(len(y), dtype=torch.bool, device=y.device)

        def bound(u: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
            invalid.logical_or_(~torch.isfinite(u) | ~torch.isfinite(du).flatten(1).all(1))
            self.n_bounded += int((u > high).sum())
            u, slope = bound_energy(u, high)
            return u, torch.nan_to_num(du, 0.0, 0.0, 0.0) * slope[:, None, None]

        with self._lock:
            value, gradient = latent_target(self.prior, self.target, y, bound=bound)
            # Off the chart there is no energy either.
            invalid |= ~torch.isfinite(value) | ~torch.isfinite(gradient).flatten(1).all(1)
            self.n_evaluated += len(y)
            self.n_invalid += int(invalid.sum())
        if bool(invalid.all()):
            raise TrainingError(
                f"none of {len(y)} samples of the flow has a finite energy; start from a flow "
                "trained on data (objective flow-matching or liouville), then bring this one in "
                "by a schedule"
            )
        cap = high + math.log1p(_ENERGY_MAX)
        keep = ~invalid.reshape(-1, *[1] * (gradient.ndim - 1))
        return (
            torch.where(invalid, torch.full_like(value, -cap), value),
            torch.where(keep, gradient, torch.zeros_like(gradient)),
        )

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the same log density (n,), differentiable in ``y`` (once)."""
        log_p: Tensor = _LogProb.apply(y, self)
        return log_p


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, target: ChartTarget) -> Tensor:
        value, gradient = target.log_prob_and_gradient(y)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad.reshape(-1, *[1] * (gradient.ndim - 1)) * gradient, None
