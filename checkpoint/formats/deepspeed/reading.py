"""The states of DeepSpeed's ranks, as tables of boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...boxes import Boxes, flat_range, row_major
from ...contents import BUFFER, MASTER, WEIGHT, Key, Record
from ...pickles import (
    StandIn,
    Storage,
    Tensor,
    mapping_of,
    open_torch,
    scalar,
    sequence_of,
)
from .directory import Directory
from .flat import Piece, partitions, slices

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


def states_of(directory: Directory, found: Found) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads all files, and gives (name, its dict without tensors) of each as it comes."""
    shapes: dict[tuple[int, int], list[Shapes]] = {}
    for (rank, data_rank), name in sorted(directory.model.items()):
        state = loaded(directory, name, found.unread)
        _check_ranks(directory, state)
        shapes[rank, data_rank] = shapes_of(state, name)
        parts = directory.data_ranks if name.startswith("zero_") else 0
        model_state(found, rank, data_rank, state, name, parts)
        yield name, state
    for (rank, data_rank), name in sorted(directory.optimizer.items()):
        state = loaded(directory, name, found.unread)
        own = shapes.get((rank, data_rank), shapes[rank, 0])
        _optimizer(found, (rank, data_rank), directory.data_ranks, own, state, name)
        yield name, state


def _check_ranks(directory: Directory, state: Mapping[str, Any]) -> None:
    """As many optimizer states as the model states say."""
    data_ranks = state.get("dp_world_size")
    if directory.optimizer and data_ranks not in (None, directory.data_ranks):
        raise CorruptCheckpoint(
            f"{directory.path}: optimizer states of {directory.data_ranks} ranks, the model states "
            f"are of {data_ranks}; files are missing, or of different runs"
        )


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


def _optimizer(
    found: Found, ranks: tuple[int, int], data_ranks: int, shapes: list[Shapes],
    state: Mapping[str, Any], file: str,
) -> None:  # fmt: skip
    held = mapping_of(state.get("optimizer_state_dict"), f"{file}: optimizer_state_dict")
    stage = stage_of(held)
    if stage == 3:
        _stage3(found, ranks, data_ranks, shapes, held, file)
    else:
        _stage2(found, ranks, data_ranks, shapes, held, file)


def stage_of(held: Mapping[str, Any]) -> int:
    """ZeRO's stage: an enum of DeepSpeed's, or a number."""
    value = held.get("zero_stage")
    if isinstance(value, StandIn) and value.args:
        value = value.args[0]
    return value if isinstance(value, int) else 3 if "fp32_flat_groups" in held else 1


def _stage2(
    found: Found, ranks: tuple[int, int], data_ranks: int, groups: list[Shapes],
    held: Mapping[str, Any], file: str,
) -> None:  # fmt: skip
    rank, data_rank = ranks
    masters = sequence_of(held.get("single_partition_of_fp32_groups"), f"{file}: fp32 groups")
    counts = held.get("partition_count", [data_ranks] * len(masters))
    counts = counts if isinstance(counts, list) else [counts] * len(masters)
    paddings = held.get("group_paddings") or [0] * len(masters)
    inner = held.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    if not len(masters) == len(groups) == len(paddings) == len(inner):
        raise CorruptCheckpoint(
            f"{file}: {len(masters)} groups, the model states have {len(groups)}; files of "
            "different runs are mixed"
        )
    if any(count != data_ranks for count in counts):
        raise InvalidInput(
            f"{file}: groups are partitioned among {counts} of {data_ranks} ranks (experts of "
            "their own data parallelism), which is not read; use DeepSpeed's ds_to_universal"
        )
    for g, (shapes, master) in enumerate(zip(groups, masters, strict=True)):
        states, step = _base_state(held, g, file)
        each = master.numel + paddings[g]
        for tensor in states.values():
            each = max(each, tensor.numel)
        total = sum(map(prod, shapes.values())) + sum(inner[g])
        if not total <= each * data_ranks or master.numel > each:
            raise CorruptCheckpoint(
                f"{file}: a slice of {each} elements on {data_ranks} ranks, the parameters of "
                f"group {g} have {total}; files of different runs are mixed"
            )
        pieces = slices(shapes, inner[g], data_rank, each)
        _check_mapping(held, g, pieces, file)
        found.flat(MASTER, rank, shapes, pieces, [master], file)
        for key, tensor in states.items():
            found.flat(key, rank, shapes, pieces, [tensor], file)
        if step is not None:
            found.steps.setdefault(file, {})[g] = step


