"""Vector fields: importing this package registers every field, so that any flow file loads."""

from openmm_eqflow.vector_fields.base import VectorField, build_vector_field
from openmm_eqflow.vector_fields.chart import ChartField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField

__all__ = ["ChartField", "LeaveOneOutField", "VectorField", "build_vector_field"]
