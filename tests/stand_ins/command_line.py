"""Call the command line in this process, as a shell would see it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import NamedTuple

import pytest

from openmm_eqflow.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs ``openmm-eqflow ARGUMENTS`` and undoes what main() sets for a whole process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: object) -> Outcome:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["openmm-eqflow", *map(str, arguments)])
            patch.setattr(sys, "excepthook", sys.excepthook)
            patch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)
            self.capfd.readouterr()
            with pytest.raises(SystemExit) as stop:
                main()
        out, err = self.capfd.readouterr()
        code = stop.value.code
        return Outcome(0 if code is None else int(code), out, err)

    def refuses(self, *arguments: object) -> str:
        """Run what must fail with exit code 2 and exactly one line on stderr; return the line."""
        outcome = self(*arguments)
        lines = outcome.err.splitlines()
        assert outcome.code == 2, outcome
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in outcome.out
        return lines[0]
