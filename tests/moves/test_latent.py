"""Latent and annealed steps on a target with known moments, without OpenMM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins.moves import BendField, TwoBasins
from torch import Tensor

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.moves import steps
from openmm_eqflow.moves.steps import (
    KernelKind,
    LatentKernel,
    LatentState,
    annealed_step,
    latent_step,
)
from openmm_eqflow.priors.gaussian import MeanFreeGaussian


@pytest.fixture
def flow() -> EquivariantFlow:
    return EquivariantFlow(MeanFreeGaussian(2, 1, 1.0), BendField(0.8, 0.4))


@pytest.mark.parametrize("kind", ["pcn", "langevin"])
def test_kernel_flux_is_symmetric(
    flow: EquivariantFlow, kind: KernelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detailed balance of density, proposal and the kernel's own ratio, point by point."""
    target, generator = TwoBasins(), torch.Generator().manual_seed(6)
    kernel = LatentKernel(flow, target, 0.6, kind)
    beta = torch.full((50,), 0.4, dtype=torch.float64)
    a, b = (
        kernel.state(flow.prior.sample_latent(50, generator=generator).clamp(-2, 2))
        for _ in range(2)
    )
    ratios: list[Tensor] = []

    def accept(log_ratio: Tensor, generator: object) -> Tensor:
        ratios.append(log_ratio)
        return torch.ones_like(log_ratio, dtype=torch.bool)

    monkeypatch.setattr(steps, "metropolis_accept", accept)

    def log_flux(start: LatentState, stop: LatentState) -> tuple[Tensor, Tensor]:
        """Of the step from one to the other, and the same if every step were accepted."""
        centre = 0.8 * start.z if kind == "pcn" else start.z + kernel._drift(start, beta)
        noise = (stop.z - centre) / 0.6
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, **__: noise)
            reached, _, _ = kernel(start, beta)
        torch.testing.assert_close(reached.z, stop.z)
        x, log_q = flow.transform(start.z)
        log_w = -target.reduced_potential(x) - log_q
        log_gamma = flow.prior.latent_log_prob(start.z) + 0.4 * log_w
        all_taken = (log_gamma - 0.5 * noise.square().sum((1, 2))).detach()
        return all_taken + ratios[-1].clamp(max=0.0), all_taken

    (forward, unrefused), (backward, other) = log_flux(a, b), log_flux(b, a)
    assert bool(torch.isfinite(forward).all())
    torch.testing.assert_close(forward, backward)
    assert float((unrefused - other).abs().median()) > 0.1  # power: the ratio makes it so


def test_path_weights_give_log_z_and_are_less_spread_than_plain_weights(
    flow: EquivariantFlow,
) -> None:
    target = TwoBasins()
    x = torch.zeros(1000, 2, 1, dtype=torch.float64)
    spreads = []
    for n_bridge in (0, 6):
        generator = torch.Generator().manual_seed(7)
        kernel = LatentKernel(flow, target, 0.7)
        _, info = annealed_step(kernel, x, 4, n_bridge, generator)
        log_w = info.log_weight_proposals.flatten().numpy()
        value, error = log_z(log_w)
        assert error < 0.03
        assert abs(value - target.log_z) < 4 * error
        spreads.append(np.std(log_w[np.isfinite(log_w)]))
    assert spreads[1] < 0.8 * spreads[0]


def test_rejected_states_are_bit_identical(flow: EquivariantFlow) -> None:
    generator = torch.Generator().manual_seed(8)
    kernel = LatentKernel(flow, TwoBasins(), 1.0)
    x = torch.randn(300, 2, 1, generator=generator, dtype=torch.float64)
    new, info = latent_step(kernel, x, 1, generator)
    stayed = info.n_accepted == 0
    assert 0 < stayed.sum() < 300
    assert (new[stayed] == x[stayed]).all()
    new, annealed_info = annealed_step(kernel, x, 1, 1, generator)
    assert 0 < annealed_info.accepted.sum() < 300
    assert (new[~annealed_info.accepted] == x[~annealed_info.accepted]).all()


def test_invalid_states_are_counted_and_left(flow: EquivariantFlow) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.tensor([[-3.0], [3.0]], dtype=torch.float64).expand(100, 2, 1)  # y < -3: u = +inf
    kernel = LatentKernel(flow, TwoBasins(), 0.5)
    new, info = latent_step(kernel, x, 30, generator)
    assert info.n_invalid.sum() > 0
    left = info.n_accepted > 0
    assert left.sum() > 10
    assert torch.isfinite(TwoBasins().reduced_potential(new[left])).all()
    new, _ = annealed_step(kernel, x, 4, 2, generator)
    assert torch.isfinite(TwoBasins().reduced_potential(new)).all()


def test_arguments_are_checked(flow: EquivariantFlow) -> None:
    with pytest.raises(ValueError, match="step is 2"):
        LatentKernel(flow, TwoBasins(), 2.0)
    with pytest.raises(ValueError, match="expected 'pcn'"):
        LatentKernel(flow, TwoBasins(), 0.5, "hmc")  # type: ignore[arg-type]
