"""``python -m openmm_eqflow.cli``."""

from openmm_eqflow.cli import main

main()
