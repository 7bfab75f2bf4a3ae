"""How mesh axes cut a stored array: types on its factors, and shards in the coordinates of all.

A rank's place on the mesh says which piece of every split factor it has. An axis may have more
ranks than a factor can be cut into: then it factors into two sub-axes, the outer of which splits
and the inner of which holds copies (`tp:2` is the outer two of tp).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from ..ir import InvalidInput
from .boxes import Boxes
from .contents import Wanted
from .factor_boxes import FactorBoxes, Split, factors_of, shard

Splits = tuple[tuple[str, int], ...]
"""(axis or the outer part of it, the factor that it splits), outermost axis first."""


def pieces(axis: str, mesh: Mapping[str, int]) -> tuple[str, int, int]:
    """(axis, pieces, copies of each) of `tp` or `tp:2`."""
    name, _, outer = axis.partition(":")
    ranks = mesh.get(name, 1)
    count = int(outer) if outer else ranks
    return name, count, ranks // count


def splits_at(splits: Splits, mesh: Mapping[str, int], at: Mapping[str, int]) -> list[Split]:
    """The splits of the rank at a place of the mesh (axes not named: 0)."""
    found = []
    for axis, factor in splits:
        name, count, copies = pieces(axis, mesh)
        found.append(Split(factor, count, at.get(name, 0) // copies))
    return found


def places(mesh: Mapping[str, int], axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """All places along some axes, the last axis fastest."""
    for at in product(*(range(mesh.get(axis, 1)) for axis in axes)):
        yield dict(zip(axes, at, strict=True))


def shard_of(
    wanted: Wanted,
    mesh: Mapping[str, int],
    at: Mapping[str, int],
    record: int = 0,
    offset: int = 0,
    part: tuple[int, int] | None = None,
) -> Boxes:
    """Where the shard of one rank is in a wanted array (see `factor_boxes.shard`)."""
    splits = splits_at(wanted.splits, mesh, at)
    return shard(wanted.dims, wanted.sizes, splits, record, offset, part)


def shard_shape(wanted: Wanted, mesh: Mapping[str, int], at: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one rank's shard."""
    sizes = list(wanted.sizes)
    low = [0] * len(sizes)
    for split in splits_at(wanted.splits, mesh, at):
        each = -(-sizes[split.factor] // split.pieces)
        low[split.factor] = min(split.index * each, sizes[split.factor])
        sizes[split.factor] = min(each, sizes[split.factor] - low[split.factor])
    return tuple(prod(sizes[f] for f in members) for members in wanted.dims)


@dataclass(frozen=True, slots=True)
class Placement:
    """Factors of a stored array (columns per dim and sizes of the whole) and what splits them."""

    dims: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    splits: Splits

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(prod(self.sizes[f] for f in members) for members in self.dims)

    def whole(self, stacked: Boxes, axes: Sequence[str], mesh: Mapping[str, int]) -> Boxes:
        """Boxes of shards, whose leading dims count the ranks of `axes`, in the coordinates of
        the whole."""
        local = list(self.sizes)
        for axis, factor in self.splits:
            _, count, _ = pieces(axis, mesh)
            if local[factor] % count:
                raise InvalidInput(
                    f"a factor of {local[factor]} cannot be cut into {count} equal shards"
                )
            local[factor] //= count
        lead = len(axes)
        bare = Boxes(
            stacked.begin[:, lead:],
            stacked.size[:, lead:],
            stacked.stride[:, lead:],
            stacked.record,
            stacked.offset,
        )
        if not self.splits:
            return bare
        ahead = np.zeros((len(stacked), len(local)), np.int64)
        step = list(self.sizes)
        for axis, factor in self.splits:
            name, count, copies = pieces(axis, mesh)
            step[factor] //= count
            if name in axes:
                ahead[:, factor] += (
                    stacked.begin[:, list(axes).index(name)] // copies * step[factor]
                )
        # The rank of each box goes with it as a record of its own: cutting keeps rows' records.
        marked = Boxes(
            bare.begin, bare.size, bare.stride, np.arange(len(bare), dtype=np.int64), bare.offset
        )
        cut = factors_of(marked, self.dims, local)
        moved = FactorBoxes(
            cut.begin + ahead[cut.record],
            cut.size,
            cut.stride,
            bare.record[cut.record],
            cut.offset,
        )
        return moved.as_dims(self.dims, self.sizes)
