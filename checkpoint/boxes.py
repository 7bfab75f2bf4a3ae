"""Boxes: which parts of an array lie where. Everything a checkpoint is comes down to this table.

A box is a contiguous range along every dim of an array. Where its elements lie is affine: a
*record* (a run of bytes in some file), the offset of its first element in the record, and a stride
per dim. Tables of boxes are closed under what conversion needs: overlap with another table,
change of coordinates (`arrangement.py`), and the proof that every element lies somewhere, once.

Offsets and strides count elements, so one table serves every state of a parameter (weight, moments)
that lies in the same way. Tables are columns of numpy, and every operation sweeps them whole: ten
thousand ranks are a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_CANDIDATES_AT_ONCE = 1 << 21
"""Pairs of boxes that are compared at a time: bounds the memory of an overlap (about 200 MB)."""


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Boxes of one array.

    `begin`, `size` and `stride` are [boxes, dims], `record` and `offset` [boxes]. A stride is the
    distance in the record, in elements, between neighbours along the dim.
    """

    begin: Ints
    size: Ints
    stride: Ints
    record: Ints
    offset: Ints

    @staticmethod
    def of(
        rows: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int], int, int]], dims: int
    ) -> Boxes:
        """From rows of (begin, size, stride, record, offset)."""
        listed = list(rows)

        def column(place: int) -> Ints:
            return np.array([row[place] for row in listed], np.int64).reshape(len(listed), dims)

        def scalar(place: int) -> Ints:
            return np.array([row[place] for row in listed], np.int64)

        return Boxes(column(0), column(1), column(2), scalar(3), scalar(4))

    @staticmethod
    def whole(shape: Sequence[int], record: int = 0, offset: int = 0) -> Boxes:
        """One box: the whole array, row-major."""
        return Boxes.of([((0,) * len(shape), shape, row_major(shape), record, offset)], len(shape))

    @staticmethod
    def joined(tables: Sequence[Boxes], dims: int) -> Boxes:
        """One table of the rows of several."""
        if not tables:
            return Boxes.of([], dims)
        if len(tables) == 1:
            return tables[0]
        names = ("begin", "size", "stride", "record", "offset")
        return Boxes(*(np.concatenate([getattr(t, name) for t in tables]) for name in names))

    def __len__(self) -> int:
        return len(self.record)

    @property
    def dims(self) -> int:
        return int(self.begin.shape[1])

    @property
    def elements(self) -> Ints:
        """The number of elements of each box."""
        found: Ints = self.size.prod(1)
        return found

    def take(self, rows: Ints | NDArray[np.bool_]) -> Boxes:
        """Some of the rows, by index or by mask."""
        return Boxes(
            self.begin[rows],
            self.size[rows],
            self.stride[rows],
            self.record[rows],
            self.offset[rows],
        )

    def clipped(self, shape: Sequence[int]) -> Boxes:
        """The part inside the array: what lies beyond is padding."""
        over = np.asarray(shape, np.int64) - self.begin
        size = np.minimum(self.size, over)
        kept = Boxes(self.begin, size, self.stride, self.record, self.offset)
        return kept.take((size > 0).all(1))

    def moved(self, by: Sequence[int]) -> Boxes:
        """The same elements seen in an array in which they begin `by` further along each dim."""
        return Boxes(
            self.begin + np.asarray(by, np.int64), self.size, self.stride, self.record, self.offset
        )


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """What the boxes of two tables have in common: `begin` and `size` [overlaps, dims], and the
    rows of both tables that meet there."""

    begin: Ints
    size: Ints
    one: Ints
    other: Ints

    def __len__(self) -> int:
        return len(self.one)

    @property
    def elements(self) -> Ints:
        """The number of elements of each overlap."""
        found: Ints = self.size.prod(1)
        return found

    def offsets(self, table: Boxes, rows: Ints) -> Ints:
        """Where the overlaps begin in the records of `table`, of which they are in `rows`."""
        inside = (self.begin - table.begin[rows]) * table.stride[rows]
        found: Ints = table.offset[rows] + inside.sum(1)
        return found


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous array, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def overlaps(one: Boxes, other: Boxes) -> Overlaps:
    """All overlaps of boxes of two tables over the same array, ordered by the rows of `one`.

    Sweeps the dim along which the tables are cut most often: O((n + m) log m) and the pairs that
    meet along this dim.
    """
    if one.dims == 0:
        pairs = np.indices((len(one), len(other))).reshape(2, -1)
        empty = np.zeros((pairs.shape[1], 0), np.int64)
        return Overlaps(empty, empty, pairs[0], pairs[1])
    dim = max(range(one.dims), key=lambda d: _cuts(one, d) + _cuts(other, d))
    order = np.argsort(other.begin[:, dim], kind="stable")
    begins = other.begin[order, dim]
    reach = np.maximum.accumulate((other.begin + other.size)[order, dim]) if len(other) else begins
    first = np.searchsorted(reach, one.begin[:, dim], "right")
    last = np.searchsorted(begins, one.begin[:, dim] + one.size[:, dim], "left")
    counts = np.maximum(last - first, 0)
    parts = [
        _meeting(one, other, order, first, counts, rows) for rows in _portions(counts, len(one))
    ]
    return Overlaps(
        *(
            np.concatenate([getattr(p, name) for p in parts])
            for name in ("begin", "size", "one", "other")
        )
    )


