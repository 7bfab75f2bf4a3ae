"""orbax laid out: plain zarr, a file per chunk, with the trees' descriptions beside them."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from ...ir import InvalidInput
from ..boxes import Boxes, row_major
from ..contents import EXP_AVG, EXP_AVG_SQ, WEIGHT, Array, Digest, Given, Job, Key, Record, Target
from ..contents import Wanted as Wanted
from ..dtypes import itemsize
from ..placement import places, shard_shape
from . import Options
from .orbax_reading import CHECKPOINT, MOMENTS, TREE, zarr_dtype

CHUNK_BYTES = 128 << 20
"""Of a chunk at most: orbax reads whole chunks."""

_HANDLERS = "orbax.checkpoint._src.handlers"
_STANDARD = f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler"
_JSON = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"
_SEQUENCE, _DICT = 1, 2

Keys = tuple[tuple[str, int], ...]
"""Keys of a path with their kinds."""


@dataclass
class _Tree:
    """One tree: its leaves by path, None for leaves that hold nothing."""

    folder: str
    leaves: dict[Keys, tuple[tuple[int, ...], tuple[int, ...]] | None] = field(default_factory=dict)


@dataclass
class _Laid:
    files: dict[str, int] = field(default_factory=dict)
    literals: list[Given] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    arrays: dict[Key, Array] = field(default_factory=dict)

    def given(self, file: str, data: bytes) -> None:
        self.files[file] = len(data)
        self.literals.append(Given(file, 0, data))


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """As `orbax.target`."""
    style = options.flags.get("tree", "emitted")
    if style not in ("emitted", "standard"):
        raise InvalidInput(f"tree={style!r}: expected emitted or standard")
    moments = any(one.state == EXP_AVG for one in wanted)
    step = job.step or 0
    laid = _Laid()
    root = f"{step}/" if style == "emitted" else ""
    trees = {
        WEIGHT: _Tree(f"{root}params/" if style == "emitted" else ""),
        EXP_AVG: _Tree(f"{root}state/" if style == "emitted" else ""),
    }
    if style == "standard":
        trees[EXP_AVG] = trees[WEIGHT]
    lead: dict[str, Keys] = {
        WEIGHT: () if style == "emitted" else (("params", _DICT),),
        EXP_AVG: () if style == "emitted" else (("opt_state", _DICT),),
    }
    nested = bool(options.flags.get("nested", False))
    for one in wanted:
        tree, path = _placed(one, trees, lead, nested)
        _array(laid, tree, path, one, options)
    if moments:
        state, first = trees[EXP_AVG], lead[EXP_AVG]
        _scalar(laid, state, (*first, ("0", _SEQUENCE), ("count", _DICT)), step)
        state.leaves[*first, ("1", _SEQUENCE)] = None
        # With a schedule the last part of optax.adamw counts too; our programs always have one.
        if options.flags.get("schedule", style == "emitted"):
            _scalar(laid, state, (*first, ("2", _SEQUENCE), ("count", _DICT)), step)
        else:
            state.leaves[*first, ("2", _SEQUENCE)] = None
    for tree in {id(tree): tree for tree in trees.values()}.values():
        if tree.leaves:
            _describe(laid, tree)
    handlers: Any = _STANDARD
    if style == "emitted":
        progress = {"step": step, "samples": 0, "seed": 0}
        own = job.others.get("progress")
        if isinstance(own, Mapping):
            progress |= {k: v for k, v in own.items() if k in progress and k != "step"}
        laid.given(f"{root}progress/metadata", json.dumps(progress).encode())
        handlers = {"params": _STANDARD, "progress": _JSON}
        if moments:
            handlers["state"] = _STANDARD
    now = time.time_ns()
    ending = {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    last = Given(f"{root}{CHECKPOINT}", 0, json.dumps(ending).encode())

    def finish(_: Sequence[Digest | None]) -> list[Given]:
        return [last]

    return Target(
        "orbax",
        {**laid.files, last.file: len(last.data)},
        laid.records,
        [None] * len(laid.records),
        laid.arrays,
        laid.literals,
        finish,
    )


def _placed(
    one: Wanted, trees: Mapping[str, _Tree], lead: Mapping[str, Keys], nested: bool
) -> tuple[_Tree, Keys]:
    parts = one.name.split(".") if nested else [one.name]
    own: Keys = tuple((part, _DICT) for part in parts)
    if one.state in (WEIGHT, "buffer"):
        return trees[WEIGHT], (*lead[WEIGHT], *own)
    field_name = {EXP_AVG: "mu", EXP_AVG_SQ: "nu"}.get(one.state)
    if field_name is None:
        raise InvalidInput(
            f"{one.state} of {one.name}: optax.adamw keeps {', '.join(MOMENTS.values())}; leave it "
            "out with --states weight,exp_avg,exp_avg_sq"
        )
    inside: Keys = (("0", _SEQUENCE), (field_name, _DICT))
    return trees[EXP_AVG], (*lead[EXP_AVG], *inside, *own)


def _array(laid: _Laid, tree: _Tree, path: Keys, one: Wanted, options: Options) -> None:
    shape = one.shape
    chunk = list(shape)
    for at in places(options.mesh, [axis.partition(":")[0] for axis, _ in one.splits]):
        chunk = list(shard_shape(one, options.mesh, at))
        break
    limit = int(options.flags.get("chunk_bytes", CHUNK_BYTES))
    for dim in range(len(chunk)):
        while prod(chunk) * itemsize(one.dtype) > limit and chunk[dim] > 1:
            chunk[dim] = -(-chunk[dim] // 2)
    name = ".".join(key for key, _ in path)
    _zarray(laid, f"{tree.folder}{name}", shape, chunk, one.dtype)
    rows = []
    nbytes = prod(chunk) * itemsize(one.dtype)
    for place in product(
        *(range(-(-n // c) if n else 0) for n, c in zip(shape, chunk, strict=True))
    ):
        begin = tuple(k * c for k, c in zip(place, chunk, strict=True))
        size = tuple(min(c, n - b) for b, c, n in zip(begin, chunk, shape, strict=True))
        rows.append((begin, size, row_major(chunk), len(laid.records), 0))
        key = ".".join(str(k) for k in place) or "0"
        file = f"{tree.folder}{name}/{key}"
        laid.records.append(Record(file, 0, nbytes))
        laid.files[file] = nbytes
    table = Boxes.of(rows, len(shape))
    laid.arrays[one.key] = Array(*one.key, shape, one.dtype, lambda: table)
    tree.leaves[path] = (shape, tuple(chunk))


def _scalar(laid: _Laid, tree: _Tree, path: Keys, value: int) -> None:
    name = ".".join(key for key, _ in path)
    _zarray(laid, f"{tree.folder}{name}", (), (), "I32")
    laid.given(f"{tree.folder}{name}/0", struct.pack("<i", value))
    tree.leaves[path] = ((), ())


def _zarray(
    laid: _Laid, folder: str, shape: Sequence[int], chunk: Sequence[int], dtype: str
) -> None:
    said = {
        "chunks": [max(1, c) for c in chunk],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": zarr_dtype(dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    laid.given(f"{folder}/.zarray", json.dumps(said).encode())


def _describe(laid: _Laid, tree: _Tree) -> None:
    """`_METADATA` of a tree, and the metadata of its arrays."""
    described, arrays = {}, []
    for path, held in tree.leaves.items():
        keys = [{"key": key, "key_type": kind} for key, kind in path]
        value: dict[str, Any] = {"value_type": "None", "skip_deserialize": True}
        if held is not None:
            chunk = held[1]
            value = {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(chunk),
            }
            arrays.append(
                {
                    "array_metadata": {
                        "param_name": ".".join(key for key, _ in path),
                        "write_shape": list(chunk),
                        "chunk_shape": list(chunk),
                        "ext_metadata": None,
                    }
                }
            )
        described[str(tuple(key for key, _ in path))] = {
            "key_metadata": keys,
            "value_metadata": value,
        }
    said = {
        "tree_metadata": described,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    laid.given(f"{tree.folder}{TREE}", json.dumps(said).encode())
    laid.given(
        f"{tree.folder}array_metadatas/process_0", json.dumps({"array_metadatas": arrays}).encode()
    )
