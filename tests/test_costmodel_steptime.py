"""What happens once per step: gradients are reduced, parameters gathered, the optimizer runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import (
    Cluster,
    Device,
    Group,
    Precision,
    collective_seconds,
    data_parallel_sync,
    optimizer_step_seconds,
)
from shardwright.costmodel.memory import state_bytes
from shardwright.costmodel.steptime import SyncSeconds
from shardwright.costmodel.zero import ZeroShards
from shardwright.ir.errors import InvalidInput

BF16 = Precision.preset("bf16")


def test_what_each_zero_stage_communicates() -> None:
    cluster, group, elements = Cluster.preset("h100-sxm", nodes=4), Group(32), 10**9

    def one(kind: str, width: int) -> float:
        return collective_seconds(cluster, kind, elements * width, group)  # type: ignore[arg-type]

    def at(stage: int) -> tuple[float, float]:
        sync = data_parallel_sync(cluster, group, elements, BF16, stage)
        return sync.per_microbatch_s, sync.per_step_s

    assert at(0) == (0, one("all_reduce", 4))
    assert at(1) == (0, one("reduce_scatter", 4) + one("all_gather", 2))
    assert at(2) == (one("reduce_scatter", 4), one("all_gather", 2))
    assert at(3) == (2 * one("all_gather", 2) + one("reduce_scatter", 4), 0)
    with pytest.raises(InvalidInput, match="zero_stage is 4"):
        at(4)
    assert data_parallel_sync(cluster, Group(1), elements, BF16, 0).per_step_s == 0


def test_frozen_parameters_are_gathered_but_not_reduced() -> None:
    cluster, group = Cluster.preset("h100-sxm"), Group(8)
    assert data_parallel_sync(cluster, group, 1e9, BF16, 1, trainable=0).per_step_s == 0
    assert data_parallel_sync(cluster, group, 1e9, BF16, 3, trainable=0).per_microbatch_s > 0


def test_the_optimizer_is_bound_by_memory() -> None:
    device = Device.preset("a100-80g")
    rate = device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction
    # bf16: read 4 + 8 + 4, write 4 + 8 + 2; fp32: read 4 + 8 + 4, write 4 + 8
    assert optimizer_step_seconds(device, 10**9, BF16) == pytest.approx(30e9 / rate)
    fp32 = Precision.preset("fp32")
    assert optimizer_step_seconds(device, 10**9, fp32) == pytest.approx(28e9 / rate)


# --- a group for each state ----------------------------------------------------------------------

CLUSTER = Cluster.preset("h100-sxm", nodes=8)
NESTED = st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4)


def sync_of(stage: int, shards: int | ZeroShards | None, replicas: int = 64) -> SyncSeconds:
    return data_parallel_sync(CLUSTER, Group(replicas), 1e9, BF16, stage, shards=shards)


@given(stage=st.integers(0, 3), size=st.sampled_from([1, 2, 8, 16, 64]))
def test_equal_groups_are_zero_over_that_many(stage: int, size: int) -> None:
    assert sync_of(stage, ZeroShards(size, size, size)) == sync_of(stage, size)
    assert sync_of(stage, ZeroShards(64, 64, 64)) == sync_of(stage, None)
    even = state_bytes(10**9, BF16, stage, ZeroShards.even(size))
    assert even == state_bytes(10**9, BF16, stage, size)


@given(factors=NESTED, elements=st.integers(1, 10**10))
def test_a_state_over_one_rank_is_the_stage_below(factors: list[int], elements: int) -> None:
    """Parameters over one rank: stage 2; gradients as well: stage 1."""
    g = factors[0]
    o = g * factors[1]
    replicas = o * factors[2] * factors[3]
    if o == replicas > g > 1:  # where all that is split has one group, it is reduced at once
        whole = sync_of(3, ZeroShards(1, g, o), replicas)
        assert whole == sync_of(2, ZeroShards(g, g, o), replicas)
        assert sync_of(2, ZeroShards(1, 1, o), replicas) == sync_of(1, o, replicas)
    for runs in (BF16, Precision.preset("fp32")):
        two = state_bytes(elements, runs, 2, ZeroShards(g, g, o))
        if (g, o) != (1, 1):
            assert state_bytes(elements, runs, 3, ZeroShards(1, g, o)) == two
        assert state_bytes(elements, runs, 2, ZeroShards(1, 1, o)) == state_bytes(
            elements, runs, 1, o
        )


@given(factors=NESTED)
def test_larger_groups_hold_less_and_stay_nearer(factors: list[int]) -> None:
    p = 2 * factors[0]
    g = p * factors[1]
    o = g * factors[2]
    held = state_bytes(10**9, BF16, 3, ZeroShards(p, g, o))
    assert held.gradients == -(-(10**9) // g) * 4
    assert held.optimizer == -(-(10**9) // o) * 12
    # the compute copy is apart from the master only where that is split further
    assert held.weights == (0 if p == g == o else -(-(10**9) // p) * 2)
    near, far = sync_of(3, ZeroShards(2, 8, 64)), sync_of(3, ZeroShards(8, 8, 64))
    assert near.gather_per_microbatch_s <= far.gather_per_microbatch_s


def test_three_levels_by_hand() -> None:
    """Parameters over 2 ranks, gradients over a node of 8, optimizer state over 4 of 8 nodes."""
    sync = sync_of(3, ZeroShards(2, 8, 32))

    def one(kind: str, size: float, ranks: int, stride: int) -> float:
        return collective_seconds(CLUSTER, kind, size, Group(ranks, stride))  # type: ignore[arg-type]

    assert sync.gather_per_microbatch_s == 2 * one("all_gather", 2e9, 2, 1)
    assert sync.reduce_per_microbatch_s == one("reduce_scatter", 4e9, 8, 1)
    across = one("reduce_scatter", 4e9 / 8, 4, 8) + one("all_reduce", 4e9 / 32, 2, 32)
    assert sync.reduce_per_step_s == across
    assert sync.gather_per_step_s == one("all_gather", 2e9 / 2, 16, 2)


@pytest.mark.parametrize("shards", [ZeroShards(8, 12, 24), ZeroShards(0, 8, 8), 3])
def test_groups_have_to_be_nested(shards: int | ZeroShards) -> None:
    with pytest.raises(InvalidInput, match="ZeRO over"):
        sync_of(3, shards)
