"""One tile: read from the source's boxes, written to the target's, hashed on the way.

Where a box lies contiguously in its file and in the tile, bytes go from the file into the tile and
from the tile into the file; otherwise through a second buffer and a strided copy. Small gaps
between runs are read along: a call costs as much as some KiB more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CorruptCheckpoint
from ..contents import Array, DigestKind, Record
from ..dtypes import as_numpy, itemsize
from ..plan import FRAGMENT_BYTES
from .digests import SMALLEST_PART, Part, check, crc32, streamed, whole
from .files import BLOCK, Bytes, Files, WriteTurns, aligned_buffer

_GAP_BYTES = 16 << 10
"""Between runs, up to which one longer read is cheaper than two."""

_WORDS: dict[int, type[np.unsignedinteger]] = {
    1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Move:
    """A box of a tile, and where it lies in a record (offset and strides in elements)."""

    begin: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    record: int
    offset: int


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of a logical tensor; moves count from the tile's beginning."""

    size: tuple[int, ...]
    reads: tuple[Move, ...]
    writes: tuple[Move, ...]


@dataclass(slots=True)
class Hashes:
    """What a tile's reads and writes hashed to."""

    reads: list[Part] = field(default_factory=list)
    writes: list[Part] = field(default_factory=list)
    wholes: list[tuple[int, str]] = field(default_factory=list)
    """Records of the target that were written in one go, with their digests."""
    checked: set[int] = field(default_factory=set)
    """Records of the source whose digests, over the whole of them, agree."""


@dataclass(frozen=True, slots=True)
class Runs:
    """How a box lies in a record: `outer` dims to be stepped through, a contiguous (or nearly so)
    rest of `span` elements with the `inner` dims; all outermost first."""

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    span: int
    dense: bool


def runs_of(size: Sequence[int], stride: Sequence[int], gap: int = 0, most: int = 1 << 62) -> Runs:
    """Cuts a box into runs; gaps of up to `gap` elements are bridged while a run stays within
    `most` elements."""
    order = sorted((d for d in range(len(size)) if size[d] > 1), key=lambda d: -stride[d])
    place, span = len(order), 1
    while place and stride[order[place - 1]] == span:
        place -= 1
        span *= size[order[place]]
    dense = place
    while place:
        dim = order[place - 1]
        longer = (size[dim] - 1) * stride[dim] + span
        if stride[dim] < span or stride[dim] - span > gap or longer > most:
            break
        place, span = place - 1, longer
    return Runs(tuple(order[:place]), tuple(order[place:]), span, place == dense)


