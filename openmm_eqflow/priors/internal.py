r"""The internal-coordinate prior: a closed-form, SE(3)-invariant density of one bonded molecule.

Latent coordinates y = (z, tau): whitened stiff residuals z (bonds, angles, stiff torsions) and
soft torsions tau. With s = (b, theta, tau_stiff),

.. math:: s = \mu(\tau) + L z, \qquad \log p(y) = \log p(\tau) + \log \rho(z), \qquad
          \log p(x) = \log p(y) - \log|\det L| - \sum 2\log b - \sum\log\sin\theta - const,

where :math:`\mu` is a Fourier series in the soft torsions and :math:`\rho` a mixture of two
isotropic Gaussians (the wider one is the defensive tail), or one such pair for every ring
conformer (:mod:`~openmm_eqflow.priors.mixture`). An angle that comes close to
:math:`\pi` (at a triple bond, say) is no Gaussian: there :math:`\sin\theta\,d\theta = dc` with
:math:`c = 1 + \cos\theta`, and a harmonic bend has :math:`p(c) \propto e^{-\kappa c}`. Its stiff
coordinate is :math:`\Phi^{-1}(1 - e^{-\kappa c})`, which then is a Gaussian and has no end.

The density is with respect to Lebesgue measure on the mean-free subspace, Haar-distributed
orientation included; with constrained bonds with respect to the volume element of
:mod:`openmm_eqflow.targets.constraints`. It is invariant by construction (any invariant prior will
do: Köhler, Klein, Noé 2020, theorem 1), carries chirality and topology, and involves no ODE.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from openmm_eqflow.geometry import random_rotations, rotate, where_drawn
from openmm_eqflow.priors.mixture import StiffMixture
from openmm_eqflow.priors.torsions import Conformers, TorsionDensity, TorsionGroup
from openmm_eqflow.priors.zmatrix import InternalCoordinates, ZMatrix, wrap_angle
from openmm_eqflow.targets.constraints import Constraints

__all__ = [
    "InternalCoordinatePrior",
]

_PLACES = ("places", "back", "_free", "_lengths")


class InternalCoordinatePrior:
    r"""See the module docstring; made by :func:`openmm_eqflow.priors.fit.fit_internal_prior`.

    Parameters
    ----------
    zmatrix
        Placement order.
    soft
        Indices (into the torsions of ``zmatrix``) of the soft torsions.
    centre
        Circular means of the stiff torsions, (n_stiff_torsions,), radians.
    modes
        Integer Fourier modes (n_modes, n_soft) of the mean function.
    coefficients
        (1 + 2 n_modes, n_stiff): constant, cosines, sines.
    cholesky
        Lower triangular factor of the residual covariance (n_stiff, n_stiff).
    torsions
        Density of the soft torsions.
    tail_share, tail_scale
        Weight and standard deviation of the wide component of rho.
    constraints
        Bonds that are constrained: numbers, not coordinates.

    Attributes
    ----------
    bends
        :math:`\kappa` of every angle that is described as nearly linear, by its index; none until
        a fit finds one.
    fixed
        Lengths in nm of the constrained bonds, by their index in the Z-matrix.
    mixture
        Components of the stiff density; None for one.
    """

    n_dims = 3

    def __init__(
        self,
        zmatrix: ZMatrix,
        *,
        soft: list[int],
        centre: Tensor,
        modes: Tensor,
        coefficients: Tensor,
        cholesky: Tensor,
        torsions: TorsionDensity | None,
        tail_share: float = 0.1,
        tail_scale: float = 1.2,
        constraints: Constraints | None = None,
    ) -> None:
        self.bends: dict[int, float] = {}
        self.constraints = constraints
        lengths = {} if constraints is None else constraints.lengths
        self.fixed = dict(sorted(zmatrix.fixed_bonds(lengths).items()))
        self.mixture: StiffMixture | None = None
        self.zmatrix = zmatrix
        self.n_particles = zmatrix.n_particles
        self.soft = list(soft)
        self.stiff = [k for k in range(len(zmatrix.lead)) if k not in set(soft)]
        self.centre = centre.double()
        self.modes = modes.double()
        self.coefficients = coefficients.double()
        self.cholesky = cholesky.double()
        self.torsions = torsions
        self.tail_share, self.tail_scale = float(tail_share), float(tail_scale)
        self.n_soft, self.n_stiff = len(self.soft), int(cholesky.shape[0])
        self.event_shape = (self.n_stiff + self.n_soft,)
        self.fold = [zmatrix.fold[k] for k in self.soft]
        # Places among the torsions: of the stiff ones, then of the soft ones, and back.
        order = [*self.stiff, *self.soft]
        self.places = torch.tensor(order, dtype=torch.int64)
        self.back = torch.argsort(self.places)
        bonds = range(self.n_particles - 1)
        self._free = torch.tensor([k for k in bonds if k not in self.fixed], dtype=torch.int64)
        self._lengths = torch.tensor([self.fixed.get(k, 0.0) for k in bonds], dtype=torch.float64)
        if self.n_stiff != len(self._free) + self.n_particles - 2 + len(self.stiff):
            raise ValueError(
                f"{self.n_stiff} stiff coordinates, {len(self._free)} free bonds, "
                f"{self.n_particles - 2} angles and {len(self.stiff)} stiff torsions do not match"
            )

    def copy(self) -> InternalCoordinatePrior:
        """Shallow copy whose parameters can be replaced."""
        return copy.copy(self)

    def to(self, device: torch.device | str) -> InternalCoordinatePrior:
        """Return the same density with its tensors on ``device``."""
        made = self.copy()
        for name in ("centre", "modes", "coefficients", "cholesky", *_PLACES):
            setattr(made, name, getattr(self, name).to(device))
        if self.torsions is not None:
            made.torsions = self.torsions.to(device)
        if self.mixture is not None:
            made.mixture = self.mixture.to(device)
        return made

    def affine(self) -> tuple[Tensor, Tensor]:
        r"""Mean (1 + 2 n_modes, m) and factor (m, n_stiff) of all m bonds, angles, stiff torsions.

        As ``coefficients`` and ``cholesky``, with rows of zeros where a bond is constrained.
        """
        if not self.fixed:
            return self.coefficients, self.cholesky
        n, m = len(self._lengths), self.n_stiff + len(self.fixed)
        rows = torch.cat([self._free, torch.arange(n, m, device=self._free.device)])
        nothing = self.coefficients.new_zeros(len(self.coefficients), m)
        lengths = torch.cat([self._lengths.to(nothing), nothing[0, n:]])
        mean = torch.cat([lengths[None], nothing[1:]]).index_copy(1, rows, self.coefficients)
        factor = self.cholesky.new_zeros(m, self.n_stiff).index_copy(0, rows, self.cholesky)
        return mean, factor

    # -- stiff coordinates --------------------------------------------------------------------

    def features(self, tau: Tensor) -> Tensor:
        """Fourier features (n, 1 + 2 n_modes) of soft torsions."""
        phase = tau @ self.modes.to(tau).T
        return torch.cat([tau.new_ones(len(tau), 1), torch.cos(phase), torch.sin(phase)], 1)

    def stiff_vector(self, internal: InternalCoordinates) -> Tensor:
        """Concatenate free bonds, angles and centred stiff torsions, (n, n_stiff)."""
        angles = internal.angles
        if self.bends:
            index, kappa = self._bends(angles)
            own = _normal_of_bend(kappa * 2 * torch.cos(angles[:, index] / 2).square())
            angles = angles.index_copy(1, index, own)
        stiff = self.places.to(angles.device)[: len(self.stiff)]
        torsion = wrap_angle(internal.torsions[:, stiff] - self.centre.to(angles))
        return torch.cat([internal.bonds[:, self._free.to(angles.device)], angles, torsion], 1)

    def internal_from_stiff(self, s: Tensor, tau: Tensor) -> InternalCoordinates:
        """Inverse of :meth:`stiff_vector`."""
        nb, na = len(self._free), self.n_particles - 2
        stiff = s[:, nb + na :] + self.centre.to(s)
        torsions = torch.cat([stiff, tau], 1)[:, self.back.to(s.device)]
        angles = s[:, nb : nb + na]
        if self.bends:
            index, kappa = self._bends(s)
            c = -torch.special.log_ndtr(-angles[:, index]) / kappa
            bent = 2 * torch.acos(torch.sqrt(c.clamp(max=2.0) / 2))
            angles = angles.index_copy(1, index, bent)
        return InternalCoordinates(self._with_fixed(s[:, :nb]), angles, torsions)

    def _with_fixed(self, free: Tensor) -> Tensor:
        """All bonds (n, N - 1) from the free ones."""
        if not self.fixed:
            return free
        lengths = self._lengths.to(free).expand(len(free), -1)
        return lengths.index_copy(1, self._free.to(free.device), free)

    def place(self, s: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, InternalCoordinates]:
        """Positions (n, N, 3), their log volume by (s, tau), and internal coordinates."""
        internal = self.internal_from_stiff(s, tau)
        x, log_volume = self.zmatrix.from_internal(internal)
        log_volume = log_volume + self._bend_volume(s, internal) + self._metric(x)
        return x, log_volume, internal

    def _metric(self, x: Tensor) -> Tensor | float:
        return 0.0 if self.constraints is None else self.constraints.half_log_det(x)

    def _bends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(self.bends), dtype=torch.long, device=like.device)
        return index, torch.tensor(list(self.bends.values())).to(like)

    def _bend_volume(self, s: Tensor, internal: InternalCoordinates) -> Tensor | float:
        r"""Return the sum of :math:`\log|d\theta/ds|` over nearly linear angles, (n,)."""
        if not self.bends:
            return 0.0
        index, kappa = self._bends(s)
        own = s[:, len(self._free) + index]
        log_dc = -0.5 * own.square() - 0.5 * math.log(2 * math.pi)
        log_dc = log_dc - torch.special.log_ndtr(-own) - torch.log(kappa)
        return (log_dc - torch.log(torch.sin(internal.angles[:, index]))).sum(1)

    # -- Prior protocol -----------------------------------------------------------------------

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latent point to (z, tau)."""
        return y[:, : self.n_stiff], y[:, self.n_stiff :]

    def sample_latent(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(n, n_stiff + n_soft)`` latent points, float64."""
        place: Any = {"dtype": torch.float64, "device": where_drawn(generator)}
        z = torch.randn(n, self.n_stiff, generator=generator, **place)
        wide = torch.rand(n, 1, generator=generator, **place) < self.tail_share
        z = torch.where(wide, self.tail_scale * z, z)
        if self.mixture is not None:
            z = self.mixture.place(z, generator=generator)
        if self.torsions is None:
            return z
        return torch.cat([z, self.torsions.sample(n, generator=generator)], 1)

    def latent_log_prob(self, y: Tensor) -> Tensor:
        """Log density of latent points with respect to dz dtau, ``(n,)``."""
        z, tau = self.split(y)
        log_z = self.stiff_log_prob(z)
        return log_z if self.torsions is None else log_z + self.torsions.log_prob(tau)

    def stiff_log_prob(self, z: Tensor) -> Tensor:
        r"""Evaluate :math:`\log\rho` at z (n, n_stiff)."""
        if self.mixture is None:
            return self._radial(0.5 * (z**2).sum(1))
        return torch.logsumexp(self.mixture.log_components(z, self._radial), 1)

    def _radial(self, half: Tensor) -> Tensor:
        narrow = math.log1p(-self.tail_share) - half
        wide = (
            math.log(self.tail_share)
            - half / self.tail_scale**2
            - self.n_stiff * math.log(self.tail_scale)
            if self.tail_share > 0
            else torch.full_like(half, -math.inf)
        )
        return torch.logaddexp(narrow, wide) - 0.5 * self.n_stiff * math.log(2 * math.pi)

    def components(self, y: Tensor) -> Tensor:
        """Component (n,) of the stiff density that each latent point most likely belongs to."""
        if self.mixture is None:
            return torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return self.mixture.log_components(self.split(y)[0], self._radial).argmax(1)

    def to_cartesian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (n, N, 3), mean-free in the root frame, and ``log_volume`` (n,).

        Points that leave the chart (b <= 0, theta outside (0, pi), a stiff torsion more than half
        a turn from its centre) get ``log_volume = nan``: their weight is zero.
        """
        z, tau = self.split(y)
        s = self.features(tau) @ self.coefficients.to(y) + z @ self.cholesky.to(y).T
        x, log_volume, (bonds, angles, _) = self.place(s, tau)
        turns = s[:, len(self._free) + self.n_particles - 2 :]
        # Further out sin(theta) is positive again, so a nan of its logarithm would not tell.
        outside = (
            (bonds <= 0).any(1)
            | ((angles <= 0) | (angles >= math.pi)).any(1)
            | (turns.abs() >= math.pi).any(1)
        )
        return x, torch.where(outside, torch.nan, log_volume + self._log_det().to(y))

    def _log_det(self) -> Tensor:
        return torch.log(torch.diagonal(self.cholesky)).sum()

    def from_cartesian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latent points (n, n_stiff + n_soft) of positions and ``log_volume`` (n,).

        Constrained bonds may be off their lengths by what an integrator tolerates: the point is
        that of the configuration with the exact ones.
        """
        internal = self.zmatrix.to_internal(x)
        if self.fixed:
            free = internal.bonds[:, self._free.to(x.device)]
            internal = internal._replace(bonds=self._with_fixed(free))
        tau = internal.torsions[:, self.places.to(x.device)[len(self.stiff) :]]
        s = self.stiff_vector(internal)
        residual = s - self.features(tau) @ self.coefficients.to(x)
        z = torch.linalg.solve_triangular(self.cholesky.to(x), residual.T, upper=False).T
        log_volume = self.zmatrix.log_volume(internal) + self._bend_volume(s, internal)
        log_volume = log_volume + self._metric(x) + self._log_det().to(x)
        return torch.cat([z, tau], 1), log_volume

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw mean-free positions with Haar-distributed orientation, (n, N, 3) float64."""
        x, _ = self.to_cartesian(self.sample_latent(n, generator=generator))
        return rotate(x, random_rotations(n, generator=generator))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density on the mean-free subspace, ``(n,)``."""
        y, log_volume = self.from_cartesian(x)
        return self.latent_log_prob(y) - log_volume

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient of :meth:`log_prob`, shape of x."""
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(self.log_prob(x).sum(), x)[0]

    # -- storage ------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able configuration and tensors."""
        tensors = {
            "centre": self.centre,
            "modes": self.modes,
            "coefficients": self.coefficients,
            "cholesky": self.cholesky,
        }
        groups = []
        for k, group in enumerate(self.torsions.groups if self.torsions else ()):
            groups.append(
                {
                    "members": list(group.members),
                    "fold": list(group.fold),
                    "width": group.width,
                    "floor": group.floor,
                }
            )
            assert self.torsions is not None
            tensors[f"torsions.{k}"] = self.torsions.tables[k]
        config = {
            "zmatrix": self.zmatrix.config(),
            "soft": self.soft,
            "tail_share": self.tail_share,
            "tail_scale": self.tail_scale,
            "groups": groups,
        }
        if self.bends:  # absent where there are none: the flows that ship know no such key
            config["bends"] = [[k, kappa] for k, kappa in self.bends.items()]
        if self.constraints is not None:
            config["constraints"] = self.constraints.config()
        if self.torsions is not None and self.torsions.conformers is not None:
            config["conformers"], coupling = self.torsions.conformers.state()
            tensors |= coupling
        if self.mixture is not None:
            tensors |= self.mixture.state()
        return config, tensors

    @classmethod
    def from_state(
        cls, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> InternalCoordinatePrior:
        """Rebuild from :meth:`state`."""
        groups = [
            TorsionGroup(tuple(g["members"]), tuple(g["fold"]), g["width"], g["floor"])
            for g in config["groups"]
        ]
        coupling, held = config.get("conformers"), config.get("constraints")
        density = (
            TorsionDensity(
                groups,
                [tensors[f"torsions.{k}"] for k in range(len(groups))],
                None if coupling is None else Conformers.from_state(coupling, tensors),
            )
            if groups
            else None
        )
        made = cls(
            ZMatrix.from_config(config["zmatrix"]),
            soft=list(config["soft"]),
            centre=tensors["centre"],
            modes=tensors["modes"],
            coefficients=tensors["coefficients"],
            cholesky=tensors["cholesky"],
            torsions=density,
            tail_share=config["tail_share"],
            tail_scale=config["tail_scale"],
            constraints=None if held is None else Constraints.from_config(held),
        )
        made.bends = {int(k): float(kappa) for k, kappa in config.get("bends", ())}
        made.mixture = StiffMixture.from_state(tensors)
        return made


def _normal_of_bend(a: Tensor) -> Tensor:
    r"""Map :math:`a = \kappa c > 0` to :math:`\Phi^{-1}(1 - e^{-a})`, accurate at both ends."""
    half = math.log(2.0)
    low = torch.special.ndtri(-torch.expm1(-a.clamp(max=half)))
    return torch.where(a < half, low, -torch.special.ndtri(torch.exp(-a.clamp(min=half))))
