"""Free energies of harmonic states whose log Z is known, from a Gaussian flow."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from stand_ins.moves import GaussianFlow

from openmm_eqflow.analysis.free_energy import delta_f_reweighting, log_z_bar, log_z_mbar
from openmm_eqflow.analysis.weights import log_z

N, D = 4, 3
DIM = (N - 1) * D
STIFF = np.array([1.0, 1.6])
EXACT = 0.5 * DIM * np.log(2 * math.pi / STIFF)


def draw(width: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Square norms of Gaussian samples of the given width, and log q of the flow (width 0.95)."""
    flow = GaussianFlow(width, N, D)
    x, _ = flow.sample_and_log_prob(n, generator=torch.Generator().manual_seed(seed))
    return x.square().sum(dim=(1, 2)).numpy(), GaussianFlow(0.95, N, D).log_prob(x).numpy()


def reduced(square: np.ndarray) -> np.ndarray:
    return 0.5 * STIFF[:, None] * square


def close(estimate: tuple[float, float], exact: float, largest_error: float) -> bool:
    assert estimate[1] < largest_error
    return abs(estimate[0] - exact) < 4 * estimate[1]


@pytest.mark.statistical
def test_absolute_free_energies() -> None:
    square, log_q = draw(0.95, 20_000, 0)
    md, log_q_md = draw(1.0, 5_000, 1)
    log_w, log_w_md = -reduced(square)[0] - log_q, -reduced(md)[0] - log_q_md
    assert close(log_z(log_w), EXACT[0], 0.01)
    assert close(log_z_bar(log_w, log_w_md), EXACT[0], 0.01)
    for sign in (0.0, -1.0):
        wrong, wrong_md = -reduced(square)[0] - sign * log_q, -reduced(md)[0] - sign * log_q_md
        assert not close(log_z(wrong), EXACT[0], 10.0)
        assert not close(log_z_bar(wrong, wrong_md), EXACT[0], 10.0)


@pytest.mark.statistical
def test_difference_by_reweighting() -> None:
    square, log_q = draw(0.95, 20_000, 2)
    u = reduced(square)
    estimate = delta_f_reweighting(u[0], u[1], log_q)
    exact = EXACT[0] - EXACT[1]
    assert close(estimate, exact, 0.03)
    assert not close(delta_f_reweighting(u[0], u[1], 0.0 * log_q), exact, 10.0)
    assert not close(delta_f_reweighting(u[0], u[1], -log_q), exact, 10.0)


@pytest.mark.statistical
def test_mbar_joins_flow_and_dynamics() -> None:
    samples = [draw(1.0, 3000, 3), draw(STIFF[1] ** -0.5, 2000, 4), draw(0.95, 4000, 5)]
    square = np.concatenate([s for s, _ in samples])
    log_q = np.concatenate([q for _, q in samples])
    result = log_z_mbar(reduced(square), log_q, [3000, 2000], n_flow=4000)
    for k in range(2):
        assert close((result.log_z[k], result.error[k]), EXACT[k], 0.02)
    assert close((result.delta_f[0, 1], result.delta_f_error[0, 1]), EXACT[0] - EXACT[1], 0.03)
    for sign in (0.0, -1.0):
        wrong = log_z_mbar(reduced(square), sign * log_q, [3000, 2000], n_flow=4000)
        assert not close((wrong.log_z[0], wrong.error[0]), EXACT[0], 10.0)


def test_invalid_samples_lower_z_and_do_not_break_the_solvers() -> None:
    square, log_q = draw(0.95, 4000, 6)
    u = reduced(square)
    half = np.where(np.arange(4000) % 2, u, np.inf)
    log_w = -u[0] - log_q
    log_w_half = -half[0] - log_q
    md, log_q_md = draw(1.0, 4000, 7)
    log_w_md = -reduced(md)[0] - log_q_md
    halved = math.log(0.5)
    assert log_z(log_w_half).value - log_z(log_w).value == pytest.approx(halved, abs=0.03)
    change = log_z_bar(log_w_half, log_w_md).value - log_z_bar(log_w, log_w_md).value
    assert change == pytest.approx(halved, abs=0.05)
    result = log_z_mbar(half, log_q, [0, 0], n_flow=4000)
    np.testing.assert_allclose(result.log_z - EXACT, halved, atol=0.05)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        log_z_bar([0.0, math.nan], [0.0, 0.0])
    with pytest.raises(ValueError, match="drop configurations"):
        log_z_bar([0.0, 0.0], [0.0, math.inf])
    with pytest.raises(ValueError, match="NaN"):
        delta_f_reweighting([math.nan], [0.0], [0.0])
    with pytest.raises(ValueError, match="counts that add up"):
        log_z_mbar(np.zeros((2, 5)), np.zeros(5), [1, 1], n_flow=1)
    with pytest.raises(ValueError, match="outside its chart"):
        log_z_mbar(np.zeros((1, 2)), [0.0, -math.inf], [0], n_flow=2)
    with pytest.raises(ValueError, match="effective flow samples"):
        log_z_bar([-math.inf, 0.0], [0.0, 0.0])


@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0])
def test_bennett_has_an_error_whatever_the_constant_in_u(offset: float) -> None:
    """Log weights of 60 kT (lj13, lj55) with an invalid draw once gave an error of NaN."""
    square, log_q = draw(0.95, 4000, 8)
    md, log_q_md = draw(1.0, 4000, 9)
    log_w, log_w_md = -reduced(square)[0] - log_q, -reduced(md)[0] - log_q_md
    log_w[:3] = -math.inf
    plain = log_z_bar(log_w, log_w_md)
    moved = log_z_bar(log_w + offset, log_w_md + offset)
    assert 0.0 < plain.error < 0.05
    assert moved.value - offset == pytest.approx(plain.value, abs=1e-6)
    assert moved.error == pytest.approx(plain.error, rel=1e-6)


@pytest.mark.statistical
def test_mbar_counts_draws_outside_the_chart() -> None:
    """A flow that leaves its chart in half of its draws has half the density inside."""
    square, log_q = draw(0.95, 8000, 10)
    md, log_q_md = draw(1.0, 3000, 11)
    outside = np.random.default_rng(12).random(8000) < 0.5
    half = math.log(2.0)
    u = np.concatenate([reduced(md), np.where(outside, np.inf, reduced(square))], 1)
    # The density of what stays inside is q / 2 where it is q of the whole flow.
    density = np.concatenate([log_q_md - half, np.where(outside, np.inf, log_q - half)])
    result = log_z_mbar(u, density, [3000, 0], n_flow=8000)
    for k in range(2):
        assert close((result.log_z[k], result.error[k]), EXACT[k], 0.05)
    # Power control: left out, log Z is off by -log(share inside).
    kept = np.concatenate([np.ones(3000, dtype=bool), ~outside])
    dropped = log_z_mbar(u[:, kept], density[kept], [3000, 0], n_flow=int((~outside).sum()))
    assert not close((dropped.log_z[1], dropped.error[1]), EXACT[1], 1.0)
    with pytest.raises(ValueError, match="outside its chart"):
        log_z_mbar(np.zeros_like(u), density, [3000, 0], n_flow=8000)


def test_pymbar_is_loaded_without_its_banners() -> None:
    """A fresh process: the banners come with the first import."""
    code = "from openmm_eqflow.analysis.free_energy import log_z_bar; "
    code += "import logging; log_z_bar([0.0, 0.1, 0.2], [0.0, 0.1]); "
    code += "assert logging.getLogger('pymbar').level == logging.NOTSET"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""
