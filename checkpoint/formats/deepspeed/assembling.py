"""Arrays made of what the files of all ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ....ir import CorruptCheckpoint, InvalidInput
from ...boxes import Boxes
from ...contents import BUFFER, MASTER, Array, Combine, Key
from .affine import Block, Shape
from .reading import Found
from .tensor_ranks import Info, Whole, copies


def arrays_of(found: Found, tensor_ranks: int, info: Info | None = None) -> dict[Key, Array]:
    """The arrays of everything found, over all tensor ranks and pipeline stages.

    Shards of tensor ranks are put together as `info` says; without it they have the axis `tp` in
    front. What several stages hold (tied weights) has to be the same on all. Raises
    CorruptCheckpoint where a rank's shard is missing.
    """
    made: dict[Key, Array] = {}
    for key, by_rank in found.pieces.items():
        stages: dict[int, dict[int, list[Boxes]]] = {}
        for rank, tables in by_rank.items():
            stages.setdefault(rank // tensor_ranks, {})[rank % tensor_ranks] = tables
        parts = [
            _of_stage(found, key, stage, own, tensor_ranks, info) for stage, own in stages.items()
        ]
        shape, combine, axes, _ = parts[0]
        if len({part[0] for part in parts}) > 1:
            raise CorruptCheckpoint(
                f"{key[1]} ({key[0]}): {parts[0][0]} in one pipeline stage, {parts[1][0]} in "
                "another; files of different runs are mixed"
            )
        boxes = Boxes.joined([part[3] for part in parts], len(shape))
        if len(parts) > 1 and combine == "copy":
            combine = "equal"
        made[key] = Array(*key, shape, found.dtypes[key], _giving(boxes), combine, axes)
    return made


Part = tuple[Shape, Combine, tuple[str, ...], Boxes]
"""Shape, what elements in several boxes are, axes, and boxes of an array in a stage."""


def _of_stage(
    found: Found,
    key: Key,
    stage: int,
    by_rank: Mapping[int, Sequence[Boxes]],
    tensor_ranks: int,
    info: Info | None,
) -> Part:
    shapes = found.shapes[key]
    first = shapes[stage * tensor_ranks + min(by_rank)]
    if tensor_ranks == 1:
        return first, "copy", (), Boxes.joined(by_rank[0], len(first))
    # Ranks with nothing of a weight store none; the optimizer's shapes say so.
    others = found.shapes.get((MASTER, key[1]), {})
    known = [shapes.get(r, others.get(r)) for r in _ranks(stage, tensor_ranks)]
    shards = [shard for shard in known if shard is not None]
    if len(shards) < tensor_ranks:
        raise CorruptCheckpoint(
            f"{key[1]} ({key[0]}): shards of {len(shards)} of {tensor_ranks} tensor ranks; files "
            "are missing, or of different runs"
        )
    if info is not None:
        plain = key[0] == BUFFER and not info.describes(key[1])
        whole = copies(shards) if plain else info.whole(key[1], shards)
        if whole.keys:
            found.keys[key[1]] = dict(whole.keys)
        return whole.shape, whole.combine, (), _whole_boxes(whole, by_rank)
    if len(set(shards)) > 1:
        raise InvalidInput(
            f"{key[1]} ({key[0]}): unequal shards {shards} on {tensor_ranks} tensor ranks, which "
            "are read only where universal_checkpoint_info says how they make a whole"
        )
    tables = [_in_front(Boxes.joined(by_rank[rank], len(first)), rank) for rank in sorted(by_rank)]
    boxes = Boxes.joined(tables, len(first) + 1)
    return (tensor_ranks, *first), "copy", ("tp",), boxes


def _ranks(stage: int, tensor_ranks: int) -> range:
    return range(stage * tensor_ranks, (stage + 1) * tensor_ranks)


def _whole_boxes(whole: Whole, by_rank: Mapping[int, Sequence[Boxes]]) -> Boxes:
    """Boxes of shards in the coordinates of the whole; what lies beyond its shape is padding."""
    dims = len(whole.shape)
    tables = [
        _moved(Boxes.joined(tables, dims), block)
        for rank, tables in by_rank.items()
        for block in whole.blocks[rank]
    ]
    return Boxes.joined(tables, dims).clipped(whole.shape)


def _moved(table: Boxes, block: Block) -> Boxes:
    """The part of a shard's boxes inside a block, where the block lies in the whole."""
    low, size = np.array(block.begin, np.int64), np.array(block.size, np.int64)
    begin = np.maximum(table.begin, low)
    end = np.minimum(table.begin + table.size, low + size)
    offset = table.offset + ((begin - table.begin) * table.stride).sum(1)
    inside = Boxes(begin, end - begin, table.stride, table.record, offset)
    ahead = [w - b for w, b in zip(block.whole, block.begin, strict=True)]
    return inside.take(np.flatnonzero((inside.size > 0).all(1))).moved(ahead)


def _in_front(boxes: Boxes, place: int) -> Boxes:
    """Boxes with the rank as a first dim."""
    rows = len(boxes)

    def column(value: int) -> Any:
        return np.full((rows, 1), value, np.int64)

    return Boxes(
        np.concatenate([column(place), boxes.begin], 1),
        np.concatenate([column(1), boxes.size], 1),
        np.concatenate([column(0), boxes.stride], 1),
        boxes.record,
        boxes.offset,
    )


def _giving(boxes: Boxes) -> Callable[[], Boxes]:
    return lambda: boxes
