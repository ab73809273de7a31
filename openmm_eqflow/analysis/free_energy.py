r"""Free energies from flow samples, alone or together with molecular dynamics.

For a flow with normalised density q, :math:`\log w = -u - \log q` and

.. math:: Z = \int e^{-u(x)}\,dx = E_q[w], \qquad f = -\log Z,

the integral over the mean-free subspace in nm^((N-1)D) and over the chirality sector the target
allows. Multiply by the volume per molecule and by the centroid's Jacobian to compare with a gas in
a box; differences between states of the same atoms need neither. A flow is a state of known free
energy, :math:`-\log q` is its reduced potential and f = 0, so it can join any bridge: targeted
free energy perturbation (Wirnsberger et al. 2020) is one-sided, :func:`log_z_bar` two-sided.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning

from openmm_eqflow.analysis.weights import Estimate, kish_ess, log_z
from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "MbarResult",
    "delta_f_reweighting",
    "log_z",
    "log_z_bar",
    "log_z_mbar",
]

FloatArray = NDArray[np.float64]
_LARGEST_WORK = 500.0  # kT above the mean


class MbarResult(NamedTuple):
    """Free energies relative to the flow, whose own is 0."""

    log_z: FloatArray
    """``(n_states,)`` absolute log Z of the physical states."""
    error: FloatArray
    delta_f: FloatArray
    """``(n_states, n_states)`` reduced free energy differences f_j - f_i."""
    delta_f_error: FloatArray


def _pymbar() -> Any:
    """Import the optional dependency when it is first needed, without its banners."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("pymbar")
    except ImportError as error:
        raise ConfigurationError(
            "BAR and MBAR need pymbar, which is not installed: pip install pymbar"
        ) from error
    finally:
        logger.setLevel(level)  # what it warns of later is heard


def _finite_reduced(u: ArrayLike, what: str) -> FloatArray:
    array = np.asarray(u, dtype=np.float64)
    if np.isnan(array).any() or (array == -np.inf).any():
        raise ValueError(f"{what} contains NaN or -inf; give invalid configurations u = +inf")
    return array


