"""Regions: the shards of any layout tile the tensor, and equal what emitted programs hold."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardwright.ir.mesh import Axis, Mesh
from shardwright.ir.region import Region, held_region
from shardwright.ir.types import I, NdType, S

MESH = Mesh((Axis("tp0", 2, "tp"), Axis("tp1", 3, "tp")))

Factors = tuple[tuple[int, ...], ...]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Factors, NdType, int]:
    """Dims of one to three factors that every split divides, and the ranks that share rows."""
    factors = tuple(
        tuple(draw(st.sampled_from([1, 6, 12])) for _ in range(draw(st.integers(1, 3))))
        for _ in range(draw(st.integers(1, 2)))
    )
    places = [S(d, p) for d, sizes in enumerate(factors) for p, n in enumerate(sizes) if n > 1]
    kinds = st.sampled_from([I, *places])
    types = NdType((("tp0", draw(kinds)), ("tp1", draw(kinds))))
    return factors, types, draw(st.integers(1, 5))


def cells(region: Region, shape: tuple[int, ...]) -> np.ndarray:  # type: ignore[type-arg]
    """Ones where the region is."""
    found = np.zeros(shape, int)
    for offsets, sizes in region.boxes():
        found[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    return found


def by_reshaping(factors: Factors, types: NdType, at: dict[str, int]) -> np.ndarray:  # type: ignore[type-arg]
    """What a rank holds, by cutting the tensor with one dim per factor, axis by axis."""
    sizes = [n for dim in factors for n in dim]
    index = np.arange(prod(sizes)).reshape(sizes)
    for axis, kind in types:
        if kind.is_split:
            place = sum(len(dim) for dim in factors[: kind.dim]) + kind.part
            index = np.split(index, MESH[axis].size, axis=place)[at[axis]]
    held = np.zeros(prod(sizes), int)
    held[index.ravel()] = 1
    return held.reshape([prod(dim) for dim in factors])


@given(layouts())
def test_a_rank_holds_what_cutting_axis_by_axis_leaves(layout: tuple[Factors, NdType, int]) -> None:
    factors, types, _ = layout
    for rank in range(MESH.size):
        at = MESH.coordinates(rank)
        region = held_region(factors, types, MESH, at)
        expected = by_reshaping(factors, types, at)
        assert (cells(region, expected.shape) == expected).all()
        assert region.elements == expected.sum()


@given(layouts())
def test_ranks_that_share_rows_tile_what_the_others_leave(
    layout: tuple[Factors, NdType, int],
) -> None:
    factors, types, ranks = layout
    at = MESH.coordinates(4)
    whole = held_region(factors, types, MESH, at)
    parts = [held_region(factors, types, MESH, at, (ranks, k)) for k in range(ranks)]
    shape = tuple(prod(dim) for dim in factors)
    assert (sum(cells(part, shape) for part in parts) == cells(whole, shape)).all()
    rows = sum(end - begin for begin, end in whole.dims[0])
    first = sum(end - begin for begin, end in parts[0].dims[0])
    assert first == -(-rows // ranks)


@given(layouts(), layouts(), st.integers(0, 5), st.integers(0, 5))
def test_an_intersection_is_what_both_hold(
    one: tuple[Factors, NdType, int], other: tuple[Factors, NdType, int], i: int, k: int
) -> None:
    factors = ((12, 6), (6,))
    ends = []
    for (_, types, ranks), rank in ((one, i), (other, k)):
        kept = tuple(
            (
                a,
                kind
                if kind.is_split and kind.dim < 2 and kind.part < len(factors[kind.dim])
                else I,
            )
            for a, kind in types
        )
        rows = ranks, rank % ranks
        ends.append(held_region(factors, NdType(kept), MESH, MESH.coordinates(rank), rows))
    a, b = ends
    shape = (72, 6)
    assert (cells(a & b, shape) == cells(a, shape) * cells(b, shape)).all()
    assert a & b == b & a and a & a == a
    assert (a & b).elements == (cells(a, shape) * cells(b, shape)).sum()


def test_a_scalar_is_whole_everywhere() -> None:
    types = NdType((("tp0", I), ("tp1", I)))
    region = held_region((), types, MESH, MESH.coordinates(0), (4, 3))
    assert region == Region(()) and region.elements == 1
