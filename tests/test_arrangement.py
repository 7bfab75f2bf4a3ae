"""Arrangements against what numpy's reshape, transpose and concatenate do to whole arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.checkpoint.arrangement import arrange
from shardwright.checkpoint.boxes import Boxes, coverage
from shardwright.checkpoint.factor_boxes import Split, shard
from shardwright.checkpoint.notation import Arrangement, parse_dims
from shardwright.ir import InvalidInput

few = st.integers(1, 4)

QKV = Arrangement.parse(
    "(g [q k v] d) h",
    {"q": ("q", "(g r d) h"), "k": ("k", "(g d) h"), "v": ("v", "(g d) h")},
)
GATED = Arrangement.parse("([w v] f) h", {"w": ("gate", "f h"), "v": ("up", "f h")})
STACKED = Arrangement.parse("i o h", {"": ("layers.{i}.weight", "h o")})


def gathered(table: Boxes, records: dict[int, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    found = np.full(shape, -1, np.int64)
    for row in range(len(table)):
        index = np.indices(table.size[row]).reshape(table.dims, -1)
        at = table.offset[row] + (index * table.stride[row][:, None]).sum(0)
        found[tuple(index + table.begin[row][:, None])] = records[int(table.record[row])][at]
    return found


@given(few, few, few, few, st.integers(1, 3))
def test_fused_projection_of_grouped_heads(g: int, r: int, d: int, h: int, tp: int) -> None:
    q, k, v = (
        np.arange(n * h).reshape(n, h) + 1000 * i for i, n in enumerate((g * r * d, g * d, g * d))
    )
    fused = np.concatenate(
        [q.reshape(g, r, d, h), k.reshape(g, 1, d, h), v.reshape(g, 1, d, h)], 1
    ).reshape(-1, h)
    arranged = arrange(QKV, {"g": g, "d": d}, fused.shape)
    assert arranged.sizes["r"] == r
    dims, sizes = arranged.columns
    records, tables = {}, []
    cut = -(-g // tp)
    whole = fused.reshape(g, (r + 2) * d, h)
    for rank in range(tp):
        records[rank] = whole[rank * cut : (rank + 1) * cut].reshape(-1)
        tables.append(shard(dims, sizes, [Split(0, tp, rank)], rank))
    logical = arranged.logical(Boxes.joined(tables, 2))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        assert coverage(logical[name], expected.shape).exactly_once
        assert (gathered(logical[name], records, expected.shape) == expected).all()


@given(few, few, st.integers(0, 3))
def test_gate_and_up_in_one_array_with_padding(f: int, h: int, more: int) -> None:
    stored = np.arange((2 * f + more) * h).reshape(-1, h)
    arranged = arrange(GATED, {"f": f}, (2 * f, h))
    found = arranged.logical(Boxes.whole(stored.shape))
    records = {0: stored.reshape(-1)}
    assert (gathered(found["gate"], records, (f, h)) == stored[:f]).all()
    assert (gathered(found["up"], records, (f, h)) == stored[f : 2 * f]).all()


@given(few, few, few)
def test_layers_stacked_and_transposed(i: int, o: int, h: int) -> None:
    stored = np.arange(i * o * h).reshape(i, o, h)
    found = arrange(STACKED, {}, stored.shape).logical(Boxes.whole(stored.shape))
    assert sorted(found) == sorted(f"layers.{k}.weight" for k in range(i))
    for k in range(i):
        got = gathered(found[f"layers.{k}.weight"], {0: stored.reshape(-1)}, (h, o))
        assert (got == stored[k].T).all()


def test_sizes_that_contradict_or_stay_open_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"sizes of g"):
        arrange(QKV, {"d": 4}, (30, 8))
    with pytest.raises(InvalidInput, match=r"stored as \(30, 8\), expected"):
        arrange(QKV, {"g": 2, "d": 4, "r": 1}, (30, 8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(a b", "unbalanced"),
        ("a a", "more than once"),
        ("[q] [k]", "more than one slot"),
        ("a-b", "no factor"),
    ],
)
def test_dims_that_are_none_are_quoted(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse_dims(text)