def _base_state(
    held: Mapping[str, Any], group: int, file: str
) -> tuple[dict[str, Tensor], float | None]:
    """The moments of a group, and its step."""
    base = held.get("base_optimizer_state")
    step = scalar(held.get("base_optimizer_state_step"))
    if isinstance(base, list):  # DeepSpeed's elastic form
        states = base[group] if group < len(base) else {}
    else:
        states = mapping_of(base, f"{file}: base_optimizer_state").get("state", {}).get(group, {})
        entries = base["param_groups"] if isinstance(base, dict) else []
        if group < len(entries) and "step" in entries[group]:  # where fused optimizers keep it
            step = scalar(entries[group]["step"])
    if "step" in states:
        step = scalar(states["step"])
    tensors = {
        key: value
        for key, value in states.items()
        if isinstance(value, Tensor) and key != "step" and len(value.shape) == 1
    }
    return tensors, None if step is None else float(step)


def _check_mapping(held: Mapping[str, Any], group: int, pieces: list[Piece], file: str) -> None:
    """DeepSpeed's own account of a slice (`param_slice_mappings`) says the same as ours."""
    mappings = held.get("param_slice_mappings")
    if not mappings:
        return
    said = {
        name: (address.state["start"], address.state["numel"])
        for name, address in mappings[group].items()
        if isinstance(address, StandIn) and isinstance(address.state, dict)
    }
    found = {piece.name: (piece.offset, piece.end - piece.begin) for piece in pieces}
    for name in said.keys() | found.keys():
        if said.get(name, (0, 0)) != found.get(name, (0, 0)) and said.get(name, (0, 0))[1]:
            raise CorruptCheckpoint(
                f"{file}: {name} lies at {said.get(name)} by param_slice_mappings, at "
                f"{found.get(name)} by the shapes of the model states; the files do not belong "
                "together, or the parameters' order was changed"
            )


def _stage3(
    found: Found, ranks: tuple[int, int], data_ranks: int, groups: list[Shapes],
    held: Mapping[str, Any], file: str,
) -> None:  # fmt: skip
    rank, data_rank = ranks
    if held.get("partition_count", data_ranks) not in (data_ranks, [data_ranks]):
        raise InvalidInput(
            f"{file}: partitioned among {held['partition_count']} of {data_ranks} ranks (MiCS or "
            "experts of their own data parallelism), which is not read"
        )
    for group in sequence_of(held.get("ds_zero_partition_groups") or (), f"{file}: groups"):
        known = isinstance(group, dict) and group.get("partition_count") == data_ranks
        said = group.get("partition_rank", data_rank) if known else data_rank
        if said != data_rank:
            raise CorruptCheckpoint(
                f"{file}: says that it is of data rank {said}: files have been swapped or renamed; "
                "give them their names back"
            )
    shapes = {name: shape for group in groups for name, shape in group.items()}
    masters = list(sequence_of(held.get("fp32_flat_groups"), f"{file}: fp32_flat_groups"))
    sizes = [tensor.numel for tensor in masters]
    total = sum(-(-prod(shape) // data_ranks) for shape in shapes.values())
    if sum(sizes) != total:
        raise CorruptCheckpoint(
            f"{file}: {sum(sizes)} elements, the model states' parameters on {data_ranks} ranks "
            f"make {total}; files of different runs are mixed"
        )
    pieces = partitions(shapes, data_rank, data_ranks, sizes)
    found.flat(MASTER, rank, shapes, pieces, masters, file)
    base = mapping_of(held.get("optimizer_state_dict"), f"{file}: optimizer_state_dict")
    states = base.get("state", {})
    keys = {
        key for entry in states.values() for key, value in entry.items()
        if isinstance(value, Tensor) and key != "step" and len(value.shape) == 1
    }  # fmt: skip
    for key in sorted(keys):
        tensors = [states.get(k, {}).get(key) for k in range(len(masters))]
        bad = [k for k, t in enumerate(tensors) if t is None or t.numel != sizes[k]]
        if bad:
            raise CorruptCheckpoint(
                f"{file}: {key} of sub-group {bad[0]} is missing or of another "
                "size than its weights"
            )
        found.flat(key, rank, shapes, pieces, tensors, file)
    entries = base.get("param_groups", [])
    for k in range(len(masters)):
        step = scalar(states.get(k, {}).get("step"))
        if step is None and entries and "step" in entries[0]:
            step = scalar(entries[0]["step"])
        if step is not None:
            found.steps.setdefault(file, {})[k] = float(step)
