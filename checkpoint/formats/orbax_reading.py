"""orbax read: trees, what their leaves mean, and where the chunks of their arrays are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir import CorruptCheckpoint, InvalidInput
from ..boxes import Boxes, row_major
from ..contents import EXP_AVG, Array, Contents, Job, Key, Record
from ..dtypes import as_numpy, itemsize, named
from ..paths import sizes, within
from ..pickles import encode, small
from . import Options
from .orbax_tensorstore import Store
from .orbax_trees import (
    CHECKPOINT,
    DICT,
    EMPTY,
    ORBAX,
    STRINGS,
    TREE,
    Leaf,
    Meanings,
    hyperparameters,
    leaves,
    step_of,
)

_NO_GROUPS = (
    "the tree tells no learning rate: where a format keeps param groups they have defaults, "
    "set your own before going on"
)

_ZARR = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "bfloat16": "BF16", "<i8": "I64", "<i4": "I32",
    "<i2": "I16", "|i1": "I8", "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64",
    "|b1": "BOOL", "<c8": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def steps_of(root: Path) -> list[Path]:
    """The steps of a CheckpointManager, the newest first."""
    found = [p for p in root.glob("*") if p.name.rpartition("_")[2].isdigit() and items_of(p)]
    return sorted(found, key=lambda path: -int(path.name.rpartition("_")[2]))


def items_of(root: Path) -> list[str]:
    """The trees of a checkpoint: "" if it is one itself."""
    if (root / TREE).is_file():
        return [""]
    return sorted(path.parent.name for path in root.glob(f"*/{TREE}"))


def read(root: Path, options: Options) -> Contents:
    """As `orbax.read`."""
    given, root = root, _chosen(root, options.tag)
    if any(root.parent.glob(f"{root.name}.orbax-checkpoint-tmp*")):
        raise CorruptCheckpoint(f"{root}: orbax did not finish writing it; load an earlier step")
    _check_items(root)
    trees = {item: _json(root / item / TREE) for item in items_of(root)}
    sources = {item: _Source(root, item, tree) for item, tree in trees.items()}
    made = _Made([], {}, {}, {})
    every = [leaf for item, tree in trees.items() for leaf in leaves(tree, item)]
    meanings = Meanings(every)
    remembered: dict[str, list[Any]] = {item: [] for item in trees}
    for leaf in every:
        what = made.leaf(leaf, sources[leaf.item], meanings)
        remembered[leaf.item].append([[list(key) for key in leaf.keys], leaf.kind, what])
    others: dict[str, Any] = {
        path.parent.name: encode(_json(path)) for path in sorted(root.glob("*/metadata"))
    }
    step = step_of(made.counters)
    handlers = _handlers(root, list(trees))
    others[ORBAX] = {
        "step": step,
        "in_step": root != given,
        "beside": sorted(others),
        "trees": [
            {"item": item, "handler": handlers[item], "leaves": remembered[item]} for item in trees
        ],
    }
    if step is None and isinstance(others.get("progress"), dict):
        step = others["progress"].get("step")
    groups = hyperparameters(made.values)
    notes: tuple[str, ...] = ()
    if not groups and any(state == EXP_AVG for state, _ in made.arrays):
        notes = (_NO_GROUPS,)
    job = Job(step, groups, others=others)
    return Contents("orbax", root, sizes(root), made.records, made.arrays, job, notes=notes)


@dataclass
class _Made:
    """What the leaves of all trees make: arrays with their records; counters and other numbers by
    their paths."""

    records: list[Record]
    arrays: dict[Key, Array]
    counters: dict[tuple[str, ...], int]
    values: dict[tuple[str, ...], Any]

    def leaf(self, leaf: Leaf, source: _Source, meanings: Meanings) -> Any:
        """Takes a leaf; returns how it is remembered: as an array's key, or as its value."""
        if leaf.kind in EMPTY:
            return None
        if leaf.kind == "string":
            return {"value": source.string(leaf)}
        shape, dtype = source.described(leaf.stored)
        extra = source.extra(leaf.stored)
        key = meanings.of(leaf, shape, prod(shape) * itemsize(dtype))
        if key is not None:
            self.arrays[key] = source.array(leaf, key, self.records)
            return {"array": list(key), **extra}
        value = small(dtype, source.value(leaf.stored))
        if not shape:
            number = value.array().item()
            self.values[leaf.called_path] = number
            if isinstance(number, int) and not isinstance(number, bool):
                self.counters[leaf.called_path] = number
        return {"value": encode(value), **extra}


