"""Rigid motions: projections, bases, Haar rotations, alignment."""

from __future__ import annotations

import pytest
import torch

from openmm_eqflow.geometry import (
    align_rotations,
    mean_free_basis,
    pair_vectors,
    random_rotations,
    remove_mean,
    rotate,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_mean_free_basis_is_orthonormal_and_spans_the_projection():
    for n in (2, 3, 7, 22):
        basis = mean_free_basis(n)
        assert basis.shape == (n, n - 1)
        torch.testing.assert_close(basis.T @ basis, torch.eye(n - 1, dtype=torch.float64))
        x = draw(4, n, 3)
        torch.testing.assert_close(torch.einsum("nk,mk,bmd->bnd", basis, basis, x), remove_mean(x))


def test_remove_mean_is_idempotent_and_pair_vectors_keep_their_sign():
    x = draw(5, 4, 3)
    centred = remove_mean(x)
    assert float(centred.sum(1).abs().max()) < 1e-14
    torch.testing.assert_close(remove_mean(centred), centred)
    r = pair_vectors(x)
    torch.testing.assert_close(r[:, 2, 0], x[:, 2] - x[:, 0])
    torch.testing.assert_close(pair_vectors(centred), r)


@pytest.mark.parametrize("n_dims", [2, 3])
def test_rotations_are_proper_and_haar(n_dims):
    r = random_rotations(20_000, n_dims, generator=torch.Generator().manual_seed(1))
    eye = torch.eye(n_dims, dtype=torch.float64)
    torch.testing.assert_close(r @ r.transpose(1, 2), eye.expand_as(r))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(20_000, dtype=torch.float64))
    # Haar: first moments vanish, second moments are 1/D, and the trace has E[tr^2] = 1 (SO(3))
    # or 2 (SO(2)). A QR without the sign fix fails the first.
    error = 5 / 20_000**0.5
    assert float(r.mean(0).abs().max()) < error
    assert float((r.square().mean(0) - 1 / n_dims).abs().max()) < error
    trace = r.diagonal(dim1=1, dim2=2).sum(1)
    expected = 1.0 if n_dims == 3 else 2.0
    assert float(trace.square().mean()) == pytest.approx(expected, abs=2.5 * error)


@pytest.mark.parametrize("n_dims", [2, 3])
def test_kabsch_recovers_rotations_and_refuses_reflections_when_proper(n_dims):
    x = remove_mean(draw(6, 5, n_dims))
    r = random_rotations(6, n_dims, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(align_rotations(x, rotate(x, r)), r)
    mirrored = x * torch.tensor([-1.0] + [1.0] * (n_dims - 1), dtype=torch.float64)
    found = align_rotations(x, mirrored)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(6, dtype=torch.float64))
    assert bool(((rotate(x, found) - mirrored).square().sum((1, 2)) > 1e-2).all())
    improper = align_rotations(x, mirrored, proper=False)
    torch.testing.assert_close(rotate(x, improper), mirrored)


def test_kabsch_is_optimal():
    x, y = remove_mean(draw(3, 6, 3)), remove_mean(draw(3, 6, 3, seed=5))
    best = (rotate(x, align_rotations(x, y)) - y).square().sum((1, 2))
    for seed in range(200):
        r = random_rotations(3, generator=torch.Generator().manual_seed(seed))
        assert bool(((rotate(x, r) - y).square().sum((1, 2)) >= best - 1e-12).all())
