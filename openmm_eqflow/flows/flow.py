r"""The equivariant continuous normalizing flow and its ODE solves on frozen grids.

ODE solves of a flow: frozen grids, classical Runge-Kutta, adaptive calibration. No particles.

A global-norm adaptive step couples the samples of a batch, so log q would depend on batch-mates.
The grid is therefore frozen per flow: found once by an adaptive solve (torchdiffeq's dopri5) on a
calibration batch and stored with the weights. State and log determinant are float64; the field
runs in the dtype of its weights.

Equivariant continuous normalizing flow with exact likelihood.

.. math:: y_1 = y_0 + \int_0^1 v(t, y_t)\,dt, \quad \mathrm{ladj} = \int_0^1 \nabla\cdot v\,dt,
          \quad \log q(x) = \log p_0(y_0) - \mathrm{ladj} - \mathrm{log\_volume}(y_1)

(Chen et al. 2018, arXiv:1806.07366; Köhler, Klein, Noé 2020). The chart y is the prior's:
Cartesian
for a Gaussian, internal coordinates for a molecule. log q is normalised on the mean-free subspace.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torchdiffeq
from torch import Tensor, nn

from openmm_eqflow.errors import AuditError
from openmm_eqflow.flows.path import Path
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.geometry import random_rotations, remove_mean, rotate
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.priors.zmatrix import wrap_angle
from openmm_eqflow.vector_fields.base import VectorField

__all__ = [
    "EquivariantFlow",
    "FieldStep",
    "calibrate_grid",
    "odeint_adaptive",
    "rk4",
    "rk4_inverse",
]

FieldWithDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor, Tensor], Tensor]


def rk4(
    field: FieldWithDivergence, y: Tensor, grid: Sequence[float], *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Integrate :math:`(y, \ell)' = (v, \nabla\cdot v)` over a fixed grid, fourth order.

    Parameters
    ----------
    field
        ``(t, y) -> (v, divergence)``.
    y
        Initial state (n, ...).
    grid
        Increasing times from 0 to 1.
    reverse
        Integrate from the last time to the first; the returned log determinant is then that of the
        *forward* map along the retraced trajectory (so that signs never change).

    Returns
    -------
    y, ladj
        Final state and :math:`\int \nabla\cdot v\,dt` from 0 to 1, shape (n,).
    """
    times = list(reversed(grid)) if reverse else list(grid)
    ladj = torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)
    for start, stop in itertools.pairwise(times):
        h = stop - start
        t0, tm, t1 = (
            torch.full((), t, dtype=y.dtype, device=y.device)
            for t in (start, start + 0.5 * h, stop)
        )
        k1, d1 = field(t0, y)
        k2, d2 = field(tm, y + 0.5 * h * k1)
        k3, d3 = field(tm, y + 0.5 * h * k2)
        k4, d4 = field(t1, y + h * k3)
        y = y + (h / 6) * (k1 + 2 * (k2 + k3) + k4)
        ladj = ladj + (h / 6) * (d1 + 2 * (d2 + d3) + d4)
    return y, (-ladj if reverse else ladj)


