"""Dims from traced shapes: sizes are numbers, `b` and `s`; products keep their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..graph import Dims
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
    known = {_key(dim): dim for dims in operands for dim in dims if len(dim) > 1}
    found = [atoms(size, symbols) for size in shape]
    return tuple(known.get(_key(dim), dim) for dim in found)


def reshaped(source: Dims, target: Dims) -> Dims:
    """`target` with the factors of each dim in the order in which `source` has them."""
    flat = [size for dim in source for size in dim]
    result: list[tuple[Size, ...]] = []
    for dim in target:
        taken = _take(flat, dim)
        result.append(dim if taken is None else taken)
    return tuple(result)


def _take(flat: list[Size], dim: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """Takes from the front of `flat` what multiplies to `dim`, symbols in the order found."""
    want = sorted(size for size in dim if isinstance(size, str))
    number = prod(size for size in dim if isinstance(size, int))
    taken: list[Size] = []
    while want or number > 1:
        if not flat:
            return None
        head = flat[0]
        if isinstance(head, str):
            if head not in want:
                return None
            want.remove(head)
            taken.append(flat.pop(0))
        elif number % head == 0:
            number //= head
            taken.append(flat.pop(0))
        elif head % number == 0 and number > 1:
            flat[0] = head // number
            taken.append(number)
            number = 1
        else:
            return None
    return _joined(taken)


def _joined(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Neighbouring numbers multiplied: refinement takes them apart where it must."""
    result: list[Size] = []
    for size in sizes:
        if isinstance(size, int) and result and isinstance(result[-1], int):
            result[-1] *= size
        else:
            result.append(size)
    return tuple(size for size in result if size != 1)


def _key(dim: Sequence[Size]) -> tuple[int, tuple[str, ...]]:
    return (
        prod(size for size in dim if isinstance(size, int)),
        tuple(sorted(size for size in dim if isinstance(size, str))),
    )


def elements(dim: Sequence[Size]) -> int:
    """The number of elements of a dim, or -1 where it has a symbol."""
    numbers = [size for size in dim if isinstance(size, int)]
    return prod(numbers) if len(numbers) == len(dim) else -1


def same_elements(a: Dims, b: Dims) -> bool:
    """Whether two dims lists are the same shape, dims of size 1 aside."""
    return [dim for dim in a if dim] == [dim for dim in b if dim]
