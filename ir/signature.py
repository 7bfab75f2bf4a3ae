"""Signatures: in which types an op may run along one mesh axis. Derived from its rule alone.

A factor split across the axis makes every operand that has it `S`, every operand that lacks it
`R`, every result that has it `S` and every result that lacks it `P`. Work that is not split runs
`I…→I` or `R…→R`. Where an op is linear, partial sums pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .graph import Op, Value
from .optable import TABLE
from .rule import FactorName, RuleShape
from .types import AxisType, I, P, R, S


@dataclass(frozen=True, slots=True)
class Signature:
    """Types of operands and results along one axis; `factor` is the loop that is split, if any."""

    operands: tuple[AxisType, ...]
    results: tuple[AxisType, ...]
    factor: FactorName | None = None

    def __str__(self) -> str:
        left = ", ".join(map(str, self.operands))
        return f"{left} -> {', '.join(map(str, self.results))}"


def signatures(op: Op, values: Mapping[str, Value]) -> tuple[Signature, ...]:
    """Every signature of `op` along one axis, in a fixed order.

    Values without gradient (token ids, masks, counts) are replicated as `R` only: `I` differs from
    it by its gradient alone.
    """
    grads_in = tuple(values[name].grad for name in op.operands)
    grads_out = tuple(values[name].grad for name in op.results)
    line = TABLE[op.kind]
    special = dict(line.special)
    found: dict[Signature, None] = {}

    for factor in op.rule.factors:
        base = factor.split("_")[0]  # a refined factor `v_0` of the special factor `v`
        outcome = special.get(factor, special.get(base))
        if factor in op.rule.locked and outcome is None:
            continue
        lacking = P if outcome is None else (I if outcome == "I" else R)
        operands = tuple(_along(op.rule.operands[k], factor, R) for k in range(len(op.operands)))
        results = tuple(
            _along(op.rule.results[k], factor, lacking if grads_out[k] or outcome is None else R)
            for k in range(len(op.results))
        )
        found[Signature(operands, results, factor)] = None

    for kind in (I, R):
        found[
            Signature(
                tuple(kind if grad else R for grad in grads_in),
                tuple(kind if grad else R for grad in grads_out),
            )
        ] = None

    if all(grads_out):
        for summed in _linear_operands(line.linear, len(op.operands)):
            if all(grads_in[k] for k in summed):
                operands = tuple(P if k in summed else R for k in range(len(op.operands)))
                found[Signature(operands, (P,) * len(op.results))] = None
    return tuple(found)


def _along(shape: RuleShape, factor: FactorName, otherwise: AxisType) -> AxisType:
    for dim, names in enumerate(shape):
        if factor in names:
            return S(dim, names.index(factor))
    return otherwise


def _linear_operands(linear: str, count: int) -> tuple[tuple[int, ...], ...]:
    """Sets of operands in which the op is jointly linear."""
    if linear == "sum":
        return (tuple(range(count)),) if count else ()
    if linear == "product":
        return tuple((k,) for k in range(count))
    return ((0,),) if linear == "first" else ()
