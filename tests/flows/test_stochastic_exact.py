"""Hamiltonian trajectories of a cluster's levels: invariance, and rejections that matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from stand_ins.stochastic import END, PAIR, gas, streams_of

from openmm_eqflow.flows import softcore_kernels as kernels
from openmm_eqflow.flows.softcore import SoftCoreTrajectory
from openmm_eqflow.flows.streams import RowStreams


@pytest.mark.statistical
def test_trajectories_leave_the_level_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = quad(PAIR.weight, 0.3, 1.1)[0] / quad(PAIR.weight, 0.3, 15, limit=200)[0]
    layer = SoftCoreTrajectory(torch.from_numpy(END), 0.07, 4)

    def share_of_close_pairs() -> tuple[float, float, float]:
        y, streams, shares = PAIR.draw(8192, 0), streams_of(8192), []
        for _ in range(40):
            y, _, share = layer.move(y, streams)
            shares.append(share)
        close = np.linalg.norm((y[:, 0] - y[:, 1]).numpy(), axis=1) < 1.1
        return float(close.mean()), float(close.std() / np.sqrt(len(close))), np.mean(shares)

    mean, error, accepted = share_of_close_pairs()
    assert 0.5 < accepted < 0.99  # the rejections matter
    assert abs(mean - exact) < 5 * error
    monkeypatch.setattr(kernels, "fill_uniform", lambda u, keys, draw: u.fill(0.0))
    mean, error, _ = share_of_close_pairs()  # power control: all accepted
    assert abs(mean - exact) > 5 * error


def test_overflow_is_rejected() -> None:
    y = torch.from_numpy(gas(16, 5)).float()
    layer = SoftCoreTrajectory(torch.from_numpy(END), 1e6, 3)
    moved, change, accepted = layer.move(y, streams_of(16))
    assert accepted == 0.0
    assert torch.equal(moved, y)
    assert not change.any()


def test_numbers_of_the_kernels_are_those_of_the_streams() -> None:
    streams = RowStreams.drawn(64, torch.Generator().manual_seed(3))
    keys = streams.keys.numpy().view(np.uint64)
    v, u = np.empty((5, 3, 64), np.float32), np.empty(64)
    for draw in range(2):
        kernels.fill_normal(v, keys, 2 * draw)
        kernels.fill_uniform(u, keys, 2 * draw + 1)
        expected = streams.normal(5, 3, dtype=torch.float32).permute(1, 2, 0)
        np.testing.assert_allclose(v, expected.numpy(), atol=2e-7, rtol=2e-6)
        np.testing.assert_array_equal(u, streams.uniform().numpy())
