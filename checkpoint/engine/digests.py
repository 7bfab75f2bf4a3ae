"""Checksums of records, put together from the parts that tiles read and write.

CRC-32 of a whole follows from those of its parts, so tiles may come in any order; a part that no
tile touched (padding, a replica) is read for it. XXH3 and SHA-256 need the record in one go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from threading import Lock

import xxhash
from isal import isal_zlib

from ...ir.errors import CorruptCheckpoint
from ..contents import DigestKind, Record
from .files import Bytes, Files, buffer_of

SMALLEST_PART = 4096
"""Bytes of a part that is kept: smaller ones are cheaper to read again than to remember."""

_STEP_BYTES = 1 << 20

Part = tuple[int, int, int, int]
"""(record, first byte, bytes, CRC-32)."""


def crc32(data: Bytes | bytes, before: int = 0) -> int:
    """Of bytes that follow others with the CRC `before`."""
    return int(isal_zlib.crc32(data, before))


def whole(kind: DigestKind, data: Bytes | bytes) -> str:
    """The digest of a record's bytes, in hexadecimal."""
    if kind == "crc32":
        return f"{crc32(data):08x}"
    if kind == "xxh3":
        return xxhash.xxh3_128_hexdigest(buffer_of(data))
    return hashlib.sha256(buffer_of(data)).hexdigest()


def streamed(kind: DigestKind, files: Files, record: Record, scratch: Bytes) -> str:
    """The digest of a record, read through a buffer."""
    crc, other = 0, (xxhash.xxh3_128() if kind == "xxh3" else hashlib.sha256())
    for begin in range(0, record.nbytes, len(scratch)):
        part = scratch[: min(len(scratch), record.nbytes - begin)]
        files.read(record.file, record.offset + begin, part)
        if kind == "crc32":
            crc = crc32(part, crc)
        else:
            other.update(buffer_of(part))
    return f"{crc:08x}" if kind == "crc32" else str(other.hexdigest())


class Ledger:
    """CRCs of parts of records, from all threads (and, when they are gathered, all ranks)."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._lock = Lock()

    def add(self, parts: Iterable[Part]) -> None:
        """Notes parts."""
        with self._lock:
            for record, begin, nbytes, crc in parts:
                self._parts.setdefault(record, []).append((begin, nbytes, crc))

    @property
    def records(self) -> set[int]:
        return set(self._parts)

    def digest(self, record: int, nbytes: int, read: Callable[[int, int], int]) -> str:
        """CRC-32 of a whole record; `read(begin, bytes)` gives that of a part nobody noted."""
        crc, at = 0, 0
        for begin, size, part in sorted(self._parts.get(record, [])):
            if begin < at:
                continue  # read twice, in different pieces
            if begin > at:
                crc = isal_zlib.crc32_combine(crc, read(at, begin - at), begin - at)
            crc = isal_zlib.crc32_combine(crc, part, size)
            at = begin + size
        if at < nbytes:
            crc = isal_zlib.crc32_combine(crc, read(at, nbytes - at), nbytes - at)
        return f"{crc:08x}"


def range_crc(files: Files, record: Record, scratch: Bytes) -> Callable[[int, int], int]:
    """Reads the CRC of ranges of a record, for `Ledger.digest`."""

    def read(begin: int, nbytes: int) -> int:
        part = Record(record.file, record.offset + begin, nbytes)
        return int(streamed("crc32", files, part, scratch), 16)

    return read


def check(record: Record, found: str, root: str) -> None:
    """Raises CorruptCheckpoint where a record's bytes are not those that were promised."""
    promised = record.digest
    if promised is not None and promised.value.lower() != found:
        raise CorruptCheckpoint(
            f"{root}/{record.file}: bytes {record.offset} to {record.offset + record.nbytes} are "
            f"damaged: {promised.kind} {found}, expected {promised.value}; take another copy"
        )
