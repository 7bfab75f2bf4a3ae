"""The law of conversions: the dual of A→B is dual(B)→dual(A), and it is the transpose.

Conversions are carried out step by step on simulated ranks; types are drawn on one to three mesh
axes, splits of one factor by several axes and of several factors of one dim included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated import (
    Ranks,
    Sizes,
    convert,
    gradients,
    pairing,
    settled,
    shape_of,
    shard,
    share,
    unshard,
)

from shardwright.ir import (
    AxisType,
    I,
    InvalidInput,
    Mesh,
    NdType,
    P,
    R,
    S,
    Step,
    backward_collective,
    collective,
    dual_steps,
    steps,
)
from shardwright.ir.conversion import LOCAL

DIMS: Sizes = ((2, 6), (6,))
"""Two dims, the first of two factors: the outer one splits 2 ways, the others 2 · 3 ways."""

AXIS_TYPES = (R, I, P, S(0), S(0, 1), S(1))


@dataclass(frozen=True)
class Conversion:
    source: NdType
    target: NdType
    mesh: Mesh
    dims: Sizes

    def __repr__(self) -> str:
        return f"{self.source} → {self.target} on {self.mesh.names}"


def on_one_axis() -> list[Conversion]:
    return [
        Conversion(NdType((("a", x),)), NdType((("a", y),)), Mesh.of(a=2), DIMS)
        for x, y in product(AXIS_TYPES, repeat=2)
    ]


@st.composite
def conversions(draw: Any) -> Conversion:
    """On two or three axes, which may nest in another order than they lie on the mesh."""
    sizes = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 2, 2), (2, 3, 2)]))
    names = "abc"[: len(sizes)]
    mesh = Mesh.of(**dict(zip(names, sizes, strict=True)))
    order = draw(st.permutations(names))
    unit = mesh.size
    dims = ((unit, unit), (unit,))
    source, target = (
        NdType(tuple((axis, draw(st.sampled_from(AXIS_TYPES))) for axis in order)) for _ in "st"
    )
    return Conversion(source, target, mesh, dims)


def check(c: Conversion) -> None:
    """Everything that must hold of a conversion."""
    forward = steps(c.source, c.target)
    backward = dual_steps(c.source, c.target)
    check_shape_of_steps(c, forward)
    assert backward == tuple(step.dual for step in reversed(forward))

    # forward: the target's shards of the same value
    full = torch.randn(shape_of(c.dims), dtype=torch.float64)
    x = shard(full, c.source, c.dims, c.mesh)
    leaves = [t.clone().requires_grad_() for t in x]
    y = convert(leaves, forward, c.source, c.dims, c.mesh)
    close(unshard(detached(y), c.target, c.dims, c.mesh), full)

    # backward: carried out in the dual types, from the dual of the target to that of the source
    cotangent = torch.randn(shape_of(c.dims), dtype=torch.float64)
    g = shard(cotangent, c.target.dual, c.dims, c.mesh)
    gradient = convert(g, backward, c.target.dual, c.dims, c.mesh)
    close(unshard(gradient, c.source.dual, c.dims, c.mesh), cotangent)

    # it is the transpose: ⟨C x, g⟩ = ⟨x, C* g⟩
    left = pairing(detached(y), g, c.target, c.mesh)
    close(left, pairing(x, gradient, c.source, c.mesh))
    close(left, (full * cotangent).sum())

    # and it is what autograd makes of the data movement, which gives every replica a gradient of
    # its own: where the type says I, the replicas of one gradient count once
    traced = gradients(y, leaves, [t * share(c.target, c.mesh) for t in g])
    counted = [t * share(c.source, c.mesh) for t in gradient]
    counted = settled(counted, c.source, c.mesh)
    for mine, theirs in zip(counted, settled(traced, c.source, c.mesh), strict=True):
        close(mine, theirs)


def check_shape_of_steps(c: Conversion, forward: Sequence[Step]) -> None:
    """From source to target, an axis at a time, without detours that nothing asks for."""
    state = c.source
    for step in forward:
        assert state[step.axis] == step.source != step.target
        state = state.replace(step.axis, step.target)
    assert state == c.target

    changed = [axis for axis, kind in c.source if c.target[axis] != kind]
    taken = [step.axis for step in forward]
    assert set(changed) <= set(taken)
    assert all(taken.count(axis) <= 2 for axis in taken)
    detours = [axis for axis in set(taken) if taken.count(axis) == 2]
    for axis in detours:  # gathered because another axis of the same factor was in the way
        kinds = {c.source[axis]}
        rivals = {k for a, k in (*c.source, *c.target) if a != axis and a in changed}
        assert kinds & rivals, f"{axis} is gathered for nobody"
    if not any(kind.is_split for _, kind in (*c.source, *c.target)):
        assert len(forward) == len(changed)


def detached(ranks: Ranks) -> Ranks:
    return [t.detach() for t in ranks]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("c", on_one_axis(), ids=repr)
def test_on_one_axis(c: Conversion) -> None:
    torch.manual_seed(0)
    check(c)
    forward = steps(c.source, c.target)
    assert len(forward) == (c.source != c.target)


@settings(max_examples=1000)
@given(conversions(), st.integers(0, 2**20))
def test_on_several_axes(c: Conversion, seed: int) -> None:
    torch.manual_seed(seed)
    check(c)


def test_every_pair_on_two_axes() -> None:
    """All 36 · 36 of them."""
    torch.manual_seed(0)
    mesh = Mesh.of(a=2, b=2)
    dims = ((4, 4), (4,))
    types = [NdType((("a", x), ("b", y))) for x, y in product(AXIS_TYPES, repeat=2)]
    for source, target in product(types, repeat=2):
        check(Conversion(source, target, mesh, dims))


@given(conversions(), st.permutations(AXIS_TYPES))
def test_through_a_third_type(c: Conversion, kinds: list[AxisType]) -> None:
    """By way of any third type it is the same value, and there and back gives it again."""
    third = NdType(tuple((axis, kind) for (axis, _), kind in zip(c.source, kinds, strict=False)))
    full = torch.randn(shape_of(c.dims), dtype=torch.float64)
    x, here = shard(full, c.source, c.dims, c.mesh), c.source
    for there in (third, c.target, third, c.source):
        x = convert(x, steps(here, there), here, c.dims, c.mesh)
        close(unshard(x, there, c.dims, c.mesh), full)
        here = there


def test_table_of_the_design() -> None:
    """The conversions that training programs are made of, with their duals."""
    rows = {
        (P, I): ("all_reduce", "none"),
        (I, R): ("none", "all_reduce"),
        (P, R): ("all_reduce", "all_reduce"),
        (S(0), R): ("all_gather", "reduce_scatter"),
        (P, S(0)): ("reduce_scatter", "all_gather"),
        (S(0), I): ("all_gather", "slice"),
        (I, S(0)): ("slice", "all_gather"),
        (R, S(0)): ("slice", "pad"),
        (S(0), S(1)): ("all_to_all", "all_to_all"),
        (I, P): ("keep_one", "none"),
        (R, I): ("none", "keep_one"),
    }
    for (source, target), (forward, backward) in rows.items():
        assert collective(source, target) == forward
        assert backward_collective(source, target) == backward
        step = Step("a", source, target)
        assert (step.forward, step.backward) == (forward, backward)
        assert step.dual.dual == step
        assert (step.dual.forward, step.dual.backward) == (backward, forward)


def test_keep_one_is_the_transpose_of_nothing() -> None:
    """R→I does nothing forward. Its gradient I→P keeps one summand: any other reading (each rank
    its own share, say) would be as good for consistent values, all replicas would count n times."""
    full, g = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mesh, r, i = Mesh.of(a=3), NdType((("a", R),)), NdType((("a", I),))
    x = shard(full, r, ((3,),), mesh)
    (step,) = dual_steps(r, i)
    assert str(step) == "a: I→P"
    gradient = convert(shard(g, i.dual, ((3,),), mesh), [step], i.dual, ((3,),), mesh)
    assert [t.abs().sum() > 0 for t in gradient] == [True, False, False]
    close(pairing(x, gradient, r, mesh), full @ g)
    overcounted = [g for _ in range(3)]
    assert abs(pairing(x, overcounted, r, mesh) - full @ g) > 1e-6


def test_only_local_steps_move_nothing() -> None:
    for source, target in product(AXIS_TYPES, repeat=2):
        kind = collective(source, target)
        needs_others = source != target and (
            source.kind == "P" or (source.is_split and target.kind != "P")
        )
        assert (kind not in LOCAL) == needs_others


@given(conversions())
def test_reversed_conversion_is_as_long(c: Conversion) -> None:
    """The dual, planned from scratch, takes about as many steps: nothing is won by that."""
    again = steps(c.target.dual, c.source.dual)
    assert abs(len(again) - len(dual_steps(c.source, c.target))) <= 1


axis_types = st.one_of(
    st.sampled_from([R, I, P]), st.builds(S, st.integers(0, 9), st.integers(0, 9))
)


@given(axis_types)
def test_type_text_round_trip(kind: AxisType) -> None:
    assert AxisType.parse(str(kind)) == kind
    assert AxisType.parse(f" {str(kind).lower()} ") == kind
    assert kind.dual.dual == kind


@given(st.dictionaries(st.sampled_from(["pp", "dp", "tp0", "tp1"]), axis_types))
def test_nd_type(types: dict[str, AxisType]) -> None:
    nd = NdType.of(types)
    assert NdType.from_json(nd.to_json()) == nd
    assert nd.dual.dual == nd
    for axis, kind in nd:
        assert nd[axis] == kind
        assert nd.replace(axis, R)[axis] == R
        assert (axis in nd.splitting(kind.dim, kind.part)) == kind.is_split
    with pytest.raises(InvalidInput, match="'ep'"):
        nd["ep"]


@example("S(²)")
@example("S(1.²)")
@given(st.text(alphabet="SRIPB()0123456789. ²½x-", max_size=8))
def test_bad_type_is_named(text: str) -> None:
    try:
        kind = AxisType.parse(text)
    except InvalidInput as error:
        assert "expected S(dim)" in str(error) and "\n" not in str(error)
    else:
        assert AxisType.parse(str(kind)) == kind


@pytest.mark.parametrize(("kind", "dim", "part"), [("S", -1, -1), ("S", 0, -1), ("R", 0, -1)])
def test_impossible_type(kind: Any, dim: int, part: int) -> None:
    with pytest.raises(InvalidInput):
        AxisType(kind, dim, part)