def _check_items(root: Path) -> None:
    """All trees that orbax says it saved are there."""
    if not (root / CHECKPOINT).is_file():
        return
    said = _json(root / CHECKPOINT)
    handlers = said.get("item_handlers") if isinstance(said, dict) else None
    for item, handler in handlers.items() if isinstance(handlers, dict) else ():
        is_tree = "StandardCheckpointHandler" in str(handler) or "PyTree" in str(handler)
        if is_tree and not within(root, f"{item}/{TREE}").is_file():
            raise CorruptCheckpoint(
                f"{root / item / TREE}: missing; {CHECKPOINT} names {item}. Restore it from "
                "another copy, or load an earlier step"
            )


def _chosen(root: Path, tag: str) -> Path:
    if items_of(root) and not tag:
        return root
    steps = steps_of(root)
    for step in steps:
        if not tag or step.name == tag:
            return step
    raise InvalidInput(
        f"{root}: no step {tag!r} in it; it has {', '.join(step.name for step in steps) or 'none'}"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{path}: no JSON ({error}); restore it from another copy"
        ) from None


def _handlers(root: Path, items: Sequence[str]) -> dict[str, str]:
    """The handler of every tree, as orbax says it."""
    said = _json(root / CHECKPOINT) if (root / CHECKPOINT).is_file() else {}
    named = said.get("item_handlers") if isinstance(said, dict) else None
    each = named if isinstance(named, dict) else dict.fromkeys(items, named)
    return {item: str(each.get(item) or "") for item in items}


