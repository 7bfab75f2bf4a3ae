"""Conversions between types, one axis at a time: what is said of them, and on which dims they work.

A conversion of an inner factor of a dim (`S(1.1)`) works on the tensor in which the factors are
dims of their own.
"""

from __future__ import annotations

from math import prod

from ...ir.conversion import Step
from ...ir.graph import Value
from ...ir.types import AxisType, NdType
from .target import LocalSize, order_within

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


def described(value: Value, step: Step) -> str:
    """`tp: S(1) → R (all-gather; backward: reduce-scatter)`"""
    said = f"{step.axis}: {step.source} → {step.target} ({_SAID[step.forward]}"
    if value.grad and step.backward != step.forward:
        said += f"; backward: {_SAID[step.backward]}"
    return said + ")"


def factors_apart(
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


def unfolded(kind: AxisType, factors: dict[int, int]) -> str:
    """A type on the tensor in which the factors of some dims are dims of their own."""
    if not kind.is_split:
        return kind.kind
    dim = kind.dim + sum(count - 1 for d, count in factors.items() if d < kind.dim)
    return f"S({dim + (kind.part if kind.dim in factors else 0)})"