def rk4_inverse(
    field: FieldWithDivergence,
    velocity: Velocity,
    y: Tensor,
    grid: Sequence[float],
    *,
    corrections: int,
) -> tuple[Tensor, Tensor]:
    r"""Invert the discrete map :func:`rk4` itself, not only the flow it approximates.

    A backward step :math:`\psi` undoes the forward step :math:`\phi` up to
    :math:`O(h^5)`, so that a density evaluated by backward steps is not quite that of the samples.
    Each correction

    .. math:: y \leftarrow y + \psi(x) - \psi(\phi(y))

    is a quasi-Newton step for :math:`\phi(y) = x` whose error shrinks by :math:`O(h^5)`. The log
    determinant is collected along :math:`\phi(y)`: it is the one that sampling finds, and the
    residual of that evaluation takes the last of the error away.

    Parameters
    ----------
    field, velocity
        ``(t, y) -> (v, divergence)`` and ``(t, y) -> v``: most evaluations need no divergence.
    y
        Final state (n, ...).
    grid
        Increasing times from 0 to 1.
    corrections
        Per step, the same for every row: a row's result never depends on its batch-mates. With 0
        the solve is :func:`rk4` in reverse.

    Returns
    -------
    z, ladj
        Initial state, and :math:`\int \nabla\cdot v\,dt` from 0 to 1 along its forward path.
    """
    if corrections == 0:
        return rk4(field, y, grid, reverse=True)

    def without_divergence(t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        v = velocity(t, state)
        return v, v.new_zeros(len(v))

    ladj = torch.zeros(y.shape[0], dtype=y.dtype, device=y.device)
    for interval in reversed(list(itertools.pairwise(grid))):
        guess, _ = rk4(without_divergence, y, interval, reverse=True)
        before = guess
        for _ in range(corrections):
            reached, _ = rk4(without_divergence, before, interval)
            before = before + guess - rk4(without_divergence, reached, interval, reverse=True)[0]
        reached, increment = rk4(field, before, interval)
        ladj = ladj + increment
        y = before - (reached - y)
    return y, ladj


def odeint_adaptive(
    field: FieldWithDivergence, y: Tensor, *, rtol: float = 1e-9, atol: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """Solve accurately from 0 to 1 by torchdiffeq's dopri5 (Dormand, Prince 1980)."""
    shape = y.shape

    def joint(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return field(t, state[0].reshape(shape))

    start = (y, torch.zeros(shape[0], dtype=y.dtype, device=y.device))
    times = torch.tensor([0.0, 1.0], dtype=y.dtype, device=y.device)
    path, ladj = torchdiffeq.odeint(joint, start, times, rtol=rtol, atol=atol, method="dopri5")
    return path[-1], ladj[-1]


def calibrate_grid(
    field: FieldWithDivergence,
    y: Tensor,
    *,
    tolerance: float,
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64),
) -> tuple[tuple[float, ...], float]:
    r"""Coarsest uniform RK4 grid whose log determinant is right on a calibration batch.

    Returns the grid and the 99th percentile of :math:`|\ell_{grid} - \ell_{adaptive}|` in kT.
    The finest candidate is returned if none meets ``tolerance``; the error tells.
    """
    accuracy = min(1e-6, 1e-2 * tolerance)
    _, reference = odeint_adaptive(field, y, rtol=accuracy, atol=0.1 * accuracy)
    error = float("inf")
    grid: tuple[float, ...] = (0.0, 1.0)
    for n in candidates:
        grid = tuple(k / n for k in range(n + 1))
        _, ladj = rk4(field, y, grid)
        error = float(torch.quantile((ladj - reference).abs(), 0.99))
        if error <= tolerance:
            break
    return grid, error

_DEFAULT_GRID = tuple(k / 8 for k in range(9))
_CORRECTIONS = (0, 1, 2)
_MAX_JACOBIAN = 16  # coordinates
_ROUND_TRIP = 5e-7  # nm, on the calibration batch; 1e-6 is the promise


def _mean_free(v: Tensor) -> Tensor:
    # Rounding of a float32 network would make the centroid of Cartesian flows drift.
    return remove_mean(v) if v.ndim == 3 else v


class FieldStep:
    """Layer of a path: one Runge-Kutta step of a flow's field, from time to time of its grid."""

    n_energies = 0

    def __init__(self, flow: EquivariantFlow, interval: tuple[float, float]) -> None:
        self.flow, self.interval = flow, interval

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Apply the map; also minus its log determinant (n,)."""
        y, ladj = rk4(self.flow._field, y, self.interval)
        return y, -ladj

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Apply the inverse; also minus the log determinant of the map (n,)."""
        y, ladj = rk4_inverse(
            self.flow._field,
            self.flow._velocity,
            y,
            self.interval,
            corrections=self.flow.inverse_corrections,
        )
        return y, -ladj


class EquivariantFlow(Path):
    """A prior, a vector field and a frozen time grid: a path of maps, with a density.

    Parameters
    ----------
    prior, vector_field
        Must agree on ``event_shape``.
    grid
        Times of the RK4 steps, from 0 to 1.
    inverse_corrections
        Corrections per step that make the inverse that of the discrete map
        (:func:`~openmm_eqflow.flows.flow.rk4_inverse`); :meth:`calibrate` finds how many it takes.
    chunk_size
        Configurations integrated at once, which bounds memory. Rows of a batch never see each
        other: at a given batch size log q is bit for bit the same whatever the batch-mates.

    Raises
    ------
    ValueError
        If prior and field describe different spaces.
    """

    has_density = True

    def __init__(
        self,
        prior: Prior,
        vector_field: VectorField,
        *,
        grid: tuple[float, ...] = _DEFAULT_GRID,
        inverse_corrections: int = 0,
        chunk_size: int = 512,
    ) -> None:
        if tuple(prior.event_shape) != tuple(vector_field.event_shape):
            raise ValueError(
                f"prior lives on {tuple(prior.event_shape)}, vector field on "
                f"{tuple(vector_field.event_shape)}: build the field with the prior's event_shape"
            )
        self.vector_field = vector_field
        # A prior of one's own need not know of devices as long as there is but one.
        there = prior if self.device.type == "cpu" else prior.to(self.device)
        super().__init__(there, (), chunk_size=chunk_size)
        self.grid = tuple(float(t) for t in grid)
        self.inverse_corrections = inverse_corrections

    @property
    def maps(self) -> EquivariantFlow:
        """What stands in the files as prior, field and grid."""
        return self

    def describe_layers(self) -> str:
        """Say what the layers are."""
        return f"{self.n_ode_steps} RK4 steps"

    @property
    def layers(self) -> tuple[FieldStep, ...]:
        """One map for every interval of the grid."""
        return tuple(FieldStep(self, interval) for interval in itertools.pairwise(self.grid))

    @property
    def n_ode_steps(self) -> int:
        """Number of RK4 steps."""
        return len(self.grid) - 1

    @property
    def module(self) -> nn.Module:
        """The field as a torch module."""
        assert isinstance(self.vector_field, nn.Module)
        return self.vector_field

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network; state and log q are float64 regardless."""
        return next(self.module.parameters()).dtype

    def _field(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        v, div = self.vector_field.with_divergence(t.to(self.dtype), y.to(self.dtype))
        return _mean_free(v.to(y.dtype)), div.to(y.dtype)

    def _velocity(self, t: Tensor, y: Tensor) -> Tensor:
        return _mean_free(self.vector_field(t.to(self.dtype), y.to(self.dtype)).to(y.dtype))

    # -- differentiable core --------------------------------------------------------------------

    def transform(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent points (n, *event_shape) to mean-free positions and their log q (one chunk).

        Positions are in the chart's own frame; log q does not depend on the frame.
        """
        return self.ends(z, RowStreams.none(z))

    def latent_and_log_prob(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (n, N, D), any centroid and orientation, to latent points and log q."""
        return self.starts(x, RowStreams.none(x))

    def rsample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Differentiable samples (n, N, D) with Haar orientation, and log q (n,)."""
        z = self.prior.sample_latent(n, generator=generator).to(self.device)
        x, log_q = self.transform(z)
        rotation = random_rotations(n, self.n_dims, generator=generator).to(x.device)
        return rotate(x, rotation), log_q

    # -- chunked, without gradients ---------------------------------------------------------------

    def rsample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw differentiable samples (n, N, D)."""
        return self.rsample_and_log_prob(n, generator=generator)[0]

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latent points and log q of positions (n, N, D), without gradients, chunked."""
        x, size = x.to(device=self.device, dtype=torch.float64), self._chunk()
        zs, log_qs = zip(
            *self._carried(self.latent_and_log_prob, x.split(size), size), strict=True
        )
        return torch.cat(zs), torch.cat(log_qs)

    def map_errors(
        self, n: int, x: Tensor | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Errors of log q on ``n`` samples and on given configurations x (m, N, D).

        Returns
        -------
        dict
            ``grid_and_precision``: against a twice finer grid in float64, kT, (n + m,);
            ``sampling_against_log_prob``, kT, ``round_trip`` in the chart and ``round_trip_nm``,
            (n,); ``against_jacobian`` of few coordinates: kT, (32,).

        Raises
        ------
        AuditError
            No sample has a finite log q.
        """
        z = self.prior.sample_latent(n, generator=generator).to(self.device)
        with torch.no_grad():
            samples, log_q = self.transform(z)
            valid = torch.isfinite(log_q)
            if not bool(valid.any()):
                raise AuditError(
                    f"none of {n} samples has a finite log q: training diverged; lower the "
                    "learning rate and train again"
                )
            z, samples, log_q = z[valid], samples[valid], log_q[valid]
            points = samples if x is None else torch.cat([samples, x.to(samples)])
            z_back, log_q_back = self.inverse(points)
            fine = _fine_log_q(self, points)
            k = len(samples)
            x_back, _ = self.transform(z_back[:k])
            errors = {
                "grid_and_precision": (log_q_back - fine).abs(),
                "sampling_against_log_prob": (log_q - log_q_back[:k]).abs(),
                "round_trip": _latent_gap(self, z_back[:k] - z),
                "round_trip_nm": (x_back - samples).abs().flatten(1).amax(1),
            }
            if _dimension(self) <= _MAX_JACOBIAN:
                errors["against_jacobian"] = _jacobian_error(self, z[:32])
        return errors

    def calibrate(
        self,
        n: int = 256,
        *,
        tolerance: float = 2e-4,
        generator: torch.Generator | None = None,
    ) -> float:
        """Freeze the coarsest grid accurate to ``tolerance`` (kT, 99th percentile); return error.

        Calibrated in float64 so that the error is the grid's, not the network precision's. Then,
        in the network's own precision, the fewest corrections of the inverse are chosen with
        which every round trip z -> x -> z -> x ends within 5e-7 nm, or near what rounding allows.
        """
        field = self.module
        dtype = self.dtype
        with torch.no_grad():
            z = self.prior.sample_latent(n, generator=generator).to(self.device)
            field.double()
            try:
                self.grid, error = calibrate_grid(self._field, z, tolerance=tolerance)
            finally:
                field.to(dtype)
            self._calibrate_inverse(z)
        return error

    def _calibrate_inverse(self, z: Tensor) -> None:
        x, log_q = self.transform(z)
        x = x[torch.isfinite(log_q)]
        gaps: list[float] = []
        for corrections in _CORRECTIONS:
            self.inverse_corrections = corrections
            back, _ = self.transform(self.latent_and_log_prob(x)[0])
            off = torch.nan_to_num((back - x).abs(), nan=torch.inf)
            gaps.append(float(off.max()) if len(x) else 0.0)
            if gaps[-1] <= _ROUND_TRIP:
                return
        # Rounding of the network is the floor: take the first that is about there.
        self.inverse_corrections = next(
            c for c, gap in zip(_CORRECTIONS, gaps, strict=True) if gap <= 2 * min(gaps)
        )


def _latent_gap(flow: EquivariantFlow, gap: Tensor) -> Tensor:
    """Largest deviation of latent coordinates, (n,); torsions are compared on the circle."""
    n_soft = int(getattr(flow.prior, "n_soft", 0))
    if n_soft:
        gap = torch.cat([gap[:, :-n_soft], wrap_angle(gap[:, -n_soft:])], 1)
    return gap.abs().flatten(1).amax(1)


def _fine_log_q(flow: EquivariantFlow, x: Tensor) -> Tensor:
    """Log q with twice the steps, everything in float64."""
    grid, dtype = flow.grid, flow.dtype
    middles = [0.5 * (a + b) for a, b in itertools.pairwise(grid)]
    flow.module.double()
    flow.grid = tuple(sorted([*grid, *middles]))
    try:
        return flow.log_prob(x)
    finally:
        flow.grid = grid
        flow.module.to(dtype)


def _dimension(flow: EquivariantFlow) -> int:
    shape = flow.prior.event_shape
    return (shape[0] - 1) * shape[1] if len(shape) == 2 else shape[0]


def _jacobian_error(flow: EquivariantFlow, z: Tensor) -> Tensor:
    """Compare ladj with slogdet of the discrete map's Jacobian (mean-free for Cartesian flows)."""
    dtype = flow.dtype
    flow.module.double()
    try:
        # Mean-free fields leave the centroid alone, so the determinant of the full map has the
        # same absolute value as that of its restriction to the mean-free subspace.
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            y, ladj = rk4(flow._field, z, flow.grid)
            # Rows do not see each other: one backward pass serves a component of all rows.
            rows = [
                torch.autograd.grad(y.flatten(1)[:, k].sum(), z, retain_graph=True)[0].flatten(1)
                for k in range(z[0].numel())
            ]
        return (torch.linalg.slogdet(torch.stack(rows, 1))[1] - ladj.detach()).abs()
    finally:
        flow.module.to(dtype)
