r"""From an ideal gas in a trap to a Lennard-Jones cluster without a jump.

.. math::
    u_t(x) = \tfrac{1}{2} \sum_i |x_i - \bar x|^2
             + 2 \sum_{i<j} \bigl[s_{ij}^{-6} - 2\, b(t)\, s_{ij}^{-3}\bigr],
    \qquad s_{ij} = d_{ij}^2 + a(t),

in kT, lengths in units of the pair distance of lowest energy. The cores are soft at first
(a(0) = 3: no pair feels more than 0.003 kT) and hard at the end (a(1) = 0); the attraction b sets
in when they exclude each other. At t = 1 it is the ``lennard-jones`` model of
:mod:`~openmm_eqflow.model_systems`, at t < 0 by convention the ideal gas.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SoftCorePath"]

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SoftCorePath:
    """Soft core a(t) = ``softness`` (1 - t)^``power``; attraction b(t) from 0 at ``onset`` to 1.

    Examples
    --------
    >>> SoftCorePath().levels(np.array([0.0, 1.0]))
    array([[1., 3., 0.],
           [1., 0., 1.]], dtype=float32)
    """

    softness: float = 3.0
    power: float = 2.0
    onset: float = 0.3

    def levels(self, t: Floats) -> Floats:
        """(trap, soft, attraction) at times ``t``: (n, 3), float32."""
        soft = self.softness * (1.0 - t) ** self.power
        attraction = np.clip((t - self.onset) / (1.0 - self.onset), 0.0, 1.0)
        return np.stack([np.ones_like(t), soft, attraction], 1).astype(np.float32)

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)
