"""One safetensors file: its header, read from strangers and written.

A file is the header's length (u64, little-endian), the header (JSON: name → dtype, shape and byte
range; `__metadata__`: text → text), and the tensors, one after the other without holes. Source:
https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...ir.errors import CorruptCheckpoint, InvalidInput
from ..contents import Wanted
from ..dtypes import itemsize

_LARGEST_HEADER_BYTES = 100_000_000
_ALIGNMENT_BYTES = 8
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file; `offset` is from the file's beginning, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Header:
    """Of a file: its tensors in the order of their bytes, and where they begin."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    begin: int
    file_bytes: int
    raw: bytes


def read_header(path: Path) -> Header:
    """Reads the header of a file and checks it against the file's size.

    Raises CorruptCheckpoint where it is no such file, is truncated, or contradicts itself.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > _LARGEST_HEADER_BYTES:
                raise CorruptCheckpoint(f"{path}: no safetensors file (its header's length is off)")
            text = file.read(length)
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path}: the file is missing") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot read it: {error.strerror}") from None
    if len(text) < length:
        raise CorruptCheckpoint(f"{path}: it ends inside its header; the file is truncated")
    try:
        said = json.loads(text)
        metadata = said.pop(METADATA, {})
        begin = 8 + length
        entries = sorted(
            (_entry(name, about, begin) for name, about in said.items()),
            key=lambda entry: (entry.offset, entry.nbytes),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CorruptCheckpoint(f"{path}: its header is damaged") from None
    except InvalidInput as error:
        raise CorruptCheckpoint(f"{path}: its header is damaged: {error}") from None
    at = begin
    for entry in entries:
        if entry.offset != at:
            raise CorruptCheckpoint(
                f"{path}: {entry.name} begins at byte {entry.offset}, expected {at}"
            )
        at += entry.nbytes
    if at != size:
        what = "truncated" if size < at else "longer than its header says"
        raise CorruptCheckpoint(f"{path}: {size:,} bytes, expected {at:,}; the file is {what}")
    return Header(tuple(entries), metadata, begin, size, first + text)


def _entry(name: str, about: Mapping[str, Any], begin: int) -> Entry:
    shape = tuple(about["shape"])
    first, last = about["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(name)
    entry = Entry(name, about["dtype"], shape, begin + first)
    if last - first != entry.nbytes:
        raise InvalidInput(
            f"{name} has {last - first} bytes, expected {entry.nbytes} of {entry.dtype} {shape}"
        )
    return entry


def write_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The header for tensors (name, dtype, shape) that lie in this order, and their offsets."""
    said: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at, places = 0, []
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * itemsize(dtype)
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        places.append(at)
        at += nbytes
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + place for place in places]


def shards(wanted: Sequence[Wanted], limit: int) -> list[list[Wanted]]:
    """Consecutive tensors of at most so many bytes together, for a file each; the widest dtypes
    first in a file, so that every tensor is aligned."""
    found: list[list[Wanted]] = [[]]
    held = 0
    for one in wanted:
        if found[-1] and held + one.nbytes > limit:
            found.append([])
            held = 0
        found[-1].append(one)
        held += one.nbytes
    return [sorted(members, key=lambda one: -itemsize(one.dtype)) for members in found]
