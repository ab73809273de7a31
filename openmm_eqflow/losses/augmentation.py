"""Random elements of the symmetry group of a target: what data augmentation applies.

Rotations, reflections and relabellings leave the energy of a cluster as it is, so a configuration
moved by any of them is as good a sample. An equivariant field gains nothing from it; a
non-equivariant one can only learn the symmetry this way (Köhler, Klein, Noé 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_eqflow.geometry import random_rotations, rotate

__all__ = ["augment_together", "random_permutations"]


def random_permutations(classes: Sequence[int], n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` relabellings (n, n_particles), uniform among those that keep every class."""
    labels = torch.tensor(list(classes), dtype=torch.float64)
    keys = labels + 0.5 * torch.rand(n, len(labels), generator=generator, dtype=torch.float64)
    # the k-th smallest key of a class replaces its k-th member
    order = keys.argsort(dim=-1)
    place = labels.argsort(stable=True)
    out = torch.empty_like(order)
    out[:, place] = order
    return out


def augment_together(
    *batches: Tensor,
    classes: Sequence[int],
    proper: bool,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Move row k of every batch by the same random element of the group, a new one for each k.

    Parameters
    ----------
    batches
        Mean-free positions (n, n_particles, n_dims), float64 on the CPU.
    classes
        Class of each atom; any permutation inside a class must be a symmetry.
    proper
        Rotations only; False also reflects (targets without chirality).

    Examples
    --------
    >>> x = torch.randn(5, 3, 2, dtype=torch.float64)
    >>> stream = torch.Generator().manual_seed(0)
    >>> (y,) = augment_together(x, classes=[0, 0, 0], proper=False, generator=stream)
    >>> torch.allclose(torch.pdist(y[0]).sort().values, torch.pdist(x[0]).sort().values)
    True
    """
    n, _, n_dims = batches[0].shape
    rotations = random_rotations(n, n_dims, generator=generator)
    if not proper:
        sign = torch.randint(2, (n, 1, 1), generator=generator) * 2.0 - 1.0
        rotations = torch.cat([rotations[..., :1] * sign, rotations[..., 1:]], dim=-1)
    order = random_permutations(classes, n, generator).unsqueeze(-1).expand(-1, -1, n_dims)
    return tuple(rotate(x, rotations).gather(1, order) for x in batches)
