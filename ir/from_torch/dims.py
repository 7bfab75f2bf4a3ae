"""Dims from traced shapes: sizes are numbers, `b` and `s`; products keep their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..graph import Dims
from ..lift.dims import ordered
from ..rule import Size


def atoms(size: Any, symbols: Mapping[str, str]) -> tuple[Size, ...]:
    """Factors of a traced size: `30*s0*s1` with s0 → b, s1 → s gives ("b", "s", 30).

    A size that is no such product (`s1 + 1`) comes back as one string; only what is lifted away may
    have it.
    """
    if isinstance(size, int):
        return () if size == 1 else (size,)
    expression = size.node.expr
    number, names = 1, []
    for factor in expression.as_ordered_factors():
        if factor.is_Integer:
            number *= int(factor)
        elif factor.is_Symbol and str(factor) in symbols:
            names.append(symbols[str(factor)])
        else:
            return (_shown(expression, symbols),)
    found: list[Size] = sorted(names)  # batch first
    return tuple(found if number == 1 else [*found, number])


def _shown(expression: Any, symbols: Mapping[str, str]) -> str:
    text = str(expression)
    for traced, name in symbols.items():
        text = text.replace(traced, name)
    return text


def dims_of(shape: Sequence[Any], symbols: Mapping[str, str], operands: Sequence[Dims]) -> Dims:
    """Dims of a traced shape. Products of symbols are ordered as in the operands' dims."""
    return ordered([atoms(size, symbols) for size in shape], operands)
