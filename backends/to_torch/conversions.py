"""Conversions between types as calls of spmd_types, one line per step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...ir.conversion import Step
from ...ir.types import AxisType, NdType
from .body import Body, Form, Statement
from .target import LocalSize, declared, order_within, type_text

_CALL = {
    "all_gather": "spmd.all_gather",
    "reduce_scatter": "spmd.reduce_scatter",
    "all_reduce": "spmd.all_reduce",
    "all_to_all": "spmd.all_to_all",
    "slice": "spmd.convert",
    "pad": "spmd.convert",
    "keep_one": "spmd.convert",
    "none": "spmd.convert",
}

_SAID = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "slice": "slice",
    "pad": "pad with zeros",
    "keep_one": "keep on one rank",
    "none": "nothing",
}

_EXPERT = {("I", "P"), ("R", "I"), ("S", "P")}
"""Conversions that spmd_types allows in forward passes only when told that they are meant."""

_CONTIGUOUS = {"linear", "linear_io", "matmul", "embedding"}
"""Kinds whose results are contiguous, as an all-reduce wants its input."""


def conversion(body: Body, before: Form, after: Form, step: Step) -> Statement:
    """The line that takes a value from one form to the next."""
    value = body.values[before[0]]
    sizes = body.target.local(value, before[1])
    options = ""
    if (step.source.kind, step.target.kind) in _EXPERT:
        options += ", expert_mode=True"
    if value.grad and step.backward in ("all_reduce", "reduce_scatter") and body.target.reduces_low:
        summed = "FLOAT32_SUM" if value.role == "parameter" else "OWN_DTYPE"
        options += f", backward_options={summed}"
    body.axes.add(step.axis)
    call = _CALL[step.forward]
    factors = _inner(before[1], after[1], step, sizes)
    if factors:
        unfolded = {d: len(f) for d, f in factors.items()}
        src, dst = _unfold(step.source, unfolded), _unfold(step.target, unfolded)
        shown = ", ".join(f"{d}: ({', '.join(f)})" for d, f in factors.items())
        options += f", factors={{{shown}}}, makes={declared(after[1])}"
        call = f"at_factors({call}, "
    else:
        src, dst = type_text(step.source), type_text(step.target)
        call += "("
    dense = step.forward == "all_reduce" and _producer(body, before) not in _CONTIGUOUS
    said = f"{step.axis}: {step.source} → {step.target} ({_SAID[step.forward]}"
    if value.grad and step.backward != step.forward:
        said += f"; backward: {_SAID[step.backward]}"

    def text(x: Sequence[str]) -> str:
        operand = f"{x[0]}.contiguous()" if dense else x[0]
        return f"{call}{operand}, {step.axis}, src={src}, dst={dst}{options})"

    said += ")"
    return Statement([before], [after], text, [""], role="conversion", step=step, comment=said)


def _producer(body: Body, form: Form) -> str:
    for statement in reversed(body.statements):
        if form in statement.writes:
            return statement.op.kind if statement.op else statement.role
    return "argument"


def _inner(
    before: NdType, after: NdType, step: Step, sizes: tuple[tuple[LocalSize, ...], ...]
) -> dict[int, list[str]]:
    """Local factor sizes of dims of which an inner factor is taken apart or put together.

    Empty where concatenating or cutting the dim as a whole does the same.
    """
    hard: set[int] = set()
    for types, kind in ((before, step.source), (after, step.target)):
        if not kind.is_split:
            continue
        outside = sizes[kind.dim][: kind.part]
        whole = all(not size.symbol for size in outside) and prod(s.number for s in outside) == 1
        innermost = order_within(types, kind.dim)[-1] == step.axis
        if not (whole and innermost):
            hard.add(kind.dim)
    if step.source.is_split and step.target.is_split and step.source.dim == step.target.dim:
        hard.add(step.source.dim)
    found: dict[int, list[str]] = {}
    for dim in sorted(hard):
        symbols = [i for i, size in enumerate(sizes[dim]) if size.symbol]
        free = symbols[0] if symbols else -1
        names = {"b": "MICRO_BATCH", "s": "SEQ_LEN"}
        found[dim] = ["-1" if i == free else size.text(names) for i, size in enumerate(sizes[dim])]
    return found


def _unfold(kind: AxisType, factors: dict[int, int]) -> str:
    """A type on the tensor in which the factors of some dims are dims of their own."""
    if not kind.is_split:
        return kind.kind
    dim = kind.dim + sum(count - 1 for d, count in factors.items() if d < kind.dim)
    return f"S({dim + (kind.part if kind.dim in factors else 0)})"
