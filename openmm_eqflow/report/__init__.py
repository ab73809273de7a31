"""The report of a run: one self-contained HTML file."""

from openmm_eqflow.report.build import write_report

__all__ = ["write_report"]
