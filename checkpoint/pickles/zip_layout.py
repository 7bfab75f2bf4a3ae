"""A torch.save file laid out before its tensors are there.

Everything but the storages' bytes is known ahead: the pickle, and all places, with storages on 64
bytes as torch puts them. The engine fills the storages; their CRCs then complete the headers and
the directory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..contents import Digest, Given, Record
from .dumping import dumps
from .foreign import Storage

_ALIGNMENT_BYTES = 64
_LARGE = 0xFFFFFFFF
_FLAGS = 0x0800  # names are UTF-8


@dataclass(frozen=True, eq=False)
class TorchLayout:
    """A torch.save file to be: `nbytes` from `begin` of `file` on.

    `records` are the bytes that have to be filled, by storage; `literals` is all that is known.
    `ending` makes the rest of the records' CRCs.
    """

    file: str
    begin: int
    nbytes: int
    records: dict[Storage, Record]
    literals: tuple[Given, ...]
    ending: Callable[[Sequence[Digest | None]], tuple[Given, ...]]
    """The last of its literals is the zip's directory."""


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    header: int
    extra: bytes
    nbytes: int
    content: bytes | None

    @property
    def begin(self) -> int:
        return self.header + 30 + len(self.name) + len(self.extra)

    def head(self, crc: int) -> bytes:
        """The local header."""
        size = _LARGE if self.nbytes >= _LARGE else self.nbytes
        return (
            struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, _FLAGS, 0, 0, 33, crc, size, size,
                        len(self.name), len(self.extra)) + self.name + self.extra
        )  # fmt: skip

    def entry(self, crc: int) -> bytes:
        """The entry in the directory."""
        large = [n for n in (self.nbytes, self.nbytes, self.header) if n >= _LARGE]
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        size, header = min(self.nbytes, _LARGE), min(self.header, _LARGE)
        return (
            struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45, _FLAGS, 0, 0, 33, crc, size,
                        size, len(self.name), len(extra), 0, 0, 0, 0, header) + self.name + extra
        )  # fmt: skip


def lay_out(file: str, value: Any, stem: str = "archive", begin: int = 0) -> TorchLayout:
    """The file that torch.save would write for a value whose tensors have holes for storages.

    `begin` is where it starts in `file` (a multiple of 64, so that storages stay aligned).
    """
    pickle, storages = dumps(value)
    contents: list[tuple[str, int, bytes | None, Storage | None]] = [
        ("data.pkl", len(pickle), pickle, None),
        (".format_version", 1, b"1", None),
        (".storage_alignment", 2, b"64", None),
        ("byteorder", 6, b"little", None),
        *((f"data/{k}", s.nbytes, s.data, s) for k, s in enumerate(storages)),
        ("version", 2, b"3\n", None),
    ]
    members: list[_Member] = []
    records: dict[Storage, Record] = {}
    at = 0
    for name, nbytes, content, storage in contents:
        if storage is not None and nbytes == 0:
            content = b""
        member = _member(f"{stem}/{name}".encode(), at, nbytes, content)
        members.append(member)
        if storage is not None and content is None:
            records[storage] = Record(file, begin + member.begin, nbytes)
        at = member.begin + nbytes
    known = {m.name: zlib.crc32(m.content) for m in members if m.content is not None}
    open_members = [m for m in members if m.content is None]
    literals = [
        Given(file, begin + m.header, m.head(known[m.name]) + m.content)
        for m in members
        if m.content is not None
    ]

    def ending(digests: Sequence[Digest | None]) -> tuple[Given, ...]:
        crcs = dict(known)
        for member, digest in zip(open_members, digests, strict=True):
            assert digest is not None and digest.kind == "crc32"
            crcs[member.name] = int(digest.value, 16)
        heads = [Given(file, begin + m.header, m.head(crcs[m.name])) for m in open_members]
        return (*heads, Given(file, begin + at, _directory(members, crcs, at)))

    nbytes = at + len(_directory(members, {m.name: 0 for m in members}, at))
    return TorchLayout(file, begin, nbytes, records, tuple(literals), ending)


def _member(name: bytes, header: int, nbytes: int, content: bytes | None) -> _Member:
    large = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= _LARGE else b""
    begin = header + 30 + len(name) + len(large) + 4
    padding = -begin % _ALIGNMENT_BYTES
    extra = large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return _Member(name, header, extra, nbytes, content)


def _directory(members: Sequence[_Member], crcs: dict[bytes, int], at: int) -> bytes:
    """The directory and the ends of the zip, in both widths as torch writes them."""
    entries = b"".join(m.entry(crcs[m.name]) for m in members)
    count, nbytes = len(members), len(entries)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, at)
    where = struct.pack("<4sIQI", b"PK\x06\x07", 0, at + nbytes, 1)
    few = min(count, 0xFFFF)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, few, few, min(nbytes, _LARGE),
                      min(at, _LARGE), 0)  # fmt: skip
    return entries + end64 + where + end
