"""DCP's `.metadata`: which chunk of which tensor is which run of bytes in which file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ....ir import CorruptCheckpoint
from ...pickles import Named, StandIn, fields_of, loads, torch_dtype

MODULE = "torch.distributed.checkpoint.metadata"
FILE = ".metadata"

SEAL = {"checksum": "xxh3 follows the pickle"}
"""An attribute of our Metadata. The format has no checksum of its index, in which a flipped bit may
be another name, and nothing says which data are of it. What follows a pickle nobody reads but us,
who demand it where this is said: `items=`, CRC-32 of the directory of every item's zip in the order
of files and offsets, their number, `xxh3=`, XXH3-128 of all before. Numbers are hexadecimal."""

_COUNT, _MARK = b"items=", b"xxh3="
_MARK_BYTES = len(_MARK) + 32
_COUNT_BYTES = len(_COUNT) + 8


@dataclass(frozen=True, slots=True)
class Item:
    """A run of bytes that is one item: a torch zip, or part of a safetensors file."""

    file: str
    offset: int
    nbytes: int
    crc: int | None = None
    """CRC-32 of the directory of the zip, where the index says it (ours does)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and its item."""

    begin: tuple[int, ...]
    size: tuple[int, ...]
    item: Item


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor over all ranks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What `.metadata` says. `paths` are the keys of the nested state dict that DCP flattened."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Item]
    paths: Mapping[str, tuple[Any, ...]]

    @property
    def items(self) -> list[Item]:
        """All items, those of chunks first."""
        chunks = [chunk.item for tensor in self.tensors.values() for chunk in tensor.chunks]
        return [*chunks, *self.objects.values()]


def sealed(pickled: bytes, crcs: Sequence[int]) -> bytes:
    """A pickle of Metadata that has `SEAL`, with what follows it."""
    held = pickled + b"".join(b"%08x" % crc for crc in crcs) + _COUNT + b"%08x" % len(crcs) + _MARK
    return held + xxhash.xxh3_128_hexdigest(held).encode()


def _unsealed(data: bytes, what: str) -> tuple[bytes, list[int] | None]:
    """(the pickle, the items' CRCs); raises CorruptCheckpoint where the seal is broken."""
    held, promised = data[:-32], data[-32:]
    count_at = len(data) - _MARK_BYTES - _COUNT_BYTES
    if not held.endswith(_MARK) or data[max(0, count_at) :][: len(_COUNT)] != _COUNT:
        return data, None
    if xxhash.xxh3_128_hexdigest(held).encode() != promised:
        raise CorruptCheckpoint(
            f"{what}: damaged (its XXH3 is not the one at its end); restore it from another copy"
        )
    count = int(data[count_at + len(_COUNT) : len(data) - _MARK_BYTES], 16)
    begin = count_at - 8 * count
    return data[:begin], [int(data[k : k + 8], 16) for k in range(begin, count_at, 8)]


def parse(data: bytes, what: str) -> Metadata:
    """Reads `.metadata`; raises CorruptCheckpoint where it is damaged or contradicts itself."""
    pickled, crcs = _unsealed(data, what)
    value = loads(pickled, what)
    if not _is(value, "Metadata"):
        raise CorruptCheckpoint(f"{what}: holds {type(value)!r}, expected DCP's Metadata")
    said = fields_of(value)
    if crcs is None and SEAL.keys() <= said.keys():
        raise CorruptCheckpoint(f"{what}: its checksum is missing: truncated or damaged")
    try:
        where = {
            (index["fqn"], tuple(index.get("offset") or ())): _item(info, what)
            for index, info in (
                (fields_of(key), info) for key, info in (said.get("storage_data") or {}).items()
            )
        }
        if crcs is not None:
            items = sorted(set(where.values()), key=lambda item: (item.file, item.offset))
            whole = dict(zip(items, crcs, strict=True))
            where = {key: replace(item, crc=whole[item]) for key, item in where.items()}
        known = said["state_dict_metadata"]
        if stray := [fqn for fqn, _ in where if fqn not in known]:
            raise CorruptCheckpoint(f"{what}: places of {stray[0]}, which it does not describe")
        tensors, objects = {}, {}
        for fqn, entry in said["state_dict_metadata"].items():
            if _is(entry, "TensorStorageMetadata"):
                tensors[fqn] = _tensor(fqn, fields_of(entry), where, what)
            elif (fqn, ()) in where:
                objects[fqn] = where[fqn, ()]
            else:
                raise CorruptCheckpoint(f"{what}: {fqn} has no place in any file")
        paths = said.get("planner_data") or {}
        return Metadata(tensors, objects, {k: tuple(v) for k, v in paths.items()} if paths else {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptCheckpoint(f"{what}: not what DCP writes ({error!r})") from None


def check_names(metadata: Metadata, root: Path) -> None:
    """A key is its path joined, as DCP flattens dicts; raises CorruptCheckpoint where it is not."""
    if not metadata.paths:
        return
    for fqn in (*metadata.tensors, *metadata.objects):
        path = metadata.paths.get(fqn, ())
        if ".".join(map(str, path)) != fqn:
            raise CorruptCheckpoint(
                f"{root / FILE}: {fqn} lies at {path!r} of the state dict, which is another name; "
                "it is damaged"
            )


def load(root: Path) -> Metadata:
    """`.metadata` of a directory; raises CorruptCheckpoint if it is missing or damaged."""
    try:
        data = (root / FILE).read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(
            f"{root / FILE}: cannot be read ({error.strerror}); a save that was cut off has none"
        ) from None
    return parse(data, str(root / FILE))


def _is(value: Any, name: str) -> bool:
    kind = type(value)
    return isinstance(kind, Named) and kind.name == name


def _item(info: Any, what: str) -> Item:
    said = fields_of(info)
    if said.get("transform_descriptors"):
        raise CorruptCheckpoint(
            f"{what}: {said['relative_path']} is compressed ({said['transform_descriptors']!r}); "
            "save it again without transforms"
        )
    numbers = (said["offset"], said["length"])
    if (
        not all(type(n) is int and n >= 0 for n in numbers)
        or type(said["relative_path"]) is not str
    ):
        raise CorruptCheckpoint(f"{what}: an item at {numbers!r} of {said['relative_path']!r}")
    return Item(said["relative_path"], *numbers)


def _tensor(
    fqn: str,
    said: Mapping[str, Any],
    where: Mapping[tuple[str, tuple[int, ...]], Item],
    what: str,
) -> StoredTensor:
    properties = said["properties"]
    state = properties.state if isinstance(properties, StandIn) else None
    named = state[0] if isinstance(state, tuple) else fields_of(properties).get("dtype")
    dtype = torch_dtype(named)
    if dtype is None:
        raise CorruptCheckpoint(f"{what}: {fqn} has the dtype {named!r}, which is not known")
    shape = tuple(said["size"])
    chunks = []
    for chunk in said["chunks"]:
        box = fields_of(chunk)
        begin, size = tuple(box["offsets"]), tuple(box["sizes"])
        inside = len(begin) == len(size) == len(shape) and all(
            b >= 0 and n >= 0 and b + n <= whole
            for b, n, whole in zip(begin, size, shape, strict=True)
        )
        if not inside:
            raise CorruptCheckpoint(f"{what}: {fqn} of {shape} has a chunk {size} at {begin}")
        if 0 in size and (fqn, begin) not in where:
            continue
        if (fqn, begin) not in where:
            raise CorruptCheckpoint(f"{what}: the chunk of {fqn} at {begin} has no place in a file")
        chunks.append(Chunk(begin, size, where[fqn, begin]))
    return StoredTensor(dtype, shape, tuple(chunks))
