"""Random streams: each use of a seed has a child of its own, by name.

Tuning, calibrating, training, monitoring, evaluating and sampling with one seed must not see the
same numbers: a flow measured on the latents it was tuned on looks better than it is. A child is
the hash of seed, name and index (numpy's ``SeedSequence`` with a spawn key): no two uses meet,
of one seed or of neighbouring ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

__all__ = [
    "EarlierSeed",
    "child",
    "child_seed",
]


class EarlierSeed(int):
    """Seed of a run that version 0.1 began: it goes on with the streams it began with."""


#: Seeds of version 0.1, by name, from seed and index.
_EARLIER: dict[str, Callable[[int, int], int]] = {
    "weights": lambda seed, _: seed,
    "training": lambda seed, _: seed,
    "validation": lambda seed, _: seed + 1,
    "pool": lambda seed, _: seed + 2,
    "path sampler": lambda seed, k: seed + 3 + k,
    "pool chunks": lambda seed, k: seed + 1000 + k,
    "evaluation": lambda seed, k: seed * 1_000_003 + k,
    "prior": lambda seed, _: seed,
    "starts": lambda seed, _: seed + 12,
    "chains": lambda seed, _: seed + 13,
}


def child_seed(seed: int, name: str, index: int = 0) -> int:
    """64 bits for one use of a seed.

    Parameters
    ----------
    seed
        Seed of the user, 0 or larger.
    name
        What the random numbers are for.
    index
        Chunk, part or worker, where there are several.

    Examples
    --------
    >>> len({child_seed(0, "evaluation", k) for k in range(100)} | {child_seed(0, "tuning")})
    101
    """
    if isinstance(seed, EarlierSeed) and name in _EARLIER:
        return _EARLIER[name](int(seed), index)
    key = (int.from_bytes(name.encode(), "big"), index)
    return int(np.random.SeedSequence(int(seed), spawn_key=key).generate_state(1, np.uint64)[0])


def child(
    seed: int, name: str, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Make the generator that :func:`child_seed` seeds."""
    return torch.Generator(device).manual_seed(child_seed(seed, name, index))
