"""Our own form: safetensors files of fragments and one manifest (`docs/checkpoint-format.md`).

The manifest covers every byte: itself, the header of every file, and every fragment (XXH3, 128
bits). The save's number is a digest of all of that, and stands in every file's header, so files of
different saves are told apart before a tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from ...ir.errors import CorruptCheckpoint, InvalidInput
from ..boxes import Boxes, row_major
from ..contents import Array, Contents, Digest, Given, Job, Key, Record, Target, Wanted
from ..dtypes import itemsize
from ..paths import within
from . import Options
from .safetensors_file import read_header, shards, write_header

MANIFEST = "shardwright.json"
VERSION = 1
FRAGMENT_BYTES = 4 << 20
LARGEST_FRAGMENT_BYTES = 32 << 20
_FRAGMENTS = 100_000
"""Of a checkpoint, where larger ones allow it: a manifest is read whole."""

FILE_BYTES = 4 << 30
SAVE = "shardwright_save"
_FRAGMENT_FILES = "fragments-*.safetensors"
_UNKNOWN = "0" * 32
_END = re.compile(rb'"checksum":"([0-9a-f]{32})"\}\n\Z')


def found(root: Path) -> str | None:
    """Its manifest, or its fragments (then the manifest is missed when it is read)."""
    if (root / MANIFEST).is_file():
        return MANIFEST
    return "fragments" if root.is_dir() and any(root.glob(_FRAGMENT_FILES)) else None


def read(root: Path, options: Options) -> Contents:
    """Reads the manifest and the headers of all files.

    Raises CorruptCheckpoint where any of them is damaged, missing, or of another save.
    """
    path = within(root, MANIFEST)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot read it: {error.strerror}") from None
    end = _END.search(raw)
    if end is None or end[1].decode() != xxhash.xxh3_128_hexdigest(raw[: end.start(1)]):
        raise CorruptCheckpoint(f"{path}: the manifest is damaged (its checksum does not agree)")
    try:
        said = json.loads(raw)
        if said["format"] != "shardwright-universal" or said["version"] != VERSION:
            raise InvalidInput(
                f"{path}: format {said['format']!r}, version {said['version']!r}; this program "
                f"reads version {VERSION}"
            )
        return _contents(root, said, len(raw))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CorruptCheckpoint(f"{path}: the manifest is not as its format says") from None


def _contents(root: Path, said: dict[str, Any], manifest_bytes: int) -> Contents:
    sizes = {MANIFEST: manifest_bytes}
    names = [about["name"] for about in said["files"]]
    for about in said["files"]:
        path = within(root, about["name"])
        header = read_header(path)
        if header.metadata.get(SAVE) != said["save"]:
            raise CorruptCheckpoint(
                f"{path}: it belongs to the save {header.metadata.get(SAVE)}, the manifest to "
                f"{said['save']}; files of different saves are mixed"
            )
        if header.file_bytes != about["bytes"]:
            raise CorruptCheckpoint(
                f"{path}: {header.file_bytes:,} bytes, expected {about['bytes']:,}"
            )
        if xxhash.xxh3_128_hexdigest(header.raw) != about["header"]:
            raise CorruptCheckpoint(f"{path}: its header is damaged")
        sizes[about["name"]] = header.file_bytes
    records: list[Record] = []
    arrays: dict[Key, Array] = {}
    for tensor in said["tensors"]:
        shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
        rows = []
        for begin, size, file, offset, digest in tensor["fragments"]:
            rows.append((tuple(begin), tuple(size), row_major(size), len(records), 0))
            nbytes = prod(size) * itemsize(dtype)
            if file < 0 or offset < 0 or offset + nbytes > sizes[names[file]]:
                raise ValueError(file)
            records.append(Record(names[file], offset, nbytes, Digest("xxh3", digest)))
        key = (tensor["state"], tensor["name"])
        arrays[key] = Array(*key, shape, dtype, partial(Boxes.of, rows, len(shape)))
    job = dict(said["job"])
    job["param_groups"] = tuple(job["param_groups"])
    companions = {str(one["name"]): str(one["xxh3"]) for one in said.get("companions", ())}
    for one in said.get("companions", ()):
        sizes[one["name"]] = _companion_bytes(root, one["name"], one["bytes"])
    return Contents(
        "universal", root, sizes, records, arrays, Job(**job), facts=said.get("facts", {}),
        companions=companions,
    )  # fmt: skip


def _companion_bytes(root: Path, name: str, expected: int) -> int:
    """The size of a file beside the tensors, which the manifest promises."""
    path = within(root, name)
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        said = "missing" if found is None else f"{found:,} bytes, expected {expected:,}"
        raise CorruptCheckpoint(f"{path}: {said}; restore it from another copy")
    return expected


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """Lays the tensors out one after the other, in fragments of whole rows."""
    facts = dict(options.flags.get("facts", {}))
    return _Layout(wanted, job, facts, options.companions).target()


class _Layout:
    """Where every fragment goes, and the manifest once their digests are known."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        job: Job,
        facts: dict[str, Any],
        companions: Sequence[Given],
    ) -> None:
        try:
            self._job = json.loads(json.dumps(asdict(job)))
        except TypeError as error:
            raise InvalidInput(f"the job's state is not JSON: {error}") from None
        self._facts = facts
        self._companions = [
            {
                "name": one.file,
                "bytes": len(one.data),
                "xxh3": xxhash.xxh3_128_hexdigest(one.data),
            }
            for one in companions
        ]
        self._files = shards(wanted, FILE_BYTES)
        self._names = [f"fragments-{n:05d}.safetensors" for n in range(len(self._files))]
        self._records: list[Record] = []
        self._arrays: dict[Key, Array] = {}
        self._tensors: list[dict[str, Any]] = []
        self._sizes: dict[str, int] = {}
        even = sum(one.nbytes for one in wanted) // _FRAGMENTS
        self._fragment_bytes = min(max(FRAGMENT_BYTES, even), LARGEST_FRAGMENT_BYTES)
        for file, (name, members) in enumerate(zip(self._names, self._files, strict=True)):
            header, places = self._header(file, _UNKNOWN)
            for one, place in zip(members, places, strict=True):
                self._add(one, file, place)
            self._sizes[name] = len(header) + sum(one.nbytes for one in members)

    def target(self) -> Target:
        """The whole; the manifest has its final size already, since digests have."""
        unknown = [Digest("xxh3", _UNKNOWN)] * len(self._records)
        sizes = self._sizes | {MANIFEST: len(self._finish(unknown)[-1].data)}
        kinds: list[Any] = ["xxh3"] * len(self._records)
        return Target("universal", sizes, self._records, kinds, self._arrays, [], self._finish)

    def _add(self, one: Wanted, file: int, place: int) -> None:
        width = itemsize(one.dtype)
        rows, fragments = [], []
        for begin, size in _fragments(one.shape, max(1, self._fragment_bytes // width)):
            inside = sum(b * s for b, s in zip(begin, row_major(one.shape), strict=True))
            rows.append((begin, size, row_major(size), len(self._records), 0))
            offset = place + inside * width
            fragments.append([list(begin), list(size), file, offset, len(self._records)])
            self._records.append(Record(self._names[file], offset, prod(size) * width))
        table = Boxes.of(rows, len(one.shape))
        self._arrays[one.key] = Array(*one.key, one.shape, one.dtype, lambda: table)
        self._tensors.append(
            {
                "state": one.state,
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "fragments": fragments,
            }
        )

    def _header(self, file: int, save: str) -> tuple[bytes, list[int]]:
        tensors = [(f"{one.state}/{one.name}", one.dtype, one.shape) for one in self._files[file]]
        return write_header(tensors, {SAVE: save})

    def _finish(self, digests: Sequence[Digest | None]) -> Sequence[Given]:
        values = [digest.value if digest is not None else _UNKNOWN for digest in digests]
        tensors = [
            tensor | {"fragments": [[*row[:4], values[row[4]]] for row in tensor["fragments"]]}
            for tensor in self._tensors
        ]
        content = {
            "job": self._job,
            "facts": self._facts,
            "companions": self._companions,
            "tensors": tensors,
        }
        save = xxhash.xxh3_128_hexdigest(_text(content))
        headers = [self._header(file, save)[0] for file in range(len(self._files))]
        files = [
            {"name": name, "bytes": self._sizes[name], "header": xxhash.xxh3_128_hexdigest(header)}
            for name, header in zip(self._names, headers, strict=True)
        ]
        manifest = {
            "format": "shardwright-universal", "version": VERSION, "save": save, "files": files,
            **content,
        }  # fmt: skip
        text = _text(manifest)[:-1] + b',"checksum":"'
        text += xxhash.xxh3_128_hexdigest(text).encode() + b'"}\n'
        return [
            *(Given(name, 0, header) for name, header in zip(self._names, headers, strict=True)),
            Given(MANIFEST, 0, text),
        ]


def _text(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _fragments(
    shape: tuple[int, ...], elements: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that are contiguous in the array, in order, of at most so many elements."""
    if not prod(shape):
        return []
    step = [1] * len(shape)
    left = elements
    for dim in reversed(range(len(shape))):
        step[dim] = min(shape[dim], left)
        if step[dim] < shape[dim]:
            break
        left = max(1, left // shape[dim])
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length, each in zip(shape, step, strict=True):
        found = [
            ((*begin, at), (*size, min(each, length - at)))
            for begin, size in found
            for at in range(0, length, each)
        ]
    return found
