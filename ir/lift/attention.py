"""Attention as one op: torch's fused form, and softmax(q·kᵀ)·v written out."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from ..errors import UnsupportedOp
from ..graph import Dims
from .dims import elements
from .draft import Draft, Op, Wire, uncast
from .evaluate import Settings
from .masks import Mask, classify


@dataclass(slots=True)
class Form:
    """An attention as found: operands [b, n, s, d], and what happens to the scores."""

    q: Wire
    k: Wire
    v: Wire
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    padding: Wire | None = None

    def masked(self, mask: Mask) -> None:
        self.causal |= mask.causal
        self.window = mask.window if mask.window is not None else self.window
        self.padding = mask.padding or self.padding


def lift_attention(draft: Draft, make: Settings) -> None:
    """Replaces every attention. Raises UnsupportedOp for a mask that is not causal or padding."""
    for op in draft.each(("sdpa", "matmul")):
        form = _fused(op, make) if op.kind == "sdpa" else _written_out(draft, op, make)
        if form is not None:
            draft.stand_in(op, place_attention(draft, op, form))
    draft.sweep()


def _fused(op: Op, make: Settings) -> Form:
    q, k, v, *mask = op.operands
    attributes = op.attributes
    scale = attributes["scale"]
    form = Form(q, k, v, 1 / sqrt(elements(q.dims[-1])) if scale is None else float(scale))
    form.causal, form.dropout = bool(attributes["causal"]), float(attributes["dropout"])
    if mask:
        additive = mask[0].dtype != "bool"
        form.masked(classify(mask[0], additive, False, make, op.module))
    return form


def _written_out(draft: Draft, op: Op, make: Settings) -> Form | None:
    """matmul(dropout(softmax(scores)), v), or None where the op is another product."""
    weights, v = uncast(op.operands[0]), op.operands[1]
    dropout = 0.0
    if drop := weights.made_by("dropout"):
        dropout = drop.attributes["p"] if drop.attributes.get("train", True) else 0.0
        weights = uncast(drop.operands[0])
    softmax = weights.made_by("softmax")
    if softmax is None:
        return None
    scores = uncast(softmax.operands[0])
    masks: list[tuple[Wire, bool, bool]] = []
    scale = 1.0
    softcap: float | None = None
    while (at := scores.producer) is not None and at.kind != "matmul":
        if at.kind == "scale":
            factor = float(at.attributes["factor"])
            cap = uncast(at.operands[0]).made_by("tanh")
            inner = uncast(cap.operands[0]).made_by("scale") if cap else None
            if inner is None:
                scale, scores = scale * factor, at.operands[0]
            elif scale == 1.0 and softcap is None:
                softcap, scores = factor, inner.operands[0]
                scale = factor * inner.attributes["factor"]
            else:
                return None
        elif softcap is None and (found := mask_of(at, make)):
            scores, mask, additive, inverted = found
            masks.append((mask, additive, inverted))
        else:
            return None
        scores = uncast(scores)
    if at is None:
        return None
    q, factor_q = _unscaled(at.operands[0])
    turned, factor_k = _unscaled(at.operands[1])
    k = _transposed(draft, turned, op)
    form = Form(q, k, v, scale * factor_q * factor_k, softcap=softcap, dropout=dropout)
    for mask, additive, inverted in masks:
        form.masked(classify(mask, additive, inverted, make, op.module))
    return form


def mask_of(op: Op, make: Settings) -> tuple[Wire, Wire, bool, bool] | None:
    """What masks scores: (scores, mask, additive, inverted), or None."""
    if op.kind in ("torch.masked_fill", "torch.keep"):
        value = op.attributes.get("value")
        if len(op.operands) == 3 and op.operands[2].source is not None:
            value = float(make()(op.operands[2].source))
        if _very_negative(value):
            return op.operands[0], op.operands[1], False, op.kind == "torch.masked_fill"
    if op.kind == "add":
        a, b = op.operands
        if a.carried != b.carried:
            return (a, b, True, False) if a.carried else (b, a, True, False)
    return None


def _very_negative(value: object) -> bool:
    return isinstance(value, (int, float)) and value <= -1e4


def _unscaled(wire: Wire) -> tuple[Wire, float]:
    op = wire.made_by("scale")
    return (op.operands[0], float(op.attributes["factor"])) if op else (wire, 1.0)


def _transposed(draft: Draft, wire: Wire, op: Op) -> Wire:
    """The wire with its last two dims swapped, without a permute where it was one."""
    order = list(range(wire.rank))
    source = wire
    if turn := wire.made_by("permute"):
        source, order = turn.operands[0], list(turn.attributes["order"])
    order[-2:] = order[:-3:-1]
    if order == sorted(order):
        return source
    return draft.add(
        "permute", [source], tuple(source.dims[d] for d in order), attributes={"order": order},
        module=op.module, before=op,
    ).result  # fmt: skip


def place_attention(draft: Draft, op: Op, form: Form) -> Wire:
    """Puts the `attention` op before another; its result [b, n, s, e]."""
    k, v = _unrepeated(draft, form.k, op), _unrepeated(draft, form.v, op)
    if k.dims[:-1] != v.dims[:-1]:
        k, v = form.k, form.v
    wires = [_four(draft, wire, op) for wire in (form.q, k, v)]
    dims: Dims = (*wires[0].dims[:-1], wires[2].dims[-1])
    attributes = {
        "causal": form.causal,
        "window": form.window,
        "scale": form.scale,
        "softcap": form.softcap,
        "dropout": form.dropout,
    }
    padding = [] if form.padding is None else [_as_bool(draft, form.padding, op)]
    made = draft.add(
        "attention", [*wires, *padding], dims, dtype=wires[0].dtype, attributes=attributes,
        module=op.module, before=op,
    )  # fmt: skip
    heads = wires[1].dims[1]
    made.sizes = {"k": elements(heads)}
    return made.result


def _unrepeated(draft: Draft, wire: Wire, op: Op) -> Wire:
    """Key or value heads [b, n, s, d] before each was repeated for its group of query heads."""
    order = list(range(wire.rank))
    merged = uncast(wire)
    if turn := merged.made_by("permute"):
        merged, order = turn.operands[0], list(turn.attributes["order"])
    merge = uncast(merged).made_by("reshape")
    repeat = uncast(merge.operands[0]).made_by("expand") if merge else None
    if repeat is None or repeat.result.rank != 5 or wire.rank != 4:
        return wire
    at = order[1]  # where the heads are before the permute
    apart, repeated = repeat.operands[0].dims, repeat.result.dims
    around = (*repeated[:at], *repeated[at + 2 :])
    heads = repeated[at] + repeated[at + 1]
    if (
        apart != (*repeated[: at + 1], (), *repeated[at + 2 :])
        or (*merged.dims[:at], *merged.dims[at + 1 :]) != around
        or (heads != merged.dims[at] and elements(heads) != elements(merged.dims[at]))
    ):
        return wire
    single = (*apart[: at + 1], *apart[at + 2 :])
    split = repeat.operands[0].made_by("reshape")
    if split and split.operands[0].dims == single:
        source = split.operands[0]
    else:
        source = draft.add(
            "reshape", [repeat.operands[0]], single, module=op.module, before=op
        ).result
    if order == sorted(order):
        return source
    return draft.add(
        "permute", [source], tuple(source.dims[d] for d in order), attributes={"order": order},
        module=op.module, before=op,
    ).result  # fmt: skip


def _four(draft: Draft, wire: Wire, op: Op) -> Wire:
    """[b, n, s, d]; a missing head dim is added."""
    if wire.rank == 4:
        return wire
    if wire.rank != 3:
        raise UnsupportedOp(
            f"attention at {op.module or 'the top level'}: operands of rank {wire.rank}; expected "
            "[batch, heads, sequence, head size]"
        )
    dims = (wire.dims[0], (), *wire.dims[1:])
    if len(wire.dims[0]) > 1:  # heads merged into the batch: [(b n), s, d]
        dims = (wire.dims[0][:1], wire.dims[0][1:], *wire.dims[1:])
    return draft.add("reshape", [wire], dims, module=op.module, before=op).result


def _as_bool(draft: Draft, mask: Wire, op: Op) -> Wire:
    if mask.dtype == "bool":
        return mask
    return draft.add(
        "cast", [mask], mask.dims, dtype="bool", attributes={"to": "bool"}, module=op.module,
        before=op,
    ).result  # fmt: skip
