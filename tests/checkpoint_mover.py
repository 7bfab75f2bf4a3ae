"""A mover of a few lines, independent of the engine: whole arrays out of a checkpoint and into one.

Format tests compare with it what real libraries write and read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.checkpoint.boxes import Boxes
from shardwright.checkpoint.contents import Contents, Digest, Key, Record, Target, Wanted
from shardwright.checkpoint.dtypes import as_numpy

Arrays = dict[Key, np.ndarray[Any, Any]]


def gathered(contents: Contents) -> Arrays:
    """Every array of a checkpoint, whole; elements that lie nowhere fail, and so do bad CRCs."""
    bytes_of: dict[int, bytes] = {}

    def data(record: int) -> bytes:
        if record not in bytes_of:
            bytes_of[record] = _read(contents.root, contents.records[record])
        return bytes_of[record]

    found = {}
    for key, array in contents.arrays.items():
        dtype = as_numpy(array.dtype)
        whole = np.zeros(array.shape, dtype)
        covered = np.zeros(array.shape, bool)
        for begin, size, view in views(array.where(), dtype, data):
            place = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
            whole[place], covered[place] = view, True
        assert covered.all(), f"{key}: elements that lie nowhere"
        found[key] = whole
    return found


def _read(root: Path, record: Record) -> bytes:
    with (root / record.file).open("rb") as file:
        file.seek(record.offset)
        data = file.read(record.nbytes)
    assert len(data) == record.nbytes
    if record.digest is not None and record.digest.kind == "crc32":
        assert record.digest.value == f"{zlib.crc32(data):08x}"
    return data


def views(boxes: Boxes, dtype: np.dtype[Any], data: Callable[[int], Any]) -> Any:
    """(begin, size, strided view of the record) of every box."""
    columns = (boxes.begin, boxes.size, boxes.stride, boxes.record, boxes.offset)
    for begin, size, stride, record, offset in zip(*(c.tolist() for c in columns), strict=True):
        flat = np.frombuffer(data(record), dtype)[offset:]
        strides = tuple(s * dtype.itemsize for s in stride)
        assert sum((n - 1) * s for n, s in zip(size, stride, strict=True)) < len(flat)
        yield begin, size, np.lib.stride_tricks.as_strided(flat, size, strides)


def write(target: Target, arrays: Mapping[Key, np.ndarray[Any, Any]], root: Path) -> None:
    """A target filled with whole arrays."""
    files = {name: bytearray(nbytes) for name, nbytes in target.files.items()}
    for given in target.literals:
        _put(files, given.file, given.offset, given.data)
    buffers = [bytearray(record.nbytes) for record in target.records]
    for key, array in target.arrays.items():
        dtype = as_numpy(array.dtype)
        whole = np.asarray(arrays[key]).astype(dtype)
        for begin, size, view in views(array.where(), dtype, buffers.__getitem__):
            inside = [
                max(0, min(n, w - b)) for b, n, w in zip(begin, size, whole.shape, strict=True)
            ]
            source = tuple(slice(b, b + n) for b, n in zip(begin, inside, strict=True))
            view[tuple(slice(0, n) for n in inside)] = whole[source]
    digests = []
    for record, data, kind in zip(target.records, buffers, target.digests, strict=True):
        _put(files, record.file, record.offset, bytes(data))
        assert kind in ("crc32", None)
        digests.append(Digest("crc32", f"{zlib.crc32(data):08x}") if kind else None)
    for given in target.finish(digests):
        _put(files, given.file, given.offset, given.data)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _put(files: dict[str, bytearray], name: str, offset: int, data: bytes) -> None:
    assert offset >= 0 and offset + len(data) <= len(files[name])
    files[name][offset : offset + len(data)] = data


def wanted_of(
    contents: Contents, splits: Mapping[str, tuple[tuple[str, int], ...]] = {}
) -> list[Wanted]:
    """The same arrays again, each dim a factor; `splits` by name."""
    return [
        Wanted(
            array.state, array.name, array.shape, array.dtype,
            tuple((d,) for d in range(len(array.shape))), array.shape,
            splits.get(array.name, ()),
        )
        for array in contents.arrays.values()
    ]  # fmt: skip
