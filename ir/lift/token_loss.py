"""Cross-entropy written out: what picks a log-probability per token, and its mean.

    -mean(pick(log_softmax(x), labels))      mean(log_sum_exp(x) - pick(x, labels))
    sum(where(labels != ignore, terms, 0)) / sum(labels != ignore)

becomes one `torch.cross_entropy` with classes in the last dim, whose reduction the loss knows.
"""

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedOp
from .draft import Draft, Op, Wire, ancestors, bare, uncast
from .evaluate import NoValue, Settings
from .patterns import match

_SUM, _MEAN = 2, 1
"""torch's numbers for reductions."""


def lift_token_loss(draft: Draft, make: Settings) -> None:
    """Replaces the cross-entropy that the draft's output is a mean or sum of, if it is one."""
    (loss,) = draft.outputs
    wire, factor = _unscaled(loss)
    op = wire.producer
    if op is None:
        return
    if op.kind in ("mean", "sum"):
        terms, more = _unscaled(op.operands[0])
        _replace(draft, op, terms, factor * more, _MEAN if op.kind == "mean" else _SUM, -100)
    elif op.kind == "div":
        _masked(draft, op, factor, make)
    draft.sweep()


def _unscaled(wire: Wire) -> tuple[Wire, float]:
    """A wire before signs, numbers and dims of size 1."""
    factor = 1.0
    while True:
        wire = bare(wire)
        op = wire.made_by("neg", "scale")
        if op is None:
            return wire, factor
        factor *= -1.0 if op.kind == "neg" else float(op.attributes["factor"])
        wire = op.operands[0]


def _terms(terms: Wire) -> tuple[Wire, Wire, float] | None:
    """(logits, labels, sign) of what is ± a cross-entropy per token."""
    picked = terms.made_by("pick")
    if picked:
        normal = uncast(picked.operands[0]).made_by("torch.log_softmax")
        return (normal.operands[0], picked.operands[1], -1.0) if normal else None
    for pattern, sign in (
        ("sub(log_sum_exp(x), pick(x, labels))", 1.0),
        ("sub(pick(x, labels), log_sum_exp(x))", -1.0),
    ):
        if found := match(pattern, terms):
            return found.wires["x"], found.wires["labels"], sign
    return None


def _replace(draft: Draft, op: Op, terms: Wire, factor: float, reduction: int, ignore: int) -> bool:
    found = _terms(terms)
    if found is None:
        return False
    logits, labels, sign = found
    made = draft.add(
        "torch.cross_entropy", [logits, labels], (), dtype=op.result.dtype, module=op.module,
        attributes={"reduction": reduction, "ignore_index": ignore, "classes_last": True},
        before=op,
    ).result  # fmt: skip
    if (whole := factor * sign) != 1.0:
        made = draft.add(
            "scale", [made], (), attributes={"factor": whole}, module=op.module, before=op
        ).result
    draft.outputs = [made]
    return True


def _masked(draft: Draft, op: Op, factor: float, make: Settings) -> None:
    """Σ terms where a label is valid, divided by how many are."""
    total, more = _unscaled(op.operands[0])
    summed = total.made_by("sum")
    if summed is None or op.operands[1].carried:
        return
    terms, signs = _unscaled(summed.operands[0])
    masked = terms.made_by("torch.keep", "mul", "torch.masked_fill")
    if masked is None:
        return
    inner, mask = masked.operands[:2]
    if mask.carried:
        inner, mask = mask, inner
    inner, last = _unscaled(inner)
    found = _terms(inner)
    if found is None:
        return
    ignore = _ignored(mask, op.operands[1], masked.kind == "torch.masked_fill", make)
    if ignore is None:
        raise UnsupportedOp(
            f"the loss at {op.module or 'the top level'}: its mask is not `labels != number`; "
            "mark what is to be ignored by a label such as -100"
        )
    _replace(draft, op, inner, factor * more * signs * last, _MEAN, ignore)


def _ignored(mask: Wire, count: Wire, inverted: bool, make: Settings) -> int | None:
    """The label whose tokens the mask leaves out, if `count` counts the others."""
    inputs = [w for w in ancestors([mask]) if w.role == "input"]
    if len(inputs) != 1 or mask.source is None or count.source is None:
        return None
    (labels,) = inputs
    for ignore in (-100, -1, 0, *sorted(make.constants(mask.source))):
        plain = make(b=2, s=9)
        given = np.array(plain.inputs[labels.name])
        given.reshape(-1)[::3] = ignore
        evaluation = make(2, 9, 0, None, None, **{labels.name: given})
        try:
            have, number = evaluation(mask.source), float(evaluation(count.source))
        except NoValue:
            return None
        valid = given != ignore
        have = ~have.astype(bool) if inverted else have.astype(bool)
        moved = valid[:, 1:] if valid.ndim > 1 else valid
        for want in (valid, moved):
            if have.size == want.size and np.array_equal(have.reshape(want.shape), want):
                return ignore if number == want.sum() else None
    return None
