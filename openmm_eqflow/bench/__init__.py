"""Speed on this machine, measured: ``openmm-eqflow bench``."""
