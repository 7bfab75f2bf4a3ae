"""Both sides of a conversion joined: which boxes of the source make which boxes of the target.

Tensors are moved in *tiles*: a tile is a block of a logical tensor of some MiB, read from the
source's boxes that it meets and written to the target's. Tiles are cut along the dims that are
outermost in the target, so reads and writes are long runs, and both sides are met by one sweep
each: a plan costs what the tables of both sides cost together, never their product. Nothing here
looks at an element.

That every element is made exactly once is proved in two steps: the boxes of the source, after
replicas are dropped, are disjoint and add up to the tensor; those of a stored target array are,
too. What the target needs is then in the source, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd, prod
from typing import Any

import numpy as np
import xxhash

from ..ir.errors import CorruptCheckpoint, InvalidInput
from .boxes import (
    Boxes,
    Ints,
    Overlaps,
    contiguous,
    distinct,
    first_gap,
    overlaps,
    without_repeats,
)
from .contents import Array, DigestKind, Key, Record
from .dtypes import itemsize

TILE_BYTES = 2 << 20
"""Of a tile, at most, where one is not cut as a side's fragments are: large enough for long reads,
small enough to stay in a core's share of the cache between reading, hashing and writing."""

_JOINS_KEPT = 4

FRAGMENT_BYTES = 32 << 20
"""Records with a checksum that cannot be put together from parts are tiles, up to this size."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One logical tensor on its way: from one array to all stored arrays of a dtype that hold it.

    `targets` are in logical coordinates; they are several where a format stores tied tensors more
    than once. `nbytes` are those of the logical tensor in the target's dtype.
    """

    key: Key
    source: Array
    targets: tuple[Array, ...]

    @property
    def dtype(self) -> str:
        """Of the target."""
        return self.targets[0].dtype

    @property
    def nbytes(self) -> int:
        return prod(self.source.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The tiles of a piece. `reads` and `writes` are ordered by tile (their `one`); `other` are
    rows of `source` and of `target`."""

    begin: Ints
    size: Ints
    source: Boxes
    target: Boxes
    reads: Overlaps
    writes: Overlaps

    def __len__(self) -> int:
        return len(self.begin)


def pieces(source: Mapping[Key, Array], target: Iterable[Array]) -> list[Piece]:
    """What has to be moved: the wanted arrays (logical) with the source's of the same key.

    In the order in which tensors come, all states of one after the other: they often lie alike, and
    in files of their own, of which several threads write several at a time.

    Raises CorruptCheckpoint where the source lacks a tensor, and InvalidInput where both sides do
    not agree on its shape.
    """
    wanted: dict[tuple[Key, str], list[Array]] = {}
    for array in target:
        wanted.setdefault((array.key, array.dtype), []).append(array)
    found = []
    for (key, _), arrays in wanted.items():
        state, name = key
        if key not in source:
            others = sorted({s for s, n in source if n == name})
            raise CorruptCheckpoint(
                f"{name} ({state}): the target needs it, and the source has "
                + (f"only its {', '.join(others)}" if others else "nothing of that name")
            )
        for array in arrays:
            if array.shape != source[key].shape:
                raise InvalidInput(
                    f"{name} ({state}): {source[key].shape} in the source, {array.shape} in the "
                    "target; the layout of one side does not describe this checkpoint"
                )
        found.append(Piece(key, source[key], tuple(arrays)))
    names = {name: number for number, name in enumerate(dict.fromkeys(p.key[1] for p in found))}
    return sorted(found, key=lambda piece: names[piece.key[1]])


def prove(moved: Iterable[Piece]) -> None:
    """Proves that the source has every element of every piece once.

    Raises CorruptCheckpoint with the tensor and a box of it that no record holds.
    """
    proved: set[bytes] = set()  # tables that are alike (states, layers) are looked at once
    for piece in moved:
        table = piece.source.where()
        shape = piece.source.shape
        key = _geometry(piece.source.combine, shape, table)
        if key in proved:
            continue
        table = table.take(np.flatnonzero((table.size > 0).all(1)))
        if (table.begin + table.size > np.array(shape, np.int64)).any():
            raise CorruptCheckpoint(
                f"{_called(piece.source)}: a part reaches beyond its shape {shape}"
            )
        if piece.source.combine == "copy":
            table = without_repeats(table)
            if int(table.elements.sum()) != prod(shape):
                _missing(piece.source, table)
        elif (gap := first_gap(table, shape)) is not None:
            _missing(piece.source, table, gap)
        proved.add(key)


def _geometry(*said: Any) -> bytes:
    """A key for tables whose boxes are at the same places, wherever their elements lie."""
    seen = xxhash.xxh3_128()
    for one in said:
        if isinstance(one, Boxes):
            seen.update(one.begin.tobytes())
            seen.update(one.size.tobytes())
        else:
            seen.update(repr(one).encode())
    return seen.digest()


def prove_stored(arrays: Iterable[Array], records: Sequence[Record]) -> None:
    """Proves that a writer laid every element of its arrays somewhere, and no two into one place.

    Raises InvalidInput otherwise (a mistake of a format or of a layout, not of a checkpoint).
    """
    stored = list(arrays)
    filled = np.zeros(len(records), np.int64)
    unordered = np.zeros(len(records), np.bool_)
    proved: set[bytes] = set()
    for array in stored:
        table = array.where()
        key = _geometry(array.shape, table)
        if key not in proved:
            own = without_repeats(table)
            if int(own.clipped(array.shape).elements.sum()) != prod(array.shape):
                gap = _box(first_gap(own, array.shape))
                raise InvalidInput(f"{_called(array)}: the target has no place for {gap} of it")
            proved.add(key)
        # Most writers lay one array behind the other: then there is nothing to remember.
        spans = _spans(table, itemsize(array.dtype))
        back = spans[:, 1] < filled[spans[:, 0]]
        back[1:] |= (spans[1:, 0] == spans[:-1, 0]) & (spans[1:, 1] < spans[:-1, 2])
        unordered[spans[back, 0]] = True
        np.maximum.at(filled, spans[:, 0], spans[:, 2])
    limits = np.array([record.nbytes for record in records], np.int64)
    wrong = np.flatnonzero(filled > limits)
    if unordered.any() and not len(wrong):
        tables = [_spans(array.where(), itemsize(array.dtype)) for array in stored]
        held = np.concatenate([spans[unordered[spans[:, 0]]] for spans in tables])
        held = held[np.lexsort((held[:, 1], held[:, 0]))]
        again = (held[1:, 0] == held[:-1, 0]) & (held[1:, 1] < held[:-1, 2])
        wrong = held[1:, 0][again]
    if len(wrong):
        file = records[int(wrong[0])].file
        raise InvalidInput(f"{file}: arrays of the target lie over each other, or beyond its end")


def _spans(table: Boxes, width: int) -> Ints:
    """(record, first byte, end) of the boxes that are one run each, in this order."""
    flat = contiguous(table)
    record, begin = table.record[flat], table.offset[flat] * width
    spans = np.stack([record, begin, begin + table.elements[flat] * width], 1)
    return spans[np.lexsort((begin, record))]


class Joins:
    """Joins pieces, and keeps the last few: tables of other states are often alike."""

    def __init__(
        self,
        source_digests: Sequence[DigestKind | None],
        target_digests: Sequence[DigestKind | None],
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        self._digests = (source_digests, target_digests)
        self._tile_bytes = tile_bytes
        self._last: OrderedDict[bytes, Joined] = OrderedDict()

    def join(self, piece: Piece) -> Joined:
        """The tiles of a piece and what they read and write."""
        source, target = _tables(piece)
        kinds = tuple(
            _needs_whole(table, digests)
            for table, digests in zip((source, target), self._digests, strict=True)
        )
        width = max(itemsize(piece.source.dtype), itemsize(piece.dtype))
        order = target.stride[int(target.elements.argmax())].tolist() if len(target) else []
        key = _geometry(piece.source.shape, width, kinds, source, target, order)
        if key in self._last:
            last = self._last[key]
            return replace(last, source=source, target=target)
        found = join(piece, *self._digests, tile_bytes=self._tile_bytes, tables=(source, target))
        self._last[key] = found
        if len(self._last) > _JOINS_KEPT:
            self._last.popitem(last=False)
        return found


def _tables(piece: Piece) -> tuple[Boxes, Boxes]:
    source = piece.source.where()
    if piece.source.combine == "copy":
        source = without_repeats(source)
    dims = len(piece.source.shape)
    return source, Boxes.joined([array.where() for array in piece.targets], dims)


def join(
    piece: Piece,
    source_digests: Sequence[DigestKind | None],
    target_digests: Sequence[DigestKind | None],
    tile_bytes: int = TILE_BYTES,
    fragment_bytes: int = FRAGMENT_BYTES,
    tables: tuple[Boxes, Boxes] | None = None,
) -> Joined:
    """The tiles of a piece and what they read and write. Digests are by record."""
    shape = piece.source.shape
    source, target = tables if tables is not None else _tables(piece)
    width = max(itemsize(piece.source.dtype), itemsize(piece.dtype))
    begin, size = _tiles(
        shape, width, source, target, source_digests, target_digests, tile_bytes, fragment_bytes
    )
    tiles = Boxes(begin, size, size, np.arange(len(begin)), np.arange(len(begin)))
    return Joined(begin, size, source, target, overlaps(tiles, source), overlaps(tiles, target))


def _tiles(
    shape: tuple[int, ...],
    width: int,
    source: Boxes,
    target: Boxes,
    source_digests: Sequence[DigestKind | None],
    target_digests: Sequence[DigestKind | None],
    tile_bytes: int,
    fragment_bytes: int,
) -> tuple[Ints, Ints]:
    for table, digests in ((target, target_digests), (source, source_digests)):
        if not _needs_whole(table, digests):
            continue
        own = distinct(table)
        fits = len(own) and int(own.elements.max()) * width <= fragment_bytes
        if fits and len(without_repeats(own)) == len(own) and own.elements.sum() == prod(shape):
            return own.begin, own.size
    return _grid(shape, max(1, tile_bytes // width), target)


def _needs_whole(table: Boxes, digests: Sequence[DigestKind | None]) -> bool:
    if not len(table):
        return False
    return digests[int(table.record[0])] not in (None, "crc32")  # a format has one kind


def _grid(shape: tuple[int, ...], elements: int, target: Boxes) -> tuple[Ints, Ints]:
    """Blocks of at most so many elements, whole along the dims that are inner in the target."""
    if not shape or 0 in shape or not len(target):
        rows = 0 if 0 in shape else 1
        none = np.zeros((rows, len(shape)), np.int64)
        return none, none
    largest = int(target.elements.argmax())
    outer_first = sorted(range(len(shape)), key=lambda d: -int(target.stride[largest, d]))
    step = [1] * len(shape)
    left = elements
    for dim in reversed(outer_first):
        step[dim] = min(shape[dim], left)
        if step[dim] < shape[dim]:
            step[dim] = _even(step[dim], shape[dim], target, dim)
            break
        left = max(1, left // shape[dim])
    starts = [np.arange(0, n, k, dtype=np.int64) for n, k in zip(shape, step, strict=True)]
    grid = np.meshgrid(*(starts[d] for d in outer_first), indexing="ij")
    begin = np.zeros((grid[0].size, len(shape)), np.int64)
    for dim, column in zip(outer_first, grid, strict=True):
        begin[:, dim] = column.reshape(-1)
    return begin, np.minimum(np.array(step), np.array(shape) - begin)


def _even(step: int, length: int, target: Boxes, dim: int) -> int:
    """A step along a dim that ends, if it can, where the target's boxes end."""
    period = reduce(gcd, np.unique(target.begin[:, dim]).tolist(), length)
    if period <= step:
        return step - step % period
    return -(-period // -(-period // step))


def _missing(array: Array, table: Boxes, gap: tuple[list[int], list[int]] | None = None) -> None:
    gap = gap if gap is not None else first_gap(table, array.shape)
    raise CorruptCheckpoint(
        f"{_called(array)}: {_box(gap)} of {array.shape} is in none of the source's files; "
        "a rank's file is missing, or the layout does not describe this checkpoint"
    )


def _box(gap: tuple[list[int], list[int]] | None) -> str:
    if gap is None:
        return "a part"
    return "[" + ", ".join(f"{b}:{e}" for b, e in zip(*gap, strict=True)) + "]"


def _called(array: Array) -> str:
    return f"{array.name} ({array.state})"
