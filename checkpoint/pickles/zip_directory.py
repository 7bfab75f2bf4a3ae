"""The directory of a torch zip, with every byte outside of large storages accounted for.

What torch's writer leaves no choice in is demanded: entries follow each other without gaps, local
headers and data descriptors say what the directory says, extra fields are torch's padding, the
ends fill the rest of the file, and fields that do not depend on the entry are the same in all of
them. So a flipped bit outside of contents shows itself without a checksum of its own; contents of
up to `CHECKED_BYTES`, and all that are no storages, are checked by their CRC on opening.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from isal import isal_zlib

from ...ir import CorruptCheckpoint, InvalidInput

CHECKED_BYTES = 4096
"""Storages up to this size are read on opening: their headers are, and reading on is no more."""

_END, _END64, _WHERE_END64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL, _DESCRIPTOR = b"PK\x01\x02", b"PK\x03\x04", b"PK\x07\x08"
_TAIL_BYTES = 22 + 20 + 56 + (1 << 16)  # the ends of a zip, and the longest comment
_LARGE = 0xFFFFFFFF
_HAS_DESCRIPTOR = 8
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began before 1.6: the pickled magic number."""

_WRITERS = ((0x031E, 45), (45, 45))
"""(made by, needed) in the 64-bit end: of torch's miniz, and of ours."""


