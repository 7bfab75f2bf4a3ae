"""orbax laid out: plain zarr, a file per chunk, with the trees' descriptions beside them."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from ...ir import InvalidInput
from ..boxes import Boxes, row_major
from ..contents import (
    BUFFER,
    EXP_AVG,
    EXP_AVG_SQ,
    WEIGHT,
    Array,
    Digest,
    Given,
    Job,
    Key,
    Record,
    Target,
    Wanted,
)
from ..dtypes import itemsize
from ..pickles import Tensor, decode, scalar, small
from ..placement import shard_shape
from . import Options
from .orbax_reading import zarr_dtype
from .orbax_trees import CHECKPOINT, DICT, EMPTY, ORBAX, SEQUENCE, STRINGS, TREE, Keys

CHUNK_BYTES = 128 << 20
"""Of a chunk at most: orbax reads whole chunks."""

_ARRAY = "jax.Array"
_HANDLERS = "orbax.checkpoint._src.handlers"
_STANDARD = f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler"
_JSON = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"

_ALIKE = {WEIGHT: BUFFER, BUFFER: WEIGHT}

_ON_ALL = json.dumps(
    {"sharding_type": "NamedSharding", "shape": [-1], "axis_names": ["all"], "partition_spec": []}
)
"""For who restores without saying where to: a copy on each of whatever devices there are."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What a leaf is: its kind, the chunks of an array, what else orbax notes of it."""

    kind: str
    chunk: tuple[int, ...] = ()
    ext: Mapping[str, Any] | None = None


_NOTHING = _Held("None")


