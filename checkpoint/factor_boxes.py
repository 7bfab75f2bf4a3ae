"""Boxes over the factors of an array's dims, and how factors become dims.

Between a stored array and a logical tensor stand their common factors: Megatron's fused projection
`((g [q k v] d) h)` and Hugging Face's query weight `((g r d) h)` differ in how the factors g, r, d
are put together. A box over factors has a range and a stride on every one of them; joining factors
to a dim keeps a box whole where they are contiguous, and cuts it where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

import numpy as np

from .boxes import Boxes, Ints, flat_range, row_major


@dataclass(frozen=True, slots=True, eq=False)
class FactorBoxes:
    """`begin`, `size` and `stride` are [boxes, factors]; `record` and `offset` [boxes]."""

    begin: Ints
    size: Ints
    stride: Ints
    record: Ints
    offset: Ints

    def __len__(self) -> int:
        return len(self.record)

    def take(self, rows: Ints) -> FactorBoxes:
        """Some of the rows (a row may be taken several times)."""
        return FactorBoxes(
            self.begin[rows],
            self.size[rows],
            self.stride[rows],
            self.record[rows],
            self.offset[rows],
        )

    def within(self, factor: int, begin: int, end: int) -> FactorBoxes:
        """The part inside a range of one factor, counted from the beginning of that range."""
        low = np.maximum(self.begin[:, factor], begin)
        high = np.minimum(self.begin[:, factor] + self.size[:, factor], end)
        starts, sizes = self.begin.copy(), self.size.copy()
        starts[:, factor], sizes[:, factor] = low - begin, high - low
        ahead = (low - self.begin[:, factor]) * self.stride[:, factor]
        found = replace(self, begin=starts, size=sizes, offset=self.offset + ahead)
        return found.take(np.flatnonzero(high > low))

    def exploded(self, factor: int, where: Ints | None = None) -> FactorBoxes:
        """Boxes of one index of a factor each; `where` says which rows (all, if not given)."""
        counts = np.ones(len(self), np.int64)
        rows = slice(None) if where is None else where
        counts[rows] = self.size[rows, factor]
        if (counts == 1).all():
            return self
        found = self.take(np.repeat(np.arange(len(self)), counts))
        step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        size = found.size.copy()
        size[np.repeat(counts, counts) > 1, factor] = 1
        begin = found.begin.copy()
        begin[:, factor] += step
        offset: Ints = found.offset + step * found.stride[:, factor]
        return replace(found, begin=begin, size=size, offset=offset)

    def as_dims(self, dims: Sequence[Sequence[int]], sizes: Sequence[int]) -> Boxes:
        """Joins factors to dims: each dim names its factors (columns), outermost first; `sizes` are
        the sizes of all factors. Factors in no dim must be of one index in every box."""
        table = self
        for members in dims:
            for place in range(len(members) - 1, 0, -1):
                table = table._joined(members[place - 1], members[place:], sizes)
        begin, size, stride = (np.zeros((len(table), len(dims)), np.int64) for _ in range(3))
        for dim, members in enumerate(dims):
            if not members:
                size[:, dim] = 1
            for column, source in (
                (begin, table.begin),
                (size, table.size),
                (stride, table.stride),
            ):
                if members:
                    column[:, dim] = source[:, members[0]]
        return Boxes(begin, size, stride, table.record, table.offset)

    def _joined(self, outer: int, inner: Sequence[int], sizes: Sequence[int]) -> FactorBoxes:
        """One factor joined to those inside it, which are joined already: their column is that of
        `inner[0]`. The result takes the column of `outer`."""
        first = inner[0]
        whole = int(np.prod([sizes[f] for f in inner]))
        contiguous = (self.size[:, first] == whole) & (
            (self.stride[:, outer] == self.stride[:, first] * whole) | (whole == 1)
        )
        table = self.exploded(outer, np.flatnonzero(~contiguous & (self.size[:, outer] > 1)))
        single = table.size[:, outer] == 1
        begin, size, stride = table.begin.copy(), table.size.copy(), table.stride.copy()
        begin[:, outer] = table.begin[:, outer] * whole + table.begin[:, first]
        size[:, outer] = np.where(single, table.size[:, first], table.size[:, outer] * whole)
        if whole > 1:
            stride[:, outer] = table.stride[:, first]
        return replace(table, begin=begin, size=size, stride=stride)


def factors_of(table: Boxes, dims: Sequence[Sequence[int]], sizes: Sequence[int]) -> FactorBoxes:
    """The boxes of an array whose dims are products of factors, cut to boxes over the factors.

    `dims` name the factors (columns, outermost first) of each dim, `sizes` are those of all
    factors; every factor is in one dim.
    """
    count = len(sizes)
    rows = np.arange(len(table))
    begin = np.zeros((len(table), count), np.int64)
    size = np.ones((len(table), count), np.int64)
    ahead = np.zeros(len(table), np.int64)
    for dim, members in enumerate(dims):
        shape = [sizes[f] for f in members]
        if len(members) == 1:
            begin[:, members[0]] = table.begin[rows, dim]
            size[:, members[0]] = table.size[rows, dim]
            continue
        ranges = np.stack([table.begin[rows, dim], table.size[rows, dim]], 1)
        kinds, which = np.unique(ranges, axis=0, return_inverse=True)
        which = which.reshape(-1)
        cut = [flat_range(shape, int(b), int(b + n)) for b, n in kinds]
        counts = np.array([len(boxes) for boxes in cut], np.int64)
        starts = np.cumsum(counts) - counts
        flat = [box for boxes in cut for box in boxes]
        repeat = counts[which]
        position = np.arange(int(repeat.sum())) - np.repeat(np.cumsum(repeat) - repeat, repeat)
        pick = np.repeat(starts[which], repeat) + position
        grown = np.repeat(np.arange(len(rows)), repeat)
        rows, begin, size, ahead = rows[grown], begin[grown], size[grown], ahead[grown]
        if not members:
            continue
        columns = np.array(members)
        begin[:, columns] = np.array([box[0] for box in flat], np.int64).reshape(-1, len(columns))[
            pick
        ]
        size[:, columns] = np.array([box[1] for box in flat], np.int64).reshape(-1, len(columns))[
            pick
        ]
        inside = (begin[:, columns] * np.array(row_major(shape))).sum(1)
        ahead = ahead + (inside - table.begin[rows, dim]) * table.stride[rows, dim]
    stride = np.zeros((len(rows), count), np.int64)
    for dim, members in enumerate(dims):
        for factor, inside in zip(members, row_major([sizes[f] for f in members]), strict=True):
            stride[:, factor] = table.stride[rows, dim] * inside
    return FactorBoxes(begin, size, stride, table.record[rows], table.offset[rows] + ahead)


@dataclass(frozen=True, slots=True)
class Split:
    """A factor cut into `pieces`, of which this is number `index`.

    Where the size is no multiple, every piece but the last ones has ⌈size / pieces⌉ indices, as
    torch.chunk and FSDP cut.
    """

    factor: int
    pieces: int
    index: int


def shard(
    dims: Sequence[Sequence[int]],
    sizes: Sequence[int],
    splits: Sequence[Split],
    record: int = 0,
    offset: int = 0,
    part: tuple[int, int] | None = None,
) -> Boxes:
    """Where the elements of one rank's shard are in the whole array.

    The shard is row-major in its record, from `offset` on. `splits` on the same factor nest in
    their order. `part` = (begin, end): only these elements of the flattened shard are there (ZeRO),
    the first of them at `offset`.
    """
    begin, size = [0] * len(sizes), list(sizes)
    for split in splits:
        each = -(-size[split.factor] // split.pieces)
        low = min(split.index * each, size[split.factor])
        begin[split.factor] += low
        size[split.factor] = min(each, size[split.factor] - low)
    order = [factor for members in dims for factor in members]
    local = [size[factor] for factor in order]
    first, last = (0, int(np.prod(local, dtype=np.int64))) if part is None else part
    found = flat_range(local, first, last) if all(local) else []
    strides = row_major(local)
    begins, counts, steps, offsets = [], [], [], []
    step = [0] * len(sizes)
    for factor, stride in zip(order, strides, strict=True):
        step[factor] = stride
    for lows, many in found:
        at, count = [0] * len(sizes), [1] * len(sizes)
        for factor, first_index, indices in zip(order, lows, many, strict=True):
            at[factor], count[factor] = begin[factor] + first_index, indices
        begins.append(at)
        counts.append(count)
        steps.append(step)
        offsets.append(offset - first + sum(map(mul, lows, strides)))
    rows, shape = len(found), (len(found), len(sizes))
    table = FactorBoxes(
        np.array(begins, np.int64).reshape(shape),
        np.array(counts, np.int64).reshape(shape),
        np.array(steps, np.int64).reshape(shape),
        np.full(rows, record, np.int64),
        np.array(offsets, np.int64),
    )
    return table.as_dims(dims, sizes)
