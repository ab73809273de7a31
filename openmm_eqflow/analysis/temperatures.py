r"""Other temperatures from one set of weighted samples.

With :math:`\beta' = T_0/T` and reduced potentials u at T_0,

.. math:: \log w_T = \log w - (\beta' - 1)\,u, \qquad
          Z(T) = \langle w_T \rangle, \qquad
          C(T) = \frac{\langle U^2 \rangle_T - \langle U \rangle_T^2}{k T^2}

(importance sampling; Ferrenberg, Swendsen 1988, Phys. Rev. Lett. 61, 2635). Exact at every T; how
far it reaches is told by the effective samples that are left there. Levels reach further
(:mod:`openmm_eqflow.flows.temperatures`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_eqflow.analysis.weights import (
    checked_log_weights,
    kish_ess,
    log_z,
    pareto_k,
    relative_weights,
)
from openmm_eqflow.units import kt_in_kj_mol, temperature_quantity

__all__ = [
    "at_temperatures",
    "log_weights_at",
    "thermodynamics",
]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def log_weights_at(
    log_weights: ArrayLike, u: ArrayLike, kelvin: float, wanted: float
) -> NDArray[np.float64]:
    """Log weights (n,) of the same samples at another temperature.

    Parameters
    ----------
    log_weights, u
        ``(n,)``: log weights at ``kelvin`` (-inf allowed), and reduced potentials there.
    kelvin, wanted
        The temperature of the samples and the one asked for, K. The potential energy must be the
        same function at both.
    """
    log_w = checked_log_weights(log_weights)
    inside = log_w > -np.inf
    shift = (kelvin / wanted - 1.0) * np.where(inside, np.asarray(u, dtype=np.float64), 0.0)
    return np.where(inside, log_w - shift, -np.inf)


def at_temperatures(
    log_weights: ArrayLike, u: ArrayLike, kelvin: float, wanted: Sequence[float]
) -> list[dict[str, Any]]:
    """Log Z, mean potential energy and its heat capacity at several temperatures.

    Parameters
    ----------
    log_weights, u
        ``(n,)`` of independent samples at ``kelvin``: log weights and reduced potentials.
    kelvin
        Temperature of the samples, K.
    wanted
        Temperatures asked for, K.

    Returns
    -------
    list of dict
        ``kelvin``, ``effective_samples``, ``pareto_k`` (None where it is not finite), ``log_z``
        (mean-free, nm, as at ``kelvin``), ``mean_potential`` (kJ/mol) and ``heat_capacity``
        (kJ/(mol K); of the potential energy: momenta add half of R per degree of freedom), each of
        the last three with ``_error``, one standard error by the delta method, too small where
        Pareto k exceeds 0.7. The rows share their samples: their errors are not
        independent.

    Examples
    --------
    A harmonic mode has u of mean 1/2 and a heat capacity of R/2 at any temperature.

    >>> x = np.random.default_rng(0).normal(size=100_000)
    >>> row = at_temperatures(np.zeros(100_000), 0.5 * x**2, 300.0, [310.0])[0]
    >>> float(round(1e3 * row["heat_capacity"] / 8.31446, 1))  # in R
    0.5
    """
    return [
        thermodynamics(log_weights_at(log_weights, u, kelvin, t), u, kelvin, t) for t in wanted
    ]


def thermodynamics(
    log_weights: ArrayLike, u: ArrayLike, kelvin: float, wanted: float
) -> dict[str, Any]:
    """Return a row of :func:`at_temperatures` from samples with their weights *there*.

    Parameters
    ----------
    log_weights, u
        ``(n,)``: log weights at ``wanted``, reduced potentials at ``kelvin``.
    kelvin, wanted
        K.
    """
    gas = kt_in_kj_mol(temperature_quantity(kelvin)) / kelvin
    energy = gas * kelvin * np.asarray(u, dtype=np.float64)
    w = relative_weights(checked_log_weights(log_weights))
    w = w / w.sum()
    apart = np.where(w > 0.0, energy, 0.0)
    mean = float(w @ apart)
    apart = np.where(w > 0.0, apart - mean, 0.0)
    spread = float(w @ apart**2)
    free, per = log_z(log_weights), gas * wanted * wanted
    return {
        "kelvin": float(wanted),
        "effective_samples": kish_ess(log_weights),
        "pareto_k": _finite(pareto_k(checked_log_weights(log_weights))),
        "log_z": float(free.value),
        "log_z_error": float(free.error),
        "mean_potential": mean,
        "mean_potential_error": math.sqrt(float(np.sum((w * apart) ** 2))),
        "heat_capacity": spread / per,
        "heat_capacity_error": math.sqrt(float(np.sum((w * (apart**2 - spread)) ** 2))) / per,
    }
