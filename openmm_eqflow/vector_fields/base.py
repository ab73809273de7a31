r"""What a vector field is: :math:`v(t, y)` with its exact divergence.

A continuous normalizing flow (Chen et al. 2018, arXiv:1806.07366) solves
:math:`dy/dt = v(t, y)` from t = 0 (prior) to t = 1 (data); along a trajectory
:math:`d \log q / dt = -\nabla\cdot v`. A flow whose field commutes with a group and whose prior is
invariant has an invariant density (Köhler, Klein, Noé 2020, theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "VectorField",
    "build_vector_field",
    "register_vector_field",
]


@runtime_checkable
class VectorField(Protocol):
    """A time-dependent vector field with exact divergence.

    Attributes
    ----------
    event_shape
        Shape of one point: ``(n_particles, n_dims)`` for Cartesian fields, ``(n_coordinates,)``
        for chart fields.
    config
        JSON-able keyword arguments that rebuild the field (weights excluded).
    exact_divergence
        False only for stochastic estimates; such a field is refused wherever log q matters.
    """

    event_shape: tuple[int, ...]
    config: dict[str, Any]
    exact_divergence: bool

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at ``y`` (batch, *event_shape); ``t`` is a scalar or ``(batch,)`` tensor."""
        ...

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Velocity and :math:`+\mathrm{tr}\,\partial v/\partial y`, shapes of y, ``(batch,)``."""
        ...


_REGISTRY: dict[str, Callable[..., nn.Module]] = {}
F = TypeVar("F", bound=type)


def register_vector_field(cls: F) -> F:
    """Class decorator: make a field loadable from a flow file by its class name."""
    _REGISTRY[cls.__name__] = cls
    return cls


def build_vector_field(kind: str, config: dict[str, Any]) -> nn.Module:
    """Rebuild a field from its class name and ``config`` (weights are loaded separately)."""
    if kind not in _REGISTRY:
        raise ConfigurationError(
            f"unknown vector field {kind!r}; known: {', '.join(sorted(_REGISTRY))}. "
            "Import the module that registers it before loading the flow."
        )
    return _REGISTRY[kind](**config)
