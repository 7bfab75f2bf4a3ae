"""Proof by reading: a converted checkpoint holds what its source holds, tensor by tensor.

Both sides are read again through their own formats and layouts, so what is compared is what a
loader would see. A tensor goes by in tiles; memory is a few buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import VerificationFailed
from .contents import Array, Contents, DigestKind, Key
from .dtypes import as_numpy
from .engine.progress import Advance
from .engine.streaming import Task, spans_of, tiles_of
from .engine.tiles import Hashes, Move, Mover, Tile
from .plan import Piece, join, prove


@dataclass(frozen=True, slots=True)
class Verified:
    """How many tensors and bytes were found equal."""

    tensors: int
    nbytes: int


def equal(
    source: Contents,
    tensors: Mapping[Key, Array],
    target: Contents,
    found: Mapping[Key, Array],
    threads: int,
    advance: Advance,
) -> Verified:
    """Compares every tensor of `tensors` with the target's of the same key, replicas included.

    Raises VerificationFailed with the first tensor that is missing or differs, and where.
    """
    pieces = []
    for key, array in tensors.items():
        if key not in found:
            raise VerificationFailed(f"{key[1]} ({key[0]}) is not in {target.root}")
        if found[key].shape != array.shape:
            raise VerificationFailed(
                f"{key[1]} ({key[0]}): {array.shape} in {source.root}, {found[key].shape} in "
                f"{target.root}"
            )
        pieces.append(Piece(key, array, (found[key],)))
    prove(replace(piece, source=piece.targets[0]) for piece in pieces)
    compare = _Compare(source, target, threads, advance)
    compare.run(pieces)
    return Verified(len(pieces), sum(piece.nbytes for piece in pieces))


def copies_agree(contents: Contents, arrays: Iterable[Array]) -> None:
    """Reads tensors of which several files are said to have copies (`equal`); others are left.

    Raises CorruptCheckpoint naming the first whose copies differ.
    """
    mover, kinds = Mover(contents.root, contents.records), _kinds(contents)
    try:
        for array in arrays:
            if array.combine != "equal":
                continue
            piece = Piece(array.key, array, (array,))
            joined = join(piece, kinds, kinds)
            for span in spans_of(piece, joined):
                for tile in tiles_of(joined, *span):
                    mover.load(tile.size, tile.reads, array, Hashes())
    finally:
        mover.close()


class _Compare:
    def __init__(self, source: Contents, target: Contents, threads: int, advance: Advance) -> None:
        self._source, self._target = source, target
        self._threads, self._advance = threads, advance
        self._local = local()
        self._movers: list[Mover] = []

    def run(self, pieces: Sequence[Piece]) -> None:
        """Compares all tiles; the first that differs ends it."""
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                for piece in pieces:  # a tensor at a time: its tables are all there are in memory
                    joined = join(piece, _kinds(self._source), _kinds(self._target))
                    tasks = [Task(0, piece, joined, *span) for span in spans_of(piece, joined)]
                    for _ in pool.map(self._task, tasks):
                        pass
                    self._replicas(piece)
        finally:
            for mover in self._movers:
                mover.close()

    def _mover(self) -> tuple[Mover, Mover, Mover]:
        """Of this thread: for the source, for the target, for the source's copies."""
        if not hasattr(self._local, "movers"):
            self._local.movers = tuple(
                Mover(side.root, side.records)
                for side in (self._source, self._target, self._source)
            )
            self._movers += self._local.movers
        found: tuple[Mover, Mover, Mover] = self._local.movers
        return found

    def _task(self, task: Task) -> None:
        for number, tile in enumerate(tiles_of(task.joined, task.first, task.last)):
            self._tile(task.piece, tile, task.joined.begin[task.first + number])

    def _tile(self, piece: Piece, tile: Tile, begin: NDArray[np.int64]) -> None:
        """The source's block against every box of the target that meets it."""
        one, other, _ = self._mover()
        source, target = piece.source, piece.targets[0]
        block = one.load(tile.size, tile.reads, source, Hashes())
        if source.dtype != target.dtype:
            block = one.cast(block, source.dtype, target.dtype)
        if target.combine != "copy":
            got = other.load(tile.size, tile.writes, target, Hashes())
            self._same(piece, block, got, begin)
        else:
            for move in tile.writes:
                got = other.load(move.size, (_alone(move),), target, Hashes())
                self._same(piece, block[_slices(move)], got, begin + np.array(move.begin, np.int64))
        self._advance(block.nbytes)

    def _same(self, piece: Piece, expected: Any, got: Any, begin: NDArray[np.int64]) -> None:
        if np.array_equal(expected, got):
            return
        index = tuple(int(i) for i in np.argwhere(np.asarray(expected) != np.asarray(got))[0])
        real = as_numpy(piece.dtype)
        place = tuple(int(b) + i for b, i in zip(begin, index, strict=True))
        raise VerificationFailed(
            f"{piece.key[1]} ({piece.key[0]}), element {list(place)}: "
            f"{np.asarray(expected)[index].view(real)} in {self._source.root}, "
            f"{np.asarray(got)[index].view(real)} in {self._target.root}"
        )

    def _replicas(self, piece: Piece) -> None:
        """Boxes of the source that a conversion has no need to read hold the same."""
        source = piece.source
        if source.combine != "copy":
            return
        if int(source.where().elements.sum()) == prod(source.shape):
            return
        own = Piece(piece.key, source, (source,))
        joined = join(own, _kinds(self._source), _kinds(self._source))
        one, _, again = self._mover()
        for task in (Task(0, own, joined, *span) for span in spans_of(own, joined)):
            for tile in tiles_of(task.joined, task.first, task.last):
                block = one.load(tile.size, tile.reads, source, Hashes())
                for move in tile.writes:
                    got = again.load(move.size, (_alone(move),), source, Hashes())
                    if not np.array_equal(block[_slices(move)], got):
                        file = self._source.records[move.record].file
                        raise VerificationFailed(
                            f"{piece.key[1]} ({piece.key[0]}): its copies in {self._source.root} "
                            f"contradict each other, one of them is in {file}"
                        )


def _alone(move: Move) -> Move:
    """The same box as a block of its own."""
    return replace(move, begin=(0,) * len(move.begin))


def _slices(move: Move) -> tuple[slice, ...]:
    return tuple(slice(b, b + n) for b, n in zip(move.begin, move.size, strict=True))


def _kinds(contents: Contents) -> list[DigestKind | None]:
    return [r.digest.kind if r.digest is not None else None for r in contents.records]
