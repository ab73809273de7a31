"""From an OpenMM System to a reduced potential on the mean-free subspace."""
