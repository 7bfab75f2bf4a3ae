"""The tiles of a share through a pool of threads, noted in the journal as they are done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..boxes import Boxes, Overlaps
from ..contents import Record
from ..dtypes import itemsize
from ..plan import Joined, Piece
from .digests import Part
from .files import make_durable
from .journal import Journal
from .tiles import Hashes, Move, Mover, Tile

TASK_BYTES = 16 << 20
"""Of the tiles that a thread takes at a time."""

_FLUSH_BYTES = 512 << 20
_FLUSH_SECONDS = 5.0
"""After which what was written is brought to the disk and noted: what a kill costs at most."""

TileId = tuple[int, int]
"""(number of the piece, number of the tile in it)."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Consecutive tiles `first … last-1` of a piece."""

    number: int
    piece: Piece
    joined: Joined
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return int(self.joined.size[self.first : self.last].prod(1).sum())


def tiles_of(joined: Joined, first: int, last: int) -> Iterator[Tile]:
    """The tiles of a task with their moves."""
    reads = _moves(joined.reads, joined.source, joined, first, last)
    writes = _moves(joined.writes, joined.target, joined, first, last)
    for place, size in enumerate(joined.size[first:last].tolist()):
        yield Tile(tuple(size), tuple(reads[place]), tuple(writes[place]))


def _moves(met: Overlaps, table: Boxes, joined: Joined, first: int, last: int) -> list[list[Move]]:
    low, high = np.searchsorted(met.one, [first, last])
    some = slice(int(low), int(high))
    tile, row = met.one[some], met.other[some]
    begin = (met.begin[some] - joined.begin[tile]).tolist()
    size = met.size[some].tolist()
    stride = table.stride[row].tolist()
    record = table.record[row].tolist()
    inside = (met.begin[some] - table.begin[row]) * table.stride[row]
    offset = (table.offset[row] + inside.sum(1)).tolist()
    found: list[list[Move]] = [[] for _ in range(first, last)]
    for k, number in enumerate((tile - first).tolist()):
        found[number].append(
            Move(tuple(begin[k]), tuple(size[k]), tuple(stride[k]), record[k], offset[k])
        )
    return found


def spans_of(piece: Piece, joined: Joined) -> list[tuple[int, int]]:
    """The tiles of a piece cut to tasks."""
    weights = joined.size.prod(1) * max(1, piece.nbytes // max(1, prod(piece.source.shape)))
    number = (np.cumsum(weights) - weights) // TASK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(joined)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


@dataclass(slots=True)
class _Done:
    tasks: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[Part] = field(default_factory=list)
    writes: list[Part] = field(default_factory=list)
    wholes: list[tuple[int, str]] = field(default_factory=list)
    checked: set[int] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    nbytes: int = 0

    def entry(self) -> dict[str, Any]:
        """As a line of the journal."""
        return {
            "tiles": self.tasks,
            "reads": self.reads,
            "writes": self.writes,
            "wholes": self.wholes,
            "checked": sorted(self.checked),
        }


class Stream:
    """Runs tasks on threads; `flush` makes what is done durable and notes it."""

    def __init__(
        self,
        make_mover: Callable[[], Mover],
        target_root: Path,
        target_records: Sequence[Record],
        journal: Journal,
        threads: int,
        advance: Callable[[int], None],
    ) -> None:
        self._make_mover = make_mover
        self._root = target_root
        self._records = target_records
        self._journal = journal
        self._threads = threads
        self._advance = advance
        self._local = threading.local()
        self._movers: list[Mover] = []
        self._lock = threading.Lock()
        self._done = _Done()
        self._flushed_at = time.monotonic()
        self._flushing = threading.Lock()

    def run(self, tasks: Iterator[Task]) -> None:
        """Runs all tasks; raises what the first one that fails raises, after noting the others."""
        running: set[Future[None]] = set()
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                try:
                    for task in tasks:
                        running.add(pool.submit(self._run, task))
                        if len(running) >= 3 * self._threads:
                            running = self._settle(running)
                    done, _ = wait(running, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                finally:
                    for future in running:
                        future.cancel()
        finally:
            for mover in self._movers:
                mover.close()
            self.flush()

    def _settle(self, running: set[Future[None]]) -> set[Future[None]]:
        """Waits until one of them is done."""
        done, rest = wait(running, return_when="FIRST_COMPLETED")
        for future in done:
            future.result()
        return rest

    def _run(self, task: Task) -> None:
        mover = getattr(self._local, "mover", None)
        if mover is None:
            mover = self._local.mover = self._make_mover()
            with self._lock:
                self._movers.append(mover)
        source, dtype = task.piece.source, task.piece.dtype
        hashes, files = Hashes(), set()
        for tile in tiles_of(task.joined, task.first, task.last):
            mover.aim(tile.writes, itemsize(dtype))
            block = mover.load(tile.size, tile.reads, source, hashes)
            if dtype != source.dtype:
                block = mover.cast(block, source.dtype, dtype)
            mover.store(block, tile.writes, hashes)
            files |= {self._records[move.record].file for move in tile.writes}
            self._advance(block.nbytes)
        nbytes = task.nbytes * block.dtype.itemsize
        with self._lock:
            self._done.tasks.append((task.number, task.first, task.last))
            self._done.reads += hashes.reads
            self._done.writes += hashes.writes
            self._done.wholes += hashes.wholes
            self._done.checked |= hashes.checked
            self._done.files |= files
            self._done.nbytes += nbytes
            due = (
                self._done.nbytes >= _FLUSH_BYTES
                or time.monotonic() - self._flushed_at >= _FLUSH_SECONDS
            )
        if due and self._flushing.acquire(blocking=False):  # the other threads go on
            try:
                self._flush()
            finally:
                self._flushing.release()

    def flush(self) -> None:
        """Brings what is done to the disk, then notes it."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            done, self._done = self._done, _Done()
            self._flushed_at = time.monotonic()
        if done.tasks:
            make_durable(self._root, sorted(done.files))
            self._journal.add(done.entry())
