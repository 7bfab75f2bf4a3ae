"""A conversion from its plan to its target: prepared, streamed, checked, put in place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import InvalidInput
from ..contents import Contents, Digest, DigestKind, Given, Record, Target
from ..plan import FRAGMENT_BYTES, TILE_BYTES, Joined, Joins, Piece
from . import directory
from .digests import Ledger, check, range_crc, streamed
from .directory import Place
from .files import Bytes, Files, WriteTurns, make_durable
from .journal import Journal, read
from .progress import shown
from .ranks import Ranks
from .streaming import Stream, Task, spans_of
from .tiles import Mover

_VERSION = 1
"""Of how tiles are cut and journals written: a conversion is resumed by the same only."""

LEAST_MEMORY_BYTES = 128 << 20
_BUFFERS = 4
"""Per thread: the tile, what is copied, what is cast, a fragment."""

_SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory_bytes` of all buffers together, and the threads (0: one per core)."""

    memory_bytes: int = 512 << 20
    threads: int = 0

    def check(self) -> None:
        """Raises InvalidInput for limits under which nothing can be moved."""
        if self.memory_bytes < LEAST_MEMORY_BYTES:
            raise InvalidInput(
                f"--memory is {self.memory_bytes:,} bytes, expected at least "
                f"{LEAST_MEMORY_BYTES >> 20}M"
            )
        if self.threads < 0:
            raise InvalidInput(f"--threads {self.threads}: expected at least 1, or 0: one per core")

    def threads_for(self, unit_bytes: int) -> int:
        """How many threads may have their buffers, with tiles of so many bytes."""
        self.check()
        cores = self.threads or len(os.sched_getaffinity(0))
        return max(1, min(cores, self.memory_bytes // (_BUFFERS * unit_bytes)))


@dataclass(frozen=True, slots=True)
class Moved:
    """What was done: bytes of the target's tensors, and how many of them an earlier run had."""

    nbytes: int
    resumed_bytes: int
    notes: tuple[str, ...]


def fingerprint(source: Contents, target: Target, moved: Sequence[Piece], options: str) -> str:
    """Of a conversion: equal where the source's files, the target and all options are the same."""
    seen = hashlib.sha256(f"{_VERSION} {TILE_BYTES} {FRAGMENT_BYTES} {options}\n".encode())
    for name in sorted(source.files):
        try:
            stat = (source.root / name).stat()
            said = f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"
        except OSError:
            said = f"{name} missing\n"
        seen.update(said.encode())
    seen.update(json.dumps([target.format, sorted(target.files.items())]).encode())
    for given in target.literals:
        seen.update(f"{given.file} {given.offset}\n".encode() + given.data)
    for record, kind in zip(target.records, target.digests, strict=True):
        seen.update(f"{record.file} {record.offset} {record.nbytes} {kind}\n".encode())
    for piece in moved:
        seen.update(f"{piece.key} {piece.dtype} {piece.source.dtype}\n".encode())
    return seen.hexdigest()


def execute(
    source: Contents,
    moved: Sequence[Piece],
    target: Target,
    at: Place,
    limits: Limits,
    options: str = "",
    ranks: Ranks | None = None,
    quiet: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Moved:
    """Moves all pieces into `at.partial` and gives it the target's name.

    `options` is whatever else decides the bytes. `check` is called with the directory of the whole
    target, before it takes the target's name. Raises CorruptCheckpoint where a source's file
    is damaged, DiskFull, LostRank, InvalidInput (another process writes the same target, too); then
    nothing under the target's name has changed, and the same call goes on where this one stopped.
    """
    ranks = ranks if ranks is not None else Ranks(at.control, 0, 1)
    run = _Run(
        source, moved, target, at, limits, fingerprint(source, target, moved, options), check
    )
    with directory.held(at) if ranks.rank == 0 else nullcontext():
        return _executed(run, ranks, quiet)


def _executed(run: _Run, ranks: Ranks, quiet: bool) -> Moved:
    at, moved = run.at, run.moved
    before = directory.finished_before(at)
    if before is not None and before != run.fingerprint and not at.replaces:
        raise directory.exists_already(at)
    done = before == run.fingerprint

    def prepare() -> None:
        if before is not None:
            shutil.rmtree(at.partial, ignore_errors=True)
            directory.clear_journals(at)
        if not done:
            run.prepare()
        elif run.check is not None:
            run.check(at.final)

    ranks.start(run.fingerprint)
    try:
        try:
            ranks.prepared(run.fingerprint, prepare)
            if done:
                total = sum(piece.nbytes for piece in moved)
                found = Moved(total, total, ("an earlier run had finished it",))
            else:
                found = run.share(ranks, quiet)
            ranks.finished()
            if ranks.rank == 0 and not done:
                run.finish()
        except OSError as error:
            raise directory.no_space(error, at) from error
        ranks.closed()
    except Exception as error:
        ranks.failed(str(error))
        raise
    finally:
        ranks.stop()
    if ranks.rank == 0:
        directory.clear_control(at)
    return found


class _Run:
    def __init__(
        self,
        source: Contents,
        moved: Sequence[Piece],
        target: Target,
        at: Place,
        limits: Limits,
        fingerprint: str,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        self.source, self.moved, self.target, self.at = source, moved, target, at
        self.fingerprint = fingerprint
        self.check = check
        self._source_digests: list[DigestKind | None] = [
            r.digest.kind if r.digest is not None else None for r in source.records
        ]
        wholes = [
            record.nbytes
            for records, kinds in (
                (source.records, self._source_digests),
                (target.records, target.digests),
            )
            for record, kind in zip(records, kinds, strict=True)
            if kind not in (None, "crc32") and record.nbytes <= FRAGMENT_BYTES
        ]
        self._threads = limits.threads_for(max([TILE_BYTES, *wholes]))
        self._turns = WriteTurns()
        self._joins = Joins(self._source_digests, target.digests)
        self._notes: list[str] = []

    def prepare(self) -> None:
        """Rank 0: files, their literals, and the journal of a new conversion; or what is there."""
        at = self.at
        first = read(at.control / "journal.0")
        same = bool(first) and first[0].get("conversion") == self.fingerprint
        if at.partial.exists() and not first:
            raise InvalidInput(
                f"{at.partial}: it is not from a conversion of ours; remove it or choose another "
                "target"
            )
        if first and not same:
            self._notes.append(
                f"{at.partial} was of another source or of other options: started over"
            )
        if not same:
            shutil.rmtree(at.partial, ignore_errors=True)
            for path in at.control.glob("journal.*"):
                path.unlink()
        directory.check_room(at, self.target.files)
        at.control.mkdir(exist_ok=True)
        if not same:
            Journal(at.control / "journal.0", {"conversion": self.fingerprint}).close()
        directory.lay_out(at, self.target.files)
        journal = Journal(at.control / "journal.0")
        journal.add({"inode": at.partial.stat().st_ino})
        journal.close()
        self._write(self.target.literals)
        directory.folders_durable(at, self.target.files)

    def share(self, ranks: Ranks, quiet: bool) -> Moved:
        """Moves this rank's tiles, less those that are done."""
        path = self.at.control / f"journal.{ranks.rank}"
        journal = Journal(path, None if path.exists() else {"conversion": self.fingerprint})
        done = self._done_tiles()
        total = sum(piece.nbytes for piece in self.moved)
        mine = range(total * ranks.rank // ranks.world, total * (ranks.rank + 1) // ranks.world)
        made = _Tasks(self, mine, done)
        quiet = quiet or ranks.rank != 0
        try:
            with shown("converting", len(mine), 0, quiet) as advance:
                stream = Stream(
                    self._mover,
                    self.at.partial,
                    self.target.records,
                    journal,
                    self._threads,
                    advance,
                )
                made.skipped = advance
                made.check = ranks.check
                stream.run(iter(made))
        finally:
            journal.close()
        if made.resumed_bytes:
            self._notes.append(f"resumed: {made.resumed_bytes:,} bytes were done already")
        return Moved(total, made.resumed_bytes, tuple(self._notes))

    def finish(self) -> None:
        """Rank 0: checksums of both sides, the last literals, the name."""
        reads, writes = Ledger(), Ledger()
        wholes: dict[int, str] = {}
        checked: set[int] = set()
        for entry in self._entries():
            reads.add(tuple(part) for part in entry.get("reads", ()))
            writes.add(tuple(part) for part in entry.get("writes", ()))
            wholes |= dict(entry.get("wholes", ()))
            checked |= set(entry.get("checked", ()))
        scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        self._check_source(reads, checked, scratch)
        found = self._target_digests(writes, wholes, scratch)
        last = self.target.finish(found)
        self._write(last)
        make_durable(self.at.partial, sorted(self.target.files))
        directory.folders_durable(self.at, self.target.files)
        if self.check is not None:
            self.check(self.at.partial)
        directory.put_in_place(self.at)

    def join(self, piece: Piece) -> Joined:
        """The tiles of a piece."""
        return self._joins.join(piece)

    def _mover(self) -> Mover:
        return Mover(
            self.source.root,
            self.source.records,
            self.at.partial,
            self.target.records,
            self.target.digests,
            self._turns,
        )

    def _write(self, literals: Iterable[Given]) -> None:
        """Writes bytes that the format knows, in order, each file durable before the next."""
        files = Files(self.at.partial, os.O_RDWR)
        try:
            for given in literals:
                if given.offset + len(given.data) > self.target.files.get(given.file, 0):
                    raise InvalidInput(f"{given.file}: a header is larger than its file")
                files.write(given.file, given.offset, given.data)
        finally:
            files.close()

    def _entries(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.at.control.glob("journal.*")):
            entries = read(path)
            if entries and entries[0].get("conversion") == self.fingerprint:
                yield from entries[1:]

    def _done_tiles(self) -> dict[int, list[tuple[int, int]]]:
        done: dict[int, list[tuple[int, int]]] = {}
        for entry in self._entries():
            for number, first, last in entry.get("tiles", ()):
                done.setdefault(number, []).append((first, last))
        return done

    def _check_source(self, reads: Ledger, checked: set[int], scratch: Bytes) -> None:
        """All records that the pieces name, also those of which only replicas would be read; and
        of torch's zips that they are read from, everything: nothing else would ever check it."""
        promised = {
            number
            for number, record in enumerate(self.source.records)
            if record.digest is not None and number not in checked
        }
        if not promised:
            return
        used: set[int] = set()
        for piece in self.moved:
            used |= set(np.unique(piece.source.where().record).tolist())
        read = {self.source.records[number].file for number in used}
        for number in promised:
            record = self.source.records[number]
            assert record.digest is not None
            if record.digest.kind == "crc32" and record.file in read:
                used.add(number)
        files = Files(self.source.root)
        try:
            for number in sorted(used & promised):
                record = self.source.records[number]
                assert record.digest is not None
                if record.digest.kind == "crc32":
                    read_range = range_crc(files, record, scratch)
                    found = reads.digest(number, record.nbytes, read_range)
                else:
                    found = streamed(record.digest.kind, files, record, scratch)
                check(record, found, str(self.source.root))
        finally:
            files.close()

    def _target_digests(
        self, writes: Ledger, wholes: Mapping[int, str], scratch: Bytes
    ) -> list[Digest | None]:
        files = Files(self.at.partial)
        try:
            return [
                self._target_digest(number, kind, writes, wholes, files, scratch)
                for number, kind in enumerate(self.target.digests)
            ]
        finally:
            files.close()

    def _target_digest(
        self,
        number: int,
        kind: DigestKind | None,
        writes: Ledger,
        wholes: Mapping[int, str],
        files: Files,
        scratch: Bytes,
    ) -> Digest | None:
        record: Record = self.target.records[number]
        if kind is None:
            return None
        if kind == "crc32":
            value = writes.digest(number, record.nbytes, range_crc(files, record, scratch))
        elif number in wholes:
            value = wholes[number]
        else:
            value = streamed(kind, files, record, scratch)
        return Digest(kind, value)


class _Tasks:
    """The tasks of a share, made when they are needed: a plan of all would not fit."""

    def __init__(self, run: _Run, mine: range, done: Mapping[int, list[tuple[int, int]]]) -> None:
        self._run, self._mine, self._done = run, mine, done
        self.resumed_bytes = 0
        self.skipped: Any = lambda nbytes: None
        self.check: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Task]:
        at = 0
        for number, piece in enumerate(self._run.moved):
            begin, at = at, at + piece.nbytes
            empty = begin == at and begin in self._mine
            if not empty and (at <= self._mine.start or begin >= self._mine.stop):
                continue
            joined = self._run.join(piece)
            spans = spans_of(piece, joined)
            done = np.zeros(len(joined), np.bool_)
            for first, last in self._done.get(number, ()):
                done[first:last] = True
            for first, last in spans:
                # A task belongs to the rank in whose bytes it begins.
                if begin + piece.nbytes * first // len(joined) not in self._mine:
                    continue
                task = Task(number, piece, joined, first, last)
                if done[first:last].all():
                    nbytes = task.nbytes * (piece.nbytes // max(1, _count(piece)))
                    self.resumed_bytes += nbytes
                    self.skipped(nbytes)
                    continue
                self.check()
                yield task


def _count(piece: Piece) -> int:
    return int(np.prod(piece.source.shape, dtype=np.int64))
