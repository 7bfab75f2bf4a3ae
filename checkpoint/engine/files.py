"""Files of a checkpoint, opened once per thread; no path leaves the checkpoint's directory."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CorruptCheckpoint, InvalidInput
from ..paths import within

Bytes = NDArray[np.uint8]


def buffer_of(data: Bytes | bytes) -> memoryview:
    """The bytes as the system's calls and the libraries of checksums take them."""
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


BLOCK = 4096
"""Bytes that direct writes count in: those of a page, and of the blocks of common file systems."""

_DIRECT_BYTES = 128 << 10
"""Of whole blocks, from which a write goes past the page cache. Measured on ext4 (2.33 GB with
fsync): 0.1 instead of 1.5 to 4.5 CPU seconds, 1.3 instead of 5 to 15 seconds."""

_STEP_BYTES = 4 << 20

_OPEN_AT_ONCE = 64
"""Descriptors a thread keeps: checkpoints have thousands of files, processes 1,024 descriptors."""


class WriteTurns:
    """One writer at a time per file: the kernel lets no two write into a file, and those that wait
    for it there burn their core (measured: twice the CPU seconds)."""

    def __init__(self) -> None:
        self._locks: dict[str, Lock] = {}

    def of(self, file: str) -> Lock:
        """The lock of a file (two threads that make one at once get the same)."""
        return self._locks.setdefault(file, Lock())


class Files:
    """Descriptors of the files of one directory, for one thread."""

    def __init__(
        self, root: Path, flags: int = os.O_RDONLY, turns: WriteTurns | None = None
    ) -> None:
        self._root = root
        self._turns = turns if turns is not None else WriteTurns()
        self._flags = flags | os.O_CLOEXEC
        self._open: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._direct = getattr(os, "O_DIRECT", 0)
        self._aligned: Bytes | None = None

    def descriptor(self, file: str, more: int = 0) -> int:
        """Of an open file (`more` flags); the least recently used one is closed for it."""
        key = file, more
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        path = within(self._root, file)
        try:
            found = os.open(path, self._flags | more)
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{path}: the file is missing") from None
        except OSError as error:
            raise InvalidInput(f"{path}: cannot open it: {error.strerror}") from None
        self._open[key] = found
        if len(self._open) > _OPEN_AT_ONCE:
            os.close(self._open.popitem(last=False)[1])
        return found

    def read(self, file: str, offset: int, into: Bytes) -> None:
        """Fills a buffer; raises CorruptCheckpoint where the file ends before."""
        descriptor = self.descriptor(file)
        view = buffer_of(into)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CorruptCheckpoint(
                    f"{self._root / file}: cannot read {len(view)} bytes at {offset}: "
                    f"{error.strerror}"
                ) from None
            if count == 0:
                raise CorruptCheckpoint(
                    f"{self._root / file}: it ends at byte {offset + done}, expected at least "
                    f"{offset + len(view)}; the file is truncated"
                )
            done += count

    def write(self, file: str, offset: int, data: Bytes | bytes) -> None:
        """Writes all bytes; raises OSError (of which `no_space` makes a named error).

        Whole blocks of a long write go past the page cache, from where they are if that is a
        multiple of a block away from their place in the file, else through an aligned buffer.
        """
        view = buffer_of(data)
        head = -offset % BLOCK
        middle = (len(view) - head) // BLOCK * BLOCK
        with self._turns.of(file):
            if not self._direct or middle < _DIRECT_BYTES:
                self._write(file, offset, view)
                return
            done = head + self._write_blocks(file, offset + head, view[head : head + middle])
            self._write(file, offset, view[:head])
            self._write(file, offset + done, view[done:])

    def _write(self, file: str, offset: int, view: memoryview) -> None:
        descriptor, done = self.descriptor(file), 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)

    def _write_blocks(self, file: str, offset: int, view: memoryview) -> int:
        """Writes whole blocks past the page cache, and returns how many bytes it could."""
        source = np.frombuffer(view, np.uint8)
        aligned, done = source.ctypes.data % BLOCK == 0, 0
        try:
            descriptor = self.descriptor(file, self._direct)
            while done < len(source):
                part = source[done : done + _STEP_BYTES]
                if not aligned:
                    part = self._in_blocks(part)
                count = os.pwrite(descriptor, part.data, offset + done)
                done += count
                if count % BLOCK:
                    break
        except (OSError, InvalidInput) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if getattr(cause, "errno", None) not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._direct = 0  # this file system has no such writes
        return done

    def _in_blocks(self, part: Bytes) -> Bytes:
        if self._aligned is None:
            self._aligned = aligned_buffer(_STEP_BYTES)
        found = self._aligned[: len(part)]
        np.copyto(found, part)
        return found

    def close(self) -> None:
        """Closes all descriptors."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def aligned_buffer(nbytes: int, phase: int = 0) -> Bytes:
    """Memory that begins `phase` bytes after a block's beginning; the contents are anything."""
    held = np.empty(nbytes + 2 * BLOCK, np.uint8)
    begin = -held.ctypes.data % BLOCK + phase
    return held[begin : begin + nbytes]


def make_durable(root: Path, files: Sequence[str]) -> None:
    """Waits until the contents of files are on the disk."""
    for file in files:
        descriptor = os.open(root / file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def folder_durable(path: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
