"""The machine that a measurement was taken on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["machine_name"]


def machine_name() -> str:
    """Processor and number of logical cores, such as ``"AMD EPYC, 2 cores"``."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        text = information.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
