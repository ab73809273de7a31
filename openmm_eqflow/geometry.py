r"""Rigid motions, the mean-free subspace and random elements of the symmetry group.

Rigid motions and the mean-free subspace.

Positions are ``(..., n_particles, n_dims)`` in nm. A potential without external field is invariant
under translations, so its Boltzmann factor is normalisable only on the mean-free subspace
:math:`\{x : \sum_i x_i = 0\}` of dimension :math:`(N-1)D`; every density of this package is a
density with respect to Lebesgue measure there (Köhler, Klein, Noé 2020, section 4).

Random elements of the symmetry group of a target: what data augmentation applies.

Rotations, reflections and relabellings leave the energy of a cluster as it is, so a configuration
moved by any of them is as good a sample. An equivariant field gains nothing from it; a
non-equivariant one can only learn the symmetry this way (Köhler, Klein, Noé 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "align_rotations",
    "augment_together",
    "mean_free_basis",
    "pair_vectors",
    "random_permutations",
    "random_rotations",
    "remove_mean",
    "rotate",
    "superposed",
    "where_drawn",
]


def remove_mean(x: Tensor) -> Tensor:
    """Project onto the mean-free subspace (geometric centroid, not centre of mass)."""
    return x - x.mean(dim=-2, keepdim=True)


def pair_vectors(x: Tensor) -> Tensor:
    r"""Return :math:`r_{ij} = x_i - x_j`, shape ``(..., n_particles, n_particles, n_dims)``."""
    return x.unsqueeze(-2) - x.unsqueeze(-3)


def mean_free_basis(n_particles: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal basis of the mean-free subspace of one axis, ``(n_particles, n_particles - 1)``.

    Columns are the Helmert contrasts, so the result is deterministic.
    """
    k = torch.arange(1, n_particles, dtype=dtype)
    rows = torch.arange(n_particles, dtype=dtype)[:, None]
    basis = torch.where(rows < k, torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    basis = torch.where(rows == k, -k.expand(n_particles, -1), basis)
    return basis / torch.sqrt(k * (k + 1))


def where_drawn(generator: torch.Generator | None) -> torch.device:
    """Device of the numbers a generator draws; torch's own is that of the CPU."""
    return torch.device("cpu") if generator is None else generator.device


def random_rotations(
    n: int,
    n_dims: int = 3,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw ``n`` proper rotations from the Haar measure of SO(n_dims), ``(n, n_dims, n_dims)``.

    QR decomposition of a Gaussian matrix with the signs of R's diagonal absorbed (Mezzadri 2007);
    on a GPU, which takes matrices one by one there, by Gram and Schmidt, which gives that sign.
    """
    device = where_drawn(generator)
    a = torch.randn(n, n_dims, n_dims, generator=generator, dtype=dtype, device=device)
    if device.type == "cpu":
        q, r = torch.linalg.qr(a)
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    else:
        q = _gram_schmidt(a)
    flip = torch.linalg.det(q) < 0
    first = torch.where(flip[:, None], -q[:, :, 0], q[:, :, 0])
    return torch.cat([first.unsqueeze(-1), q[:, :, 1:]], -1)


def _gram_schmidt(a: Tensor) -> Tensor:
    """Orthonormal columns (n, D, D); twice is enough for round-off."""
    columns: list[Tensor] = []
    for column in a.unbind(-1):
        for _ in range(2):
            for other in columns:
                column = column - (column * other).sum(-1, keepdim=True) * other
        columns.append(column / torch.linalg.vector_norm(column, dim=-1, keepdim=True))
    return torch.stack(columns, -1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply ``rotation`` (..., D, D) to positions ``x`` (..., N, D): row vectors times R^T."""
    return x @ rotation.transpose(-1, -2)


def align_rotations(mobile: Tensor, reference: Tensor, *, proper: bool = True) -> Tensor:
    r"""Rotation R minimising :math:`\sum_i |R\,a_i - b_i|^2` (Kabsch 1976), batched.

    Parameters
    ----------
    mobile, reference
        Mean-free positions ``(..., n_particles, n_dims)``.
    proper
        Allow proper rotations only (det R = +1); otherwise reflections too.
    """
    u, _, vt = torch.linalg.svd(mobile.transpose(-1, -2) @ reference)
    if proper:
        sign = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
        u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    return (u @ vt).transpose(-1, -2)


def superposed(x: Tensor, by: Sequence[int] | None = None) -> Tensor:
    """Turn structures (n, N, 3) onto the first, by some of their atoms or by all.

    Not by mdtraj: its quaternion iteration does not converge for some small molecules, and says so
    on stderr once per frame.
    """
    chosen = list(range(x.shape[1])) if by is None else list(by)
    x = x - x[:, chosen].mean(dim=1, keepdim=True)
    return rotate(x, align_rotations(x[:, chosen], x[:1, chosen]))


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
