"""Hugging Face folders: `model.safetensors`, or shards with an index, beside config and tokenizer.

Other states (moments, master weights) are in files of their own, `exp_avg.safetensors`, whose
metadata names the state, under the same tensor names; what else a job keeps is in
`training_state.json`. Loaders that look for the model find just the model. Shards that torch's DCP
wrote for Hugging Face (`DCP_SHARDING_INFO`) are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...ir.errors import CorruptCheckpoint, InvalidInput
from ..boxes import Boxes, row_major
from ..contents import WEIGHT, Array, Contents, Digest, Given, Job, Key, Record, Target, Wanted
from ..paths import within
from . import Options, universal
from .safetensors_file import Header, read_header, shards, write_header

SHARD_BYTES = 5_000_000_000
"""As transformers cuts by default (`max_shard_size="5GB"`)."""

_INDEX = ".safetensors.index.json"
_STATE = "shardwright_state"
_TRAINING = "training_state.json"
_SHARDING = "DCP_SHARDING_INFO"


def found(root: Path) -> str | None:
    """Files with this ending."""
    if root.is_file():
        return "a .safetensors file" if root.suffix == ".safetensors" else None
    names = sorted(path.name for path in root.glob("*.safetensors"))
    return f"{names[0]} and {len(names) - 1} more" if names else None


def read(root: Path, options: Options) -> Contents:
    """Reads the headers of all files, and the index of each state."""
    only = root.name if root.is_file() else ""
    root = root.parent if only else root
    names = [only] if only else _files(root)
    headers = {name: read_header(within(root, name)) for name in names}
    records: list[Record] = []
    parts: dict[Key, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]] = {}
    homes: dict[Key, str] = {}
    for name, header in headers.items():
        if universal.SAVE in header.metadata:
            raise CorruptCheckpoint(
                f"{root / name}: it is a part of a universal checkpoint, whose manifest "
                f"{universal.MANIFEST} is missing here"
            )
        state = header.metadata.get(_STATE, WEIGHT)
        offsets = _saved_offsets(root / name, header)
        for entry in header.entries:
            key = (state, entry.name)
            begin = offsets.get(entry.name)
            if key in homes and begin is None:
                raise CorruptCheckpoint(
                    f"{root / name}: it holds {entry.name}, which {homes[key]} holds, too; files "
                    "of different models are mixed"
                )
            homes[key] = name
            at = begin if begin is not None else (0,) * len(entry.shape)
            parts.setdefault(key, []).append((entry.dtype, entry.shape, at, len(records)))
            records.append(Record(name, entry.offset, entry.nbytes))
    if not only:
        _check_indices(root, homes)
    sizes = {name: header.file_bytes for name, header in headers.items()}
    if only:
        return Contents("safetensors", root, sizes, records, _arrays(parts))
    for path in sorted(root.glob("*" + _INDEX)):
        sizes[path.name] = path.stat().st_size
    job = Job()
    if (root / _TRAINING).is_file():
        sizes[_TRAINING] = (root / _TRAINING).stat().st_size
        job = _job(within(root, _TRAINING))
    facts = _config(root)
    return Contents("safetensors", root, sizes, records, _arrays(parts), job, facts=facts)


def _files(root: Path) -> list[str]:
    """The model's shards by its index, or its one file, or all there are; and those of states."""
    present = sorted(path.name for path in root.glob("*.safetensors"))
    if not present:
        raise CorruptCheckpoint(f"{root}: no .safetensors file")
    found: list[str] = []
    for path in sorted(root.glob("*" + _INDEX)):
        found += sorted(set(_weight_map(path).values()))
    if "model.safetensors" in present and not (root / ("model" + _INDEX)).exists():
        found.append("model.safetensors")
    if not found:
        return present
    beside = [name for name in present if name not in found]
    return found + [n for n in beside if read_header(within(root, n)).metadata.get(_STATE)]


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        if not all(type(k) is str and type(v) is str for k, v in found.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{path}: it is no index with a weight_map") from None
    return dict(found)


def _check_indices(root: Path, homes: dict[Key, str]) -> None:
    for path in sorted(root.glob("*" + _INDEX)):
        prefix = path.name.removesuffix(_INDEX)
        state = WEIGHT if prefix == "model" else prefix
        for name, file in _weight_map(path).items():
            home = homes.get((state, name))
            if home != file:
                where = f"is in {home}" if home else "is in none of the files"
                raise CorruptCheckpoint(
                    f"{path}: it says that {name} is in {file}, but it {where}; shards of "
                    "different models are mixed, or the index is old"
                )


def _saved_offsets(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    if _SHARDING not in header.metadata:
        return {}
    try:
        said = json.loads(header.metadata[_SHARDING])
        return {name: tuple(int(n) for n in about["saved_offsets"]) for name, about in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{path}: its {_SHARDING} is damaged") from None


def _arrays(
    parts: dict[Key, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]],
) -> dict[Key, Array]:
    made = {}
    for (state, name), pieces in parts.items():
        dtype, dims = pieces[0][0], len(pieces[0][1])
        if any(d != dtype or len(s) != dims or len(b) != dims for d, s, b, _ in pieces):
            raise CorruptCheckpoint(f"{name}: its shards differ in dtype or in the number of dims")
        shape = tuple(max(b[d] + s[d] for _, s, b, _ in pieces) for d in range(dims))
        rows = tuple((b, s, row_major(s), record, 0) for _, s, b, record in pieces)
        made[state, name] = Array(state, name, shape, dtype, partial(Boxes.of, rows, dims))
    return made


def _job(path: Path) -> Job:
    try:
        said = json.loads(path.read_bytes())
        said["param_groups"] = tuple(said.get("param_groups", ()))
        return Job(**said)
    except (ValueError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{path}: it is no state of a training job") from None


def _config(root: Path) -> dict[str, Any]:
    try:
        found = json.loads(within(root, "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """Lays out one file per state, or shards of at most `shard_bytes` (5 GB) with an index."""
    limit = options.flags.get("shard_bytes", SHARD_BYTES)
    by_state: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_state.setdefault("weight" if one.state == "buffer" else one.state, []).append(one)
    files: dict[str, int] = {}
    records: list[Record] = []
    arrays: dict[Key, Array] = {}
    literals: list[Given] = []
    indices: list[Given] = []
    for state, members in by_state.items():
        stem = "model" if state == WEIGHT else state
        groups = shards(members, limit)
        homes: dict[str, str] = {}
        for number, shard in enumerate(groups):
            file = f"{stem}-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            if len(groups) == 1:
                file = f"{stem}.safetensors"
            metadata = {"format": "pt"} | ({} if state == WEIGHT else {_STATE: state})
            header, places = write_header([(w.name, w.dtype, w.shape) for w in shard], metadata)
            literals.append(Given(file, 0, header))
            files[file] = len(header) + sum(w.nbytes for w in shard)
            for one, place in zip(shard, places, strict=True):
                arrays[one.key] = _whole(one, len(records))
                records.append(Record(file, place, one.nbytes))
                homes[one.name] = file
        if len(groups) > 1:
            said = {
                "metadata": {"total_size": sum(w.nbytes for w in members)},
                "weight_map": dict(sorted(homes.items())),
            }
            indices.append(Given(stem + _INDEX, 0, (json.dumps(said, indent=2) + "\n").encode()))
    if job != Job():
        try:
            text = json.dumps(asdict(job), indent=1)
        except TypeError as error:
            raise InvalidInput(f"the job's state is not JSON: {error}") from None
        literals.append(Given(_TRAINING, 0, text.encode()))
    files |= {g.file: len(g.data) for g in (*literals, *indices) if g.file not in files}
    none: list[None] = [None] * len(records)

    def finish(digests: Sequence[Digest | None]) -> Sequence[Given]:
        return indices

    return Target("safetensors", files, records, none, arrays, literals, finish)


def _whole(one: Wanted, record: int) -> Array:
    return Array(one.state, one.name, one.shape, one.dtype, lambda: Boxes.whole(one.shape, record))
