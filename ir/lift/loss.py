"""The loss as sum and count: cross-entropy, means and sums over all elements."""

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedOp
from .dims import same_elements
from .draft import Draft, Op, Wire, ancestors, uncast
from .evaluate import NoValue, Settings, equal

_SUPPORTED = (
    "supported are a mean or sum over all elements, F.mse_loss, F.l1_loss, and F.cross_entropy "
    "(ignore_index; no class weights, no label smoothing), each divided by numbers at most"
)


def lift_loss(draft: Draft, make: Settings) -> None:
    """Replaces the scalar that the draft returns by (sum, count).

    Raises UnsupportedOp for a loss that is no such quotient.
    """
    (wire,) = draft.outputs
    factor = 1.0
    while True:
        wire = uncast(wire)
        op = wire.producer
        if op is not None and op.kind == "scale":
            factor *= op.attributes["factor"]
        elif op is None or op.kind != "reshape" or not same_elements(op.operands[0].dims, ()):
            break
        wire = op.operands[0]
    if op is None or not (pair := _pair(draft, op, make)):
        kind = op.kind.removeprefix("torch.").removeprefix("aten.") if op else wire.role
        place = (op.module if op else "") or "the top level"
        raise UnsupportedOp(f"the loss ends in {kind} at {place}: {_SUPPORTED}")
    total, count = pair
    if factor != 1.0:
        total = draft.add(
            "scale", [total], (), attributes={"factor": factor}, module=op.module
        ).result
    draft.outputs = [total, count]
    draft.sweep()


def _pair(draft: Draft, op: Op, make: Settings) -> tuple[Wire, Wire] | None:
    if op.kind in ("torch.cross_entropy", "torch.nll_loss"):
        return _cross_entropy(draft, op, make)
    if op.kind in ("torch.mse_loss", "torch.l1_loss"):
        x, y = op.operands
        if op.attributes["reduction"] == 0 or x.dims != y.dims:
            return None
        apart = draft.add("sub", [x, y], x.dims, module=op.module).result
        squared = op.kind == "torch.mse_loss"
        terms = draft.add(
            "power" if squared else "abs", [apart], x.dims, module=op.module,
            attributes={"exponent": 2} if squared else {},
        )  # fmt: skip
        return _reduced(draft, terms.result, op.attributes["reduction"] == 1, op.module)
    if op.kind in ("mean", "sum") and op.result.rank == 0:
        return _reduced(draft, uncast(op.operands[0]), op.kind == "mean", op.module)
    return None


def _reduced(draft: Draft, terms: Wire, mean: bool, module: str) -> tuple[Wire, Wire]:
    """sum and count of all elements, summed in at least float32."""
    if (sum_loss := terms.made_by("torch.cross_entropy")) is not None:
        raise UnsupportedOp(f"the loss at {sum_loss.module or 'the top level'}: {_SUPPORTED}")
    terms = _wide(draft, terms, module)
    op = draft.add("mean_loss" if mean else "sum_loss", [terms], [(), ()], count=2, module=module)
    return _sum_and_count(op)


def _wide(draft: Draft, wire: Wire, module: str, before: Op | None = None) -> Wire:
    if wire.dtype != "model":
        return wire
    return draft.add(
        "cast", [wire], wire.dims, dtype="wide", attributes={"to": "wide"}, module=module,
        before=before,
    ).result  # fmt: skip


def _sum_and_count(op: Op) -> tuple[Wire, Wire]:
    total, count = op.results
    count.grad = False
    return total, count


