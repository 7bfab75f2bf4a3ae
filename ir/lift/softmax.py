"""Softmax and log-softmax written out, one-hot products, means: as JAX's libraries write them."""

from __future__ import annotations

from math import prod

import numpy as np

from .dims import elements
from .draft import Draft, Op, Wire, ancestors, bare, uncast
from .evaluate import NoValue, Settings
from .patterns import match

_LOWERED = frozenset({"reduce_max", "reshape", "expand", "stop_gradient", "cast", "relu"})
_EXPONENTIAL = "exp(sub(x, top))"
_SOFTMAX = f"div({_EXPONENTIAL}, sum({_EXPONENTIAL}, dims=dims))"
_LOG_SUM = f"log(sum({_EXPONENTIAL}, dims=dims)) | log(abs(sum({_EXPONENTIAL}, dims=dims)))"


def lift_means(draft: Draft, make: Settings) -> None:
    """A sum over some dims divided by the number of their elements becomes `mean`."""
    for op in draft.each(("scale", "div")):
        total = bare(op.operands[0]).made_by("sum")
        if total is None:
            continue
        sizes = [total.operands[0].dims[d] for d in total.attributes["dims"]]
        if op.kind == "scale":
            count = prod(elements(dim) for dim in sizes)
            if count <= 0 or abs(op.attributes["factor"] * count - 1) > 1e-6:
                continue
        elif not _counts(op.operands[1], sizes, make):
            continue
        made = draft.add(
            "mean", [total.operands[0]], total.result.dims, dtype=op.result.dtype,
            attributes=total.attributes, module=op.module, before=op,
        )  # fmt: skip
        draft.stand_in(op, made.result)
    draft.sweep()


def _counts(wire: Wire, sizes: list[tuple[int | str, ...]], make: Settings) -> bool:
    """Whether a number computed from the sizes is that of these dims' elements."""
    if wire.carried or wire.source is None or wire.rank:
        return False
    if any(each.role == "input" for each in ancestors([wire])):
        return False  # a count of valid labels is another thing
    for b, s in ((3, 31), (5, 37)):
        try:
            have = float(make(b=b, s=s)(wire.source))
        except NoValue:
            return False
        if have != prod(size_of(n, b, s) for dim in sizes for n in dim):
            return False
    return True


def size_of(size: int | str, b: int, s: int) -> int:
    """The number that a size of the draft stands for, `s - 1` included; 0 where it is unknown."""
    if isinstance(size, int):
        return size
    base, _, less = size.partition(" - ")
    found = {"b": b, "s": s}.get(base, 0)
    return found - int(less) if less.isdigit() else found


def lift_softmax(draft: Draft) -> None:
    """exp(x - max) / Σ exp(x - max) over the last dim becomes `softmax`, and its logarithm
    `torch.log_softmax`."""
    for op in draft.each("div"):
        found = match(_SOFTMAX, op.result)
        if found and _shifted(found.wires["x"], found.wires["top"], found.numbers["dims"]):
            x = found.wires["x"]
            if x.rank == op.result.rank and _last(x, found.numbers["dims"]):
                _stand_in(draft, op, "softmax", x)
    for op in draft.each("sub"):
        found = match(f"sub(sub(x, top), ({_LOG_SUM}))", op.result)
        if found and _shifted(found.wires["x"], found.wires["top"], found.numbers["dims"]):
            x = found.wires["x"]
            if x.dims == op.result.dims and _last(x, found.numbers["dims"]):
                _stand_in(draft, op, "torch.log_softmax", x)
    _log_sum_exp(draft)
    draft.sweep()


def _stand_in(draft: Draft, op: Op, kind: str, x: Wire) -> None:
    dtype = op.result.dtype
    if dtype != x.dtype:  # computed wider than its operand
        x = draft.add(
            "cast", [x], x.dims, dtype=dtype, attributes={"to": dtype}, module=op.module, before=op
        ).result
    made = draft.add(kind, [x], x.dims, dtype=dtype, module=op.module, before=op)
    draft.stand_in(op, made.result)


def _log_sum_exp(draft: Draft) -> None:
    """log Σ exp(x - max) + max becomes `log_sum_exp`."""
    for op in draft.each("add"):
        found = match(f"add(({_LOG_SUM}), top)", op.result)
        if found and _shifted(found.wires["x"], found.wires["top"], found.numbers["dims"]):
            x = found.wires["x"]
            if _last(x, found.numbers["dims"]):
                made = draft.add(
                    "log_sum_exp", [x], x.dims[:-1], dtype=x.dtype, module=op.module, before=op
                )
                draft.stand_in(op, made.result)


def _last(x: Wire, dims: list[int]) -> bool:
    return list(dims) == [x.rank - 1]


def _shifted(x: Wire, top: Wire, dims: list[int]) -> bool:
    """Whether `top` is the maximum of x, whatever guards it against infinities."""
    wire = bare(top)
    for _ in range(8):
        op = wire.producer
        if op is None:
            return False
        if op.kind == "reduce_max":
            return bare(op.operands[0]) is bare(x) and op.attributes["dims"] == dims
        if op.kind in ("jax.select_n", "jax.max", "torch.keep", "torch.masked_fill"):
            nexts = [w for w in op.operands if w.carried and w.is_float]
            if len(nexts) != 1:
                return False
            wire = bare(nexts[0])
        elif op.kind in _LOWERED:
            wire = bare(op.operands[0])
        else:
            return False
    return False


def lift_one_hot(draft: Draft, make: Settings) -> None:
    """Σ one_hot(labels) · x over the last dim becomes `pick`, an entry of x per row."""
    for op in draft.each("sum"):
        x = uncast(op.operands[0])
        product = x.made_by("mul")
        if product is None or op.attributes["dims"] != [x.rank - 1]:
            continue
        a, b = product.operands
        if a.carried == b.carried:
            continue
        carried, fixed = (a, b) if a.carried else (b, a)
        if carried.dims != x.dims or (labels := _one_hot_of(fixed, x, make)) is None:
            continue
        made = draft.add(
            "pick", [carried, labels], x.dims[:-1], dtype=carried.dtype, module=op.module, before=op
        )
        draft.stand_in(op, made.result)
    draft.sweep()


def _one_hot_of(wire: Wire, x: Wire, make: Settings) -> Wire | None:
    """The wire of class numbers that a static wire has a one for."""
    classes = elements(x.dims[-1])
    if wire.source is None or classes < 0:
        return None
    for each in ancestors([wire]):
        if each.is_float or each.dtype == "bool" or each.source is None:
            continue
        if [d for d in each.dims if d] != [d for d in x.dims[:-1] if d]:
            continue
        evaluation = make(b=3, s=6)
        try:
            hot, label = evaluation(wire.source), evaluation(each.source)
        except NoValue:
            return None
        want = label.reshape(label.size, 1) == np.arange(classes)
        if hot.size == want.size and np.array_equal(hot.reshape(want.shape), want):
            return each
    return None
