"""What ops keep for the backward pass, and what recomputation keeps and runs again instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.graph import Graph, Op, Value
from ..ir.optable import TABLE
from ..ir.plan import Recompute
from .runtime import Runtime

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


def is_fused(op: Op) -> bool:
    """Whether the op is one that a framework which fuses pointwise ops makes part of a chain:
    those that compute elements from elements, drawing no mask and moving no data."""
    return TABLE[op.kind].work == "pointwise" and op.kind not in ("dropout", "rotary", "cast")


def runs_again(op: Op, recompute: Recompute, runtime: Runtime) -> bool:
    """Whether the op's forward pass runs a second time before its backward pass.

    `full` runs all of a block again. `selective` what the runtime does not keep: every op but
    contractions and attention, or the attention core alone, which a flash kernel recomputes by
    itself (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    if recompute != "selective":
        return recompute == "full"
    if runtime.selective == "core-attention":
        return TABLE[op.kind].work == "attention" and runtime.attention == "unfused"
    return not is_expensive(op)


def run_again(graph: Graph, recompute: Recompute, runtime: Runtime | None = None) -> tuple[Op, ...]:
    """Ops whose forward pass runs a second time in the backward pass, in order.

    Conversions on the way run again too, except reductions of partial results, which `selective`
    keeps. The default runtime is `torch`.
    """
    runs = runtime or Runtime.preset("torch")
    return tuple(op for op in graph.ops if runs_again(op, recompute, runs))
