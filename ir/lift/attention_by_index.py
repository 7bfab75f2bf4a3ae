"""Attention written as two products by index, in any layout: softmax over t of q[s, d]·k[t, d],
times v[t, e].

Dims carry labels. Those of the weights are followed back through the softmax, masks and scales to
the product of queries and keys, and say there what each dim of q, k and v is: batch, head of keys
(k), query head of a group (g), position (s, t) or feature (d, e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..graph import Dims
from .attention import Form, mask_of, place_attention
from .contraction import permuted
from .draft import Draft, Op, Wire, uncast
from .evaluate import Array, Settings
from .masks import classify


@dataclass(slots=True)
class _Scores:
    """A wire on the way back, and the labels of its dims; -1 for a dim of size 1 that has none."""

    wire: Wire
    labels: list[int]
    masks: list[tuple[Wire, bool, bool, list[int]]] = field(default_factory=list)
    scale: float = 1.0
    softcap: float | None = None
    dropout: float = 0.0
    softmax: int = -1


def lift_attention_by_index(draft: Draft, make: Settings) -> None:
    """Replaces every attention that two `einsum`s make. Raises UnsupportedOp for other masks."""
    for op in draft.each("einsum"):
        for side in (0, 1):
            if _replaced(draft, op, side, make):
                break
    draft.sweep()


def _replaced(draft: Draft, op: Op, side: int, make: Settings) -> bool:
    names = ("left", "right")
    weights, v = op.operands[side], op.operands[1 - side]
    mine, other = list(op.attributes[names[side]]), list(op.attributes[names[1 - side]])
    out = list(op.attributes["out"])
    found = _followed(_Scores(weights, mine), make)
    if found is None or found.softmax < 0:
        return False
    product = found.wire.producer
    assert product is not None
    t = found.softmax
    summed = [i for i in mine if i in other and i not in out]
    if summed != [t]:
        return False
    # the labels of q and k, in the names that the weights have
    naming = dict(zip(product.attributes["out"], found.labels, strict=True))
    sides = [[naming.get(i, 1000 + i) for i in product.attributes[n]] for n in names]
    queries = 0 if t in sides[1] else 1
    q, k = product.operands[queries], product.operands[1 - queries]
    of_q, of_k = sides[queries], sides[1 - queries]
    roles = _roles(of_q, of_k, other, t, q, v.dims[other.index(t)])
    if roles is None:
        return False
    batch, heads, groups, s, d, e = roles
    scale = found.scale
    q, factor_q = _unscaled(q)
    k, factor_k = _unscaled(k)
    q4 = _arranged(draft, q, of_q, [batch, [*heads, *groups], [s], d], op)
    k4 = _arranged(draft, k, of_k, [batch, heads, [t], d], op)
    v4 = _arranged(draft, v, other, [batch, heads, [t], e], op)
    form = Form(q4, k4, v4, scale * factor_q * factor_k, softcap=found.softcap)
    form.dropout = found.dropout
    order = [*batch, *heads, *groups, s, t]
    for mask, additive, inverted, labels in found.masks:
        arrange = partial(_turned, labels=labels, order=order, batch=len(batch))
        keys = _dims_of(labels, mask, t)
        form.masked(classify(mask, additive, inverted, make, op.module, arrange, keys))
    result = place_attention(draft, op, form)
    size = dict(zip(of_q, q.dims, strict=True)) | dict(zip(other, v.dims, strict=True))
    apart = [*batch, *heads, *groups, s, *e]
    dims: Dims = tuple(size[i] for i in apart)
    if result.dims != dims:
        result = draft.add("reshape", [result], dims, module=op.module, before=op).result
    if set(apart) != set(out):
        return False
    result = permuted(draft, result, [apart.index(i) for i in out], op)
    draft.stand_in(op, result)
    return True


def _followed(at: _Scores, make: Settings) -> _Scores | None:
    """Back from the weights to the product of queries and keys; None where they are no softmax."""
    for _ in range(64):
        at.wire = uncast(at.wire)
        op = at.wire.producer
        if op is None:
            return None
        if op.kind == "einsum":
            return at if len(at.labels) == len(op.attributes["out"]) else None
        if op.kind == "permute":
            labels = [-1] * len(at.labels)
            for label, source in zip(at.labels, op.attributes["order"], strict=True):
                labels[source] = label
            at.labels, at.wire = labels, op.operands[0]
        elif op.kind == "reshape":
            moved = _through_reshape(op, at.labels)
            if moved is None:
                return None
            at.labels, at.wire = moved, op.operands[0]
        elif op.kind == "softmax" and at.softmax < 0:
            at.softmax, at.wire = at.labels[-1], op.operands[0]
        elif op.kind == "dropout" and at.softmax < 0:
            at.dropout = op.attributes["p"] if op.attributes.get("train", True) else 0.0
            at.wire = op.operands[0]
        elif at.softmax < 0 or not _scored(at, op, make):
            return None
    return None


def _scored(at: _Scores, op: Op, make: Settings) -> bool:
    """Follows a scale, a cap or a mask of the scores."""
    if op.kind == "scale":
        factor = float(op.attributes["factor"])
        cap = uncast(op.operands[0]).made_by("tanh")
        inner = uncast(cap.operands[0]).made_by("scale") if cap else None
        if inner is None:
            at.scale, at.wire = at.scale * factor, op.operands[0]
        elif at.scale == 1.0 and at.softcap is None:
            at.softcap, at.wire = factor, inner.operands[0]
            at.scale = factor * inner.attributes["factor"]
        else:
            return False
        return True
    if at.softcap is None and (found := mask_of(op, make)):
        at.wire, mask, additive, inverted = found
        at.masks.append((mask, additive, inverted, at.labels[-mask.rank :] if mask.rank else []))
        return len(at.labels) == at.wire.rank
    return False


def _through_reshape(op: Op, labels: Sequence[int]) -> list[int] | None:
    """Labels before a reshape that only adds or drops dims of size 1."""
    source, target = op.operands[0].dims, op.result.dims
    kept = [label for label, dim in zip(labels, target, strict=True) if dim]
    if [dim for dim in source if dim] != [dim for dim in target if dim]:
        return None
    rest = iter(kept)
    return [next(rest) if dim else -1 for dim in source]


def _roles(
    of_q: list[int],
    of_k: list[int],
    of_v: list[int],
    t: int,
    q: Wire,
    keys: tuple[int | str, ...],
) -> tuple[list[int], list[int], list[int], int, list[int], list[int]] | None:
    """(batch, heads, groups, s, d, e) as labels; None where it is another product."""
    shared = [i for i in of_q if i in of_k and i in of_v]
    d = [i for i in of_q if i in of_k and i not in of_v]
    e = [i for i in of_v if i not in of_k]
    free = [i for i in of_q if i not in of_k]
    size = dict(zip(of_q, q.dims, strict=True))
    if len(d) != 1 or len(e) != 1 or t not in of_k or t not in of_v:
        return None
    batch = [i for i in shared if "b" in size[i]][:1] or [i for i in shared if size[i]][:1]
    heads = [i for i in shared if i not in batch]
    rows = [i for i in free if "s" in size[i]]
    if not rows:  # a fixed length: queries are as many as keys
        rows = free if len(free) == 1 else [i for i in free if size[i] == keys]
    if len(rows) != 1 or len(batch) != 1:
        return None
    return batch, heads, [i for i in free if i not in rows], rows[0], d, e


def _unscaled(wire: Wire) -> tuple[Wire, float]:
    op = uncast(wire).made_by("scale")
    return (op.operands[0], float(op.attributes["factor"])) if op else (wire, 1.0)


def _arranged(
    draft: Draft, wire: Wire, labels: Sequence[int], groups: Sequence[Sequence[int]], op: Op
) -> Wire:
    """A wire as [batch, heads, positions, features]."""
    order = [labels.index(i) for group in groups for i in group]
    turned = permuted(draft, wire, order, op)
    dims: list[tuple[int | str, ...]] = []
    position = 0
    for group in groups:
        dims.append(tuple(n for d in turned.dims[position : position + len(group)] for n in d))
        position += len(group)
    if tuple(dims) == turned.dims:
        return turned
    return draft.add("reshape", [turned], tuple(dims), module=op.module, before=op).result


def _dims_of(labels: Sequence[int], mask: Wire, label: int) -> tuple[int | str, ...]:
    return mask.dims[labels.index(label)] if label in labels else ()


def _turned(value: Array, labels: Sequence[int], order: Sequence[int], batch: int) -> Array:
    """A mask's values as [batch, others, s, t]."""
    places = [i for i, label in enumerate(labels) if label in order]
    value = value.reshape([value.shape[i] for i in places])
    kept = [labels[i] for i in places]
    value = value.transpose([kept.index(i) for i in order if i in kept])
    full = [value.shape[[i for i in order if i in kept].index(i)] if i in kept else 1
            for i in order]  # fmt: skip
    value = value.reshape(full)
    middle = int(np.prod(full[batch:-2]))
    return value.reshape((*full[:batch], middle, *full[-2:]))
