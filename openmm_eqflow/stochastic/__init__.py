"""Stochastic normalizing flows: field layers and Hamiltonian Monte Carlo layers in turn."""
