"""Numbers from weights, chains and frames."""
