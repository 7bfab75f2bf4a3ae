"""Conversions between types as calls of `jax.lax`, one line per step.

`S`, `R` and `P` are all *varying* to JAX, `I` is invariant: its checker (`check_vma`) holds what is
left of a type to what the line above says.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.conversion import Step
from ...ir.types import AxisType
from ..emission.body import Body, Form, Statement
from ..emission.conversions import described, factors_apart, unfolded

_CALLS = {
    ("S", "R"): "lax.all_gather({x}, {axis}, axis={source}, tiled=True)",
    ("S", "I"): 'lax.all_gather({x}, {axis}, axis={source}, tiled=True, to="invarying")',
    ("S", "P"): "pad_part({x}, {axis}, {source})",
    ("R", "S"): "take_part({x}, {axis}, {target})",
    ("I", "S"): "cut({x}, {axis}, {target})",
    ("R", "I"): "of_first({x}, {axis})",
    ("I", "R"): 'lax.pcast({x}, {axis}, to="varying")',
    ("R", "P"): "keep_first({x}, {axis})",
    ("I", "P"): "keep_first({x}, {axis})",
    ("P", "S"): "lax.psum_scatter({x}, {axis}, scatter_dimension={target}, tiled=True)",
    ("P", "R"): 'lax.pcast(lax.psum({x}, {axis}), {axis}, to="varying")',
    ("P", "I"): "lax.psum({x}, {axis})",
    ("S", "S"): "lax.all_to_all({x}, {axis}, {target}, {source}, tiled=True)",
}


def conversion(body: Body, before: Form, after: Form, step: Step) -> Statement:
    """The line that takes a value from one form to the next."""
    value = body.values[before[0]]
    kinds = (step.source.kind, step.target.kind)
    call = _CALLS[kinds]
    if kinds == ("I", "S") and not value.grad:
        call = _CALLS["R", "S"]
    factors = factors_apart(before[1], after[1], step, body.target.local(value, before[1]))
    parts = {d: len(f) for d, f in factors.items()}
    source, target = (_dim(unfolded(kind, parts)) for kind in (step.source, step.target))
    shown = ", ".join(f"{d}: ({', '.join(f)},)" for d, f in factors.items())

    def text(x: Sequence[str]) -> str:
        operand = "y" if factors else x[0]
        if kinds == ("I", "R") and operand.startswith("local(") and operand.endswith("])"):
            return f'{operand[:-1]}, vary="{step.axis}")'  # gradients are summed before the cast
        line = call.format(x=operand, axis=f'"{step.axis}"', source=source, target=target)
        return f"at_factors(lambda y: {line}, {x[0]}, {{{shown}}})" if factors else line

    said = described(value, step)
    return Statement([before], [after], text, [""], role="conversion", step=step, comment=said)


def _dim(kind: str | AxisType) -> str:
    """The dim of a split, written out; empty for other types."""
    text = str(kind)
    return text[2:-1] if text.startswith("S(") else ""
