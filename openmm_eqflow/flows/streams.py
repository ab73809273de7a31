r"""One random stream per configuration, so that none depends on the others of its batch.

Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): a
counter-based generator, four 32-bit words for each value of a counter under a 64-bit key. The key
names the configuration; the counter holds the number of the draw and a place in it. Any number can
be computed without those before it, so a batch is one array operation on whatever device. Normals
are Box and Muller's. The compiled kernels of clusters compute the same numbers
(:func:`~openmm_eqflow.flows.softcore_kernels.fill_normal`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "RowStreams",
    "philox",
]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for a counter of four and a key of two: int64 tensors of values below 2^32.

    Examples
    --------
    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero,) * 2)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of 64 bits wraps to a negative number; the mask undoes the sign.
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK,
        )  # fmt: skip
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class RowStreams:
    """Random numbers of ``n`` rows, each from the stream of its own key.

    Parameters
    ----------
    keys
        (n,), int64, on the device where the numbers are wanted.

    Attributes
    ----------
    n_drawn
        Draws so far; the next takes this number.

    Examples
    --------
    >>> streams = RowStreams(torch.arange(3))
    >>> z = streams.normal(5)
    >>> alone = RowStreams(torch.arange(3)[1:2])
    >>> bool((alone.normal(5)[0] == z[1]).all())
    True
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.n_drawn = keys, 0
        self._words = (keys & _MASK, (keys >> 32) & _MASK)

    @classmethod
    def drawn(
        cls, n: int, generator: torch.Generator | None, device: torch.device | str = "cpu"
    ) -> RowStreams:
        """Draw new keys from ``generator``."""
        source = "cpu" if generator is None else generator.device
        keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator, device=source)
        return cls(keys.to(device))

    @classmethod
    def of(cls, x: Tensor) -> RowStreams:
        """Keys from every bit of the rows of ``x`` (n, ...): equal rows have equal streams."""
        bits = x.detach().to(torch.float64).contiguous().view(torch.int64).flatten(1)
        place = torch.arange(bits.shape[1], device=x.device)
        low, high = bits & _MASK, (bits >> 32) & _MASK
        zero = torch.zeros_like(place)
        a, b, _, _ = philox((low, high, place.expand_as(low), zero), (zero, zero))
        return cls((a | (b << 32)).sum(1))

    @classmethod
    def none(cls, x: Tensor) -> RowStreams:
        """Streams for rows of ``x`` from which nothing will be drawn."""
        return cls(torch.zeros(len(x), dtype=torch.int64, device=x.device))

    @classmethod
    def joined(cls, parts: Sequence[RowStreams]) -> RowStreams:
        """One after the other, from the first draw."""
        return cls(torch.cat([part.keys for part in parts]))

    def rows(self, rows: slice) -> RowStreams:
        """Streams of some of the rows, from the first draw."""
        return RowStreams(self.keys[rows])

    def skip(self) -> int:
        """Return the number of the next draw, for whoever computes it elsewhere."""
        self.n_drawn += 1
        return self.n_drawn - 1

    def _take(self, n_blocks: int) -> tuple[Tensor, ...]:
        """Words of ``n_blocks`` values of the counter, each (n, n_blocks)."""
        place = torch.arange(n_blocks, device=self.keys.device)[None]
        zero = torch.zeros_like(place)
        k0, k1 = (word[:, None] for word in self._words)
        draw = torch.full_like(place, self.skip())
        return philox((place, draw, zero, zero), (k0, k1))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw standard normals (n, *shape), from 32 bits each: none beyond 6.7."""
        size = math.prod(shape)
        w0, w1, w2, w3 = (word.double() for word in self._take(-(-size // 4)))
        pairs = []
        for u, v in ((w0, w1), (w2, w3)):
            radius = torch.sqrt(-2.0 * torch.log((u + 1.0) * 2.0**-32))
            turn = v * (2.0 * math.pi * 2.0**-32)
            pairs += [radius * torch.cos(turn), radius * torch.sin(turn)]
        flat = torch.stack(pairs, -1).flatten(1)[:, :size]
        return flat.reshape(-1, *shape).to(dtype)

    def uniform(self) -> Tensor:
        """Draw uniform numbers (n,) in (0, 1), from 53 bits, float64."""
        w0, w1, _, _ = (word[:, 0] for word in self._take(1))
        return (((w0 >> 5) << 26 | (w1 >> 6)).double() + 0.5) * 2.0**-53
