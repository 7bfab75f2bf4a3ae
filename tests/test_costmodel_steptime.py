"""What happens once per step: gradients are reduced, parameters gathered, the optimizer runs."""

from __future__ import annotations

import pytest

from shardwright.costmodel import (
    Cluster,
    Device,
    Group,
    Precision,
    collective_seconds,
    data_parallel_sync,
    optimizer_step_seconds,
)
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
