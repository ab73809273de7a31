"""A chart of its own, targets with known path densities on it, the exact field between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openmm_eqflow.training.pool import Pool, build_pool
from stand_ins.flows import stream

MEAN = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
SPREAD = 0.8


class FlatPrior:
    """Three standard normal residuals and one uniform torsion; positions are y itself."""

    n_particles, n_dims, n_soft = 2, 2, 1
    event_shape = (4,)

    def sample_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        tau = 2 * math.pi * (torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5)
        return torch.cat([z, tau], 1)

    def latent_log_prob(self, y: Tensor) -> Tensor:
        return (
            -0.5 * y[:, :3].square().sum(1) - 1.5 * math.log(2 * math.pi) - math.log(2 * math.pi)
        )

    def to_cartesian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.reshape(-1, 2, 2), torch.zeros_like(y[:, 0])

    def from_cartesian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, 4), torch.zeros_like(x[:, 0, 0])


class CoupledTarget:
    """z | tau ~ N(MEAN + cos(tau) e0, SPREAD^2), tau ~ von Mises(0.8); unnormalised."""

    coupling = 0.5
    kappa = 0.8

    def log_p(self, y: Tensor) -> Tensor:
        z, tau = y[:, :3], y[:, 3]
        shift = self.coupling * torch.cos(tau)[:, None] * torch.eye(3, dtype=y.dtype)[0]
        return -0.5 * ((z - MEAN - shift) / SPREAD).square().sum(1) + self.kappa * torch.cos(tau)

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = -self.log_p(x.reshape(-1, 4))
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact samples by rejection, standing in for reference frames."""
        generator = stream(seed)
        tau = 2 * math.pi * (torch.rand(4 * n, generator=generator, dtype=torch.float64) - 0.5)
        keep = torch.rand(4 * n, generator=generator).log() < self.kappa * (torch.cos(tau) - 1)
        tau = tau[keep][:n]
        z = MEAN + SPREAD * torch.randn(n, 3, generator=generator, dtype=torch.float64)
        z[:, 0] += self.coupling * torch.cos(tau)
        return torch.cat([z, tau[:, None]], 1).reshape(-1, 2, 2)


class GaussianTarget(CoupledTarget):
    coupling = 0.0
    kappa = 0.0


class ExactField(nn.Module):
    """Linear field along p_t ~ p0^(1-t) p1^t between the two Gaussians (zero for tau)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        t = t[:, None].double()
        precision = (1 - t) + t / SPREAD**2
        slope = 1 / SPREAD**2 - 1
        centre = t * MEAN / SPREAD**2 / precision
        drift = MEAN / SPREAD**2 / precision - centre * slope / precision
        rate = -0.5 * slope / precision  # d log sigma / dt
        v = drift + rate * (y[:, :3] - centre)
        v = self.factor * torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        return v, self.factor * 3 * rate[:, 0]


def pool(target: CoupledTarget, n: int, *, n_frames: int = 0, seed: int = 0) -> Pool:
    frames = target.sample(n_frames, seed + 50) if n_frames else None
    return build_pool(FlatPrior(), target, n_prior=n, frames=frames, generator=stream(seed))
