"""Conversions between types as calls of spmd_types, one line per step."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.conversion import Step
from ..emission.body import Body, Form, Statement
from ..emission.conversions import described, factors_apart, unfolded
from .types import declared, type_text

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
    factors = factors_apart(before[1], after[1], step, sizes)
    if factors:
        parts = {d: len(f) for d, f in factors.items()}
        src, dst = unfolded(step.source, parts), unfolded(step.target, parts)
        shown = ", ".join(f"{d}: ({', '.join(f)})" for d, f in factors.items())
        options += f", factors={{{shown}}}, makes={declared(after[1])}"
        call = f"at_factors({call}, "
    else:
        src, dst = type_text(step.source), type_text(step.target)
        call += "("
    dense = step.forward == "all_reduce" and _producer(body, before) not in _CONTIGUOUS

    def text(x: Sequence[str]) -> str:
        operand = f"{x[0]}.contiguous()" if dense else x[0]
        return f"{call}{operand}, {step.axis}, src={src}, dst={dst}{options})"

    said = described(value, step)
    return Statement([before], [after], text, [""], role="conversion", step=step, comment=said)


def _producer(body: Body, form: Form) -> str:
    for statement in reversed(body.statements):
        if form in statement.writes:
            return statement.op.kind if statement.op else statement.role
    return "argument"
