"""Exact Markov steps: openmmtools moves, OpenMM replica exchange, the package's own chains.

openmmtools stores the module of a move's class with every move; moves stored before version 0.2
name this package, so its old names resolve here.
"""

from __future__ import annotations

from typing import Any

_STORED_NAMES = ("AnnealedMove", "FlowMove", "LatentMove")


def __getattr__(name: str) -> Any:
    """Import a stored name on first use (PEP 562)."""
    if name in _STORED_NAMES:
        from openmm_eqflow.moves import flow_moves

        return getattr(flow_moves, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
