"""How much of a loop or of a value one rank has, given types on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ..ir.graph import Binding, Op, Value, bind
from ..ir.mesh import Mesh
from ..ir.plan import OpTypes
from ..ir.rule import FactorName
from ..ir.types import NdType


def local_sizes(
    op: Op, binding: Binding, splits: Mapping[FactorName, int] | None = None
) -> dict[FactorName, int]:
    """Iterations of each loop of an op on the fullest rank.

    `splits` says into how many pieces a factor is cut (product over the axes that split it); a
    piece that does not come out even counts as the larger one.
    """
    splits = splits or {}
    return {f: -(-bind(size, binding) // splits.get(f, 1)) for f, size in op.sizes.items()}


def op_splits(op: Op, types: OpTypes, mesh: Mesh) -> dict[FactorName, int]:
    """Factor → number of pieces, read off the types of an op's operands and results."""
    cuts: dict[FactorName, set[str]] = {}
    shapes = op.rule.operands + op.rule.results
    for shape, nd in zip(shapes, types.operands + types.results, strict=True):
        for axis, kind in nd:
            if kind.is_split:
                cuts.setdefault(shape[kind.dim][kind.part], set()).add(axis)
    return {f: prod(mesh[axis].size for axis in axes) for f, axes in cuts.items()}


def local_shape(value: Value, nd: NdType, mesh: Mesh, binding: Binding) -> tuple[int, ...]:
    """Shape of a value on the fullest rank; partial and replicated values are whole."""
    pieces: dict[tuple[int, int], int] = {}
    for axis, kind in nd:
        if kind.is_split:
            place = (kind.dim, kind.part)
            pieces[place] = pieces.get(place, 1) * mesh[axis].size
    return tuple(
        prod(-(-bind(size, binding) // pieces.get((i, part), 1)) for part, size in enumerate(dim))
        for i, dim in enumerate(value.dims)
    )