def _cuts(table: Boxes, dim: int) -> int:
    begin = table.begin[:, dim]
    if not len(begin) or (begin == begin[0]).all():
        return 1
    return len(np.unique(begin))


def _portions(counts: Ints, total: int) -> list[slice]:
    """Consecutive rows with a bounded number of candidates each (one row at least)."""
    if counts.sum() <= _CANDIDATES_AT_ONCE:
        return [slice(0, total)]
    found, begin, filled = [], 0, 0
    for row, count in enumerate(counts.tolist()):
        if filled and filled + count > _CANDIDATES_AT_ONCE:
            found.append(slice(begin, row))
            begin, filled = row, 0
        filled += count
    return [*found, slice(begin, total)]


def _meeting(
    one: Boxes, other: Boxes, order: Ints, first: Ints, counts: Ints, rows: slice
) -> Overlaps:
    """The overlaps of some rows of `one` with their candidates."""
    some = counts[rows]
    left = np.repeat(np.arange(rows.start, rows.stop), some)
    position = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some)
    right = order[np.repeat(first[rows], some) + position]
    begin = np.maximum(one.begin[left], other.begin[right])
    end = np.minimum((one.begin + one.size)[left], (other.begin + other.size)[right])
    kept = (end > begin).all(1)
    begin = begin[kept]
    return Overlaps(begin, end[kept] - begin, left[kept], right[kept])


