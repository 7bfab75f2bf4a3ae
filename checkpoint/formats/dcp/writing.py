"""A DCP directory laid out: an item per box, in the file of the rank that has it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

from ....ir import InvalidInput
from ...boxes import Boxes, row_major
from ...contents import MASTER, Array, Digest, Given, Job, Key, Record, Target, Wanted
from ...dtypes import itemsize
from ...factor_boxes import Split, shard
from ...pickles import (
    Size,
    TorchLayout,
    decode,
    dumps,
    hole,
    lay_out,
    scalar,
    small,
    stand_in,
)
from ...pickles.foreign import StandIn, torch_name
from ...placement import places, splits_at
from .. import Options
from .items import ALIGNMENT_BYTES
from .metadata import FILE, MODULE, SEAL, sealed
from .names import STATES

ADAMW = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
"""What torch's AdamW keeps in a param group beside numbers, at its defaults: DCP loads only what
is there."""

LEARNING_RATE = 1e-3
NUMBERS = {"betas": {"$tuple": [0.9, 0.999]}, "eps": 1e-8, "weight_decay": 1e-2}
"""And its numbers, for sources that tell none: a group without them loads into no optimizer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be stored: its key and path, and for every rank the boxes that it writes."""

    key: str
    path: tuple[Any, ...]
    wanted: Wanted
    boxes: Mapping[int, Sequence[tuple[tuple[int, ...], tuple[int, ...]]]]


@dataclass(frozen=True, slots=True)
class Thing:
    """A small value to be stored as an object, or as a tensor if it is one."""

    key: str
    path: tuple[Any, ...]
    value: Any


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """As `dcp.target`."""
    style = options.flags.get("names", "state_dict")
    if style not in ("state_dict", "emitted"):
        raise InvalidInput(f"names={style!r}: expected state_dict or emitted")
    ranks = prod(options.mesh.values())
    loads = [0] * ranks
    entries = []
    for one in wanted:
        key, path = _key(one, style)
        entries.append(Entry(key, path, one, pieces(one, options.mesh, loads)))
    if style == "emitted" and "lr" in options.flags:
        raise InvalidInput("--set lr: our programs (names=emitted) keep no param groups")
    lr = float(options.flags.get("lr", LEARNING_RATE))
    things = _emitted(job) if style == "emitted" else _state_dict(wanted, job, lr)
    weights = {one.name: one for one in wanted if one.state == "weight"}
    tied = {
        _key(replace(weights[name], name=alias), style): _key(weights[name], style)[0]
        for alias, name in job.others.get("shared_params", {}).items()
        if name in weights and alias not in weights
    }
    return lay_out_directory(entries, things, "dcp", tied=tied)


def _key(wanted: Wanted, style: str) -> tuple[str, tuple[Any, ...]]:
    if wanted.state in ("weight", "buffer"):
        path: tuple[Any, ...] = ("model", wanted.name) if style == "state_dict" else (wanted.name,)
        return ".".join(path), path
    if style == "emitted":
        if wanted.state not in ("exp_avg", "exp_avg_sq"):
            raise InvalidInput(
                f"{wanted.state} of {wanted.name}: our programs keep weights, exp_avg and "
                "exp_avg_sq; use names=state_dict, or leave it out"
            )
        key = f"optimizer.{wanted.state}.{wanted.name}"
        return key, (key,)
    state = "master" if wanted.state == MASTER else wanted.state
    if state not in STATES:
        raise InvalidInput(
            f"state {wanted.state!r} of {wanted.name}: DCP's readers know {', '.join(STATES)}"
        )
    path = ("optim", "state", wanted.name, state)
    return ".".join(path), path


def pieces(
    wanted: Wanted, mesh: Mapping[str, int], loads: list[int]
) -> dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The boxes that each rank writes, every element once.

    Axes in `splits` split as they say; then all others split the rows that are left, as FSDP2
    does. `loads` (bytes by rank) grow: what cannot be split goes to the rank with least.
    """
    for axis, _ in wanted.splits:
        if axis.partition(":")[0] not in mesh:
            raise InvalidInput(f"{wanted.name} is split along {axis!r}, which is no axis of {mesh}")
    width = itemsize(wanted.dtype)
    held: dict[tuple[Split, ...], Boxes] = {}
    ranks: dict[tuple[Split, ...], list[int]] = {}
    for rank, at in enumerate(places(mesh, list(mesh))):
        own = tuple(splits_at(wanted.splits, mesh, at))
        if own not in held:
            held[own] = shard(wanted.dims, wanted.sizes, own)
        ranks.setdefault(own, []).append(rank)
    found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for own, boxes in held.items():
        for begin, size in zip(boxes.begin.tolist(), boxes.size.tolist(), strict=True):
            for rank, box in _rows(tuple(begin), tuple(size), ranks[own], loads):
                found.setdefault(rank, []).append(box)
                loads[rank] += prod(box[1]) * width
    return found


