"""Batched potential energies of OpenMM Systems."""
