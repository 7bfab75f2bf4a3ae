"""ZeRO's geometry: where parameters lie in the flat buffers of ranks.

Stages 1 and 2 lay the parameters of a group one after the other (each may be padded), pad the
whole to a multiple of 2·ranks, and give each rank an equal slice. Stage 3 pads every parameter to
a multiple of the ranks and gives each rank its part; a rank lays its parts one after the other,
through all groups, cut into sub-groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

START_ALIGNMENT = 2
"""Elements: ZeRO-1/2 pads a group to a multiple of this times the ranks, so that slices start on 4
bytes for NCCL (`nccl_start_alignment_factor` of DeepSpeed's stage_1_and_2)."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `begin … end-1` of a flattened parameter, at `offset` in flat buffer `buffer`."""

    name: str
    begin: int
    end: int
    buffer: int
    offset: int


def group_total(shapes: Sequence[Shape], paddings: Sequence[int], ranks: int) -> tuple[int, int]:
    """(elements of a group with its inner padding, that padded for the ranks) of stages 1 and 2."""
    held = sum(prod(shape) for shape in shapes) + sum(paddings)
    multiple = START_ALIGNMENT * ranks
    return held, -(-held // multiple) * multiple


def slices(
    shapes: Mapping[str, Shape], paddings: Sequence[int], rank: int, slice_elements: int
) -> list[Piece]:
    """What the slice of a rank holds of a group's parameters (stages 1 and 2)."""
    low, high = rank * slice_elements, (rank + 1) * slice_elements
    found, at = [], 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        elements = prod(shape)
        begin, end = max(at, low), min(at + elements, high)
        if begin < end:
            found.append(Piece(name, begin - at, end - at, 0, begin - low))
        at += elements + padding
    return found


def partition_elements(shape: Shape, ranks: int) -> int:
    """Elements of a rank's part of a parameter, with padding (stage 3)."""
    return -(-prod(shape) // ranks)


def partitions(
    shapes: Mapping[str, Shape], rank: int, ranks: int, buffers: Sequence[int]
) -> list[Piece]:
    """What a rank holds of parameters whose parts lie through `buffers` (elements of each)."""
    ends: list[int] = []
    for elements in buffers:
        ends.append((ends[-1] if ends else 0) + elements)
    found: list[Piece] = []
    at = buffer = 0
    for name, shape in shapes.items():
        each = partition_elements(shape, ranks)
        low = rank * each
        held = max(0, min(low + each, prod(shape)) - low)
        done = 0
        while done < held:
            while at + done >= ends[buffer]:
                buffer += 1
            take = min(held - done, ends[buffer] - at - done)
            offset = at + done - (ends[buffer] - buffers[buffer])
            found.append(Piece(name, low + done, low + done + take, buffer, offset))
            done += take
        at += each
    return found
