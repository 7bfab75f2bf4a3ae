"""The closed forms of 1F1B against an exact event simulation, and what happens once per step."""

from __future__ import annotations

from collections.abc import Sequence

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
    pipeline_bound_seconds,
    pipeline_estimate_seconds,
)
from shardwright.costmodel.steptime import exposed_seconds, overlap_cost_fraction
from shardwright.ir.errors import InvalidInput

BF16 = Precision.preset("bf16")


def simulate_1f1b(
    forward_s: Sequence[float], backward_s: Sequence[float], p2p_s: Sequence[float], m: int
) -> float:
    """The time at which the last op of non-interleaved 1F1B ends; transfers overlap compute."""
    p = len(forward_s)
    orders: list[list[tuple[str, int]]] = []
    for s in range(p):
        warm = min(m, p - s - 1)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    ended: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * p
    while any(orders):
        for s in range(p):
            while orders[s]:
                kind, i = orders[s][0]
                if kind == "F":
                    ready = ended.get(("F", s - 1, i)) if s else 0.0
                    lag = p2p_s[s - 1] if s else 0.0
                else:
                    ready = ended.get(("B", s + 1, i) if s < p - 1 else ("F", s, i))
                    lag = p2p_s[s] if s < p - 1 else 0.0
                if ready is None:
                    break
                seconds = forward_s[s] if kind == "F" else backward_s[s]
                clock[s] = max(clock[s], ready + lag) + seconds
                ended[kind, s, i] = clock[s]
                orders[s].pop(0)
    return max(clock)


@st.composite
def pipelines(draw: st.DrawFn, spread: float) -> tuple[list[float], list[float], list[float], int]:
    """Forward, backward and p2p seconds (up to 10 % of a stage), and microbatches."""
    p = draw(st.integers(1, 8))
    around = st.floats(1 - spread, 1 + spread)
    forward = [draw(around) for _ in range(p)]
    backward = [2 * draw(around) for _ in range(p)]
    p2p = [draw(st.floats(0, 0.3)) for _ in range(p - 1)]
    return forward, backward, p2p, draw(st.integers(1, 32))


@given(pipelines(spread=0.9))
def test_the_bound_never_exceeds_the_simulation(
    drawn: tuple[list[float], list[float], list[float], int],
) -> None:
    forward, backward, p2p, m = drawn
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    bound = pipeline_bound_seconds(stages, p2p, m)
    assert bound <= simulate_1f1b(forward, backward, p2p, m) * (1 + 1e-12)
    assert bound <= pipeline_estimate_seconds(stages, p2p, m) * (1 + 1e-12)


@given(pipelines(spread=0.2))
def test_the_estimate_is_near_the_simulation(
    drawn: tuple[list[float], list[float], list[float], int],
) -> None:
    forward, backward, p2p, m = drawn
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    simulated = simulate_1f1b(forward, backward, p2p, m)
    assert 0.9 <= pipeline_estimate_seconds(stages, p2p, m) / simulated <= 1.001


@given(pipelines(spread=0.2))
def test_uneven_stages_without_transfers_are_exact(
    drawn: tuple[list[float], list[float], list[float], int],
) -> None:
    """The familiar `(m-1)·max + Σ` is up to 14 % too long here."""
    forward, backward, p2p, m = drawn
    stages, none = [f + b for f, b in zip(forward, backward, strict=True)], [0.0] * len(p2p)
    simulated = simulate_1f1b(forward, backward, none, m)
    assert pipeline_estimate_seconds(stages, none, m) == pytest.approx(simulated, rel=1e-3)


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.1, 0.9))
def test_equal_stages_without_transfers_are_exact(p: int, m: int, share: float) -> None:
    simulated = simulate_1f1b([share] * p, [1 - share] * p, [0.0] * (p - 1), m)
    assert simulated == pytest.approx(m + p - 1)
    estimate = pipeline_estimate_seconds([1.0] * p, [0.0] * (p - 1), m)
    assert estimate == pytest.approx(simulated)
    assert pipeline_bound_seconds([1.0] * p, [0.0] * (p - 1), m) == pytest.approx(simulated)


def test_transfers_slow_the_steady_state() -> None:
    """Two stages, a round trip of 2·(T + c) shared by two microbatches in flight."""
    estimate = pipeline_estimate_seconds([3.0, 3.0], [1.0], 101)
    assert estimate == pytest.approx(51 * 8.0)  # 404 without
    assert estimate == pytest.approx(simulate_1f1b([1, 1], [2, 2], [1], 101), rel=0.01)


def test_bad_pipelines() -> None:
    with pytest.raises(InvalidInput, match="2 stages with 2 transfers"):
        pipeline_bound_seconds([1, 1], [0, 0], 4)
    with pytest.raises(InvalidInput, match="0 microbatches"):
        pipeline_estimate_seconds([1], [], 0)


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


def test_hidden_communication_costs_compute_and_the_rest_is_exposed() -> None:
    loss = overlap_cost_fraction()
    assert 0 < loss < 0.5
    assert exposed_seconds(0.0, 10.0) == 0.0
    assert exposed_seconds(1.0, 10.0) == pytest.approx(loss)
    assert exposed_seconds(100.0, 0.0) == pytest.approx(100.0)
    # compute of 10 s beside endless communication is done after 10 / (1 - loss)
    assert exposed_seconds(100.0, 10.0) == pytest.approx(100.0 - 10.0)
