r"""A temperature ladder with equal exchange rates, from energy means and spreads.

For two temperatures with normal, independent energies the exchange exponent
:math:`y = (\beta_a - \beta_b)(U_a - U_b)` is normal with mean m and variance v, and

.. math:: E[\min(1, e^y)] = \Phi(m/\sqrt v) + e^{m + v/2}\, \Phi(-(v + m)/\sqrt v).

(Kofke 2002, J. Chem. Phys. 117, 6911, discusses the same average for parallel tempering.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from openmm_eqflow.thermo import kt_in_kj_mol, temperature_quantity

__all__ = ["choose_ladder", "exchange_rate"]

FloatArray = NDArray[np.float64]


def exchange_rate(
    beta: tuple[float, float], mean: tuple[float, float], spread: tuple[float, float]
) -> float:
    """Mean acceptance of an exchange between two states with normal energies.

    Parameters
    ----------
    beta, mean, spread
        Inverse temperature (mol/kJ), mean and standard deviation of the energy (kJ/mol) of both.
    """
    difference = beta[0] - beta[1]
    m = difference * (mean[0] - mean[1])
    v = difference**2 * (spread[0] ** 2 + spread[1] ** 2)
    if v == 0.0:
        return float(min(1.0, np.exp(m)))
    root = np.sqrt(v)
    # The second term in logarithms: exp overflows where the normal tail underflows.
    return float(ndtr(m / root) + np.exp(m + 0.5 * v + log_ndtr(-(v + m) / root)))


def choose_ladder(
    grid: FloatArray,
    means: FloatArray,
    spreads: FloatArray,
    *,
    swap_rate: float,
    max_temperatures: int,
) -> tuple[tuple[float, ...], float]:
    """Shortest ladder from ``grid[0]`` to ``grid[-1]`` whose exchange rate reaches ``swap_rate``.

    Parameters
    ----------
    grid, means, spreads
        Ascending temperatures (K) with mean and standard deviation of the energy (kJ/mol);
        interpolated linearly in between.
    swap_rate
        Least acceptance between neighbours.
    max_temperatures
        At most so many; the hottest temperature is lowered if they do not suffice.

    Returns
    -------
    temperatures, rate
        Ascending, all neighbours with the same predicted acceptance.
    """

    def rate(a: float, b: float) -> float:
        mean = np.interp([a, b], grid, means)
        spread = np.interp([a, b], grid, spreads)
        beta = [1.0 / kt_in_kj_mol(temperature_quantity(t)) for t in (a, b)]
        return exchange_rate(
            (beta[0], beta[1]),
            (float(mean[0]), float(mean[1])),
            (float(spread[0]), float(spread[1])),
        )

    def next_temperature(a: float, wanted: float) -> float:
        """Hottest b on the grid that still exchanges with a at the wanted rate."""
        low, high = a, float(grid[-1])
        if rate(a, high) >= wanted:
            return high
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if rate(a, middle) >= wanted else (low, middle)
        return low

    def climb(n: int, wanted: float) -> list[float]:
        ladder = [float(grid[0])]
        while len(ladder) < n:
            ladder.append(next_temperature(ladder[-1], wanted))
        return ladder

    n = 2
    while n < max_temperatures and climb(n, swap_rate)[-1] < grid[-1]:
        n += 1
    if climb(n, swap_rate)[-1] < grid[-1]:
        return tuple(climb(n, swap_rate)), swap_rate
    low, high = swap_rate, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if climb(n, middle)[-1] >= grid[-1] else (low, middle)
    return tuple(climb(n, low)), low
