"""Types as spmd_types writes them."""

from __future__ import annotations

from ...ir.types import AxisType, NdType
from ..emission.target import order_within


def type_text(kind: AxisType) -> str:
    """A type as spmd_types writes it, which knows dims but not their factors."""
    return f"S({kind.dim})" if kind.is_split else kind.kind


def declared(types: NdType) -> str:
    """`{"dp": S(0), "tp": S(0)}`: axes that split one dim come outermost first."""
    names = [a for a, kind in types if not kind.is_split]
    for dim in sorted({kind.dim for _, kind in types if kind.is_split}):
        names += order_within(types, dim)
    return "{" + ", ".join(f'"{a}": {type_text(types[a])}' for a in names) + "}"
