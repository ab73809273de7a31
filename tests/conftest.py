"""Test processes side by side: torch's own threads would wait for each other, spinning."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; for subprocesses too
