"""The flow that lies about log q: the power control of every statistical test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIES = ("dropped", "turned", "tilted")


class LyingFlow:
    """The draws and the maps of a flow, with a wrong log q.

    Parameters
    ----------
    flow
        The honest one; whatever is not a density is its own.
    lie
        ``dropped``: log q is 0. ``turned``: its sign is. ``tilted``: log q and ``tilt`` times the
        distance of the first two particles, an error that varies with the configuration.
    """

    def __init__(self, flow: Any, lie: str, tilt: float = 1.0) -> None:
        assert lie in LIES
        self.honest, self.lie, self.tilt = flow, lie, tilt

    def __getattr__(self, name: str) -> Any:
        if name == "honest":  # while it is copied
            raise AttributeError(name)
        return getattr(self.honest, name)

    def told(self, x: Tensor, log_q: Tensor) -> Tensor:
        if self.lie == "tilted":
            return log_q + self.tilt * (x[:, 0] - x[:, 1]).norm(dim=-1)
        return -log_q if self.lie == "turned" else 0.0 * log_q

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_q = self.honest.sample_and_log_prob(n, generator=generator)
        return x, self.told(x, log_q)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.told(x, self.honest.log_prob(x))

    def transform(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_q = self.honest.transform(z)
        return x, self.told(x, log_q)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_q = self.honest.inverse(x)
        return z, self.told(x, log_q)
