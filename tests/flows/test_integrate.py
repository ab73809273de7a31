"""Frozen grids: order of convergence, direction and sign, torchdiffeq, calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stand_ins.flows import uniform_grid
from torch import Tensor

from openmm_eqflow.flows.flow import calibrate_grid, odeint_adaptive, rk4, rk4_inverse


class Pendulum:
    r"""y' = (1 + t) sin y: y(t) = 2 atan(tan(y0/2) e^{t + t^2/2}), dy/dy0 = sin y / sin y0."""

    @staticmethod
    def field(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (1 + t) * torch.sin(y), (1 + t) * torch.cos(y).sum(1)

    @staticmethod
    def y_exact(y0: Tensor) -> Tensor:
        return 2 * torch.atan(torch.tan(0.5 * y0) * math.exp(1.5))

    @classmethod
    def ladj_exact(cls, y0: Tensor) -> Tensor:
        return torch.log(torch.sin(cls.y_exact(y0)) / torch.sin(y0)).sum(1)


def start(n: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.3 + 2.4 * torch.rand(n, 3, generator=generator, dtype=torch.float64)


def test_fourth_order():
    y0 = start()
    steps = np.array([4, 8, 16, 32])
    errors = []
    for n in steps:
        y, ladj = rk4(Pendulum.field, y0, uniform_grid(int(n)))
        errors.append(
            (
                float((y - Pendulum.y_exact(y0)).abs().max()),
                float((ladj - Pendulum.ladj_exact(y0)).abs().max()),
            )
        )
    slopes = np.polyfit(np.log(1 / steps), np.log(np.array(errors)), 1)[0]
    assert np.all(np.abs(slopes - 4) < 0.4), slopes


def test_reverse_undoes_forward_and_keeps_the_sign_of_ladj():
    y0 = start()
    grid = uniform_grid(64)
    y1, ladj = rk4(Pendulum.field, y0, grid)
    back, ladj_back = rk4(Pendulum.field, y1, grid, reverse=True)
    torch.testing.assert_close(back, y0, atol=1e-7, rtol=0)
    torch.testing.assert_close(ladj_back, ladj, atol=1e-7, rtol=0)
    assert float(ladj.abs().min()) > 1e-2  # a flipped sign would show


def invert(y1: Tensor, grid: tuple[float, ...], corrections: int) -> tuple[Tensor, Tensor]:
    return rk4_inverse(
        Pendulum.field, lambda t, y: Pendulum.field(t, y)[0], y1, grid, corrections=corrections
    )


def test_the_corrected_inverse_is_that_of_the_discrete_map():
    y0 = start()
    grid = tuple(float(v) for v in np.linspace(0, 1, 6) ** 1.5)  # coarse and uneven
    y1, ladj = rk4(Pendulum.field, y0, grid)
    gaps = []
    for corrections in (0, 1, 2):
        back, ladj_back = invert(y1, grid, corrections)
        gaps.append((float((back - y0).abs().max()), float((ladj_back - ladj).abs().max())))
    assert gaps[0][0] > 1e-4
    assert gaps[0][1] > 1e-4
    assert gaps[1][0] < 1e-3 * gaps[0][0]
    assert gaps[1][1] < 1e-2 * gaps[0][1]
    assert gaps[2][0] < 1e-10
    assert gaps[2][1] < 1e-9
    # The map it inverts is off the exact solution by far more than that.
    assert float((y1 - Pendulum.y_exact(y0)).abs().max()) > 1e-4


def test_no_corrections_are_the_plain_reverse():
    y1, grid = start(), uniform_grid(8)
    plain = rk4(Pendulum.field, y1, grid, reverse=True)
    for found, expected in zip(invert(y1, grid, 0), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_corrections_keep_rows_apart():
    y1, grid = start(), uniform_grid(5)
    whole = invert(y1, grid, 1)
    for found, expected in zip(invert(y1[2:3], grid, 1), whole, strict=True):
        torch.testing.assert_close(found, expected[2:3], atol=1e-14, rtol=0)


def test_uneven_grids():
    y0 = start()
    grid = tuple(float(v) for v in np.linspace(0, 1, 41) ** 1.5)
    y, ladj = rk4(Pendulum.field, y0, grid)
    torch.testing.assert_close(y, Pendulum.y_exact(y0), atol=1e-5, rtol=0)
    torch.testing.assert_close(ladj, Pendulum.ladj_exact(y0), atol=1e-5, rtol=0)


def test_against_torchdiffeq_and_the_exact_solution():
    y0 = start()
    y, ladj = odeint_adaptive(Pendulum.field, y0)
    torch.testing.assert_close(y, Pendulum.y_exact(y0), atol=1e-7, rtol=0)
    torch.testing.assert_close(ladj, Pendulum.ladj_exact(y0), atol=1e-7, rtol=0)
    fine, fine_ladj = rk4(Pendulum.field, y0, uniform_grid(256))
    torch.testing.assert_close(fine, y, atol=1e-7, rtol=0)
    torch.testing.assert_close(fine_ladj, ladj, atol=1e-7, rtol=0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_calibration_takes_the_coarsest_grid_that_will_do(tolerance):
    y0 = start(50)
    grid, error = calibrate_grid(Pendulum.field, y0, tolerance=tolerance)
    exact = Pendulum.ladj_exact(y0)

    def p99(n: int) -> float:
        _, ladj = rk4(Pendulum.field, y0, uniform_grid(n))
        return float(torch.quantile((ladj - exact).abs(), 0.99))

    n = len(grid) - 1
    assert error <= tolerance
    assert p99(n) == pytest.approx(error, abs=1e-6)
    coarser = [c for c in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64) if c < n]
    assert all(p99(c) > tolerance for c in coarser)


def test_calibration_reports_when_no_grid_is_fine_enough():
    grid, error = calibrate_grid(Pendulum.field, start(), tolerance=1e-4, candidates=(1, 2))
    assert len(grid) == 3
    assert error > 1e-4


def test_rows_do_not_see_each_other():
    y0 = start(8)
    grid = uniform_grid(6)
    y, ladj = rk4(Pendulum.field, y0, grid)
    other = y0.clone()
    other[1:] = start(20)[-7:]
    y_other, ladj_other = rk4(Pendulum.field, other, grid)
    assert torch.equal(y[0], y_other[0])
    assert torch.equal(ladj[0], ladj_other[0])


def test_gradients_pass_through():
    y0 = start(2).requires_grad_(True)
    grid = uniform_grid(4)
    assert torch.autograd.gradcheck(lambda y: rk4(Pendulum.field, y, grid), (y0,))
