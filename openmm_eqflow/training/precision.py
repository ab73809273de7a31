"""Device and arithmetic of the network; state and log q are float64 whatever is chosen.

``tf32`` rounds the inputs of float32 matrix products to 10 bits of mantissa, ``bfloat16`` runs
them in 8 (torch autocast). Either serves the training loss only: evaluation, calibration, audit
and sampling use the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openmm_eqflow.errors import ConfigurationError

__all__ = [
    "PRECISIONS",
    "AutocastField",
    "check_precision",
    "resolve_device",
    "training_precision",
]

PRECISIONS = ("float32", "tf32", "bfloat16")


class AutocastField(nn.Module):
    """The same field (and the same weights) evaluated under autocast, results in float32.

    Parameters
    ----------
    field
        Vector field with float32 weights.
    """

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field: Any = field
        self.event_shape = field.event_shape
        self.exact_divergence = getattr(field, "exact_divergence", False)
        self.equivariant = getattr(field, "equivariant", True)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity, shape of y."""
        with torch.autocast(y.device.type, dtype=torch.bfloat16):
            velocity: Tensor = self.field(t, y)
        return velocity.float()

    def with_divergence(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and its divergence."""
        with torch.autocast(y.device.type, dtype=torch.bfloat16):
            v, div = self.field.with_divergence(t, y)
        return v.float(), div.float()


def resolve_device(name: str) -> str:
    """Turn ``auto`` into a device.

    Raises
    ------
    ConfigurationError
        Another name than auto, cpu or cuda, or CUDA where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device is 'cuda' but torch finds no CUDA GPU; use --device cpu or install a CUDA "
            "build of torch"
        )
    if name not in ("cpu", "cuda"):
        raise ConfigurationError(f"device is {name!r}, expected auto, cpu or cuda")
    return name


def check_precision(precision: str, device: str) -> None:
    """Refuse what the device cannot do.

    Raises
    ------
    ConfigurationError
        Unknown precision, or another than float32 without a GPU.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(
            f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}"
        )
    if precision != "float32" and torch.device(device).type != "cuda":
        raise ConfigurationError(
            f"precision {precision!r} needs a CUDA device, this run uses {device!r}; set "
            "precision: float32"
        )


@contextmanager
def training_precision(field: nn.Module, precision: str, device: str) -> Iterator[nn.Module]:
    """Yield the field as the training loss shall see it; see :func:`check_precision`."""
    check_precision(precision, device)
    if precision == "float32":
        yield field
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield AutocastField(field) if precision == "bfloat16" else field
    finally:
        torch.set_float32_matmul_precision(before)
