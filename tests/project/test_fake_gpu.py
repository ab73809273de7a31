"""Where tensors live, without a GPU: forward passes on torch's fake tensors of device cuda."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins.fake_cuda import fake_cuda, on_fake_cuda
from stand_ins.priors import prior_of

from openmm_eqflow import load_flow, load_system
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.priors import compiled_chart
from openmm_eqflow.priors.compiled_chart import prior_value_and_score
from openmm_eqflow.runs.stages import build_target

MAPS = ["dw4", "alanine-dipeptide", "toluene", "ala3"]


def test_the_fake_gpu_finds_hidden_copies() -> None:
    with fake_cuda():
        x = torch.empty(3, device="cuda")
        for wrong in (lambda: x + torch.empty(3), lambda: x[torch.tensor([0])], lambda: x[[0, 1]]):
            with pytest.raises(RuntimeError):
                wrong()
        assert x[1:].is_cuda


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("name", MAPS)
def test_a_flow_stays_on_its_device(name: str) -> None:
    flow = load_flow(name)
    with fake_cuda(), torch.no_grad():
        there = on_fake_cuda(flow)
        y = torch.randn(4, *flow.prior.event_shape, dtype=torch.float64, device="cuda")
        streams = RowStreams(torch.zeros(4, dtype=torch.int64, device="cuda"))
        end, change = there.forward(y, streams)
        x, log_volume = there.prior.to_cartesian(end)
        log_q = there.prior.latent_log_prob(y) + change - log_volume
        back, _ = there.prior.from_cartesian(x)
        start, _ = there.backward(back, RowStreams.of(x))
        for tensor in (end, x, log_q, start, streams.normal(3), streams.uniform()):
            assert tensor.is_cuda


@pytest.fixture
def chart_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the chart's kernels return, without the kernels, which want real numbers."""

    def place(rows: Any, lead: Any, b: Any, th: Any, ta: Any) -> Any:
        return b.new_empty(len(rows), 3, b.shape[1]), b.new_empty(b.shape[1])

    def pull_back(rows: Any, lead: Any, b: Any, th: Any, ta: Any, x: Any, g: Any) -> Any:
        return torch.empty_like(b), torch.empty_like(th), torch.empty_like(ta)

    def table_sums(angles: Any, table: Any, label: Any, m: int, width: float, reach: int) -> Any:
        assert angles.device == table.device == label.device
        return angles.new_empty(m, angles.shape[1]), angles.new_empty(m, *angles.shape)

    kernels = SimpleNamespace(place=place, pull_back=pull_back, table_sums=table_sums)
    monkeypatch.setattr(compiled_chart, "_triton", lambda: kernels)


@pytest.mark.usefixtures("chart_kernels")
@pytest.mark.parametrize("name", MAPS[1:])
def test_closed_forms_of_a_prior_stay_on_their_device(name: str) -> None:
    prior = load_flow(name).prior
    for g in range(len(prior.torsions.groups)):
        prior.torsions.n_basins(g)  # counted once, before
    with fake_cuda(), torch.no_grad():
        there = on_fake_cuda(prior)
        y = torch.randn(4, *prior.event_shape, dtype=torch.float64, device="cuda")
        value, score = prior_value_and_score(there, y)
        assert value.is_cuda
        assert score.is_cuda
        assert score.shape == y.shape


@pytest.mark.usefixtures("chart_kernels")
@pytest.mark.parametrize("name", [*MAPS[1:], "held water"])
def test_the_target_in_the_chart_stays_on_its_device(name: str) -> None:
    """Constrained bonds too."""
    prior = prior_of(name)
    with fake_cuda(), torch.no_grad():
        there = on_fake_cuda(prior)
        y = torch.randn(4, *prior.event_shape, dtype=torch.float64, device="cuda")
        value, score = compiled_chart.target_value_and_score(
            there, lambda x: (x.new_zeros(len(x)), torch.zeros_like(x)), y
        )
        assert value.is_cuda
        assert score.is_cuda
        assert score.shape == y.shape


@pytest.mark.parametrize("name", [*MAPS, "lj55"])
def test_energies_stay_on_their_device(name: str) -> None:
    with build_target(load_system(name)) as target, fake_cuda():
        there = copy.copy(target)
        there.evaluator = on_fake_cuda(target.evaluator)
        there.evaluator._device = torch.device("cuda", 0)
        there._signs = on_fake_cuda(target._signs)
        shape = (4, target.n_particles, target.n_dims)
        u = there.reduced_potential(torch.randn(shape, dtype=torch.float64, device="cuda"))
        assert u.is_cuda
        assert u.dtype == torch.float64


def test_layers_of_a_cluster_stay_on_their_device() -> None:
    flow = load_flow("lj55")
    with fake_cuda(), torch.no_grad():
        y = torch.randn(4, 55, 3, dtype=torch.float64, device="cuda")
        streams = RowStreams(torch.zeros(4, dtype=torch.int64, device="cuda"))
        kernel, transport = map(on_fake_cuda, flow.layers[:2])
        assert type(kernel) is not type(transport)
        # The map's way back asks its numbers when to stop: fake ones have no answer.
        for way in (kernel.forward, kernel.backward, transport.forward):
            y, change = way(y, streams)
            assert y.is_cuda
            assert change.is_cuda
