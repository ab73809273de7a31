r"""Path gradients: the gradients of both KL divergences without the noise of the score term.

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

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.losses.chart_target import ChartTarget, prior_score
from openmm_eqflow.losses.likelihood import LikelihoodLoss
from openmm_eqflow.losses.reverse_kl import ReverseKLLoss
from openmm_eqflow.losses.solve import follow, transport_score

__all__ = ["ForwardPathLoss", "ReversePathLoss"]


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
        As for :class:`~openmm_eqflow.losses.likelihood.LikelihoodLoss`.
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
