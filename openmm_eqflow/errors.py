"""Exceptions. Every message gives the observed value, the expectation and the next action."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AuditError",
    "CheckpointError",
    "ConfigurationError",
    "EnergyError",
    "EqFlowError",
    "TrainingError",
    "UnknownSystemError",
    "UnsupportedSystemError",
]


class EqFlowError(Exception):
    """Base of every error this package raises on purpose.

    The command line prints its message in one line and exits with code 2.
    """


class ConfigurationError(EqFlowError):
    """A setting, a YAML key or a run directory does not fit."""


class UnknownSystemError(ConfigurationError):
    """No system of that name; the message lists near matches."""


class UnsupportedSystemError(EqFlowError):
    """The OpenMM System has a feature (named) for which a flow's density would be wrong."""


class CheckpointError(EqFlowError):
    """A file is truncated, altered or of another system (hash mismatch)."""


class EnergyError(EqFlowError):
    """Energies could not be computed (all workers lost, platform missing)."""


class TrainingError(EqFlowError):
    """Training diverged; the last good weights are kept and named.

    ``history`` holds the evaluations before that (empty if there were none).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.history: list[dict[str, float]] = []


class AuditError(EqFlowError):
    r"""The flow's log q is not accurate enough to be used in an acceptance ratio."""