class Mover:
    """The buffers and descriptors of one thread."""

    def __init__(
        self,
        source: Path,
        records: Sequence[Record],
        target: Path | None = None,
        target_records: Sequence[Record] = (),
        target_digests: Sequence[DigestKind | None] = (),
        turns: WriteTurns | None = None,
    ) -> None:
        self._root = source
        self._records = records
        self._files = Files(source)
        self._target_records = target_records
        self._target_digests = target_digests
        self._target = Files(target, os.O_RDWR, turns) if target is not None else None
        self._buffers: dict[str, Bytes] = {}
        self._phase = 0
        self._fragment: tuple[int, Bytes] | None = None
        self._checked: set[int] = set()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
        if self._target is not None:
            self._target.close()

    def buffer(self, name: str, nbytes: int) -> Bytes:
        """One of the thread's buffers, at least so large; the contents are anything."""
        held = self._buffers.get(name)
        if held is None or len(held) < nbytes + BLOCK:
            self._buffers.pop(name, None)
            held = self._buffers[name] = aligned_buffer(max(nbytes, 1 << 16) + BLOCK)
        return held[self._phase : self._phase + nbytes]

    def aim(self, writes: Sequence[Move], width: int) -> None:
        """Lays the buffers of the next tile so that its first write, of elements of `width` bytes,
        goes past the page cache from where it is."""
        self._phase = 0
        if writes:
            record = self._target_records[writes[0].record]
            phase = (record.offset + writes[0].offset * width) % BLOCK
            self._phase = phase if phase % width == 0 else 0

    def load(
        self, size: Sequence[int], reads: Sequence[Move], array: Array, hashes: Hashes
    ) -> NDArray[np.generic]:
        """A block of a logical tensor, as words of the dtype's size, or, where summands are
        combined, in the dtype. Raises CorruptCheckpoint where copies that have to be equal are
        not."""
        width = itemsize(array.dtype)
        if array.combine == "equal":
            return self._equal(size, reads, array, hashes)
        if array.combine != "copy":
            return self._combined(size, reads, array, hashes)
        block = self._words("tile", size, width)
        for move in reads:
            self._read(move, block, hashes)
        return block

    def store(self, block: NDArray[np.generic], writes: Sequence[Move], hashes: Hashes) -> None:
        """Writes a block (of words) to the target's records."""
        width = block.dtype.itemsize
        assert self._target is not None
        for move in writes:
            record = self._target_records[move.record]
            kind = self._target_digests[move.record] if self._target_digests else None
            for at, memory, _ in self._stepped(move, block, runs_of(move.size, move.stride)):
                data = self._flat(memory)
                self._target.write(record.file, record.offset + at * width, data)
                if kind == "crc32":
                    if len(data) >= SMALLEST_PART:
                        hashes.writes.append((move.record, at * width, len(data), crc32(data)))
                elif kind is not None and at == 0 and len(data) == record.nbytes:
                    hashes.wholes.append((move.record, whole(kind, data)))

    def cast(self, block: NDArray[np.generic], source: str, target: str) -> NDArray[np.generic]:
        """A block in another dtype, as words again."""
        old, new = as_numpy(source), as_numpy(target)
        made = self._words("cast", block.shape, new.itemsize)
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(made.view(new), block.view(old), casting="unsafe")
        return made

    def words(self, block: NDArray[np.generic]) -> NDArray[np.generic]:
        """The same bytes as words."""
        return block.view(_WORDS[block.dtype.itemsize])

    def _words(self, name: str, size: Sequence[int], width: int) -> NDArray[np.generic]:
        count = int(np.prod(size, dtype=np.int64))
        return self.buffer(name, count * width).view(_WORDS[width]).reshape(tuple(size))

    def _equal(
        self, size: Sequence[int], reads: Sequence[Move], array: Array, hashes: Hashes
    ) -> NDArray[np.generic]:
        """All copies of a block are read, and compared by their bytes."""
        width = itemsize(array.dtype)
        block = self._words("tile", size, width)
        holders = np.full(tuple(size), -1, np.int32)
        for number, move in enumerate(reads):
            part = self._words("copy", move.size, width)
            origin = (0,) * len(move.begin)
            self._read(Move(origin, move.size, move.stride, move.record, move.offset), part, hashes)
            at: Any = (*(slice(b, b + n) for b, n in zip(move.begin, move.size, strict=True)), ...)
            held = holders[at]
            if (differs := (held >= 0) & (block[at] != part)).any():
                other = reads[int(held[differs].flat[0])]
                one, two = (self._records[m.record].file for m in (other, move))
                raise CorruptCheckpoint(
                    f"{self._root}: {one} and {two} hold different values of {array.name} "
                    f"({array.state}), of which they are said to have copies; files of different "
                    "runs are mixed, or it is no copy: then a layout has to say what it is, see "
                    "--spec"
                )
            block[at] = part
            held[...] = number
        return block

    def _combined(
        self, size: Sequence[int], reads: Sequence[Move], array: Array, hashes: Hashes
    ) -> NDArray[np.generic]:
        """Sums (or means) of the boxes that lie over each other, in at least float32."""
        real = as_numpy(array.dtype)
        wide = np.dtype(np.float64) if real.itemsize == 8 else np.dtype(np.float32)
        total, counts = np.zeros(tuple(size), wide), np.zeros(tuple(size), np.int32)
        for move in reads:
            part = self._words("tile", move.size, real.itemsize)
            origin = (0,) * len(move.begin)
            self._read(Move(origin, move.size, move.stride, move.record, move.offset), part, hashes)
            at = tuple(slice(b, b + n) for b, n in zip(move.begin, move.size, strict=True))
            total[at] += part.view(real).astype(wide)
            counts[at] += 1
        if counts.size and counts.min() != counts.max():
            raise CorruptCheckpoint(
                f"{self._root}: {array.name} ({array.state}) is the {array.combine} of its copies, "
                f"of which there are {counts.min()} for some elements and {counts.max()} for others"
            )
        if array.combine == "mean" and counts.size:
            total /= wide.type(counts.flat[0])
        return self.words(total.astype(real))

    def _stepped(
        self, move: Move, block: NDArray[np.generic], runs: Runs
    ) -> Iterator[tuple[int, NDArray[np.generic], tuple[int, ...]]]:
        """(offset in the record, the part of the tile, its dims' strides in the record)."""
        at = [slice(b, b + n) for b, n in zip(move.begin, move.size, strict=True)]
        part: Any = (*at, ...)  # `...`: an array still, if it has no dims
        inside = block[part]
        order = (*runs.outer, *runs.inner)
        rest = [d for d in range(len(move.size)) if d not in order]
        first: Any = (*(0 for _ in rest), ...)
        view = inside.transpose((*rest, *order))[first]
        strides = tuple(move.stride[d] for d in runs.inner)
        if not runs.outer:
            yield move.offset, view, strides
            return
        steps = [move.stride[d] for d in runs.outer]
        for index in np.ndindex(*(move.size[d] for d in runs.outer)):
            ahead = sum(i * s for i, s in zip(index, steps, strict=True))
            yield move.offset + ahead, view[(*index, ...)], strides

    def _read(self, move: Move, block: NDArray[np.generic], hashes: Hashes) -> None:
        width = block.dtype.itemsize
        record = self._records[move.record]
        kind = record.digest.kind if record.digest is not None else None
        if kind not in (None, "crc32"):
            hashes.checked.add(move.record)
            if record.nbytes <= FRAGMENT_BYTES:
                self._read_fragment(move, block, record)
                return
            self._check_large(move.record, record)
        longest = max(block.nbytes // width, 1)
        runs = runs_of(move.size, move.stride, _GAP_BYTES // width, longest)
        for at, memory, strides in self._stepped(move, block, runs):
            nbytes = runs.span * width
            direct = runs.dense and memory.flags.c_contiguous
            if direct:
                data = memory.reshape(-1).view(np.uint8)
            else:
                data = self.buffer("scratch", nbytes)
            if record.read is not None:
                record.read(at * width, data)
            else:
                self._files.read(record.file, record.offset + at * width, data)
            if kind == "crc32" and nbytes >= SMALLEST_PART:
                hashes.reads.append((move.record, at * width, nbytes, crc32(data)))
            if not direct:
                _spread(data, memory, strides, width)

    def _read_fragment(self, move: Move, block: NDArray[np.generic], record: Record) -> None:
        """Reads a record whose checksum is over all of it: into the tile, if it is all there, or
        into a buffer of its own."""
        assert record.digest is not None
        width, kind = block.dtype.itemsize, record.digest.kind
        runs = runs_of(move.size, move.stride, record.nbytes)
        parts = list(self._stepped(move, block, runs))
        memory = parts[0][1]
        if runs.dense and runs.span * width == record.nbytes and memory.flags.c_contiguous:
            data = memory.reshape(-1).view(np.uint8)
            self._files.read(record.file, record.offset, data)
            check(record, whole(kind, data), str(self._root))
            return
        if self._fragment is None or self._fragment[0] != move.record:
            self._fragment = None
            data = self.buffer("fragment", record.nbytes)
            self._files.read(record.file, record.offset, data)
            check(record, whole(kind, data), str(self._root))
            self._fragment = (move.record, data)
        for at, memory, strides in parts:
            _spread(self._fragment[1][at * width :], memory, strides, width)

    def _check_large(self, number: int, record: Record) -> None:
        """Reads a record once, through a buffer, for its checksum."""
        assert record.digest is not None
        if number not in self._checked:
            scratch = self.buffer("scratch", 1 << 20)
            found = streamed(record.digest.kind, self._files, record, scratch)
            check(record, found, str(self._root))
            self._checked.add(number)

    def _flat(self, memory: NDArray[np.generic]) -> Bytes:
        """The elements one after the other, copied if they are not."""
        if not memory.flags.c_contiguous:
            made = self._words("scratch", memory.shape, memory.dtype.itemsize)
            np.copyto(made, memory)
            memory = made
        found: Bytes = memory.reshape(-1).view(np.uint8)
        return found


def _spread(data: Bytes, memory: NDArray[np.generic], strides: tuple[int, ...], width: int) -> None:
    """Copies a run into its place; `strides` are those of its elements in the run."""
    words = data[: len(data) - len(data) % width].view(_WORDS[width])
    inside = np.lib.stride_tricks.as_strided(
        words, memory.shape, tuple(s * width for s in strides), writeable=False
    )
    np.copyto(memory, inside)