def delta_f_reweighting(
    u_a: ArrayLike,
    u_b: ArrayLike,
    log_q: ArrayLike,
    *,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> Estimate:
    r"""Free energy difference of two states from the same flow samples.

    .. math:: f_b - f_a = \log \hat Z_a - \log \hat Z_b, \qquad
              \hat Z_k = \frac1n \sum_i e^{-u_k(x_i) - \log q(x_i)}

    The samples are shared, so most of the error cancels; it is estimated by resampling the pairs
    together (bootstrap).

    Parameters
    ----------
    u_a, u_b
        ``(n,)`` reduced potentials of the flow's samples in both states, each with its own
        temperature or force field; +inf where invalid.
    log_q
        ``(n,)`` their log densities.
    """
    log_q = np.asarray(log_q, dtype=np.float64)
    log_w = np.stack([-_finite_reduced(u, "u") - log_q for u in (u_a, u_b)])
    value = log_z(log_w[0]).value - log_z(log_w[1]).value
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    rng = np.random.default_rng(seed)
    n = log_w.shape[1]
    resampled = np.empty(n_bootstrap)
    for b in range(n_bootstrap):
        sums = w @ rng.multinomial(n, np.full(n, 1.0 / n))
        resampled[b] = np.log(sums[0]) - np.log(sums[1]) if sums.min() > 0.0 else np.nan
    centre = np.log(w.sum(axis=1))
    spread = resampled - (centre[0] - centre[1])
    return Estimate(float(value), float(np.nanstd(spread, ddof=1)))


def log_z_bar(log_w_flow: ArrayLike, log_w_md: ArrayLike) -> Estimate:
    r"""Absolute log Z from samples of both ends: the flow and the target itself.

    Bennett's acceptance ratio (Bennett 1976) between q, of free energy 0, and :math:`e^{-u}`. The
    work from flow to target is :math:`-\log w` on flow samples, and :math:`\log w` backwards on
    samples of the target (molecular dynamics or the chain). Unlike the plain mean weight it also
    sees where the flow is too thin.

    Parameters
    ----------
    log_w_flow
        ``(n,)`` log weights of flow samples; ``-inf`` where invalid.
    log_w_md
        ``(m,)`` log weights of *decorrelated* target samples. The flow must reach all of them:
        ``+inf`` (log q = -inf) is refused.

    Returns
    -------
    Estimate
        log Z and its asymptotic error.
    """
    forward = -np.asarray(log_w_flow, dtype=np.float64)
    backward = np.asarray(log_w_md, dtype=np.float64)
    if np.isnan(forward).any() or (forward == -np.inf).any() or not np.isfinite(backward).all():
        raise ValueError(
            "log weights are NaN or +inf (or -inf for target samples); drop configurations the "
            "flow cannot reach and say so, or widen the flow"
        )
    if kish_ess(-forward) < 2.0:
        raise ValueError("fewer than two effective flow samples; Bennett's ratio has no overlap")
    # Work relative to the flow's own estimate: pymbar's error overflows far from zero. Beyond the
    # bound, and for invalid draws, a weight is less than exp(-500) of the mean: 0 in every sum.
    centre = log_z(-forward).value
    work = np.minimum(forward + centre, _LARGEST_WORK)
    result = _pymbar().other_estimators.bar(work, np.minimum(backward - centre, _LARGEST_WORK))
    return Estimate(centre - float(result["Delta_f"]), float(result["dDelta_f"]))


def log_z_mbar(
    u_kn: ArrayLike, log_q: ArrayLike, n_samples: ArrayLike, *, n_flow: int
) -> MbarResult:
    r"""Absolute free energies of several states from flow and MD samples together.

    The multistate Bennett acceptance ratio (Shirts, Chodera 2008) with the flow as one more
    sampled state, of reduced potential :math:`-\log q` and free energy 0.

    Parameters
    ----------
    u_kn
        ``(n_states, n)`` reduced potentials of all samples in all physical states.
    log_q
        ``(n,)`` log density of all samples under the flow; +inf for draws of the flow outside its
        chart, whose reduced potentials are +inf. Such draws count in ``n_flow`` and have weight
        zero: leaving them out would raise log Z by -log(share inside).
    n_samples
        ``(n_states,)`` decorrelated samples from each physical state; may be 0. The samples are
        ordered: state 0 first, the flow's last.
    n_flow
        Samples of the flow.
    """
    u = _finite_reduced(u_kn, "u_kn")
    log_q = np.asarray(log_q, dtype=np.float64)
    counts = np.append(np.asarray(n_samples, dtype=int), n_flow)
    n_states, n = u.shape
    if counts.size != n_states + 1 or counts.sum() != n or log_q.shape != (n,):
        raise ValueError(
            f"u_kn is {u.shape}, log_q {log_q.shape}, sample counts {counts.tolist()}; expected "
            "(n_states, n), (n,) and counts that add up to n"
        )
    outside = (log_q == np.inf) & (np.arange(n) >= n - n_flow) & np.isinf(u).all(axis=0)
    if not np.isfinite(log_q[~outside]).all():
        raise ValueError(
            "log_q is not finite for some samples; only draws of the flow outside its chart may "
            "have +inf, with u = +inf in every state. Keep those: they count in n_flow"
        )
    # Only the flow's state has weight on them, and there it cancels whatever log q is.
    log_q = np.where(outside, 0.0, log_q)
    # exp(-1e4) is 0 in double precision; infinities would turn into NaN inside the solver.
    reduced = np.minimum(np.concatenate([u, -log_q[None]]), u[np.isfinite(u)].max() + 1e4)
    with warnings.catch_warnings():
        # pymbar 4 passes scipy's root finder options it does not know; harmless.
        warnings.simplefilter("ignore", OptimizeWarning)
        result = _pymbar().MBAR(reduced, counts).compute_free_energy_differences()
    delta, error = result["Delta_f"], result["dDelta_f"]
    return MbarResult(
        log_z=-delta[n_states, :n_states],
        error=error[n_states, :n_states],
        delta_f=delta[:n_states, :n_states],
        delta_f_error=error[:n_states, :n_states],
    )
