"""The four fields that are compared, and what each is trained on.

Every objective is validated on frames it is not trained on: a training keeps the weights of its
best validation loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.geometry import augment_together
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.training.divergences import LikelihoodLoss
from openmm_eqflow.training.flow_matching import FlowMatchingLoss
from openmm_eqflow.training.loop import Objective
from openmm_eqflow.training.recipes import make_recipe
from openmm_eqflow.vector_fields import EGNNField, KernelField, LeaveOneOutField, MLPField

RECIPE = make_recipe("cluster", "standard")


@dataclass(frozen=True)
class FieldSpec:
    """How a field is built, trained and evaluated.

    Attributes
    ----------
    build
        Called with training frames, ``classes`` and ``sizes``.
    pair_tangents
        Whether its exact divergence carries (N-1)D tangents through all pairs of particles.
    """

    build: Callable[..., nn.Module]
    learning_rate: float
    sizes: dict[str, Any] = field(default_factory=dict)
    pair_tangents: bool = False
    equivariant: bool = True

    def chunk_size(self, n_particles: int, n_dims: int) -> int:
        """Return how many configurations are integrated at once: what a cache holds."""
        if not self.pair_tangents:
            return 128
        return min(max(50_000 // (n_particles**2 * (n_particles - 1) * n_dims), 8), 128)

    def share(self, n_particles: int, n_dims: int) -> float:
        """Part of the test frames and samples it is measured on: a fifth where it is slow."""
        return 0.2 if self.chunk_size(n_particles, n_dims) < 64 else 1.0


def _build_mlp(x: Tensor, *, classes: Sequence[int], **sizes: int) -> nn.Module:
    del classes  # it knows nothing of which particles are alike
    return MLPField.fit(x, **sizes)


FIELDS = {
    "KernelField": FieldSpec(KernelField.fit, 5e-3),  # 5e-3: that of the paper
    "LeaveOneOutField": FieldSpec(LeaveOneOutField.fit, 2e-3, dict(RECIPE.field or {})),
    "EGNNField": FieldSpec(
        EGNNField.fit,
        2e-3,
        {"width": 32, "n_layers": 3},
        pair_tangents=True,
    ),
    "MLPField": FieldSpec(_build_mlp, 2e-3, equivariant=False),
}


class HeldOut:
    """A training loss whose validation is that of another one, over held-out frames."""

    def __init__(self, training: Objective, held_out: Objective) -> None:
        self.training, self.held_out = training, held_out

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Loss of a fresh batch."""
        return self.training(batch_size, generator)

    def validation(self, n: int, generator: torch.Generator) -> Tensor:
        """Loss on the held-out frames."""
        return self.held_out.validation(n, generator)


class AugmentedLikelihood(LikelihoodLoss):
    """Likelihood of frames moved by random elements of the group (Gaussian prior: y is x)."""

    classes: Sequence[int] = ()

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Mean of -log q, in kT, over a batch of augmented data."""
        index = self.data.draw(batch_size, generator)
        (y,) = augment_together(
            self.data.y[index], classes=self.classes, proper=False, generator=generator
        )
        return -self.log_prob(y, self.data.log_volume[index]).mean()


def build_objective(
    name: str,
    module: nn.Module,
    prior: MeanFreeGaussian,
    frames: Tensor,
    held_out: Tensor,
    *,
    classes: Sequence[int],
    augmented: bool,
    equivariant: bool,
) -> Objective:
    """Make the objective ``flow-matching`` or ``nll`` over ``frames``.

    Pairs of flow matching are aligned over the group, which only suits an equivariant field or an
    augmented one; a non-equivariant field without augmentation sees independent pairs.
    """
    if name == "nll":
        steps = RECIPE.ode_steps
        if not augmented:
            return LikelihoodLoss(module, prior, frames, held_out=held_out, n_steps=steps)
        loss = AugmentedLikelihood(module, prior, frames, held_out=held_out, n_steps=steps)
        loss.classes = list(classes)
        return loss

    def matching(data: Tensor) -> FlowMatchingLoss:
        return FlowMatchingLoss(
            module,
            prior,
            data,
            classes=classes,
            proper=False,
            n_starts=4 if equivariant or augmented else 0,
            augment=augmented,
        )

    return HeldOut(matching(frames), matching(held_out))
