"""What several test files stand on: small flows, fields, systems and runs, each defined once."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
