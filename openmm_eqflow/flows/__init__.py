"""Flows: maps and Monte Carlo layers with an exact weight, audited and stored."""
