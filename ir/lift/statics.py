"""What is left of the gradient-free part once masks and tables are lifted: numbers, positions,
small constants. Found by evaluation, so that it does not matter how they were computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UnsupportedOp
from ..graph import Dims
from ..optable import TABLE
from .draft import Draft, Op, Wire, ancestors
from .evaluate import Array, NoValue, Settings, equal

_LARGEST_CONSTANT = 4096
"""Elements of a constant that a plan file should carry."""


def fold_statics(draft: Draft, make: Settings) -> None:
    """Replaces static wires that carried ops read by numbers, positions and constants.

    Raises UnsupportedOp for one that is neither and that the op table cannot compute.
    """
    one, other = make(seed=0), make(seed=1)
    done: dict[Wire, Wire] = {}
    for op in list(draft.ops):
        if op not in draft.ops or not any(w.carried for w in op.operands):
            continue
        for wire in dict.fromkeys(op.operands):
            if wire.carried or wire.source is None or wire.role == "input":
                continue
            try:
                value = one(wire.source)
                fixed = equal(value, other(wire.source))
            except NoValue:
                continue
            if not fixed:
                continue  # computed from the inputs
            if value.size == 1 and _take_number(draft, op, wire, value):
                continue
            if wire not in done:
                done[wire] = _replacement(draft, wire, value, op)
            op.operands = [done[w] if w is wire else w for w in op.operands]
    _slices_of_parameters(draft)
    draft.sweep()


def _take_number(draft: Draft, op: Op, wire: Wire, value: Array) -> bool:
    """mul, div, add or sub with a number becomes `scale` or `shift`."""
    if op.kind not in ("mul", "div", "add", "sub") or wire.rank > op.result.rank:
        return False
    number: Any = value.item()
    first = op.operands[0] is wire
    x = op.operands[1] if first else op.operands[0]
    if x.dims != op.result.dims or (first and op.kind == "div"):
        return False
    if op.kind in ("mul", "div"):
        kind, attributes = "scale", {"factor": number if op.kind == "mul" else 1 / number}
    else:
        kind, attributes = "shift", {"term": -number if op.kind == "sub" and not first else number}
        if first and op.kind == "sub":
            x = draft.add("neg", [x], x.dims, module=op.module, before=op).result
    made = draft.add(
        kind, [x], x.dims, dtype=op.result.dtype, attributes=attributes, module=op.module,
        before=op,
    )  # fmt: skip
    draft.redirect(op.result, made.result)
    return True


def _replacement(draft: Draft, wire: Wire, value: Array, reader: Op) -> Wire:
    first = draft.ops[0]
    symbolic = any(isinstance(size, str) for dim in wire.dims for size in dim)
    if wire.dtype in ("int64", "int32") and wire.dims and symbolic:
        start = int(value.flatten()[0])
        if bool((value - start == np.arange(value.shape[-1])).all()):
            return _positions(draft, wire.dims, start, first)
    known = all(w.producer is None or w.producer.kind in TABLE for w in ancestors([wire]))
    buffers = any(w.role == "constant" for w in ancestors([wire]))
    if known and not buffers:
        return wire
    if not symbolic and value.size <= _LARGEST_CONSTANT:
        return draft.add(
            "constant", [], wire.dims, dtype=wire.dtype, attributes={"value": value.tolist()},
            before=first,
        ).result  # fmt: skip
    sizes = " × ".join(_shown(dim) for dim in wire.dims)
    raise UnsupportedOp(
        f"op {reader.kind} at {reader.module or 'the top level'} reads a fixed tensor of {sizes} "
        f"elements that is neither positions nor small (at most {_LARGEST_CONSTANT} elements, none "
        "that grow with the sequence)"
    )


def _positions(draft: Draft, dims: Dims, start: int, first: Op) -> Wire:
    """start, start + 1, … along the last dim."""
    row: Dims = (*(() for _ in dims[:-1]), dims[-1])
    made = draft.add("positions", [], row, dtype="int64", before=first).result
    if start:
        made = draft.add(
            "shift", [made], row, dtype="int64", attributes={"term": start}, before=first
        ).result
    return made if row == dims else draft.add("expand", [made], dims, before=first).result


def _shown(dim: tuple[int | str, ...]) -> str:
    return "·".join(map(str, dim)) or "1"


def _slices_of_parameters(draft: Draft) -> None:
    """`positions_table[:, :s]` is an embedding of the positions 0 … s-1."""
    for op in draft.each("slice"):
        (weight,) = op.operands
        dim = op.attributes["dim"]
        if (
            weight.role != "parameter"
            or op.attributes["start"] != 0
            or op.attributes["stop"] != "s"
        ):
            continue
        if dim != weight.rank - 2 or any(weight.dims[:dim]):
            continue
        table = weight
        if weight.rank > 2:
            table = draft.add(
                "reshape", [weight], weight.dims[-2:], module=op.module, before=op
            ).result
        positions = draft.add("positions", [], (("s",),), dtype="int64", before=draft.ops[0])
        rows = draft.add(
            "embedding", [table, positions.result], (("s",), weight.dims[-1]), dtype=weight.dtype,
            module=op.module, before=op,
        ).result  # fmt: skip
        if rows.dims != op.result.dims:
            rows = draft.add("reshape", [rows], op.result.dims, module=op.module, before=op).result
        draft.redirect(op.result, rows)
