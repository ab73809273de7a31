r"""A chart field that also sees interatomic distances, divergence still exact.

Whitened internal coordinates resolve bonds and torsions; what they cannot resolve are contacts:
close pairs of atoms far apart in the bond graph move with many coordinates at once. With Gaussian
features :math:`\varphi_{pk}(d_p)` of the distances the field adds to
:class:`~openmm_eqflow.vector_fields.chart.ChartField`

.. math:: v_z \mathrel{+}= W\,[m \odot \sigma(a)], \qquad
          a = \sum_{pk} U_{pk}\,\varphi_{pk}(d_p) + V z + g, \qquad (m, g) = c(\tau, t),

and the same sums over pairs enter the torsion network. Its divergence in z is

.. math:: \sum_j m_j\,\sigma'(a_j)\,\Bigl[\sum_p \Bigl(\sum_k U_{pkj}\,\varphi_{pk}'\Bigr)
          \bigl(\partial_z d_p \cdot W_j\bigr) + (V W)_{jj}\Bigr],

one directional derivative of every distance per hidden unit, whatever the number of coordinates;
:math:`\partial_y d_p` comes from :mod:`~openmm_eqflow.vector_fields.chart_geometry` and depends on
no weight. Distances repeat after a full turn of a torsion: with them the field of a threefold
rotor need not repeat after a third of one, as that of ``ChartField`` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.vector_fields.base import register_vector_field
from openmm_eqflow.vector_fields.chart import ChartField, silu_with_derivative
from openmm_eqflow.vector_fields.chart_geometry import ChartGeometry, ChartMotion

__all__ = [
    "CONTACT_OPTIONS",
    "ContactField",
]

_STIFF = 0.012  # nm; pairs whose distance varies less say nothing that bonds and angles do not
_MANY = 250  # pairs from which on sums are arranged by atom (42 atoms, 718 pairs: twice as quick)
#: Options of :meth:`ContactField.fit` that a plain chart field does not have.
CONTACT_OPTIONS = ("contacts", "n_rbf", "n_samples", "reach")
_REACH = 0.55  # nm; pairs that hardly ever come closer have no contact


@register_vector_field
class ContactField(ChartField):
    """Chart field with distances; see the module docstring and :meth:`fit`.

    Parameters
    ----------
    zmatrix, soft, n_modes
        As of :class:`~openmm_eqflow.vector_fields.chart_geometry.ChartGeometry`.
    pairs
        Atoms of each distance, (n_pairs, 2).
    contacts
        Hidden units of the contact network.
    n_rbf
        Features per distance.
    n_fixed
        Number of constrained bonds.
    options
        Of :class:`~openmm_eqflow.vector_fields.chart.ChartField`.

    Example
    -------
    >>> import torch
    >>> from openmm_eqflow.priors.zmatrix import ZMatrix
    >>> zm = ZMatrix.from_bonds(4, [(0, 1), (1, 2), (2, 3)], masses=[12, 12, 12, 12])
    >>> field = ContactField(zm.config(), [0], 0, [[0, 3]], width=8)
    >>> field.geometry.mean[0] = torch.tensor([0.15, 0.15, 0.15, 1.9, 1.9])
    >>> v, div = field.with_divergence(torch.tensor(0.5), torch.zeros(2, 6))
    >>> v.shape, div.shape
    (torch.Size([2, 6]), torch.Size([2]))
    """

    centres: Tensor
    inverse_widths: Tensor
    incidence: Tensor
    first: Tensor
    second: Tensor
    ends: Tensor
    ends_sign: Tensor

    def __init__(
        self,
        zmatrix: dict[str, Any],
        soft: list[int],
        n_modes: int,
        pairs: list[list[int]],
        contacts: int = 64,
        n_rbf: int = 8,
        n_fixed: int = 0,
        **options: Any,
    ) -> None:
        geometry = ChartGeometry(zmatrix, list(soft), n_modes, n_fixed)
        fold = [geometry.zmatrix.fold[k] for k in soft]
        super().__init__(geometry.n_stiff, geometry.n_soft, fold, **options)
        self.config = {
            "zmatrix": geometry.zmatrix.config(),
            "soft": list(soft),
            "n_modes": n_modes,
            "pairs": [list(pair) for pair in pairs],
            "contacts": contacts,
            "n_rbf": n_rbf,
        } | options
        if n_fixed:  # absent where there are none: the flows that ship know no such key
            self.config["n_fixed"] = n_fixed
        self.geometry = geometry
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        self.register_buffer("first", torch.tensor(first, dtype=torch.long), False)
        self.register_buffer("second", torch.tensor(second, dtype=torch.long), False)
        n_pairs = len(pairs)
        incidence = torch.zeros(n_pairs, geometry.n_particles)
        incidence[range(n_pairs), first] += 1
        incidence[range(n_pairs), second] -= 1
        self.register_buffer("incidence", incidence, False)
        self.by_atom = n_pairs > _MANY
        # Pairs of every atom, atom after atom, and at which end of them it is.
        ends = [
            (p, 1.0 - 2 * (i == k[1]))
            for i in range(geometry.n_particles)
            for p, k in enumerate(pairs)
            if i in k
        ]
        self.n_ends = [sum(i in k for k in pairs) for i in range(geometry.n_particles)]
        self.register_buffer("ends", torch.tensor([p for p, _ in ends], dtype=torch.long), False)
        self.register_buffer("ends_sign", torch.tensor([sign for _, sign in ends]), False)
        spread = torch.linspace(0.1, 0.6, n_rbf).expand(n_pairs, n_rbf)
        self.register_buffer("centres", spread.clone())
        self.register_buffer("inverse_widths", torch.full((n_pairs, 1), 10.0))
        c, k = self.head.in_features, self.torsion_hidden.in_features
        self.contact_in = nn.Parameter(
            torch.randn(n_pairs, n_rbf, contacts) / math.sqrt(max(n_pairs, 1))
        )
        self.contact_z = nn.Parameter(
            0.5 * torch.randn(contacts, self.n_stiff) / math.sqrt(self.n_stiff)
        )
        self.contact_head = nn.Linear(c, 2 * contacts)
        self.contact_out = nn.Parameter(torch.zeros(self.n_stiff, contacts))
        self.contact_torsion = nn.Parameter(torch.zeros(contacts, k))

    @classmethod
    def fit(
        cls, prior: Any, *, n_samples: int = 4000, reach: float = _REACH, **options: Any
    ) -> ContactField:
        """Field on the chart of an internal-coordinate prior, scaled by samples of it.

        Pairs are those whose distance is neither fixed by bonds and angles nor always longer than
        ``reach`` nm (for 49 in 50 samples); features lie where samples of the prior have their
        shortest distances.
        """
        generator = torch.Generator().manual_seed(0)
        x, _ = prior.to_cartesian(prior.sample_latent(n_samples, generator=generator))
        i, j = torch.triu_indices(prior.n_particles, prior.n_particles, 1)
        d = torch.linalg.vector_norm(x[:, i] - x[:, j], dim=-1)
        keep = (d.std(0) > _STIFF) & (d.quantile(0.02, 0) < reach)
        pairs = torch.stack([i[keep], j[keep]], 1).tolist()
        if prior.fixed:
            options["n_fixed"] = len(prior.fixed)
        field = cls(prior.zmatrix.config(), prior.soft, len(prior.modes), pairs, **options)
        field.geometry.load_state_dict(ChartGeometry.of(prior).state_dict())
        low = d[:, keep].quantile(0.0005, 0) - 0.01
        gap = d[:, keep].quantile(0.6, 0) - low
        n_rbf = field.centres.shape[1]
        grid = torch.linspace(0, 1, n_rbf, dtype=d.dtype)
        field.centres.copy_(low[:, None] + gap[:, None] * grid)
        field.inverse_widths.copy_(0.8 * (n_rbf - 1) / gap[:, None])
        return field

    def _distances(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (n, n_pairs, 3), distances in widths from the centres, features of these."""
        r = x[:, self.first] - x[:, self.second]
        d = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        a = (d - self.centres) * self.inverse_widths
        return r / d, a, torch.exp(-0.5 * a * a)

    def _stiff_contacts(
        self, z: Tensor, context: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity and the factor m sigma' of the trace."""
        m, g = self.contact_head(context).chunk(2, 1)
        a = total + z @ self.contact_z.T + g
        h, slope = silu_with_derivative(a)
        return ((1 + m) * h) @ self.contact_out.T, (1 + m) * slope

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity, shape of y."""
        z, features, _, time = self._inputs(t, y)
        _, _, phi = self._distances(self.geometry.positions(y))
        total = phi.flatten(1) @ self.contact_in.flatten(0, 1)
        context = self._context(features, time)
        v = self._stiff(z, context)[0] + self._stiff_contacts(z, context, total)[0]
        if not self.n_soft:
            return v
        extra = total @ self.contact_torsion
        return torch.cat([v, self._soft(z, features, time, extra)[0]], 1)

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence, (n, n_coordinates) and (n,)."""
        z, features, slope, time = self._inputs(t, y)
        x, move = self.geometry.linearise(y) if self.by_atom else self.geometry(y)
        unit, a, phi = self._distances(x)
        slopes = -a * self.inverse_widths * phi
        total = phi.flatten(1) @ self.contact_in.flatten(0, 1)
        context = self._context(features, time)
        v, (d0, d1) = self._stiff(z, context)
        mixing, diagonal = self._trace_weights()
        div = ((d1 @ mixing) * d0).sum(1) + d0 @ diagonal
        more, factor = self._stiff_contacts(z, context, total)
        v = v + more
        respond: Any = self._by_atom if self.by_atom else self._by_pair
        trace, change = respond(unit, slopes, move)
        trace = trace + (self.contact_z.T * self.contact_out).sum(0)
        div = div + (factor * trace).sum(1)
        if not self.n_soft:
            return v, div
        v_soft, e0, e1 = self._soft(z, features, time, total @ self.contact_torsion)
        tangent = torch.einsum("nsf,sfk->nsk", slope, self.torsion_in)
        tangent = tangent + change @ self.contact_torsion
        return torch.cat([v, v_soft], 1), div + self._soft_trace(tangent, e0, e1)

    def _by_pair(self, unit: Tensor, slopes: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """How the sums over pairs change along the chart.

        Parameters
        ----------
        unit, slopes, jacobian
            Unit vectors (n, n_pairs, 3), slopes of the features (n, n_pairs, n_rbf) and
            derivative of positions (n, N, 3, d).

        Returns
        -------
        tuple of Tensor
            Change of every sum along its own column of the output matrix, (n, contacts), and
            along the torsions, (n, n_soft, contacts).
        """
        # How every distance changes along every column of the output matrix, and the sums with it.
        motion = (self.incidence.unsqueeze(-1) * unit.unsqueeze(2)).flatten(2)
        moved = jacobian[..., : self.n_stiff].flatten(1, 2) @ self.contact_out
        response = torch.einsum("npk,pkh->nph", slopes, self.contact_in)
        trace = (response * (motion @ moved)).sum(1)
        along = motion @ jacobian[..., self.n_stiff :].flatten(1, 2)
        return trace, along.transpose(1, 2) @ response

    def _by_atom(self, unit: Tensor, slopes: Tensor, motion: ChartMotion) -> tuple[Tensor, Tensor]:
        """Return the same from the gradient of the sums in every atom.

        A pair moves with two atoms only: of many pairs the dense product above is mostly zeros.
        """
        n, n_rbf = len(unit), slopes.shape[2]
        signed = (self.ends_sign[:, None] * unit[:, self.ends]).transpose(1, 2).contiguous()
        parts = signed.unsqueeze(-1) * slopes[:, self.ends].unsqueeze(1)
        sizes = [n_rbf * count for count in self.n_ends]
        pieces = parts.flatten(2).flatten(0, 1).split(sizes, 1)
        weights = self.contact_in[self.ends].flatten(0, 1).split(sizes)
        products = [piece @ weight for piece, weight in zip(pieces, weights, strict=True)]
        gradient = torch.stack([product.reshape(n, 3, -1) for product in products], 1)
        return self.geometry.pull_back(motion, gradient, self.contact_out)
