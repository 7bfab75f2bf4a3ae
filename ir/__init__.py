"""Floor 1: the graph, SBP types, op rules, conversions, and the data that the floors above share.

types       AxisType, NdType: S, R, I, P over factored dims
conversion  what converting between two types does, forward and backward
rule        factor rules in index notation
optable     the op table; shape_rules: rules that depend on shapes
signature   the types in which an op may run, derived from its rule
graph       Value, Op, Graph, Segment, Model
refine      from raw ops to graphs with common factors
mesh        Mesh and sub-axes
lift        from a traced draft to a Model, whatever framework traced it
from_torch  tracing PyTorch modules; from_jax: tracing JAX functions
"""

from .conversion import Step, backward_collective, collective, dual_steps, steps
from .errors import (
    CorruptCheckpoint,
    Infeasible,
    InvalidInput,
    ShardwrightError,
    UnsupportedOp,
    VerificationFailed,
)
from .graph import Graph, Init, Model, Op, Parameter, Segment, Value
from .mesh import Axis, Mesh
from .signature import Signature, signatures
from .types import AxisType, I, NdType, P, R, S

__all__ = [
    "Axis", "AxisType", "CorruptCheckpoint", "Graph", "I", "Infeasible", "Init", "InvalidInput",
    "Mesh", "Model", "NdType", "Op", "P", "Parameter", "R", "S", "Segment", "ShardwrightError",
    "Signature", "Step", "UnsupportedOp", "Value", "VerificationFailed", "backward_collective",
    "collective", "dual_steps", "signatures", "steps",
]  # fmt: skip