def _cross_entropy(draft: Draft, op: Op, make: Settings) -> tuple[Wire, Wire] | None:
    logits, labels, *weight = op.operands
    if op.kind == "torch.nll_loss":
        normal = logits.made_by("torch.log_softmax")
        if normal is None:
            return None
        logits = normal.operands[0]
    reduction = op.attributes["reduction"]
    if weight or op.attributes.get("smoothing") or reduction == 0:
        return None
    if logits.rank > 2 and not op.attributes.get(
        "classes_last"
    ):  # classes are dim 1 of [b, v, s]: bring them to the end
        order = [0, *range(2, logits.rank), 1]
        logits = draft.add(
            "permute", [logits], tuple(logits.dims[d] for d in order),
            attributes={"order": order}, module=op.module, before=op,
        ).result  # fmt: skip
    ignore = int(op.attributes["ignore_index"])
    logits, cut = _unflattened(draft, logits)
    labels = _labels(draft, labels, logits, cut, ignore, op, make)
    logits = _wide(draft, logits, op.module, before=op)
    made = draft.add(
        "cross_entropy", [logits, labels], [(), ()], count=2, dtype=logits.dtype,
        attributes={"ignore_index": ignore}, module=op.module, before=op,
    )  # fmt: skip
    total, count = _sum_and_count(made)
    if reduction == 2:  # a sum: its count is one
        made = draft.add("sum_loss", [total], [(), ()], count=2, module=op.module)
        total, count = _sum_and_count(made)
    return total, count


def _unflattened(draft: Draft, logits: Wire) -> tuple[Wire, bool]:
    """Logits before leading dims were merged, and whether their last position was cut off."""
    at = uncast(logits)
    while (op := at.made_by("reshape")) and op.operands[0].dims[-1:] == at.dims[-1:]:
        at = uncast(op.operands[0])
    cut = at.made_by("slice")
    if cut and cut.attributes["dim"] == 1 and cut.attributes["start"] == 0 and at.rank == 3:
        rows = cut.operands[0].dims[1]
        if at.dims[1] == (f"{''.join(map(str, rows))} - 1",):
            return _recast(draft, cut.operands[0], logits, cut), True
    return (_recast(draft, at, logits, None), False) if at.rank > 2 else (logits, False)


def _recast(draft: Draft, at: Wire, like: Wire, before: Op | None) -> Wire:
    """`at` in the dtype of `like`: the cast that was looked through, done again."""
    if at.dtype == like.dtype:
        return at
    assert like.producer is not None
    return draft.add(
        "cast", [at], at.dims, dtype=like.dtype, attributes={"to": like.dtype},
        module=like.producer.module, before=before or like.producer,
    ).result  # fmt: skip


def _labels(
    draft: Draft, labels: Wire, logits: Wire, cut: bool, ignore: int, op: Op, make: Settings
) -> Wire:
    """The labels as an input, shifted by one where the model does that; else as they are."""
    inputs = [w for w in ancestors([labels]) if w.role == "input"]
    shape = logits.dims[:-1]
    if len(inputs) == 1 and inputs[0].dims == shape and labels.source is not None:
        (source,) = inputs
        found = _recognised(labels, source, cut, ignore, make)
        if found == "same":
            return source
        if found == "shifted":
            return draft.add(
                "shift_labels", [source], source.dims, attributes={"ignore_index": ignore},
                module=op.module, before=op,
            ).result  # fmt: skip
    if cut:
        raise UnsupportedOp(
            f"the loss at {op.module or 'the top level'}: logits lose their last position, but the "
            "labels are not the token ids moved by one"
        )
    if labels.dims == shape:
        return labels
    if same_elements(
        (tuple(n for d in labels.dims for n in d),), (tuple(n for d in shape for n in d),)
    ):
        return draft.add("reshape", [labels], shape, module=op.module, before=op).result
    raise UnsupportedOp(
        f"the loss at {op.module or 'the top level'}: logits {logits.dims}, labels {labels.dims}"
    )


def _recognised(labels: Wire, source: Wire, cut: bool, ignore: int, make: Settings) -> str:
    evaluation = make(b=3, s=6)
    try:
        value = evaluation(labels.source).flatten()
    except NoValue:
        return ""
    given = evaluation.inputs[source.name]
    if not cut and equal(value, given.flatten()):
        return "same"
    if given.ndim != 2:
        return ""
    moved = given[:, 1:]
    if not cut:
        moved = np.pad(moved, ((0, 0), (0, 1)), constant_values=ignore)
    return "shifted" if equal(value, moved.flatten()) else ""
