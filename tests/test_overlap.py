"""What communication beside compute exposes: bounds that hold in every mode, and plain oracles."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import overlap
from shardwright.costmodel.overlap import (
    OverlapMode,
    exposed_seconds,
    outer_exposed_seconds,
    overlap_cost_fraction,
    piecewise_exposed_seconds,
    sharded_pass_seconds,
    tensor_exposed_seconds,
)
from shardwright.ir.errors import InvalidInput

MODES: tuple[OverlapMode, ...] = get_args(OverlapMode)
SECONDS = st.floats(0, 10)


def flow_shop(first_s: float, second_s: float, pieces: int) -> float:
    """Pieces pass one machine and then another, in plain steps."""
    first = second = 0.0
    for _ in range(pieces):
        first += first_s / pieces
        second = max(second, first) + second_s / pieces
    return second


def test_hidden_communication_costs_compute_and_the_rest_is_exposed() -> None:
    loss = overlap_cost_fraction()
    assert 0 < loss < 0.5
    assert exposed_seconds(0.0, 10.0) == 0.0
    assert exposed_seconds(1.0, 10.0) == pytest.approx(loss)
    assert exposed_seconds(100.0, 0.0) == pytest.approx(100.0)
    # compute of 10 s beside endless communication is done after 10 / (1 - loss)
    assert exposed_seconds(100.0, 10.0) == pytest.approx(100.0 - 10.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=6), st.integers(1, 16))
def test_no_mode_is_worse_than_waiting_or_better_than_the_loss(
    pieces: list[tuple[float, float]], chunks: int
) -> None:
    compute, communication = [g for g, _ in pieces], [q for _, q in pieces]
    total = sum(communication)
    for mode in MODES:
        exposed = tensor_exposed_seconds(mode, compute, communication, chunks)
        assert exposed <= total * (1 + 1e-9)
        assert exposed >= overlap_cost_fraction() * total * (1 - 1e-9)
    assert tensor_exposed_seconds("none", compute, communication) == pytest.approx(total)
    one = tensor_exposed_seconds("chunked", compute, communication, chunks=1)
    assert one == pytest.approx(total)
    fewer, more = (tensor_exposed_seconds("chunked", compute, communication, k) for k in (2, 8))
    fused = tensor_exposed_seconds("fused", compute, communication)
    assert fused <= more * (1 + 1e-9) <= fewer * (1 + 2e-9)


@given(SECONDS, SECONDS, st.integers(1, 12))
def test_without_a_loss_pieces_are_a_flow_shop(
    compute: float, communication: float, k: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "overlap_cost_fraction", lambda: 0.0)
        exposed = piecewise_exposed_seconds(communication, compute, k)
    assert exposed + compute == pytest.approx(flow_shop(compute, communication, k), abs=1e-9)
    assert exposed + compute == pytest.approx(flow_shop(communication, compute, k), abs=1e-9)


def test_one_block_late_hides_behind_the_next_block() -> None:
    """A long block hides the collective before it; nothing hides the last one."""
    loss = overlap_cost_fraction()
    late = tensor_exposed_seconds("one-block-late", [1, 100, 1], [5, 0, 2])
    assert late == pytest.approx(5 * loss + 2)


def test_chunks_cost_their_latency() -> None:
    whole = tensor_exposed_seconds("chunked", [10], [2], 4)
    assert tensor_exposed_seconds("chunked", [10], [2], 4, 0.1) > whole
    assert tensor_exposed_seconds("chunked", [10], [0], 4, 0.1) == 0


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 12))
def test_prefetched_shards_hide_all_but_a_block(
    compute: float, gather: float, reduce: float, blocks: int
) -> None:
    ahead = sharded_pass_seconds(compute, gather, reduce, blocks)
    waits = sharded_pass_seconds(compute, gather, reduce, blocks, prefetch=False)
    least = max(compute, gather + reduce)
    assert least * (1 - 1e-9) <= ahead <= (compute + gather + reduce) * (1 + 1e-9)
    assert waits >= (compute + gather) * (1 - 1e-9)
    plenty = sharded_pass_seconds(100.0, gather, 0.0, blocks)
    loss = overlap_cost_fraction()
    assert plenty == pytest.approx(100 + gather / blocks + loss * gather * (1 - 1 / blocks))


def test_outer_steps_share_their_synchronisation() -> None:
    assert outer_exposed_seconds(50.0, 1.0, 100, asynchronous=False) == pytest.approx(0.5)
    hidden = outer_exposed_seconds(50.0, 1.0, 100)
    assert hidden == pytest.approx(0.5 * overlap_cost_fraction())
    assert outer_exposed_seconds(50.0, 1.0, 10) == pytest.approx(4.0)  # ten steps hide 10 s


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="2 pieces of compute with 1 of communication"):
        tensor_exposed_seconds("none", [1, 1], [1])
    with pytest.raises(InvalidInput, match="overlap mode all"):
        tensor_exposed_seconds("all", [1], [1])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="chunks=0"):
        tensor_exposed_seconds("chunked", [1], [1], 0)
    with pytest.raises(InvalidInput, match="blocks=0"):
        sharded_pass_seconds(1, 1, 1, 0)
    with pytest.raises(InvalidInput, match="outer steps every 0"):
        outer_exposed_seconds(1, 1, 0)
