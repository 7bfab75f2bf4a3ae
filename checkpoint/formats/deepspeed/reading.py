"""The files of DeepSpeed's ranks as tables of boxes, and what model states hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint
from ...boxes import Boxes, flat_range, row_major
from ...contents import BUFFER, WEIGHT, Key, Record
from ...pickles import (
    Storage,
    Tensor,
    mapping_of,
    open_torch,
    sequence_of,
)
from .directory import Directory
from .flat import Piece, partitions

Shapes = dict[str, tuple[int, ...]]

_LARGE = {"module", "optimizer", "optimizer_state_dict", "frozen_param_fragments"}
_BESIDE_BYTES = 64 << 20
"""Up to which size tensors of a user's own (RNG states) are read as values; in what is `_LARGE`
only single numbers are (the step)."""


@dataclass
class Found:
    """What has been read so far: arrays as pieces by key and model rank, records, and the rest."""

    records: list[Record] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    pieces: dict[Key, dict[int, list[Boxes]]] = field(default_factory=dict)
    shapes: dict[Key, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    dtypes: dict[Key, str] = field(default_factory=dict)
    steps: dict[str, dict[int, float]] = field(default_factory=dict)
    """By file, the step of each of its groups."""
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By parameter, what DeepSpeed's universal form says beside it (`cat_dim`, …)."""
    experts: dict[str, dict[str, None]] = field(default_factory=dict)
    """By the name that ranks give a parameter of their experts, all that are called so."""
    moe_layers: list[str] = field(default_factory=list)
    """What the experts' names begin with, by layer."""
    tag: str = ""
    kept: list[Storage] = field(default_factory=list)
    unread: list[Record] = field(default_factory=list)
    """Storages of all files whose CRCs nobody has checked yet."""

    def record(self, storage: Storage) -> int:
        """The number of a storage's record."""
        if id(storage) not in self.numbers:
            assert storage.record is not None
            self.numbers[id(storage)] = len(self.records)
            self.records.append(storage.record)
            self.kept.append(storage)  # its id stays its own
        return self.numbers[id(storage)]

    def add(
        self, key: Key, rank: int, shape: tuple[int, ...], dtype: str, boxes: Boxes, file: str
    ) -> None:
        """Boxes of a parameter in the shard of a model rank."""
        known = self.shapes.setdefault(key, {}).setdefault(rank, shape)
        if known != shape or self.dtypes.setdefault(key, dtype) != dtype:
            raise CorruptCheckpoint(
                f"{file}: {key[1]} ({key[0]}) is {dtype} {shape}, elsewhere "
                f"{self.dtypes[key]} {known}; files of different runs are mixed"
            )
        self.pieces.setdefault(key, {}).setdefault(rank, []).append(boxes)

    def tensor(self, key: Key, rank: int, tensor: Tensor, file: str) -> None:
        """A tensor that is there whole."""
        row = ((0,) * len(tensor.shape), tensor.shape, tensor.stride)
        boxes = Boxes.of(
            [(*row, self.record(tensor.storage), tensor.offset)] if tensor.numel else [],
            len(tensor.shape),
        )
        self.add(key, rank, tensor.shape, tensor.dtype, boxes, file)

    def flat(
        self, state: str, rank: int, shapes: Shapes, pieces: Sequence[Piece],
        buffers: Sequence[Tensor], file: str,
    ) -> None:  # fmt: skip
        """Pieces of parameters in flat buffers."""
        rows: dict[str, list[Any]] = {}
        for piece in pieces:
            buffer = buffers[piece.buffer]
            if piece.offset + piece.end - piece.begin > buffer.numel:
                raise CorruptCheckpoint(
                    f"{file}: {state} of {piece.name} reaches beyond its flat buffer of "
                    f"{buffer.numel} elements; the file is of another run than the model states"
                )
            shape = shapes[piece.name]
            strides = row_major(shape)
            for begin, size in flat_range(shape, piece.begin, piece.end):
                at = sum(b * s for b, s in zip(begin, strides, strict=True)) - piece.begin
                offset = buffer.offset + piece.offset + at
                rows.setdefault(piece.name, []).append(
                    (begin, size, strides, self.record(buffer.storage), offset)
                )
        dtype = buffers[0].dtype if buffers else "F32"
        for name, shape in shapes.items():
            boxes = Boxes.of(rows.get(name, []), len(shape))
            self.add((state, name), rank, shape, dtype, boxes, file)


def loaded(directory: Directory, name: str, unread: list[Record]) -> dict[str, Any]:
    """A file's dict; small tensors (steps, RNG states) have their bytes."""
    return loaded_file(directory.path, name, unread)


def loaded_file(
    root: Path, name: str, unread: list[Record], large: Collection[str] | None = _LARGE
) -> dict[str, Any]:
    """A file's dict; tensors beside the `large` entries (None: all are) have their bytes, if they
    are small.

    Appends to `unread` what has not been checked of the file.
    """
    with open_torch(root / name, name) as file:
        file.check_name(Path(name).stem)
        unread.extend(file.unread)
        value = file.value
        if not isinstance(value, dict):
            raise CorruptCheckpoint(f"{name}: holds {type(value).__name__}, expected a dict")
        return {
            key: file.loaded(item, 64 if large is None or key in large else _BESIDE_BYTES)
            for key, item in value.items()
        }


def shapes_of(state: Mapping[str, Any], file: str) -> list[Shapes]:
    """The shapes of trained parameters by group, in flat order."""
    groups = state.get("param_shapes") or []
    if isinstance(groups, dict):
        groups = [groups]
    return [
        {name: tuple(shape) for name, shape in mapping_of(group, f"{file}: param_shapes").items()}
        for group in sequence_of(groups, f"{file}: param_shapes")
    ]


def model_state(
    found: Found, rank: int, data_rank: int, state: Mapping[str, Any], file: str, parts: int
) -> None:
    """Weights, buffers and frozen parameters of a model file (of `parts`, 0 if it is the one)."""
    module = state.get("module")
    shared = state.get("shared_params") or {}
    buffers = set(state.get("buffer_names") or ())
    if isinstance(module, dict):
        for name, tensor in module.items():
            if not isinstance(tensor, Tensor) or name in shared:
                continue
            if name in buffers:
                found.tensor((BUFFER, name), rank, tensor, file)
            elif tensor.numel:  # stage 3 leaves empty tensors for its parameters
                found.tensor((WEIGHT, name), rank, tensor, file)
    frozen = state.get("frozen_param_shapes") or {}
    fragments = state.get("frozen_param_fragments") or {}
    for name, size in frozen.items():
        shape, fragment = tuple(size), fragments.get(name)
        if not parts and rank in found.pieces.get((WEIGHT, name), {}):
            continue
        if not isinstance(fragment, Tensor):
            raise CorruptCheckpoint(f"{file}: the frozen parameter {name} is missing")
        if not parts:
            found.tensor((WEIGHT, name), rank, fragment, file)
        else:
            pieces = partitions({name: shape}, data_rank, parts, [fragment.numel])
            found.flat(WEIGHT, rank, {name: shape}, pieces, [fragment], file)
