r"""A vector field in the prior's own coordinates, with a divergence that costs one more matmul.

In the chart y = (z, tau) of whitened stiff residuals and soft torsions the flow is still an
equivariant CNF: y is invariant, so the induced Cartesian velocity :math:`(dG/dy) v` commutes with
every rigid motion. The stiff part is a two-hidden-layer network in z whose layers are modulated by
a network c of torsions and time only,

.. math:: h_0 = \sigma(s_0 \odot W_0 z + g_0), \quad h_1 = \sigma(s_1 \odot W_1 h_0 + g_1), \quad
          v_z = W_2 h_1 + W_3 h_0 + b, \qquad (s, g, b) = c(\tau, t).

With :math:`d_k = s_k \odot \sigma'(\cdot)` its exact divergence in z is the bilinear form

.. math:: \mathrm{tr}\,\frac{\partial v_z}{\partial z}
          = d_1^T \left[W_1 \odot (W_0 W_2)^T\right] d_0 + \mathrm{diag}(W_0 W_3)^T d_0,

because :math:`\mathrm{tr}(W_2 D_1 W_1 D_0 W_0) = \sum_{ij} (D_1)_i (W_1)_{ij} (D_0)_j
(W_0 W_2)_{ji}`: no tangents at all, whatever the number of coordinates (closed-form traces of
shallow
networks: Onken et al. 2021, OT-Flow, arXiv:2006.00104). The few torsions have a small network of
their own, whose trace takes one forward-mode tangent per torsion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.vector_fields.base import register_vector_field

__all__ = [
    "ChartField",
    "silu_with_derivative",
]


def silu_with_derivative(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return a * sigmoid(a) and its derivative."""
    sigmoid = torch.sigmoid(a)
    value = a * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


