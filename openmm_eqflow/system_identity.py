"""One name for one potential: SHA-256 of the serialised System."""

from __future__ import annotations

import hashlib
import re

import openmm

__all__ = ["system_sha256"]


def system_sha256(system: openmm.System) -> str:
    """SHA-256 of the System's XML, the version of OpenMM that wrote it left out.

    A flow trained with one version must be recognised by the next.
    """
    xml = openmm.XmlSerializer.serialize(system)
    return hashlib.sha256(re.sub(r' openmmVersion="[^"]*"', "", xml).encode()).hexdigest()