class Span:
    """Some bytes of a file: `name` as errors and records call it, `begin` and `nbytes`."""

    def __init__(self, file: BinaryIO, name: str, begin: int = 0, nbytes: int | None = None):
        self.file, self.name, self.begin = file, name, begin
        whole = file.seek(0, 2)
        self.nbytes = whole - begin if nbytes is None else nbytes
        if begin < 0 or self.nbytes < 0 or begin + self.nbytes > whole:
            raise CorruptCheckpoint(
                f"{name}: {whole} bytes, but bytes {begin} to {begin + self.nbytes} are expected; "
                "it is truncated, or belongs to another checkpoint"
            )

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` in the span; raises CorruptCheckpoint beyond its end."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise CorruptCheckpoint(f"{self.name}: truncated, or damaged in its zip directory")
        self.file.seek(self.begin + offset)
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise CorruptCheckpoint(f"{self.name}: truncated")
        return data


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a zip: `begin` of its content in the span, its size and CRC-32.

    `checked`: its content has been read, and has that CRC.
    """

    begin: int
    nbytes: int
    crc: int
    checked: bool


@dataclass(frozen=True, slots=True)
class _Said:
    """An entry as the directory has it. `common`: what all entries of a zip have alike."""

    name: bytes
    header: int
    nbytes: int
    crc: int
    flags: int
    common: tuple[int, ...]

    @property
    def large(self) -> bool:
        return self.nbytes >= _LARGE or self.header >= _LARGE

    @property
    def descriptor(self) -> bytes:
        """What follows the content: CRC and sizes, for writers that know them only then."""
        if not self.flags & _HAS_DESCRIPTOR:
            return b""
        form = "<4sIQQ" if self.large else "<4sIII"
        return struct.pack(form, _DESCRIPTOR, self.crc, self.nbytes, self.nbytes)

    def local(self, extra_bytes: int) -> bytes:
        """The local header, without its name and extra field."""
        _, needed, time, date, *_ = self.common
        crc = size = 0
        if not self.flags & _HAS_DESCRIPTOR:
            crc, size = self.crc, min(self.nbytes, _LARGE)
        return struct.pack("<4sHHHHHIIIHH", _LOCAL, needed, self.flags, 0, time, date, crc, size,
                           size, len(self.name), extra_bytes)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Directory:
    """The entries of a zip by name, and the CRC-32 of the directory and the ends behind it.

    As the directory has the CRCs of all contents, its own stands for the whole zip.
    """

    entries: Mapping[str, Entry]
    crc: int


def directory_of(span: Span) -> Directory:
    """The directory of a zip; raises CorruptCheckpoint where anything contradicts itself.

    Reads headers, and contents as said above. InvalidInput: torch.save's form of before 1.6.
    """
    count, nbytes, begin = _ends(span)
    data = span.read(begin, span.nbytes - begin)
    said = _directory(data[:nbytes], count, span.name)
    return Directory(_account(span, said, begin), isal_zlib.crc32(data))


def _ends(span: Span) -> tuple[int, int, int]:
    """(entries, bytes, begin) of the directory."""
    name = span.name
    if span.nbytes < 22 or (end := span.read(span.nbytes - 22, 22))[:4] != _END:
        raise _no_zip(span)
    disks, count, again, nbytes, begin, comment = struct.unpack("<IHHIIH", end[4:])
    at = span.nbytes - 22
    damaged = CorruptCheckpoint(f"{name}: the end of its zip directory is damaged")
    if disks or again != count or comment:
        raise damaged
    if at >= 76 and (ends := span.read(at - 76, 76))[56:60] == _WHERE_END64:
        where = struct.unpack("<IQI", ends[60:])
        sign, size, *versions, disk, other, whole, all_of_it, large_nbytes, large_begin = (
            struct.unpack("<4sQHHIIQQQQ", ends[:56])
        )
        if (
            where != (0, at - 76, 1)
            or (sign, size, disk, other) != (_END64, 44, 0, 0)
            or tuple(versions) not in _WRITERS
            or whole != all_of_it
            or (count, nbytes, begin)
            != (min(whole, 0xFFFF), min(large_nbytes, _LARGE), min(large_begin, _LARGE))
        ):
            raise damaged
        at, count, nbytes, begin = at - 76, whole, large_nbytes, large_begin
    if begin + nbytes != at:
        raise CorruptCheckpoint(
            f"{name}: its zip directory is not where its end says; it is truncated or damaged"
        )
    return count, nbytes, begin


def _no_zip(span: Span) -> Exception:
    """Why a file does not end as torch's zips do."""
    if span.read(0, min(span.nbytes, len(_LEGACY))) == _LEGACY:
        return InvalidInput(
            f"{span.name}: written in torch.save's form of before 1.6, which is no zip; load it "
            "with torch and save it again"
        )
    tail_bytes = min(span.nbytes, _TAIL_BYTES)
    if _END in span.read(span.nbytes - tail_bytes, tail_bytes):
        return CorruptCheckpoint(
            f"{span.name}: a zip with bytes after its end, which torch.save does not write; it is "
            "damaged or another file; restore it from another copy"
        )
    return CorruptCheckpoint(
        f"{span.name}: no zip of torch.save ({span.nbytes} bytes, no end of a zip directory); it "
        "is truncated or another file; restore it from another copy"
    )


def _directory(data: bytes, count: int, file: str) -> list[_Said]:
    """What the directory says; raises CorruptCheckpoint where it is not torch's."""
    found: list[_Said] = []
    names: set[bytes] = set()
    at = 0
    try:
        for _ in range(count):
            (
                sign, made, needed, flags, method, time, date, crc, packed, nbytes, name_bytes,
                extra_bytes, comment_bytes, disk, internal, external, header,
            ) = struct.unpack_from("<4sHHHHHHIIIHHHHHII", data, at)  # fmt: skip
            if sign != _ENTRY:
                raise ValueError("no entry")
            name = data[at + 46 : at + 46 + name_bytes]
            extra = data[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
            nbytes, packed, header = _large(extra, nbytes, packed, header)
            if method or flags & 1 or packed != nbytes or name in names:
                raise ValueError(f"{name.decode()} is packed, encrypted or there twice")
            if disk or comment_bytes or name.decode().encode() != name:  # ValueError: no UTF-8
                raise ValueError(f"{name.decode()} has what torch does not write")
            common = (made, needed, time, date, internal, external, flags & ~_HAS_DESCRIPTOR)
            if found and common != found[0].common:
                raise ValueError(f"{name.decode()} is not written as the entries before it")
            names.add(name)
            found.append(_Said(name, header, nbytes, crc, flags, common))
            at += 46 + name_bytes + extra_bytes
        if at != len(data):
            raise ValueError("more than its entries")
    except (ValueError, struct.error) as error:
        raise CorruptCheckpoint(f"{file}: its zip directory is damaged ({error})") from None
    return found


def _large(extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and place that do not fit 32 bits are in the extra field 1, the only one."""
    values = [nbytes, packed, header]
    wide = [k for k, value in enumerate(values) if value == _LARGE]
    expected = struct.pack("<HH", 1, 8 * len(wide)) if wide else b""
    if extra[:4] != expected or len(extra) != len(expected) + 8 * len(wide):
        raise ValueError("an extra field that torch does not write")
    for place, value in zip(wide, struct.unpack(f"<{len(wide)}Q", extra[4:]), strict=True):
        if value < _LARGE:
            raise ValueError("a size beyond 32 bits that is none")
        values[place] = value
    return values[0], values[1], values[2]


def _account(span: Span, said: list[_Said], end: int) -> dict[str, Entry]:
    """Entries from the first byte to the directory, headers and descriptors as said.

    As entries leave no gaps, a content lies right before the descriptor that the next header
    follows; headers and small contents are read in runs.
    """
    found: dict[str, Entry] = {}
    run = _Run(span)
    before = b""
    at = 0
    for k, entry in enumerate(said):
        name = entry.name.decode()
        stop = said[k + 1].header if k + 1 < len(said) else end
        begin = stop - len(entry.descriptor) - entry.nbytes
        extra_bytes = begin - entry.header - 30 - len(entry.name)
        if at != entry.header or not 0 <= extra_bytes <= 0xFFFF:
            raise CorruptCheckpoint(
                f"{span.name}: entries of its zip overlap or leave gaps, at {name}; its zip "
                "directory is damaged"
            )
        check = entry.nbytes <= CHECKED_BYTES or not _is_storage(name)
        head = run.read(at - len(before), begin, begin + entry.nbytes if check else begin)
        expected = before + entry.local(extra_bytes) + entry.name
        extra = head[len(expected) : len(expected) + extra_bytes]
        if not head.startswith(expected) or not _is_padding(extra, entry):
            raise CorruptCheckpoint(
                f"{span.name}: the header of {name} in it, or what is before it, is damaged; "
                "restore the file from another copy"
            )
        if check:
            content_crc = isal_zlib.crc32(memoryview(head)[len(expected) + extra_bytes :])
            if content_crc != entry.crc:
                raise CorruptCheckpoint(
                    f"{span.name}: {name} is damaged (its CRC is not the one in the zip's "
                    "directory); restore the file from another copy"
                )
        found[name] = Entry(begin, entry.nbytes, entry.crc, check)
        before, at = entry.descriptor, stop
    if said and run.read(end - len(before), end, end) != before:
        raise CorruptCheckpoint(f"{span.name}: what ends its last entry is damaged")
    if at != end:
        raise CorruptCheckpoint(f"{span.name}: bytes before its zip directory are of no entry")
    return found


class _Run:
    """Reads forward, a block at a time where the next bytes will be asked for, too."""

    def __init__(self, span: Span) -> None:
        self._span, self._begin, self._data = span, 0, b""

    def read(self, begin: int, least: int, end: int) -> bytes:
        """The bytes from `begin` to `end`; `least` of them would be enough for the header."""
        if begin < self._begin or end > self._begin + len(self._data):
            ahead = min(max(end, least + CHECKED_BYTES), self._span.nbytes)
            self._begin, self._data = begin, self._span.read(begin, ahead - begin)
        return self._data[begin - self._begin : end - self._begin]


def _is_storage(name: str) -> bool:
    """`STEM/data/KEY`."""
    return "/data/" in name


def _is_padding(extra: bytes, entry: _Said) -> bool:
    """An extra field of torch's: the sizes that do not fit 32 bits, then `FB`, bytes, and Zs."""
    if entry.large:
        wide: list[tuple[int, ...]] = []
        if entry.nbytes >= _LARGE:
            # The writer does not know the second, the packed size, before it has written.
            wide = [(entry.nbytes, 0), (entry.nbytes, entry.nbytes)]
        place = (entry.header,) if entry.header >= _LARGE else ()
        forms = {
            struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
            for values in [*(w + place for w in wide or [()]), *wide]
        }
        for form in (*forms, b""):
            if extra.startswith(form) and _is_filler(extra[len(form) :]):
                return True
        return False
    return _is_filler(extra)


def _is_filler(extra: bytes) -> bool:
    return not extra or extra == b"FB" + struct.pack("<H", len(extra) - 4) + b"Z" * (len(extra) - 4)


def unread(entries: Mapping[str, Entry]) -> list[Entry]:
    """The contents that opening has left unchecked, in the file's order."""
    return sorted((e for e in entries.values() if not e.checked), key=lambda e: e.begin)
