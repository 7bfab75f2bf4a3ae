"""How tensor ranks hold parameters, as DeepSpeed's files say it: `universal_checkpoint_info`.

Written in both of its forms: geometric maps, which say everything, and lists of patterns for
converters that do not know maps, as far as lists can say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....ir import InvalidInput
from ...boxes import Boxes, row_major
from ...contents import MASTER, WEIGHT, Wanted
from ...placement import shard_of, shard_shape
from .planning import Plan
from .tensor_ranks import (
    AFFINE,
    INFO_VERSION,
    PARTS,
    REPLICATED,
    ROW,
    UNSUPPORTED,
    VOCABULARY,
    VOCABULARY_SIZE,
    WIDTHS,
)

_VERSION = 0.4
"""Of the info (`UNIVERSAL_CHECKPOINT_VERSION_VALUE`): from it on, widths of parts are recorded."""


def split_info(plan: Plan) -> dict[str, Any]:
    """The info of all trained and frozen parameters; raises InvalidInput where vocabularies of
    different sizes are padded, of which it can name one."""
    lists: dict[str, list[Any]] = {ROW: [], REPLICATED: [], VOCABULARY: [], PARTS: []}
    widths: dict[str, list[list[int]]] = {}
    maps: dict[str, Any] = {}
    rows: set[int] = set()
    for name, wanted in _parameters(plan).items():
        pattern = f"^{re.escape(name)}$"
        shards = [
            shard_of(wanted, plan.mesh, {"tp": rank}) for rank in range(plan.mesh.get("tp", 1))
        ]
        shapes = [shard_shape(wanted, plan.mesh, {"tp": rank}) for rank in range(len(shards))]
        maps[pattern] = _map(wanted, shards, shapes)
        if not _is_split(wanted):
            lists[REPLICATED].append(pattern)
        elif (cut := _cut(shards)) is not None:
            dim, own = cut
            if len(own) > 1:
                sizes: list[Any] = list(wanted.shape)
                sizes[dim] = tuple(sum(part) for part in own)
                lists[PARTS].append({"patterns": [pattern], "shape": sizes, "partition_dim": dim})
                widths[pattern] = own
            elif dim == 1:
                lists[ROW].append(pattern)
        if wanted.true_shape != wanted.shape:
            lists[VOCABULARY].append(pattern)
            rows.add(wanted.true_shape[0])
            if len(rows) > 1 or wanted.true_shape[1:] != wanted.shape[1:]:
                raise InvalidInput(
                    f"{name}: padded from {wanted.true_shape} to {wanted.shape}; DeepSpeed's files "
                    "can say one number of rows, of padded vocabularies: remove other `pad`s from "
                    "the target's layout"
                )
    return {
        INFO_VERSION: _VERSION,
        **lists,
        UNSUPPORTED: {},
        **({WIDTHS: widths} if widths else {}),
        **({VOCABULARY_SIZE: rows.pop()} if rows else {}),
        AFFINE: {"version": 1, "params": maps},
    }


def _parameters(plan: Plan) -> Mapping[str, Wanted]:
    frozen = {
        name: wanted
        for (state, name), wanted in plan.wants.items()
        if state == WEIGHT and (MASTER, name) not in plan.wants and name not in plan.buffers
    }
    return {name: plan.wants[MASTER, name] for name in plan.order} | frozen


def _is_split(wanted: Wanted) -> bool:
    return any(axis.partition(":")[0] == "tp" for axis, _ in wanted.splits)


def _map(wanted: Wanted, shards: Sequence[Boxes], shapes: Sequence[tuple[int, ...]]) -> Any:
    """The affine map of a parameter; boxes that several ranks have name all of them."""
    strides = row_major(wanted.shape)
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, boxes in enumerate(shards):
        for begin, size in zip(boxes.begin.tolist(), boxes.size.tolist(), strict=True):
            holders.setdefault((*begin, *size), []).append(rank)
    ranks: dict[int, Any] = {}
    for rank, (boxes, shape) in enumerate(zip(shards, shapes, strict=True)):
        columns = (boxes.begin, boxes.size, boxes.stride, boxes.offset)
        pieces = [
            {
                "shape": size,
                "source": [sum(b * s for b, s in zip(begin, strides, strict=True)), list(strides)],
                "dest": [offset, stride],
                "locations": holders[*begin, *size],
            }
            for begin, size, stride, offset in zip(*(c.tolist() for c in columns), strict=True)
        ]
        ranks[rank] = {"shard_shape": list(shape), "pieces": pieces}
    return {"logical_shape": list(wanted.shape), "ranks": ranks}


def _cut(shards: Sequence[Boxes]) -> tuple[int, list[list[int]]] | None:
    """(dim, width of each rank's piece by part), where all ranks have pieces of the same parts that
    lie one after the other along one dim; None where lists cannot say it."""
    counts = {len(boxes) for boxes in shards}
    if len(counts) > 1 or counts == {0}:
        return None
    dims = shards[0].dims
    moving = {
        dim
        for dim in range(dims)
        for boxes in shards
        if len({tuple(b.begin[:, dim].tolist()) for b in shards}) > 1
        or len(set(boxes.begin[:, dim].tolist())) > 1
    }
    if len(moving) != 1:
        return None
    dim = moving.pop()
    at, widths = 0, []
    for part in range(counts.pop()):
        own = []
        for boxes in shards:
            if int(boxes.begin[part, dim]) != at:
                return None
            own.append(int(boxes.size[part, dim]))
            at += own[-1]
        widths.append(own)
    return dim, widths
