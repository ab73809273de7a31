r"""Objectives that simulate the flow: likelihood, reverse KL and path gradients both ways.

Prior and target as densities of the chart, with gradients that do not come from autograd.

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

Negative log likelihood with the exact divergence.

.. math:: L = -E_{x \sim data}[\log q(x)], \qquad
          \log q(x) = \log p_0(z) - \mathrm{ladj} - \mathrm{log\_volume}(y), \quad z = T^{-1}(y)

(Köhler, Klein, Noé 2020; Chen et al. 2018, arXiv:1806.07366), up to the entropy of the data the
forward KL divergence. Any field with an exact divergence and any prior: the flow runs backwards
from the data in the prior's chart.

Reverse KL divergence: the flow's own samples against the energy, no data.

.. math:: L = E_{z \sim p_0}[\log q(T(z)) + u(T(z))] = KL(q \| p) - \log Z

(Noé, Olsson, Köhler, Wu 2019, "training by energy"), with reparameterised samples x = T(z): its
gradient takes forces. In the chart, where log q(y) = log p_0(z) - ladj and log p_1(y) = -u +
log_volume, no rotation is needed: both densities are invariant. The bound on the energy and what
becomes of invalid samples: :mod:`~openmm_eqflow.training.divergences`.

Path gradients: the gradients of both KL divergences without the noise of the score term.

The gradient of the reverse divergence has two parts, one through the sample, x = T(z), and one
through the weights of log q at fixed x. The second is a score: its mean is zero, its variance is
not, also where q = p. Left out (Roeder, Wu, Duvenaud 2017, "Sticking the landing",
arXiv:1703.09194), the *path gradient* remains,

.. math:: \nabla_\theta KL(q \| p) = E_z\left[\nabla_y (\log q - \log p_1)(y)
          \cdot \partial_\theta T(z)\right], \qquad y = T(z),

unbiased, and zero sample by sample at q = p. The score of q comes from an ODE along the flow
(Vaitl, Nicoli, Nakajima, Kessel 2022, "Path-gradient estimators for continuous normalizing
flows").

The forward divergence is a reverse one in latent space, between the data pulled back,
:math:`p_{\theta,0} = T^{-1}_* p_1`, and the prior, so that

.. math:: \nabla_\theta KL(p \| q) = E_{y \sim p_1}\left[\nabla_z (\log p_{\theta,0} -
          \log p_0)(z) \cdot \partial_\theta T^{-1}(y)\right], \qquad z = T^{-1}(y)

(Vaitl, Winkler, Richter, Kessel 2024, "Fast and unified path gradient estimators for normalizing
flows", arXiv:2403.15881; with flow matching first: Vaitl, Klein 2025, arXiv:2505.10139). The score
of the target at the data is minus the force over kT, computed once. The dropped term has mean zero
under p exactly: on data that are not equilibrium samples of p, or are few, the forward path
gradient is not the gradient of the NLL of those data; it uses the forces instead.

Both objectives return the *value* of the divergence (up to a constant) with the *path gradient*
attached to it.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.flows.kernels import (
    DifferentiablePotential,
    latent_target,
    prior_score,
)
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.training.solve import follow, solve, transport_score, uniform_grid

__all__ = [
    "ChartData",
    "ChartTarget",
    "ForwardPathLoss",
    "LikelihoodLoss",
    "ReverseKLLoss",
    "ReversePathLoss",
    "bound_energy",
    "prior_score",
    "require_exact",
]

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

    def __init__(
        self, prior: Prior, target: DifferentiablePotential, *, energy_high: float
    ) -> None:
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

#: Validation points at most, and how many are integrated at once: every one is a whole solve.
N_VALIDATION = 512
VALIDATION_CHUNK = 128


def require_exact(field: nn.Module) -> None:
    """Refuse a field whose divergence is an estimate."""
    if not getattr(field, "exact_divergence", False):
        raise ConfigurationError(
            f"{type(field).__name__} estimates its divergence: its likelihood is not exact; use "
            "a field with an exact divergence"
        )


class ChartData:
    """Configurations in the chart of a prior: y (n, *event_shape) and log_volume (n,), float64.

    Raises
    ------
    ConfigurationError
        A configuration does not lie in the chart.
    """

    def __init__(self, prior: Prior, data: Tensor) -> None:
        self.y, self.log_volume = prior.from_cartesian(data.detach().double().cpu())
        finite = torch.isfinite(self.log_volume) & torch.isfinite(self.y).flatten(1).all(1)
        if not bool(finite.all()) or not len(data):
            raise ConfigurationError(
                f"{int((~finite).sum())} of {len(data)} configurations are outside the chart of "
                "the prior, expected none (and at least one configuration): fit the prior to "
                "these data"
            )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return ``n`` indices, drawn with replacement on the CPU."""
        return torch.randint(len(self.y), (n,), generator=generator)

    def spread(self, n: int) -> Tensor:
        """Return at most ``n`` indices, evenly spread over the data."""
        return torch.arange(0, len(self.y), max(1, -(-len(self.y) // n)))


class LikelihoodLoss:
    """Mean of -log q over batches of data; see the module docstring.

    Parameters
    ----------
    field
        Vector field with an exact divergence (its weights are what is trained).
    prior
        Prior with the field's ``event_shape``.
    data
        Equilibrium configurations (n, n_particles, n_dims), nm.
    held_out
        Configurations for :meth:`validation`; ``data`` if None.
    n_steps
        RK4 steps of a solve.
    """

    def __init__(
        self,
        field: nn.Module,
        prior: Prior,
        data: Tensor,
        *,
        held_out: Tensor | None = None,
        n_steps: int = 8,
    ) -> None:
        require_exact(field)
        self.field, self.prior = field, prior
        self.data = ChartData(prior, data)
        self.held_out = self.data if held_out is None else ChartData(prior, held_out)
        self.grid = uniform_grid(n_steps)

    def log_prob(self, y: Tensor, log_volume: Tensor) -> Tensor:
        """Log density (n,) of configurations with chart points ``y``; differentiable."""
        device = next(self.field.parameters()).device
        z, ladj = solve(self.field, y.to(device), self.grid, reverse=True)
        return self.prior.latent_log_prob(z) - ladj - log_volume.to(device)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q, in kT, over a batch of data."""
        index = self.data.draw(batch_size, generator)
        return -self.log_prob(self.data.y[index], self.data.log_volume[index]).mean()

    @torch.no_grad()
    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q over held-out data: the same configurations every time."""
        data = self.held_out
        index = data.spread(min(n, N_VALIDATION))
        return -torch.cat(
            [
                self.log_prob(data.y[part], data.log_volume[part])
                for part in index.split(VALIDATION_CHUNK)
            ]
        ).mean()


class ReverseKLLoss:
    """Mean of log q + u over samples of the flow, kT; see the module docstring.

    Parameters
    ----------
    field
        Vector field with an exact divergence (its weights are what is trained).
    target
        Target in the chart of the flow's prior.
    n_steps
        RK4 steps of a solve.
    """

    def __init__(self, field: nn.Module, target: ChartTarget, *, n_steps: int = 8) -> None:
        require_exact(field)
        self.field, self.target, self.prior = field, target, target.prior
        self.grid = uniform_grid(n_steps)

    def latents(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw (n, *event_shape) latent points, on the CPU whatever the device."""
        z = self.prior.sample_latent(n, generator=generator)
        return z.to(next(self.field.parameters()).device)

    def per_sample(self, z: Tensor) -> Tensor:
        """Return log q + u (n,) of the samples that ``z`` flows to; differentiable."""
        y, ladj = solve(self.field, z, self.grid)
        return self.prior.latent_log_prob(z) - ladj - self.target.log_prob(y)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of log q + u over a batch of fresh samples."""
        return self.per_sample(self.latents(batch_size, generator)).mean()

    @torch.no_grad()
    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Mean of log q + u over samples; the same generator state gives the same latents."""
        z = self.latents(min(n, N_VALIDATION), generator)
        parts = [ReverseKLLoss.per_sample(self, part) for part in z.split(VALIDATION_CHUNK)]
        return torch.cat(parts).mean()


def _attach(value: Tensor, direction: Tensor, point: Tensor) -> Tensor:
    """Per-sample ``value`` (n,) whose gradient is that of ``direction . point``."""
    pull = (direction.detach() * point).flatten(1).sum(1)
    return value.detach() + pull - pull.detach()


class ReversePathLoss(ReverseKLLoss):
    """Reverse KL divergence with its path gradient; parameters as of ``ReverseKLLoss``."""

    def per_sample(self, z: Tensor) -> Tensor:
        """Return log q + u (n,) of the samples that ``z`` flows to; path gradient attached."""
        log_p0, score = prior_score(self.prior, z)
        y, score, ladj, states = transport_score(self.field, z, score, self.grid)
        log_p1, force = self.target.log_prob_and_gradient(y)
        end = follow(self.field, states, self.grid)
        return _attach(log_p0 - ladj - log_p1, score - force, end)


class ForwardPathLoss(LikelihoodLoss):
    """Mean of -log q over data with the path gradient of the forward KL divergence.

    Parameters
    ----------
    field, data, held_out, n_steps
        As for :class:`~openmm_eqflow.training.divergences.LikelihoodLoss`.
    target
        Target in the chart of the flow's prior; its forces at the data are computed here, once.

    Raises
    ------
    ConfigurationError
        Some data have no finite energy: they are no samples of the target.
    """

    def __init__(
        self,
        field: nn.Module,
        target: ChartTarget,
        data: Tensor,
        *,
        held_out: Tensor | None = None,
        n_steps: int = 8,
        chunk: int = 4096,
    ) -> None:
        super().__init__(field, target.prior, data, held_out=held_out, n_steps=n_steps)
        before = target.n_invalid
        parts = [target.log_prob_and_gradient(y)[1] for y in self.data.y.split(chunk)]
        if target.n_invalid > before:
            raise ConfigurationError(
                f"{target.n_invalid - before} of {len(data)} data have no finite energy: they "
                "are no samples of this target; check temperature, force field and chirality"
            )
        self.score = torch.cat(parts)

    def per_sample(self, index: Tensor) -> Tensor:
        """Return -log q (n,) of data ``index``, path gradient attached."""
        device = next(self.field.parameters()).device
        y, score = self.data.y[index].to(device), self.score[index].to(device)
        z, pulled, ladj, states = transport_score(
            self.field, y, score, self.grid, reverse=True
        )
        log_p0, slope = prior_score(self.prior, z)
        value = ladj + self.data.log_volume[index].to(device) - log_p0
        start = follow(self.field, states, self.grid, reverse=True)
        return _attach(value, pulled - slope, start)

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q over a batch of data, path gradient attached."""
        return self.per_sample(self.data.draw(batch_size, generator)).mean()
