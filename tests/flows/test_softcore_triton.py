"""Kernels of a cluster's layers on a GPU, interpreted, against the compiled ones of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmm_eqflow import load_flow
from openmm_eqflow.flows.softcore import SoftCoreMap, SoftCoreTrajectory
from openmm_eqflow.flows.streams import RowStreams

pytest.importorskip("triton", reason="no Triton here")
if torch.cuda.is_available():
    pytest.skip("a GPU runs them itself: -m gpu", allow_module_level=True)
from openmm_eqflow.flows import softcore_triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on infinities


def start(n: int) -> tuple[Tensor, Tensor]:
    y = load_flow("lj55").prior.sample_latent(n, generator=torch.Generator().manual_seed(1))
    return y, torch.arange(n) * 10**15 - 7


def test_a_trajectory_is_that_of_the_cpu() -> None:
    """Level by level with the same streams, accepted rows and rejected ones."""
    y, keys = start(4)
    layers = [v for v in load_flow("lj55").layers if isinstance(v, SoftCoreTrajectory)]
    moved = []
    for k, layer in enumerate((layers[0], layers[3], layers[-1])):
        short = SoftCoreTrajectory(layer.level, layer.timestep, 2)
        streams = RowStreams(keys)
        streams.n_drawn = 3 * k
        there, change = short.forward(y, streams)
        ours, by = kernels.trajectory(y, layer.level, layer.timestep, 2, keys, 3 * k)
        assert float((ours - there).abs().max()) < 2e-6
        assert float((by - change).abs().max()) < 1e-3
        moved += (change != 0).tolist()
        other, _ = kernels.trajectory(y, layer.level, layer.timestep, 2, keys, 3 * k + 1)
        if k == 0:  # power: another draw is another trajectory
            assert float((other - there).abs().max()) > 1e-2
        y = there.double()
    assert any(moved)
    assert not all(moved)


def test_a_map_and_its_inverse_are_those_of_the_cpu() -> None:
    y, _ = start(3)
    layer = next(v for v in load_flow("lj55").layers if isinstance(v, SoftCoreMap))
    image, change = layer.forward(y)
    ours, ladj = kernels.transport(y, layer.table, layer.spacing)
    assert float((ours - image).abs().max()) < 1e-6
    assert float((ladj + change).abs().max()) < 1e-5
    assert float((image - y).abs().max()) > 1e-4  # power: the map does something
    back, again = kernels.transport_back(ours, layer.table, layer.spacing, 3e-7, 12)
    assert float((back - y).abs().max()) < 2e-6
    assert float((again - ladj).abs().max()) < 1e-5
    # Off the end of float32 there is no determinant, on a GPU either: such a path has failed.
    y[0, 3, 1] = torch.nan
    for found in (
        kernels.transport(y, layer.table, layer.spacing)[1],
        kernels.transport_back(y, layer.table, layer.spacing, 3e-7, 12)[1],
        layer.forward(y)[1],
    ):
        assert torch.isnan(found).tolist() == [True, False, False]