@register_vector_field
class ChartField(nn.Module):
    """Field on (z, tau), periodic in the torsions; see the module docstring.

    Parameters
    ----------
    n_stiff, n_soft
        Numbers of whitened residuals and of soft torsions.
    fold
        Rotational symmetry of each torsion; the field repeats itself accordingly.
    width, conditioner_width, torsion_width
        Hidden sizes of the stiff network, of its conditioner and of the torsion network.
    n_harmonics, n_time_features
        Input features of torsions and time.

    Example
    -------
    >>> import torch
    >>> field = ChartField(n_stiff=4, n_soft=1, fold=[1], width=8)
    >>> v, div = field.with_divergence(torch.tensor(0.5), torch.zeros(2, 5))
    >>> v.shape, div.shape
    (torch.Size([2, 5]), torch.Size([2]))
    """

    exact_divergence = True
    orders: Tensor
    times: Tensor

    def __init__(
        self,
        n_stiff: int,
        n_soft: int,
        fold: Sequence[int],
        width: int = 512,
        conditioner_width: int = 192,
        torsion_width: int = 128,
        n_harmonics: int = 4,
        n_time_features: int = 4,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_stiff": n_stiff,
            "n_soft": n_soft,
            "fold": list(fold),
            "width": width,
            "conditioner_width": conditioner_width,
            "torsion_width": torsion_width,
            "n_harmonics": n_harmonics,
            "n_time_features": n_time_features,
        }
        self.n_stiff, self.n_soft, self.width = n_stiff, n_soft, width
        self.event_shape = (n_stiff + n_soft,)
        orders = torch.tensor([[m * f for m in range(1, n_harmonics + 1)] for f in fold])
        self.register_buffer("orders", orders.float().reshape(n_soft, n_harmonics), False)
        times = math.pi * torch.arange(1, n_time_features // 2 + 1)
        self.register_buffer("times", times.float(), False)
        n_features = 2 * n_harmonics * n_soft
        n_time = 2 + 2 * len(times)
        self.w0 = nn.Parameter(torch.randn(width, n_stiff) / math.sqrt(n_stiff))
        self.w1 = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.w2 = nn.Parameter(torch.zeros(n_stiff, width))
        self.w3 = nn.Parameter(torch.zeros(n_stiff, width))
        c = conditioner_width
        self.conditioner = nn.Sequential(
            nn.Linear(n_features + n_time, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU()
        )
        self.head = nn.Linear(c, 4 * width + n_stiff)
        with torch.no_grad():
            self.head.weight *= 0.5
            self.head.weight[4 * width :] = 0
            self.head.bias[4 * width :] = 0
        k = torsion_width
        self.torsion_z = nn.Linear(n_stiff, k, bias=False)
        self.torsion_in = nn.Parameter(
            torch.randn(n_soft, 2 * n_harmonics, k) / math.sqrt(max(n_features, 1))
        )
        self.torsion_time = nn.Linear(n_time, k)
        self.torsion_hidden = nn.Linear(k, k)
        self.torsion_out = nn.Parameter(torch.zeros(n_soft, k))
        self._kept: tuple[list[Any], tuple[Tensor, Tensor]] | None = None

    def _apply(self, *arguments: Any, **options: Any) -> ChartField:
        self._kept = None  # of the old precision or device
        return super()._apply(*arguments, **options)

    def _trace_weights(self) -> tuple[Tensor, Tensor]:
        """W1 o (W0 W2)^T and the diagonal of W0 W3, which weigh d1, d0 in the trace.

        Without gradients they are kept until a weight changes: for a single configuration, as in
        a Markov chain of one replica, that product would cost more than all the rest.
        """
        weights = (self.w0, self.w1, self.w2, self.w3)
        if torch.is_grad_enabled():
            return self.w1 * (self.w0 @ self.w2).T, (self.w0 * self.w3.T).sum(1)
        state = [(w.data_ptr(), w._version) for w in weights]
        kept = self._kept
        if kept is None or kept[0] != state:
            kept = state, (self.w1 * (self.w0 @ self.w2).T, (self.w0 * self.w3.T).sum(1))
            self._kept = kept
        return kept[1]

    def _inputs(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return z, torsion features (n, n_soft, F), their derivative, and time features."""
        z, tau = y[:, : self.n_stiff], y[:, self.n_stiff :]
        phase = tau.unsqueeze(-1) * self.orders
        cos, sin = torch.cos(phase), torch.sin(phase)
        features = torch.cat([cos, sin], -1)
        slope = torch.cat([-sin * self.orders, cos * self.orders], -1)
        t = t.expand(y.shape[0]).unsqueeze(-1)
        time = torch.cat([t, t * t, torch.cos(t * self.times), torch.sin(t * self.times)], -1)
        return z, features, slope, time

    def _context(self, features: Tensor, time: Tensor) -> Tensor:
        context: Tensor = self.conditioner(torch.cat([features.flatten(1), time], -1))
        return context

    def _stiff(
        self, z: Tensor, context: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        head = self.head(context)
        w = self.width
        s0, g0, s1, g1, bias = head.split([w, w, w, w, self.n_stiff], 1)
        h0, d0 = silu_with_derivative((1 + s0) * (z @ self.w0.T) + g0)
        h1, d1 = silu_with_derivative((1 + s1) * (h0 @ self.w1.T) + g1)
        v = h1 @ self.w2.T + h0 @ self.w3.T + bias
        return v, (d0 * (1 + s0), d1 * (1 + s1))

    def _soft(
        self, z: Tensor, features: Tensor, time: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = self.torsion_z(z) + self.torsion_time(time)
        a = a + features.flatten(1) @ self.torsion_in.flatten(0, 1)
        if extra is not None:
            a = a + extra
        h0, d0 = silu_with_derivative(a)
        h1, d1 = silu_with_derivative(self.torsion_hidden(h0))
        return (h0 + h1) @ self.torsion_out.T, d0, d1

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity, shape of y."""
        z, features, _, time = self._inputs(t, y)
        v, _ = self._stiff(z, self._context(features, time))
        return torch.cat([v, self._soft(z, features, time)[0]], 1) if self.n_soft else v

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its exact divergence, (n, n_coordinates) and (n,)."""
        z, features, slope, time = self._inputs(t, y)
        v, (d0, d1) = self._stiff(z, self._context(features, time))
        mixing, diagonal = self._trace_weights()
        div = ((d1 @ mixing) * d0).sum(1) + d0 @ diagonal
        if not self.n_soft:
            return v, div
        v_soft, e0, e1 = self._soft(z, features, time)
        # One tangent per torsion: (n, n_soft, k).
        tangent = torch.einsum("nsf,sfk->nsk", slope, self.torsion_in)
        return torch.cat([v, v_soft], 1), div + self._soft_trace(tangent, e0, e1)

    def _soft_trace(self, tangent: Tensor, e0: Tensor, e1: Tensor) -> Tensor:
        """Trace of the torsion network whose input moves by ``tangent`` (n, n_soft, k)."""
        tangent = tangent * e0.unsqueeze(1)
        second = (tangent @ self.torsion_hidden.weight.T) * e1.unsqueeze(1)
        return ((tangent + second) * self.torsion_out).sum((1, 2))
