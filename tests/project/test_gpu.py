"""On a GPU everything is what it is on the CPU. Run where there is one: ``pytest -m gpu``."""

from __future__ import annotations

import copy
import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmmtools import mcmc, states
from torch import Tensor

from openmm_eqflow import FlowMove, load_flow, load_system
from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.errors import EqFlowError
from openmm_eqflow.flows.adapt import path_from_chemistry
from openmm_eqflow.flows.kernels import Bridge
from openmm_eqflow.flows.relaxed import AnnealedPath, anneal, relax
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.runs.annealing import backwards
from openmm_eqflow.runs.evaluation import at_other_temperatures, draw_weighted
from openmm_eqflow.runs.stages import build_target, run
from openmm_eqflow.training.liouville import LiouvilleLoss
from openmm_eqflow.training.pool import build_pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]

MAPS = ["dw4", "lj13", "alanine-dipeptide", "alanine-dipeptide-vacuum", "toluene", "ala3"]
MOLECULES = ["alanine-dipeptide", "toluene"]


def stream(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def close(gpu: Tensor, cpu: Tensor, *, tolerance: float, share: float = 1.0) -> None:
    """At least ``share`` of the entries agree; infinities where the others are."""
    gpu = gpu.cpu().double()
    assert torch.equal(torch.isfinite(gpu), torch.isfinite(cpu))
    off = torch.nan_to_num((gpu - cpu).abs())
    assert float((off <= tolerance).double().mean()) >= share, float(off.max())


@pytest.mark.parametrize("name", [*MAPS, "lj55"])
def test_energies_and_forces(name: str) -> None:
    with build_target(load_system(name)) as target:
        x, _ = load_flow(name).prior.to_cartesian(
            load_flow(name).prior.sample_latent(64, generator=stream(3))
        )
        u, gradient = target.reduced_potential_and_gradient(x)
        on_gpu, slope = target.reduced_potential_and_gradient(x.cuda())
        assert on_gpu.is_cuda
        scale = u[torch.isfinite(u)].abs().clamp(min=1.0)
        finite = torch.isfinite(u)
        assert torch.equal(torch.isfinite(on_gpu.cpu()), finite)
        assert float(((on_gpu.cpu() - u)[finite].abs() / scale).max()) < 1e-9
        size = gradient.abs().amax((1, 2)).clamp(min=1.0)
        assert float(((slope.cpu() - gradient).abs().amax((1, 2)) / size).max()) < 1e-8
        again = target.reduced_potential(x)  # the CPU's path is still there
        assert torch.equal(again, u)


@pytest.mark.parametrize("name", ["alanine-dipeptide", "toluene", "ala3"])
def test_both_ends_of_a_path(name: str) -> None:
    """Values and scores in the chart, to rounding; power: not those of other points."""
    flow = load_flow(name)
    y = flow.prior.sample_latent(300, generator=stream(8))
    with build_target(load_system(name)) as target:
        here, there = Bridge(flow.prior, target), Bridge(flow.prior.to("cuda"), target)
        on_cpu, on_gpu, other = here.at(y), there.at(y.cuda()), there.at(y.flip(0).cuda())
    for k, one in enumerate(on_cpu):
        for points, agree in ((on_gpu, True), (other, False)):
            two = points[k].cpu()
            finite = torch.isfinite(one) & torch.isfinite(two)
            off = (one - two).abs() / one.abs().clamp(min=1.0)
            assert (float(off[finite].max()) < 1e-7) == agree, (name, k)
        assert torch.equal(torch.isfinite(one), torch.isfinite(on_gpu[k].cpu()))


def test_an_evaluation_that_is_replayed() -> None:
    """The same bits, also of points that came later and of sizes in turn; counts go on."""
    prior = load_flow("alanine-dipeptide").prior
    with build_target(load_system("alanine-dipeptide")) as target:
        bridge = Bridge(prior.to("cuda"), target)
        sizes = (300, 70, 500, 40, 9)
        points = [prior.sample_latent(n, generator=stream(n)).cuda() for n in sizes]
        before = [bridge._evaluated(y) for y in points]
        n = target.n_evaluated
        for _ in range(2):
            for y, expected in zip(points, before, strict=True):
                for _ in range(4):
                    state = bridge.at(y.clone())
                    assert all(map(torch.equal, state[1:], expected))
                target.reduced_potential(prior.to_cartesian(y.cpu())[0])  # the CPU between
        assert len(bridge._recorded._graphs) == 3  # of five sizes
        assert target.n_evaluated - n >= 2 * 5 * sum(map(len, points))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        moved = points[0] + 1e-3
        assert all(map(torch.equal, bridge.at(moved)[1:], bridge._evaluated(moved)))
        assert not torch.equal(bridge.at(moved).log_target, before[0][1])


@pytest.mark.parametrize("name", MOLECULES)
def test_paths_of_molecules(name: str) -> None:
    """The same latents and streams: the same paths, but for decisions on a knife's edge."""
    cpu, gpu = load_flow(name), load_flow(name, device="cuda")
    with build_target(load_system(name)) as one, build_target(load_system(name)) as two:
        pairs = [
            (relax(cpu, one, seed=1), relax(gpu, two, seed=1)),
            (
                anneal(cpu.prior, one, n_levels=5),
                anneal(gpu.prior, two, n_levels=5, device="cuda"),
            ),
        ]
        for on_cpu, on_gpu in pairs:
            if hasattr(on_cpu, "relaxation"):  # float32 fields: step sizes differ a little
                on_gpu = type(on_cpu)(gpu, two, on_cpu.relaxation)
            else:
                for a, b in zip(on_cpu.layers, on_gpu.layers, strict=True):
                    b.step = a.step.cuda()
            x, log_q = on_cpu.sample_and_log_prob(128, generator=stream(4))
            y, log_p = on_gpu.sample_and_log_prob(128, generator=stream(4))
            assert y.is_cuda
            close(log_p, log_q, tolerance=1e-2, share=0.9)
            close(on_gpu.log_prob(x), on_cpu.log_prob(x), tolerance=1e-2, share=0.9)
            for path, target in ((on_cpu, one), (on_gpu, two)):
                x, log_q = path.sample_and_log_prob(256, generator=stream(5))
                log_w = (-target.reduced_potential(x) - log_q).cpu().numpy()
                found = log_z(log_w)
                assert found.error < 0.5
                if path is on_cpu:
                    expected = found
                else:
                    error = (found.error**2 + expected.error**2) ** 0.5
                    assert abs(found.value - expected.value) < 5 * error


def test_a_path_from_chemistry() -> None:
    """Rounds and trials on the GPU find the log Z that the CPU does, -195.594 +- 0.002."""
    with build_target(load_system("alanine-dipeptide")) as target:
        made = path_from_chemistry(target, ess=0.8, seed=1, device="cuda")
        assert made.path.device.type == "cuda"
        samples = draw_weighted(made.path, target, 8000, seed=2)
        found = log_z(samples.log_weight.numpy())
        assert found.error < 0.02
        assert abs(found.value + 195.594) < 5 * found.error
        # Power: without log q the weights say something else.
        wrong = log_z((samples.log_weight + samples.log_q).numpy())
        assert not abs(wrong.value + 195.594) < 5 * wrong.error
        back = backwards(made.path, target, samples.x[:300], samples.log_weight.numpy())
        assert abs(back["log_z"] - found.value) < max(5 * back["log_z_error"], 0.1)
        warm = at_other_temperatures(made.path, target, samples, [300.0, 330.0], seed=3)
        assert torch.equal(warm[0].log_weight, samples.log_weight)
        on_cpu = copy.copy(target)
        here = AnnealedPath(made.path.prior.to("cpu"), on_cpu, made.path.levels)
        cold = at_other_temperatures(here, on_cpu, samples, [330.0], seed=3)
        one, two = (log_z(v[-1].log_weight.numpy()) for v in (warm, cold))
        assert abs(one.value - two.value) < 5 * max(one.error, 0.01)


def test_a_quick_run(tmp_path: FilePath) -> None:
    """All stages, the network and the levels on the GPU."""
    folder = run("alanine-dipeptide", tmp_path / "run", budget="quick", seed=0, device="cuda")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["device"].startswith("cuda"), folder
    assert metrics["relative_ess"] > 0.7
    assert abs(metrics["log_z"] + 195.594) < 5 * max(metrics["log_z_error"], 0.004)


def test_paths_of_a_cluster() -> None:
    """Layers of lj55 one by one; whole paths are chaotic, so their weights are compared."""
    cpu, gpu = load_flow("lj55"), load_flow("lj55", device="cuda")
    y = cpu.prior.sample_latent(64, generator=stream(1))
    keys = torch.arange(64)
    for k in range(40):
        here, change = cpu.layers[k].forward(y, RowStreams(keys + 100 * k))
        there, other = gpu.layers[k].forward(y.cuda(), RowStreams((keys + 100 * k).cuda()))
        close(there, here.double(), tolerance=2e-4, share=0.97)
        close(other, change, tolerance=2e-2, share=0.97)
        back, change = cpu.layers[k].backward(here, RowStreams(keys))
        hind, other = gpu.layers[k].backward(here.cuda(), RowStreams(keys.cuda()))
        close(hind, back.double(), tolerance=2e-4, share=0.97)
        y = here
    coarse = gpu.on_levels(400)
    x, log_q = coarse.sample_and_log_prob(2048, generator=stream(2, "cuda"))
    with build_target(load_system("lj55")) as target:
        found = log_z((-target.reduced_potential(x) - log_q).cpu().numpy())
    assert found.error < 0.25  # about 0.1 on the CPU
    assert abs(found.value - 383.96) < max(5 * found.error, 0.5)


def test_a_training_step() -> None:
    cpu, gpu = load_flow("toluene"), load_flow("toluene", device="cuda")
    with build_target(load_system("toluene")) as target:
        pool = build_pool(cpu.prior, target, n_prior=1000, generator=stream(6))
    gradients: list[list[Tensor]] = []
    for flow in (cpu, gpu):
        module = flow.module.train()
        loss = LiouvilleLoss(module, pool)(512, stream(7))
        loss.backward()
        gradients.append([p.grad.cpu() for p in module.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm() / (a.norm() + 1e-6)) < 1e-3


def test_flow_move_beside_a_context_on_the_gpu() -> None:
    if "CUDA" not in {
        openmm.Platform.getPlatform(k).getName() for k in range(openmm.Platform.getNumPlatforms())
    }:
        pytest.skip("OpenMM has no CUDA platform")
    system, flow = load_system("alanine-dipeptide"), load_flow("alanine-dipeptide", device="cuda")
    state = states.ThermodynamicState(system.system, system.temperature)
    start = states.SamplerState(system.positions)
    langevin = mcmc.LangevinDynamicsMove(n_steps=50)
    move = mcmc.SequenceMove([FlowMove(flow, seed=3, n_proposals=64), langevin])
    sampler = mcmc.MCMCSampler(state, start, move)
    sampler.run(10)
    assert move.move_list[0].statistics["n_accepted"] >= 5
    energy = float(sampler.sampler_state.potential_energy / (state.kT))
    assert np.isfinite(energy)


def test_out_of_memory_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = load_flow("toluene", device="cuda")
    flow.gpu_chunk_size = 1000
    fine = copy.copy(flow)

    def greedy(*_: Any) -> Any:
        return torch.empty(2**45, device="cuda")

    monkeypatch.setattr(flow, "_field", greedy)
    with pytest.raises(EqFlowError, match=r"set flow\.gpu_chunk_size = 250"):
        flow.sample(1000)
    fine.gpu_chunk_size = 250
    assert fine.sample(1000).is_cuda


def test_chunk_fits_into_memory() -> None:
    flow = load_flow("toluene", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    flow.sample(flow._chunk(), generator=stream(1, "cuda"))
    assert 1000 < flow._chunk() <= 65_536
    assert torch.cuda.max_memory_allocated() < torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize("name", MAPS)
def test_samples_and_log_prob(name: str) -> None:
    """Float32 networks in another order of summation: 1e-4 kT and 1e-5 nm."""
    cpu, gpu = load_flow(name), load_flow(name, device="cuda")
    few, many = (16, 64) if name == "lj13" else (64, 400)  # of a flow that is slow on the CPU
    x, log_q = cpu.sample_and_log_prob(few, generator=stream(1))
    y, log_p = gpu.sample_and_log_prob(few, generator=stream(1))
    assert y.is_cuda
    assert log_p.is_cuda
    close(y, x, tolerance=1e-5, share=0.99)
    close(log_p, log_q, tolerance=2e-3, share=0.99)
    close(gpu.log_prob(x), cpu.log_prob(x), tolerance=2e-3, share=0.99)
    # Drawn on the GPU: other numbers, the same density.
    y, log_p = gpu.sample_and_log_prob(many, generator=stream(1, "cuda"))
    x, log_q = cpu.sample_and_log_prob(many, generator=stream(2))
    a, b = log_p.cpu(), log_q
    error = float((a.var() + b.var()).sqrt()) / many**0.5
    assert abs(float(a.mean() - b.mean())) < 5 * error
