"""Invariant priors."""
