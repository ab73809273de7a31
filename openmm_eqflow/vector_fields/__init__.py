"""Vector fields: importing this package registers every field, so that any flow file loads."""

from openmm_eqflow.vector_fields.base import VectorField, build_vector_field
from openmm_eqflow.vector_fields.baselines import EGNNField, MLPField, StillField
from openmm_eqflow.vector_fields.chart import ChartField
from openmm_eqflow.vector_fields.contact import ContactField
from openmm_eqflow.vector_fields.kernel import KernelField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField
from openmm_eqflow.vector_fields.radial import RadialSplineField

__all__ = [
    "ChartField",
    "ContactField",
    "EGNNField",
    "KernelField",
    "LeaveOneOutField",
    "MLPField",
    "RadialSplineField",
    "StillField",
    "VectorField",
    "build_vector_field",
]
