r"""Markov kernels in the latent space of a flow.

With x = T(z) the target's density in the latent space is

.. math:: \pi(z) \propto p_0(z)\, w(z), \qquad w(z) = e^{-u(T(z))} / q(T(z)),

the prior times the importance weight: a good flow makes w flat, so steps that would be refused in
Cartesian coordinates are accepted here. Between prior and target lie

.. math:: \gamma_\beta(z) = p_0(z)\, w(z)^\beta, \qquad 0 \le \beta \le 1.

The kernels are preconditioned Crank-Nicolson (Cotter, Roberts, Stuart, White 2013) or Metropolised
Langevin (Roberts, Tweedie 1996) with respect to :math:`\gamma_\beta`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_eqflow.ensemble import ReducedPotential
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.metropolis import metropolis_accept
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.priors.torsions import TorsionDensity

__all__ = ["KernelKind", "LatentFlow", "LatentKernel", "LatentState"]

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
