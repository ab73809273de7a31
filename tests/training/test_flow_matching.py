"""Flow matching: alignment against oracles, the objective's minimiser, reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import (
    align_rotations,
    augment_together,
    random_rotations,
    remove_mean,
    rotate,
)
from openmm_eqflow.priors.gaussian import MeanFreeGaussian
from openmm_eqflow.training.flow_matching import FlowMatchingLoss, align_batch, assign
from openmm_eqflow.vector_fields.baselines import MLPField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField


@pytest.mark.parametrize("n", [1, 2, 5, 13, 40])
def test_assignment_is_optimal(n: int) -> None:
    rng = np.random.default_rng(n)
    for trial in range(20):
        cost = rng.normal(size=(n, n))
        if trial % 2:
            cost = np.round(cost)  # ties
        rows, columns = linear_sum_assignment(cost)
        column = assign(cost)
        assert sorted(column) == list(range(n))
        assert cost[np.arange(n), column].sum() == pytest.approx(cost[rows, columns].sum())


def eye_starts(n: int, n_starts: int, n_dims: int) -> np.ndarray:
    starts = random_rotations(n * n_starts, n_dims, generator=torch.Generator().manual_seed(9))
    return starts.reshape(n, n_starts, n_dims, n_dims).numpy()


@pytest.mark.parametrize("n_dims", [2, 3])
@pytest.mark.parametrize("proper", [True, False])
def test_a_moved_copy_is_recovered(n_dims: int, proper: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = remove_mean(torch.randn(6, 7, n_dims, generator=generator, dtype=torch.float64))
    classes = [0, 0, 1, 1, 1, 2, 0]
    order = [6, 0, 4, 2, 3, 5, 1]
    mobile = rotate(reference[:, order], random_rotations(6, n_dims, generator=generator))
    if not proper:
        mobile = mobile * torch.tensor([-1.0, *[1.0] * (n_dims - 1)])
    aligned = align_batch(
        mobile.numpy(),
        reference.numpy(),
        eye_starts(6, 60, n_dims),
        classes=classes,
        proper=proper,
    )
    np.testing.assert_allclose(aligned, reference.numpy(), atol=1e-10)


def test_alignment_stays_on_the_orbit_and_is_a_local_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (remove_mean(torch.randn(8, 6, 3, generator=generator).double()) for _ in range(2))
    classes = [0, 0, 0, 1, 1, 2]
    out = torch.from_numpy(
        align_batch(a.numpy(), b.numpy(), eye_starts(8, 3, 3), classes=classes, proper=True)
    )
    for s in range(8):
        # same Gram matrix up to a relabelling inside classes: compare sorted distances per class
        for k in range(3):
            rows = [i for i, c in enumerate(classes) if c == k]
            before = torch.cdist(a[s, rows], a[s]).flatten().sort()[0]
            after = torch.cdist(out[s, rows], out[s]).flatten().sort()[0]
            torch.testing.assert_close(before, after)
    # Neither a rotation nor an exchange inside a class comes closer.
    rotation = align_rotations(out, b, proper=True)
    torch.testing.assert_close(rotate(out, rotation), out, rtol=0, atol=1e-9)
    cost = (out - b).square().sum((1, 2))
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 4)):
        swapped = out.clone()
        swapped[:, [i, j]] = out[:, [j, i]]
        assert bool(((swapped - b).square().sum((1, 2)) > cost).all())
    # The hand stays: that of four points which no relabelling inside classes exchanges.
    hands = []
    for x in (a, out):
        near = (x[:, :3] - x[:, 5:]).norm(dim=-1).argmin(1)
        place = x[torch.arange(8), near]
        edges = [v - x[:, 5] for v in (x[:, :3].mean(1), x[:, 3:5].mean(1), place)]
        hands.append(torch.linalg.det(torch.stack(edges, 1)))
    torch.testing.assert_close(*hands)


def loss_for(field: nn.Module, data: Tensor, **options: object) -> FlowMatchingLoss:
    settings: dict[str, object] = {"classes": [0] * data.shape[1], "proper": False, **options}
    prior = MeanFreeGaussian(data.shape[1], data.shape[2], 0.5)
    return FlowMatchingLoss(field, prior, data, **settings)  # type: ignore[arg-type]


def lattice(n: int, n_dims: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sites = torch.eye(n_dims, dtype=torch.float64)
    return remove_mean(sites + 0.05 * torch.randn(n, n_dims, n_dims, generator=generator))


def test_more_starts_shorten_the_paths() -> None:
    generator = torch.Generator().manual_seed(3)
    data = remove_mean(torch.randn(64, 8, 3, generator=generator).double())
    field = LeaveOneOutField.fit(data, classes=[0] * 8, width=8, readout_width=8)
    costs = []
    for n_starts in (0, 1, 6):
        loss = loss_for(field, data, n_starts=n_starts)
        x0, x1 = loss.pairs(64, torch.Generator().manual_seed(4))
        costs.append(float((x1 - x0).square().sum((1, 2)).mean()))
    assert costs[2] < costs[1] < costs[0]


def test_validation_sees_held_out_frames_and_training_does_not() -> None:
    data, other = lattice(50), 3.0 * lattice(20)
    field = LeaveOneOutField.fit(data, classes=[0] * 3, width=8, readout_width=8)
    plain, loss = loss_for(field, data), loss_for(field, data, held_out=other)

    def seeded(k: int) -> torch.Generator:
        return torch.Generator().manual_seed(k)

    assert torch.equal(loss(16, seeded(6)), plain(16, seeded(6)))
    expected = loss_for(field, other).validation(64, seeded(5))
    assert torch.equal(loss.validation(64, seeded(5)), expected)
    assert float(expected) > 2.0 * float(plain.validation(64, seeded(5)))
    nothing = loss_for(field, data, held_out=other[:0])
    assert torch.equal(nothing.validation(64, seeded(5)), plain.validation(64, seeded(5)))


def test_seeded_and_chunks_count_by_their_size() -> None:
    data = lattice(50)
    field = LeaveOneOutField.fit(data, classes=[0] * 3, width=8, readout_width=8).double()
    loss = loss_for(field, data)
    values = [float(loss.validation(64, torch.Generator().manual_seed(5))) for _ in range(2)]
    assert values[0] == values[1]
    first = loss(16, torch.Generator().manual_seed(6))
    assert first.requires_grad
    assert torch.equal(first, loss(16, torch.Generator().manual_seed(6)))
    chunked = loss.validation(100, torch.Generator().manual_seed(5), chunk_size=30)
    stream, sizes = torch.Generator().manual_seed(5), (30, 30, 30, 10)
    parts = [float(loss.validation(n, stream)) * n for n in sizes]
    assert float(chunked) == pytest.approx(sum(parts) / 100, rel=1e-12)
    assert float(chunked) != pytest.approx(sum(parts[:3]) / 90, rel=1e-3)  # power: none is left


def test_the_loss_is_least_at_the_exact_field() -> None:
    # Gaussian data with independent pairs: v = x (t s1^2 - (1-t) s0^2) / (t^2 s1^2 + (1-t)^2 s0^2)
    generator = torch.Generator().manual_seed(7)
    data = 0.25 * remove_mean(torch.randn(4000, 3, 2, generator=generator).double())
    loss = loss_for(nn.Linear(1, 1), data, n_starts=0)

    class Exact(nn.Module):
        def __init__(self, tilt: float) -> None:
            super().__init__()
            self.tilt = nn.Parameter(torch.tensor(tilt, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            a, b = t * 0.25**2, (1 - t) * 0.5**2
            return ((a - b) / (t * a + (1 - t) * b) + self.tilt)[:, None, None] * x

    values = []
    for tilt in (-0.3, 0.0, 0.3):
        loss.field = Exact(tilt)
        values.append(float(loss.validation(8000, torch.Generator().manual_seed(8))))
    assert values[1] < min(values[0], values[2])
    # The loss is a parabola of the tilt, of the same draws: where its vertex is.
    vertex = 0.15 * (values[0] - values[2]) / (values[0] + values[2] - 2 * values[1])
    assert abs(vertex) < 0.02


def test_augmentation_keeps_cost_and_randomises_orientation() -> None:
    data = lattice(40)
    field = MLPField.fit(data, width=8)
    with pytest.raises(ConfigurationError, match="augment=True"):
        loss_for(field, data)
    plain = loss_for(LeaveOneOutField.fit(data, classes=[0] * 3, width=8), data, classes=[0, 1, 0])
    augmented = loss_for(field, data, classes=[0, 1, 0], augment=True)
    x0, x1 = plain.pairs(400, torch.Generator().manual_seed(9))
    y0, y1 = augmented.pairs(400, torch.Generator().manual_seed(9))
    cost = (x1 - x0).square().sum((1, 2))
    torch.testing.assert_close((y1 - y0).square().sum((1, 2)), cost)
    # atom 1 keeps its label; its direction is uniform after augmentation
    direction = nn.functional.normalize(y1[:, 1], dim=-1)
    assert float(direction.mean(0).abs().max()) < 5 * (1 / 3 / 400) ** 0.5
    second = direction.T @ direction / 400 - torch.eye(3, dtype=direction.dtype) / 3
    assert float(second.abs().max()) < 5 * (4 / 45 / 400) ** 0.5
    assert float(nn.functional.normalize(x1[:, 1], dim=-1).mean(0).abs().max()) > 0.5


def test_group_elements_are_the_same_for_all_batches() -> None:
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, 2, generator=stream, dtype=torch.float64)
    options = {"classes": [0, 0, 0, 1], "proper": False, "generator": stream}
    y, z = augment_together(x, 2.0 * x, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(2.0 * y, z)
    # Which of the first three came where: all six orders, about as often as each other.
    gap = (y[:, :, None].norm(dim=-1) - x[:, None].norm(dim=-1)).abs()
    source = gap.argmin(-1)
    assert bool((source[:, 3] == 3).all())
    _, counts = torch.unique(source[:, :3], dim=0, return_counts=True)
    assert len(counts) == 6
    assert int(counts.min()) > 50 - 5 * 7
    # Reflections occur, unless asked not to.
    for proper, share in ((False, 0.5), (True, 1.0)):
        (y,) = augment_together(x, **options | {"classes": [0, 1, 2, 3], "proper": proper})  # type: ignore[arg-type]
        sign = torch.sign(torch.linalg.det(y[:, :2]) * torch.linalg.det(x[:, :2]))
        assert abs(float((sign > 0).double().mean()) - share) < 5 * 0.5 / 300**0.5


def test_bad_arguments() -> None:
    data = lattice(10)
    field = LeaveOneOutField.fit(data, classes=[0] * 3, width=8)
    with pytest.raises(ConfigurationError, match="do not match"):
        loss_for(field, data, classes=[0, 0])
    with pytest.raises(ConfigurationError, match="n_starts"):
        loss_for(field, data, n_starts=-1)
