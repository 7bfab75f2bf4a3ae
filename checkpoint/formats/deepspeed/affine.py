"""DeepSpeed's affine maps: which blocks of a parameter a tensor rank holds, as boxes.

A map (`affine_map` of `universal_checkpoint_info`, deepspeed/checkpoint/affine.py) lists for every
rank pieces, each as a view of the flat whole (`source`) and of the flat shard (`dest`): an offset
and strides, as torch.as_strided has them. Boxes have the dims of the parameter; a piece that is no
box on both sides is cut into several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...boxes import row_major

VERSION = 1
"""Of the form of maps (`AFFINE_MAP_FORMAT_VERSION`)."""

_MOST_BLOCKS = 1 << 16
"""Per piece: what is cut finer is no map of a layer."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A box that lies at `begin` in a shard and at `whole` in the parameter."""

    begin: Shape
    whole: Shape
    size: Shape


def blocks_of(entry: Mapping[str, Any], rank: int, shard: Shape, name: str) -> list[Block]:
    """The blocks of a rank, whose shard has that shape, by the entry of a parameter in a map.

    Raises CorruptCheckpoint where the map contradicts the shard, InvalidInput for scaled pieces.
    """
    try:
        held = {int(key): value for key, value in entry["ranks"].items()}[rank]
        whole = tuple(int(n) for n in entry["logical_shape"])
        said = tuple(int(n) for n in held["shard_shape"])
        pieces = [_View.of(piece) for piece in held["pieces"]]
        scales = {float(piece.get("scale", 1.0)) for piece in held["pieces"]}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{name}: its affine map of rank {rank} is damaged ({error!r})"
        ) from None
    if said != shard:
        raise CorruptCheckpoint(
            f"{name}: tensor rank {rank} holds {shard}, its affine map says {said}; files of "
            "different runs are mixed"
        )
    if scales - {1.0}:
        raise InvalidInput(
            f"{name}: held scaled by {min(scales)} on tensor rank {rank}, which is not read: the "
            "optimizer's moments scale otherwise; undo it in the job that saves"
        )
    found: list[Block] = []
    for piece in pieces:
        found += _cut(piece, whole, shard, name, _MOST_BLOCKS)
    if sum(prod(block.size) for block in found) != prod(shard):
        raise CorruptCheckpoint(
            f"{name}: the pieces of its affine map do not make up the {prod(shard)} elements of "
            f"tensor rank {rank}"
        )
    return found


@dataclass(frozen=True, slots=True)
class _View:
    """A piece: per dim (size, stride in the whole, stride in the shard), and both offsets."""

    dims: tuple[tuple[int, int, int], ...]
    source: int
    dest: int

    @staticmethod
    def of(piece: Mapping[str, Any]) -> _View:
        (source, outer), (dest, inner) = piece["source"], piece["dest"]
        dims = zip(piece["shape"], outer, inner, strict=True)
        return _View(tuple((int(n), int(s), int(d)) for n, s, d in dims), int(source), int(dest))


def _cut(view: _View, whole: Shape, shard: Shape, name: str, most: int) -> list[Block]:
    """A piece as boxes: one, where each of its dims is a range of one dim on both sides."""
    dims = [dim for dim in view.dims if dim[0] != 1]
    if any(size == 0 for size, _, _ in dims):
        return []
    at = {"whole": _place(view.source, whole, name), "shard": _place(view.dest, shard, name)}
    size = [1] * len(whole)
    odd = -1
    for number, (count, outer, inner) in enumerate(dims):
        dim = _dim(outer, whole)
        fits = dim is not None and dim == _dim(inner, shard) and size[dim] == 1
        if dim is None or not fits:
            odd = number
            break
        room = min(whole[dim] - at["whole"][dim], shard[dim] - at["shard"][dim])
        if count > room:
            odd = number
            break
        size[dim] = count
    if odd < 0:
        return [Block(at["shard"], at["whole"], tuple(size))]
    count, outer, inner = dims.pop(odd)
    dim = _dim(outer, whole)
    if dim is not None and dim == _dim(inner, shard) and whole[dim] == shard[dim]:
        rows = whole[dim]
        if not at["whole"][dim] and not at["shard"][dim] and count > rows and not count % rows:
            dims += [(count // rows, outer * rows, inner * rows), (rows, outer, inner)]
            return _cut(_View(tuple(dims), view.source, view.dest), whole, shard, name, most)
    if count > most:
        raise InvalidInput(
            f"{name}: its affine map interleaves elements too finely to be read; give its layout "
            "as --spec, with --set info=false"
        )
    found: list[Block] = []
    for step in range(count):
        part = _View(tuple(dims), view.source + step * outer, view.dest + step * inner)
        found += _cut(part, whole, shard, name, most // count)
    return found


def _place(offset: int, shape: Shape, name: str) -> Shape:
    found = []
    for stride, size in zip(row_major(shape), shape, strict=True):
        found.append(offset // max(stride, 1))
        offset %= max(stride, 1)
        if not 0 <= found[-1] < size:
            raise CorruptCheckpoint(f"{name}: its affine map points beyond the shape {shape}")
    return tuple(found)


def _dim(stride: int, shape: Shape) -> int | None:
    """The dim whose neighbours are so far apart in a contiguous array."""
    for dim, own in enumerate(row_major(shape)):
        if own == stride and shape[dim] > 1:
            return dim
    return None