def flat_range(
    shape: Sequence[int], begin: int, end: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes (offsets, sizes), in order, that elements `begin … end-1` of a row-major array
    are: at most 2·dims - 1 of them."""
    if begin >= end:
        return []
    if not shape:
        return [((), ())]
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner
    if len(shape) == 1:
        return [((begin,), (end - begin,))]
    if first > last:  # inside one row
        return _in_row(shape, first - 1, begin, end, inner)
    found = _in_row(shape, first - 1, begin, first * inner, inner)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        found.append(((first, *zeros), (last - first, *shape[1:])))
    return found + _in_row(shape, last, last * inner, end, inner)


def _in_row(
    shape: Sequence[int], row: int, begin: int, end: int, inner: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    below = flat_range(shape[1:], begin - row * inner, end - row * inner)
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in below]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the elements of an array lie in a table.

    `elements` of the array, `covered` by the table counted with repetition, and a `twice`: two rows
    of the table that overlap, if any do.
    """

    elements: int
    covered: int
    twice: tuple[int, int] | None

    @property
    def exactly_once(self) -> bool:
        return self.twice is None and self.covered == self.elements


def coverage(table: Boxes, shape: Sequence[int]) -> Coverage:
    """Whether a table holds every element of an array exactly once.

    A proof without looking at elements: boxes inside the array that do not overlap, and whose sizes
    add up to the array's, are a partition of it.
    """
    inside = table.clipped(shape)
    met = overlaps(inside, inside)
    double = np.flatnonzero(met.one != met.other)
    twice = (int(met.one[double[0]]), int(met.other[double[0]])) if len(double) else None
    return Coverage(prod(shape), int(inside.elements.sum()), twice)


def distinct(table: Boxes) -> Boxes:
    """One row of those that are the same box: replicas are copies, any of them will do."""
    if len(table) < 2:
        return table
    keys = np.concatenate([table.begin, table.size], 1)
    _, rows = np.unique(keys, axis=0, return_index=True)
    return table.take(np.sort(rows))


def without_repeats(table: Boxes) -> Boxes:
    """Boxes that are disjoint and hold the same elements: what lies in an earlier box is cut out of
    the later ones (replicas are copies, any of them will do)."""
    if _side_by_side(table):
        return table
    table = distinct(table)
    met = overlaps(table, table)
    later = met.one > met.other
    if not later.any():
        return table
    row, earlier = met.one[later], met.other[later]
    kept = np.ones(len(table), np.bool_)
    kept[row] = False
    cut: list[Boxes] = [table.take(kept)]
    order = np.argsort(row, kind="stable")
    row, earlier = row[order], earlier[order]
    bounds = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
    for low, high in pairwise(bounds.tolist()):
        rest = table.take(row[low : low + 1])
        for other in earlier[low:high].tolist():
            rest = _minus(rest, table.begin[other], table.begin[other] + table.size[other])
            if not len(rest):
                break
        cut.append(rest)
    return Boxes.joined(cut, table.dims)


def _side_by_side(table: Boxes) -> bool:
    """Whether the boxes follow each other along one dim (most tables are so: then they are disjoint
    at a glance)."""
    for dim in range(table.dims):
        begin = table.begin[:, dim]
        if len(begin) and (begin == begin[0]).all():
            continue
        order = np.argsort(begin, kind="stable")
        begin = begin[order]
        return bool((begin[1:] >= (begin + table.size[order, dim])[:-1]).all())
    return len(table) < 2


def _minus(table: Boxes, low: Ints, high: Ints) -> Boxes:
    """What of the boxes lies outside the box low … high-1."""
    begin, end = table.begin, table.begin + table.size
    meets = ((begin < high) & (end > low)).all(1)
    found = [table.take(np.flatnonzero(~meets))]
    rest = table.take(np.flatnonzero(meets))
    for dim in range(table.dims):
        for side in (0, 1):
            begin, end = rest.begin.copy(), rest.begin + rest.size
            if side == 0:
                end[:, dim] = np.minimum(end[:, dim], low[dim])
            else:
                begin[:, dim] = np.maximum(begin[:, dim], high[dim])
            found.append(_restricted(rest, begin, end))
        begin, end = rest.begin.copy(), rest.begin + rest.size
        begin[:, dim] = np.maximum(begin[:, dim], low[dim])
        end[:, dim] = np.minimum(end[:, dim], high[dim])
        rest = _restricted(rest, begin, end)
    return Boxes.joined(found, table.dims)


def _restricted(table: Boxes, begin: Ints, end: Ints) -> Boxes:
    offset = table.offset + ((begin - table.begin) * table.stride).sum(1)
    cut = Boxes(begin, end - begin, table.stride, table.record, offset)
    return cut.take(np.flatnonzero((end > begin).all(1)))


def first_gap(table: Boxes, shape: tuple[int, ...]) -> tuple[list[int], list[int]] | None:
    """A box (begin, end) of an array that no box of the table holds, if there is one."""
    rest = Boxes.whole(shape)
    for begin, size in zip(table.begin, table.size, strict=True):
        rest = _minus(rest, begin, begin + size)
        if not len(rest):
            return None
    if not len(rest) or not prod(shape):
        return None
    return rest.begin[0].tolist(), (rest.begin[0] + rest.size[0]).tolist()


def contiguous(table: Boxes) -> Ints:
    """The rows whose elements lie one after the other, in their own order."""
    inside = np.ones(len(table), np.bool_)
    expected = np.ones(len(table), np.int64)
    for dim in reversed(range(table.dims)):
        inside &= (table.stride[:, dim] == expected) | (table.size[:, dim] == 1)
        expected = expected * table.size[:, dim]
    return np.flatnonzero(inside)
