"""orbax read: trees, what their leaves mean, and where the chunks of their arrays are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...ir import CorruptCheckpoint, InvalidInput
from ..boxes import Boxes, row_major
from ..contents import EXP_AVG, EXP_AVG_SQ, WEIGHT, Array, Contents, Job, Key, Record
from ..dtypes import as_numpy, itemsize, named
from ..paths import sizes, within
from ..pickles import encode
from . import Options
from .orbax_tensorstore import Store

TREE, CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"
MOMENTS = {"mu": EXP_AVG, "nu": EXP_AVG_SQ}

_PARAMS = ("params", "model")
_ZARR = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "bfloat16": "BF16", "<i8": "I64", "<i4": "I32",
    "<i2": "I16", "|i1": "I8", "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64",
    "|b1": "BOOL", "<c8": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Leaf:
    """An array of a tree: the keys that lead to it, and the name under which it is stored."""

    item: str
    path: tuple[str, ...]

    @property
    def stored(self) -> str:
        return ".".join(self.path)


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
    root = _chosen(root, options.tag)
    if any(root.parent.glob(f"{root.name}.orbax-checkpoint-tmp*")):
        raise CorruptCheckpoint(f"{root}: orbax did not finish writing it; load an earlier step")
    records: list[Record] = []
    arrays: dict[Key, Array] = {}
    step: int | None = None
    others: dict[str, Any] = {}
    _check_items(root)
    for item in items_of(root):
        tree = _json(root / item / TREE)
        store = _Source(root, item, tree)
        for leaf in _leaves(tree, item):
            state, name = meaning(leaf)
            if state in ("step", "other"):
                value = store.scalar(leaf.stored)
                if state == "step" and isinstance(value, int):
                    step = value if step is None else max(step, value)
                else:
                    others[".".join(filter(None, (item, leaf.stored)))] = encode(value)
                continue
            array = store.array(leaf, state, name, records)
            if array.key in arrays:
                raise CorruptCheckpoint(f"{root / item / TREE}: {state} of {name} twice")
            arrays[array.key] = array
    for path in sorted(root.glob("*/metadata")):
        others[path.parent.name] = encode(_json(path))
    if step is None and isinstance(others.get("progress"), dict):
        step = others["progress"].get("step")
    job = Job(step, others=others)
    return Contents("orbax", root, sizes(root), records, arrays, job)


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


def _leaves(tree: Any, item: str) -> Iterator[Leaf]:
    described = tree.get("tree_metadata") if isinstance(tree, dict) else None
    if not isinstance(described, dict):
        raise CorruptCheckpoint(f"{item or '.'}/{TREE}: no tree_metadata in it")
    for value in described.values():
        try:
            kind = value["value_metadata"]["value_type"]
            skipped = value["value_metadata"].get("skip_deserialize")
            path = tuple(str(key["key"]) for key in value["key_metadata"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{item or '.'}/{TREE}: damaged ({error!r})") from None
        if path and not skipped and kind not in ("None", "string", "Dict", "List", "Tuple"):
            yield Leaf(item, path)


def meaning(leaf: Leaf) -> tuple[str, str]:
    """(state, name) of a leaf: optax's moments by their fields, parameters without the key
    `params`; ("step", "") of a count, ("other", …) of what is none of these."""
    path = leaf.path
    for at, key in enumerate(path[:-1]):
        if key in MOMENTS:
            return MOMENTS[key], ".".join(_bare(path[at + 1 :]))
    if path[-1] in ("count", "step"):
        return "step", ""
    if leaf.item in ("", *_PARAMS) or path[0] in _PARAMS:
        return WEIGHT, ".".join(_bare(path))
    return "other", leaf.stored


def _bare(path: Sequence[str]) -> Sequence[str]:
    return path[1:] if path[0] in _PARAMS and len(path) > 1 else path


class _Source:
    """The arrays of one tree: plain chunks as they lie, others through tensorstore."""

    def __init__(self, root: Path, item: str, tree: Mapping[str, Any]) -> None:
        self._root, self._item = root, item
        self._folder = within(root, item) if item else root
        self._ocdbt = bool(tree.get("use_ocdbt", True))
        self._driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        self._store: Store | None = None

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

    def scalar(self, name: str) -> Any:
        said = self._plain(name)
        if said is None:
            return self.store.array(name).read().result().tolist()
        dtype = as_numpy(_dtype(said["dtype"], name))
        record = self._chunk(name, said, (), dtype.itemsize)
        return np.frombuffer((self._root / record.file).read_bytes(), dtype)[0].item()

    def array(self, leaf: Leaf, state: str, name: str, records: list[Record]) -> Array:
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
        return Array(state, name, shape, dtype, lambda: table)

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
