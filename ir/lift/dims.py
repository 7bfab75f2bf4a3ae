"""Dims while a graph is being lifted: products of numbers and symbols, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..graph import Dims
from ..rule import Size


def ordered(found: Sequence[tuple[Size, ...]], operands: Sequence[Dims]) -> Dims:
    """Dims with products of symbols ordered as in the operands' dims."""
    known = {_key(dim): dim for dims in operands for dim in dims if len(dim) > 1}
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


def same_count(a: Dims, b: Dims) -> bool:
    """Whether two shapes have the same number of elements, whatever the symbols stand for."""
    return _key([n for dim in a for n in dim]) == _key([n for dim in b for n in dim])


def same_elements(a: Dims, b: Dims) -> bool:
    """Whether two dims lists are the same shape, dims of size 1 aside."""
    return [dim for dim in a if dim] == [dim for dim in b if dim]