@dataclass
class _Tree:
    """One tree: its leaves by path, and the values of its strings."""

    folder: str
    handler: str = _STANDARD
    leaves: dict[Keys, _Held] = field(default_factory=dict)
    strings: dict[str, Any] = field(default_factory=dict)


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
    remembered = job.others.get(ORBAX)
    known = remembered.get("trees") if isinstance(remembered, Mapping) else None
    if style == "source" and not known:
        raise InvalidInput(
            "--set tree=source: the source is no orbax checkpoint, nor was it one before; expected "
            "emitted, standard or train_state"
        )
    laid = _Laid()
    alone = isinstance(known, list) and [tree.get("item") for tree in known] == [""]
    if style == "source" or (style == "standard" and alone):
        folder = f"{job.step or 0}/" if job.others[ORBAX]["in_step"] else ""
        trees = _as_remembered(laid, wanted, job, options, folder)
        names = job.others[ORBAX].get("beside", ())
        beside = {name: decode(job.others.get(name)) for name in names}
    else:
        trees, folder = _as_made(laid, wanted, job, options, style)
        beside = {"progress": _progress(job)} if style == "emitted" else {}
    for tree in trees.values():
        _describe(laid, tree)
    for name, value in beside.items():
        laid.given(f"{folder}{name}/metadata", json.dumps(value).encode())
    each = {**{item: tree.handler for item, tree in trees.items()}, **dict.fromkeys(beside, _JSON)}
    now = time.time_ns()
    ending = {
        "item_handlers": each[""] if list(each) == [""] else each,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    last = Given(f"{folder}{CHECKPOINT}", 0, json.dumps(ending).encode())

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


def _progress(job: Job) -> dict[str, Any]:
    """What our programs keep beside the trees."""
    found = {"step": job.step or 0, "samples": 0, "seed": 0}
    own = job.others.get("progress")
    if isinstance(own, Mapping):
        found |= {k: v for k, v in own.items() if k in found and k != "step"}
    return found


def _as_made(
    laid: _Laid, wanted: Sequence[Wanted], job: Job, options: Options, style: str
) -> tuple[dict[str, _Tree], str]:
    """The trees of our programs, or one tree, and the folder that they are in."""
    step = job.step or 0
    folder = f"{step}/" if style == "emitted" else ""
    lead: dict[str, Keys] = {WEIGHT: (("params", DICT),), EXP_AVG: (("opt_state", DICT),)}
    if style == "emitted":
        lead = {WEIGHT: (), EXP_AVG: ()}
        trees = {"params": _Tree(f"{folder}params/"), "state": _Tree(f"{folder}state/")}
        held = {WEIGHT: trees["params"], EXP_AVG: trees["state"]}
    else:
        trees = {"": _Tree("")}
        held = dict.fromkeys((WEIGHT, EXP_AVG), trees[""])
    for one in wanted:
        tree, path = _placed(one, held, lead, bool(options.flags.get("nested", False)))
        _array(laid, tree, path, one, options)
    if any(one.state == EXP_AVG for one in wanted):
        count, state, first = small("I32", step), held[EXP_AVG], lead[EXP_AVG]
        _value(laid, state, (*first, ("0", SEQUENCE), ("count", DICT)), count)
        state.leaves[*first, ("1", SEQUENCE)] = _NOTHING
        # With a schedule the last part of optax.adamw counts too; our programs always have one.
        if options.flags.get("schedule", style == "emitted"):
            _value(laid, state, (*first, ("2", SEQUENCE), ("count", DICT)), count)
        else:
            state.leaves[*first, ("2", SEQUENCE)] = _NOTHING
    if style == "train_state":
        _value(laid, trees[""], (("step", DICT),), small("I32", step))
    return {item: tree for item, tree in trees.items() if tree.leaves}, folder


def _as_remembered(
    laid: _Laid, wanted: Sequence[Wanted], job: Job, options: Options, folder: str
) -> dict[str, _Tree]:
    """The trees that an orbax source had. Counters that stood at the optimizer's step follow it;
    leaves whose arrays are left out are left out. Raises InvalidInput where an array has no place
    in them."""
    remembered = job.others[ORBAX]
    by_key = {one.key: one for one in wanted}
    trees: dict[str, _Tree] = {}
    for said in remembered["trees"]:
        item = str(said["item"])
        tree = _Tree(f"{folder}{item}/" if item else folder, said["handler"] or _STANDARD)
        trees[item] = tree
        for keys, kind, what in said["leaves"]:
            path: Keys = tuple((str(key), int(of)) for key, of in keys)
            if what is None:
                tree.leaves[path] = _Held(kind)
            elif "array" in what:
                state, name = what["array"]
                one = by_key.pop((state, name), None)
                if one is None and state in _ALIKE:  # some formats do not tell them apart
                    one = by_key.pop((_ALIKE[state], name), None)
                if one is not None:
                    _array(laid, tree, path, one, options, kind, what.get("ext"))
            elif kind == "string":
                tree.leaves[path] = _Held(kind)
                tree.strings[_name(path)] = what["value"]
            else:
                value = decode(what["value"])
                if job.step is not None and scalar(value) == remembered["step"] and not value.shape:
                    value = small(value.dtype, job.step)
                _value(laid, tree, path, value, kind, what.get("ext"))
    if by_key:
        state, name = next(iter(by_key))
        raise InvalidInput(
            f"{state} of {name}: the source's tree has no place for it; leave it out with --states"
        )
    return trees


def _name(path: Keys) -> str:
    return ".".join(key for key, _ in path)


def _placed(
    one: Wanted, trees: Mapping[str, _Tree], lead: Mapping[str, Keys], nested: bool
) -> tuple[_Tree, Keys]:
    parts = one.name.split(".") if nested else [one.name]
    own: Keys = tuple((part, DICT) for part in parts)
    if one.state in (WEIGHT, BUFFER):
        return trees[WEIGHT], (*lead[WEIGHT], *own)
    field_name = {EXP_AVG: "mu", EXP_AVG_SQ: "nu"}.get(one.state)
    if field_name is None:
        raise InvalidInput(
            f"{one.state} of {one.name}: optax.adamw keeps exp_avg and exp_avg_sq; leave it "
            "out with --states weight,exp_avg,exp_avg_sq"
        )
    inside: Keys = (("0", SEQUENCE), (field_name, DICT))
    return trees[EXP_AVG], (*lead[EXP_AVG], *inside, *own)


def _array(
    laid: _Laid,
    tree: _Tree,
    path: Keys,
    one: Wanted,
    options: Options,
    kind: str = _ARRAY,
    ext: Mapping[str, Any] | None = None,
) -> None:
    shape = one.shape
    axes = [axis.partition(":")[0] for axis, _ in one.splits]
    chunk = list(shard_shape(one, options.mesh, dict.fromkeys(axes, 0)))
    limit = int(options.flags.get("chunk_bytes", CHUNK_BYTES))
    for dim in range(len(chunk)):
        while prod(chunk) * itemsize(one.dtype) > limit and chunk[dim] > 1:
            chunk[dim] = -(-chunk[dim] // 2)
    name = _name(path)
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
    tree.leaves[path] = _Held(kind, tuple(chunk), ext)


def _value(
    laid: _Laid,
    tree: _Tree,
    path: Keys,
    value: Tensor,
    kind: str = _ARRAY,
    ext: Mapping[str, Any] | None = None,
) -> None:
    """A small array whose values are known."""
    folder = f"{tree.folder}{_name(path)}"
    _zarray(laid, folder, value.shape, value.shape, value.dtype)
    place = ".".join("0" for _ in value.shape) or "0"
    laid.given(f"{folder}/{place}", value.array().tobytes())
    tree.leaves[path] = _Held(kind, tuple(value.shape), ext)


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
        value: dict[str, Any] = {
            "value_type": held.kind,
            "skip_deserialize": held.kind in EMPTY,
        }
        if held.kind == _ARRAY:
            value["write_shape"] = list(held.chunk)
            about = {
                "param_name": _name(path),
                "write_shape": list(held.chunk),
                "chunk_shape": list(held.chunk),
                "ext_metadata": held.ext,
            }
            arrays.append({"array_metadata": about})
        described[str(tuple(key for key, _ in path))] = {
            "key_metadata": [{"key": key, "key_type": kind} for key, kind in path],
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
    if tree.strings:
        laid.given(f"{tree.folder}{STRINGS}", json.dumps(tree.strings).encode())
    names = [_name(path) for path, held in tree.leaves.items() if held.kind == _ARRAY]
    shardings = {base64.b64encode(name.encode()).decode(): _ON_ALL for name in names}
    laid.given(f"{tree.folder}_sharding", json.dumps(shardings).encode())
    laid.given(
        f"{tree.folder}array_metadatas/process_0", json.dumps({"array_metadatas": arrays}).encode()
    )
