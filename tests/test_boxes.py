"""Laws of tables of boxes, against numpy on arrays small enough to look at every element."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.checkpoint.boxes import (
    Boxes,
    coverage,
    distinct,
    flat_range,
    overlaps,
    row_major,
)
from shardwright.checkpoint.factor_boxes import Split, factors_of, shard

Shape = tuple[int, ...]
shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def tables(draw: st.DrawFn, shape: Shape, most: int = 8) -> Boxes:
    """Boxes anywhere in an array, each in a record of its own."""
    rows = []
    for record in range(draw(st.integers(0, most))):
        begin = [draw(st.integers(0, length - 1)) for length in shape]
        size = [draw(st.integers(1, n - b)) for n, b in zip(shape, begin, strict=True)]
        rows.append((begin, size, row_major(size), record, 0))
    return Boxes.of(rows, len(shape))


def counted(table: Boxes, shape: Shape) -> np.ndarray:
    """How often each element of the array lies in the table."""
    found = np.zeros(shape, np.int64)
    for begin, size in zip(table.begin.tolist(), table.size.tolist(), strict=True):
        found[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] += 1
    return found


def read(table: Boxes, records: dict[int, np.ndarray], shape: Shape) -> np.ndarray:
    """The array that a table describes (-1 where it describes nothing)."""
    found = np.full(shape, -1, np.int64)
    for row in range(len(table)):
        index = np.indices(table.size[row]).reshape(table.dims, -1)
        at = table.offset[row] + (index * table.stride[row][:, None]).sum(0)
        place = index + table.begin[row][:, None]
        found[tuple(place)] = records[int(table.record[row])][at]
    return found


@given(st.data(), shapes)
def test_overlaps_are_the_common_elements_of_every_pair(data: st.DataObject, shape: Shape) -> None:
    one, other = data.draw(tables(shape)), data.draw(tables(shape))
    met = overlaps(one, other)
    expected = {}
    for i in range(len(one)):
        for j in range(len(other)):
            both = counted(one.take(np.array([i])), shape) * counted(
                other.take(np.array([j])), shape
            )
            if both.any():
                expected[i, j] = both
    found = {}
    for row in range(len(met)):
        box = Boxes.of([(met.begin[row], met.size[row], met.size[row], 0, 0)], len(shape))
        found[int(met.one[row]), int(met.other[row])] = counted(box, shape)
    assert len(found) == len(met) and found.keys() == expected.keys()
    assert all((found[pair] == expected[pair]).all() for pair in found)
    assert (np.diff(met.one) >= 0).all()


@given(st.data(), shapes)
def test_coverage_is_exact_just_where_counting_says_so(data: st.DataObject, shape: Shape) -> None:
    table = data.draw(tables(shape))
    said = coverage(table, shape)
    truth = counted(table, shape)
    assert said.exactly_once == bool((truth == 1).all())
    assert (said.twice is None) == bool((truth <= 1).all())
    assert said.covered == truth.sum()


@given(st.data(), shapes)
def test_a_flat_range_is_its_elements_in_order(data: st.DataObject, shape: Shape) -> None:
    count = prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    numbers = np.arange(count).reshape(shape)
    boxes = flat_range(shape, begin, end)
    parts = [
        numbers[tuple(slice(b, b + n) for b, n in zip(at, size, strict=True))].reshape(-1)
        for at, size in boxes
    ]
    joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    assert (joined == np.arange(begin, end)).all() and len(joined) == end - begin
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.data(), shapes)
def test_clipping_leaves_what_is_inside(data: st.DataObject, shape: Shape) -> None:
    table = data.draw(tables(shape))
    smaller = tuple(data.draw(st.integers(1, length)) for length in shape)
    inside = counted(table, shape)[tuple(slice(0, n) for n in smaller)]
    assert (counted(table.clipped(smaller), smaller) == inside).all()


@given(st.data(), shapes)
def test_copies_of_a_box_count_once(data: st.DataObject, shape: Shape) -> None:
    table = data.draw(tables(shape))
    twice = Boxes.joined([table, table], len(shape))
    assert (counted(distinct(twice), shape) > 0).tolist() == (counted(table, shape) > 0).tolist()
    assert len(distinct(twice)) == len(distinct(table))


@st.composite
def factored(draw: st.DrawFn) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dims: list[tuple[int, ...]] = []
    at = 0
    while at < len(sizes):
        count = draw(st.integers(1, len(sizes) - at))
        dims.append(tuple(range(at, at + count)))
        at += count
    return tuple(dims), sizes


@given(st.data(), factored())
def test_cut_to_factors_and_joined_again_a_table_says_the_same(
    data: st.DataObject, factors: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
) -> None:
    dims, sizes = factors
    shape = tuple(prod(sizes[f] for f in members) for members in dims)
    table = data.draw(tables(shape, most=4))
    records = {k: np.arange(prod(size)) + 1000 * k for k, size in enumerate(table.size.tolist())}
    again = factors_of(table, dims, sizes).as_dims(dims, sizes)
    # Where boxes overlap the last one wins in `read`, so rows are compared one at a time.
    for row in range(len(table)):
        of_row = again.take(again.record == table.record[row])
        before = read(table.take(np.array([row])), records, shape)
        assert (read(of_row, records, shape) == before).all()


@given(st.data(), factored())
def test_shards_of_all_ranks_are_the_array_cut_as_torch_cuts_it(
    data: st.DataObject, factors: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
) -> None:
    dims, sizes = factors
    factor = data.draw(st.integers(0, len(sizes) - 1))
    pieces = data.draw(st.integers(1, 4))
    whole = np.arange(prod(sizes)).reshape(sizes)
    each = -(-sizes[factor] // pieces)
    records, found = {}, []
    for index in range(pieces):
        at = [slice(None)] * len(sizes)
        at[factor] = slice(index * each, (index + 1) * each)
        flat = whole[tuple(at)].reshape(-1)
        begin = data.draw(st.integers(0, len(flat)))
        for record, part in enumerate(((0, begin), (begin, len(flat)))):
            records[2 * index + record] = flat[slice(*part)]
            found.append(
                shard(dims, sizes, [Split(factor, pieces, index)], 2 * index + record, part=part)
            )
    shape = tuple(prod(sizes[f] for f in members) for members in dims)
    table = Boxes.joined(found, len(dims))
    assert coverage(table, shape).exactly_once
    assert (read(table, records, shape) == whole.reshape(shape)).all()
