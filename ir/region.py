"""Regions: which elements of a logical tensor a rank holds, and what two regions have in common.

A shard is a grid: per dim some intervals, and all combinations of them. The split of a contiguous
dim gives one interval, the split of an inner factor several (GPT-2's fused projection split on
heads). Grids are closed under intersection, which is all that moving tensors from one layout to
another needs: what a rank wants and another has is their intersection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from .mesh import Mesh
from .types import NdType

Interval = tuple[int, int]
"""Begin and end (not included) along a dim."""


@dataclass(frozen=True, slots=True)
class Region:
    """Per dim the intervals, in order, with space between them. A scalar has no dims and one
    element."""

    dims: tuple[tuple[Interval, ...], ...]

    @property
    def elements(self) -> int:
        return prod(sum(end - begin for begin, end in dim) for dim in self.dims)

    def __and__(self, other: Region) -> Region:
        """What both hold."""
        return Region(tuple(_common(a, b) for a, b in zip(self.dims, other.dims, strict=True)))

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and sizes of its contiguous boxes, in row-major order."""
        for corner in product(*self.dims):
            yield tuple(begin for begin, _ in corner), tuple(end - begin for begin, end in corner)


def _common(one: tuple[Interval, ...], other: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """The intersection of two ascending lists of intervals, swept once."""
    found: list[Interval] = []
    i = k = 0
    while i < len(one) and k < len(other):
        begin, end = max(one[i][0], other[k][0]), min(one[i][1], other[k][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] <= other[k][1]:
            i += 1
        else:
            k += 1
    return tuple(found)


def held_region(
    factors: tuple[tuple[int, ...], ...],
    types: NdType,
    mesh: Mesh,
    at: Mapping[str, int],
    rows_over: tuple[int, int] | None = None,
) -> Region:
    """What the rank at coordinates `at` (axis → index) holds of a tensor.

    `factors` are the factor sizes of every dim, outermost first; `types` on the axes of `mesh`, of
    which the first is the outermost where several split one factor. `rows_over` = (ranks,
    index): those ranks share the rows of what is left, the first ones ⌈rows / ranks⌉ each, as FSDP
    cuts (a scalar stays whole).
    """
    dims = tuple(_intervals(sizes, dim, types, mesh, at) for dim, sizes in enumerate(factors))
    if rows_over is not None and dims:
        ranks, index = rows_over
        count = sum(end - begin for begin, end in dims[0])
        each = -(-count // ranks)
        dims = (_rows(dims[0], index * each, (index + 1) * each), *dims[1:])
    return Region(dims)


def _intervals(
    sizes: tuple[int, ...], dim: int, types: NdType, mesh: Mesh, at: Mapping[str, int]
) -> tuple[Interval, ...]:
    """The part of one dim: from the innermost factor outwards, whole runs stay one interval."""
    runs: list[Interval] = [(0, 1)]
    inside = 1
    for part in reversed(range(len(sizes))):
        index, pieces = 0, 1
        for axis in types.splitting(dim, part):
            index, pieces = index * mesh[axis].size + at[axis], pieces * mesh[axis].size
        count = sizes[part] // pieces
        if runs == [(0, inside)]:
            runs = [(index * count * inside, (index + 1) * count * inside)]
        else:
            steps = range(index * count, (index + 1) * count)
            runs = [(i * inside + begin, i * inside + end) for i in steps for begin, end in runs]
        inside *= sizes[part]
    return tuple(runs)


def _rows(dim: tuple[Interval, ...], first: int, last: int) -> tuple[Interval, ...]:
    """Elements `first … last-1` of the intervals laid end to end."""
    found, position = [], 0
    for begin, end in dim:
        low, high = max(first - position, 0), min(last - position, end - begin)
        if low < high:
            found.append((begin + low, begin + high))
        position += end - begin
    return tuple(found)
