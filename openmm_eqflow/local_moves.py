"""The name under which moves stored before version 0.2 look for their classes."""

from openmm_eqflow.moves.flow_moves import AnnealedMove, LatentMove

__all__ = ["AnnealedMove", "LatentMove"]