def _rows(
    begin: tuple[int, ...], size: tuple[int, ...], ranks: Sequence[int], loads: Sequence[int]
) -> list[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A box cut along its first dim among ranks, in pieces of ⌈rows / ranks⌉."""
    if not size or len(ranks) == 1:
        return [(min(ranks, key=lambda rank: loads[rank]), (begin, size))]
    each = -(-size[0] // len(ranks))
    found = []
    for k, rank in enumerate(ranks):
        low = min(k * each, size[0])
        rows = min(each, size[0] - low)
        if rows:
            found.append((rank, ((begin[0] + low, *begin[1:]), (rows, *size[1:]))))
    return found


def _state_dict(wanted: Sequence[Wanted], job: Job, lr: float) -> list[Thing]:
    """The rest of `{"model": …, "optim": …}` and what stood beside them."""
    things: list[Thing] = []
    path: tuple[Any, ...]
    moments = list(
        dict.fromkeys(w.name for w in wanted if w.state in ("exp_avg", "momentum_buffer"))
    )
    steps = job.others.get("steps", {})
    if job.step is not None:
        for name in moments:
            path = ("optim", "state", name, "step")
            step = float(steps.get(name, job.step))
            things.append(Thing(".".join(path), path, small("F32", step)))
    if moments:
        groups = [
            group if "lr" in group else {"lr": lr, **NUMBERS, **group}
            for group in job.param_groups or ({},)
        ]
        for k, group in enumerate(grouped(groups, moments)):
            for entry, value in group.items():
                path = ("optim", "param_groups", k, entry)
                things.append(Thing(".".join(map(str, path)), path, value))
    for path, value in _leaves({k: v for k, v in job.others.items() if k != "steps"}, ()):
        things.append(Thing(".".join(path), path, value))
    return things


def grouped(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Param groups as torch's AdamW has them, with the names of their parameters.

    Raises InvalidInput where it does not follow which parameter is in which group.
    """
    if not groups:
        return []
    made = [{**ADAMW, **{k: decode(v) for k, v in group.items()}} for group in groups]
    if len(made) == 1:
        made[0]["params"] = list(names)
        return made
    known = set(names)
    held: list[str] = []
    for group in made:
        members = group.get("params", [])
        if not all(isinstance(name, str) and name in known for name in members):
            raise InvalidInput(
                f"{len(groups)} param groups, of which it is not known what parameters they have; "
                "give the source's layout names, or convert the weights only"
            )
        held.extend(members)
    if sorted(held) != sorted(known):
        raise InvalidInput("the param groups do not hold every trained parameter once")
    return made


def _leaves(value: Mapping[str, Any], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """A nested dict as DCP flattens it: to values that are no dicts (encoded ones are values)."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, item in value.items():
        plain = isinstance(item, dict) and item and not next(iter(item)).startswith("$")
        if plain:
            found.extend(_leaves(item, (*path, key)))
        else:
            found.append(((*path, key), decode(item)))
    return found


def _emitted(job: Job) -> list[Thing]:
    """Progress as our programs keep it."""
    train = job.others.get("train", {})
    said = {"step": job.step or 0, "samples": 0, "seed": 0}
    things = []
    for name, default in said.items():
        kept = scalar(decode(train[name])) if name in train and name != "step" else default
        value = small("I64", default if kept is None else int(kept))
        things.append(Thing(f"train.{name}", (f"train.{name}",), value))
    return things


def lay_out_directory(
    entries: Sequence[Entry],
    things: Sequence[Thing],
    format_name: str,
    folder: str = "",
    tied: Mapping[tuple[str, tuple[Any, ...]], str] = MappingProxyType({}),
) -> Target:
    """The directory of some tensors and values; `.metadata` comes last.

    `tied`: keys (with their paths) under which the tensors of other keys are found too.
    """
    at: dict[int, int] = {}
    layouts: list[TorchLayout] = []
    records: list[Record] = []
    described: dict[str, Any] = {}
    places: list[tuple[str, tuple[int, ...] | None, TorchLayout]] = []
    arrays: dict[Key, Array] = {}

    def item(rank: int, value: Any) -> TorchLayout:
        file = f"{folder}__{rank}_0.distcp"
        made = lay_out(file, value, begin=at.get(rank, 0))
        at[rank] = -(-(made.begin + made.nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        layouts.append(made)
        records.extend(made.records.values())
        return made

    for thing in things:
        made = item(0, thing.value)
        shape = getattr(thing.value, "shape", None)
        if shape is None:
            described[thing.key] = stand_in(MODULE, "BytesStorageMetadata", state={})
            places.append((thing.key, None, made))
        else:
            zeros = (0,) * len(shape)
            described[thing.key] = _tensor(thing.value.dtype, shape, [(zeros, shape)])
            places.append((thing.key, zeros, made))
    for entry in entries:
        rows, boxes = [], []
        for rank, held in entry.boxes.items():
            for begin, size in held:
                value = hole(entry.wanted.dtype, size)
                places.append((entry.key, begin, item(rank, value)))
                boxes.append((begin, size))
                if prod(size):
                    rows.append((begin, size, row_major(size), len(records) - 1, 0))
        described[entry.key] = _tensor(entry.wanted.dtype, entry.wanted.shape, boxes)
        table = Boxes.of(rows, len(entry.wanted.shape))
        arrays[entry.wanted.key] = Array(
            entry.wanted.state, entry.wanted.name, entry.wanted.shape, entry.wanted.dtype,
            partial(_given, table),
        )  # fmt: skip
    paths = {thing.key: thing.path for thing in things}
    paths |= {entry.key: entry.path for entry in entries}
    for (alias, path), key in tied.items():
        paths[alias], described[alias] = path, described[key]
        places += [(alias, begin, layout) for name, begin, layout in places if name == key]
    pickled = dumps(_metadata(described, places, paths, folder))[0]
    index_bytes = len(sealed(pickled, [0] * len(layouts)))
    # The last item ends its file: padding follows only where another item does.
    nbytes = {layout.file: layout.begin + layout.nbytes for layout in layouts}
    literals = [given for layout in layouts for given in layout.literals]

    def finish(digests: Sequence[Digest | None]) -> list[Given]:
        found: list[Given] = []
        crcs: dict[tuple[str, int], int] = {}
        done = 0
        for layout in layouts:
            found.extend(layout.ending(digests[done : done + len(layout.records)]))
            crcs[layout.file, layout.begin] = zlib.crc32(found[-1].data)
            done += len(layout.records)
        index = sealed(pickled, [crc for _, crc in sorted(crcs.items())])
        return [*found, Given(folder + FILE, 0, index)]

    return Target(
        format_name,
        {**nbytes, folder + FILE: index_bytes},
        records,
        ["crc32"] * len(records),
        arrays,
        literals,
        finish,
    )


def _given(table: Boxes) -> Boxes:
    return table


def _metadata(
    described: Mapping[str, Any],
    places: Sequence[tuple[str, tuple[int, ...] | None, TorchLayout]],
    paths: Mapping[str, tuple[Any, ...]],
    folder: str,
) -> StandIn:
    counts: dict[str, int] = {}
    storage = {}
    for key, begin, layout in places:
        index = counts[key] = counts.get(key, -1) + 1
        said: dict[str, Any] = {"fqn": key, "offset": None, "index": None}
        if begin is not None:
            said |= {"offset": Size(begin), "index": index}
        info = {
            "relative_path": layout.file.removeprefix(folder),
            "offset": layout.begin,
            "length": layout.nbytes,
        }
        storage[stand_in(MODULE, "MetadataIndex", state=said)] = stand_in(
            "torch.distributed.checkpoint.filesystem", "_StorageInfo", state=info
        )
    state = {
        "state_dict_metadata": dict(described),
        "planner_data": dict(paths),
        "storage_data": storage,
        "storage_meta": None,
        "version": "1.0.0",
        **SEAL,
    }
    return stand_in(MODULE, "Metadata", state=state)


def _tensor(
    dtype: str, shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> StandIn:
    layout = stand_in("torch.serialization", "_get_layout", "torch.strided", called=True)
    memory = stand_in(MODULE, "_MEM_FORMAT_ENCODING", 0, called=True)
    properties = stand_in(
        MODULE, "TensorProperties", state=(torch_name(dtype), layout, False, memory, False)
    )
    chunks = [
        stand_in(
            MODULE, "ChunkStorageMetadata", state={"offsets": Size(begin), "sizes": Size(size)}
        )
        for begin, size in boxes
    ]
    state = {"properties": properties, "size": Size(shape), "chunks": chunks}
    return stand_in(MODULE, "TensorStorageMetadata", state=state)
