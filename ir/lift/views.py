"""Views made simpler: what a person would not write is dropped, merged or moved.

A flattening of leading dims around a layer (`[b, s, h]` → `[b·s, h]` → layer → back) goes away,
because the layer's rule takes any number of leading dims.
"""

from __future__ import annotations

from ..graph import Dims
from .draft import Draft, Op, Wire

_PER_ROW = frozenset(
    {"linear", "linear_io", "dropout", "gelu", "silu", "relu", "tanh", "sigmoid", "scale", "shift",
     "cast", "neg", "rms_norm", "layer_norm", "softmax", "power", "erf", "exp"}
)  # fmt: skip
"""Kinds that leave the leading dims of operand 0 alone."""


def simplify_views(draft: Draft) -> None:
    """Merges and drops views until nothing changes."""
    changed = True
    while changed:
        changed = False
        for op in list(draft.ops):
            changed |= _drop(draft, op) or _merge(draft, op) or _sink(draft, op)
        draft.sweep()


def _drop(draft: Draft, op: Op) -> bool:
    """An op that changes nothing: the view of all, a dropout that is off."""
    if op.kind in ("reshape", "expand"):
        nothing = op.operands[0].dims == op.result.dims
    elif op.kind == "permute":
        nothing = op.attributes["order"] == sorted(op.attributes["order"])
    elif op.kind == "dropout":
        nothing = op.attributes["p"] == 0 or not op.attributes.get("train", True)
    else:
        return False
    if nothing:
        draft.redirect(op.result, op.operands[0])
        draft.ops.remove(op)
    return nothing


def _merge(draft: Draft, op: Op) -> bool:
    """A view of a view of the same kind; a cast up and back again."""
    if op.kind == "cast":
        return _merge_casts(draft, op)
    if op.kind not in ("reshape", "permute", "expand"):
        return False
    inner = op.operands[0].made_by(op.kind)
    if inner is None:
        return False
    if op.kind == "permute":
        order = inner.attributes["order"]
        op.attributes["order"] = [order[d] for d in op.attributes["order"]]
    op.operands = list(inner.operands)
    return True


def _merge_casts(draft: Draft, op: Op) -> bool:
    inner = op.operands[0].made_by("cast")
    source = inner.operands[0] if inner else None
    if source is None or (op.result.dtype, inner and inner.result.dtype) != ("model", "wide"):
        return False
    if source.dtype != "model":
        return False
    draft.redirect(op.result, source)
    draft.ops.remove(op)
    return True


def _sink(draft: Draft, op: Op) -> bool:
    """A reshape of leading dims before a per-row op moves behind it."""
    if op.kind in _PER_ROW:
        flat = op.operands[0]
        source = _unflattened(draft, flat, op)
    elif op.kind == "add" and sorted(w.rank for w in op.operands)[0] == 1:
        flat = max(op.operands, key=lambda w: w.rank)
        source = _unflattened(draft, flat, op)
    else:
        return False
    if source is None:
        return False
    made = draft.add(
        op.kind, [source if w is flat else w for w in op.operands],
        (*source.dims[:-1], op.result.dims[-1]), dtype=op.result.dtype,
        attributes=op.attributes, module=op.module, before=op,
    )  # fmt: skip
    back = draft.add("reshape", [made.result], op.result.dims, module=op.module, before=op)
    draft.redirect(op.result, back.result)
    draft.ops.remove(op)
    return True


def _unflattened(draft: Draft, wire: Wire, op: Op) -> Wire | None:
    """The wire before a reshape that merges leading dims; None where there is no such reshape.

    A reshape may merge trailing dims as well (heads and head size): that part is kept.
    """
    reshape = wire.made_by("reshape")
    if reshape is None or wire.rank < 2:
        return None
    source = reshape.operands[0]
    rest = [n for dim in wire.dims[:-1] for n in dim]
    for count in range(source.rank, 0, -1):
        if [n for dim in source.dims[:count] for n in dim] == rest:
            break
    else:
        return None
    dims: Dims = (*source.dims[:count], wire.dims[-1])
    if len(dims) <= wire.rank or () in dims[:-1]:
        return None
    if dims == source.dims:
        return source
    return draft.add("reshape", [source], dims, module=reshape.module, before=op).result
