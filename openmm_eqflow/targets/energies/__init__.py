"""Batched energies and forces of OpenMM Systems."""
