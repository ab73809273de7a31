"""Reference data by parallel tempering."""
