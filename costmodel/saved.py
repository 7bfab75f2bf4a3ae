"""What ops keep for the backward pass, and what recomputation keeps and runs again instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.graph import Graph, Op, Value
from ..ir.optable import TABLE
from ..ir.plan import Recompute

_EXPENSIVE = frozenset({"contraction", "attention"})
"""Classes of work whose results selective recomputation keeps."""


@dataclass(frozen=True, slots=True)
class Saves:
    """Indices of the operands and results an op keeps, and how many float32 statistics per row."""

    operands: tuple[int, ...]
    results: tuple[int, ...]
    statistics: int


def saves(op: Op, values: Mapping[str, Value]) -> Saves:
    """What the op table says an op keeps; nothing where no operand has a gradient.

    A product keeps an operand only for the gradient of another: `x0` of `mul` goes when `x1` has
    no gradient.
    """
    line = TABLE[op.kind]
    wanted = {k for k, name in enumerate(op.operands) if values[name].grad}
    if not wanted:
        return Saves((), (), 0)
    kept = [int(e[1:]) for e in line.saves if e[0] == "x" and int(e[1:]) < len(op.operands)]
    if line.linear == "product":
        kept = [k for k in kept if wanted - {k}]
    return Saves(
        tuple(kept),
        tuple(int(e[1:]) for e in line.saves if e[0] == "r"),
        sum(int(e[1:]) for e in line.saves if e[0] == "+"),
    )


def is_expensive(op: Op) -> bool:
    """Whether selective recomputation keeps the op's results: contractions and attention."""
    return TABLE[op.kind].work in _EXPENSIVE


def run_again(graph: Graph, recompute: Recompute) -> tuple[Op, ...]:
    """Ops whose forward pass runs a second time in the backward pass, in order.

    `selective` (every op but contractions and attention; Korthikanti et al. 2022,
    arXiv:2205.05198, with flash attention in place of its attention core) and `full`. Conversions
    on the way run again too, except reductions of partial results, which `selective` keeps.
    """
    if recompute == "none":
        return ()
    return tuple(op for op in graph.ops if recompute == "full" or not is_expensive(op))