class _Source:
    """The arrays of one tree: plain chunks as they lie, others through tensorstore."""

    def __init__(self, root: Path, item: str, tree: Mapping[str, Any]) -> None:
        self._root, self._item = root, item
        self._folder = within(root, item) if item else root
        self._ocdbt = bool(tree.get("use_ocdbt", True))
        self._driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        self._store: Store | None = None
        self._strings: Any = None
        self._extras: dict[str, Any] | None = None

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store(self._folder, self._ocdbt, self._driver)
        return self._store

    def _plain(self, name: str) -> Mapping[str, Any] | None:
        """The description of an array whose chunks are bytes as they are."""
        if self._ocdbt or self._driver != "zarr":
            return None
        path = within(self._folder, f"{name}/.zarray")
        said: Mapping[str, Any] = _json(path)
        if not _describes_array(said):
            raise CorruptCheckpoint(f"{path}: describes no array; restore it from another copy")
        raw = said.get("compressor") is None and not said.get("filters") and said["order"] == "C"
        return said if raw else None

    def string(self, leaf: Leaf) -> Any:
        """The value of a string, which is beside the arrays."""
        if self._strings is None:
            self._strings = _json(self._folder / STRINGS)
        if not isinstance(self._strings, dict) or leaf.stored not in self._strings:
            raise CorruptCheckpoint(f"{self._folder / STRINGS}: {leaf.stored} is not in it")
        return self._strings[leaf.stored]

    def extra(self, name: str) -> dict[str, Any]:
        """What orbax notes of an array beside its shape: of which kind a random key is."""
        if self._extras is None:
            self._extras = {}
            for path in sorted(self._folder.glob("array_metadatas/process_*")):
                said = _json(path)
                for one in said.get("array_metadatas", ()) if isinstance(said, dict) else ():
                    about = one.get("array_metadata", {})
                    if about.get("ext_metadata"):
                        self._extras[str(about.get("param_name"))] = about["ext_metadata"]
        return {"ext": self._extras[name]} if name in self._extras else {}

    def described(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of an array."""
        said = self._plain(name)
        if said is not None:
            return tuple(said["shape"]), _dtype(said["dtype"], name)
        opened = self.store.array(name)
        return tuple(opened.shape), named(opened.dtype.name)

    def value(self, name: str) -> NDArray[Any]:
        """All of a small array."""
        shape, dtype = self.described(name)
        records: list[Record] = []
        array = self.array(Leaf(self._item, ((name, DICT),), ""), ("", name), records)
        found = np.zeros(shape, as_numpy(dtype))
        table = array.where()
        for begin, size, stride, number in zip(
            table.begin.tolist(), table.size.tolist(), table.stride.tolist(), table.record.tolist(),
            strict=True,
        ):  # fmt: skip
            record = records[number]
            held = np.empty(record.nbytes, np.uint8)
            if record.read is not None:
                record.read(0, held)
            else:
                held[:] = np.fromfile(within(self._root, record.file), np.uint8)
            box = np.lib.stride_tricks.as_strided(
                held.view(found.dtype), size, [step * found.itemsize for step in stride]
            )
            found[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] = box
        return found

    def array(self, leaf: Leaf, key: Key, records: list[Record]) -> Array:
        said = self._plain(leaf.stored)
        if said is not None:
            shape, chunk = tuple(said["shape"]), tuple(said["chunks"])
            dtype = _dtype(said["dtype"], leaf.stored)
        else:
            opened = self.store.array(leaf.stored)
            shape, dtype = tuple(opened.shape), named(opened.dtype.name)
            chunk = tuple(opened.chunk_layout.read_chunk.shape or ())  # None for scalars
        rows = []
        for at in product(*(range(-(-n // c)) for n, c in zip(shape, chunk, strict=True))):
            begin = tuple(k * c for k, c in zip(at, chunk, strict=True))
            size = tuple(min(c, n - b) for b, c, n in zip(begin, chunk, shape, strict=True))
            if said is not None:
                records.append(self._chunk(leaf.stored, said, at, prod(chunk) * itemsize(dtype)))
                stride = row_major(chunk)
            else:
                file = f"{self._item}/{TREE}".lstrip("/")
                read = self.store.reader(leaf.stored, begin, size, dtype)
                records.append(Record(file, 0, prod(size) * itemsize(dtype), read=read))
                stride = row_major(size)
            rows.append((begin, size, stride, len(records) - 1, 0))
        table = Boxes.of(rows, len(shape))
        return Array(*key, shape, dtype, lambda: table)

    def _chunk(self, name: str, said: Mapping[str, Any], at: Sequence[int], nbytes: int) -> Record:
        separator = said.get("dimension_separator", ".")
        key = separator.join(str(k) for k in at) or "0"
        file = "/".join(filter(None, (self._item, name, key)))
        path = within(self._root, file)
        if not path.is_file() or path.stat().st_size != nbytes:
            raise CorruptCheckpoint(
                f"{path}: missing, or not of {nbytes} bytes as .zarray says; restore it from "
                "another copy"
            )
        return Record(file, 0, nbytes)


def _describes_array(said: Any) -> bool:
    """Whether `.zarray` says what is needed of it."""
    if not isinstance(said, dict) or not {"shape", "chunks", "dtype", "order"} <= said.keys():
        return False
    shape, chunks = said["shape"], said["chunks"]
    if not isinstance(shape, list) or not isinstance(chunks, list) or len(shape) != len(chunks):
        return False
    return all(
        type(n) is int and n >= 0 and type(c) is int and c > 0
        for n, c in zip(shape, chunks, strict=True)
    )


def _dtype(said: str, name: str) -> str:
    if said not in _ZARR:
        raise InvalidInput(f"{name}: elements of {said!r}; expected one of {', '.join(_ZARR)}")
    return _ZARR[said]


def zarr_dtype(dtype: str) -> str:
    """The name of a dtype in `.zarray`."""
    return next(said for said, ours in _ZARR.items() if ours == dtype)
