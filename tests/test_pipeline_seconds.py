"""The bound of every schedule and the estimates of the search, against the simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_oracle import pipelines

from shardwright.costmodel.pipeline import (
    pipeline_bound_seconds,
    pipeline_estimate_seconds,
    schedule_bound_seconds,
    schedule_estimate_seconds,
)
from shardwright.costmodel.simulate import (
    DataParallel,
    StageTimes,
    StepOptions,
    Transfer,
    simulate,
)
from shardwright.ir.errors import InvalidInput
from shardwright.ir.schedule import ScheduleTable
from shardwright.ir.schedule_rows import schedule_table

Pipeline = tuple[ScheduleTable, StageTimes, tuple[float, ...]]


@given(pipelines(spread=0.9), st.booleans())
def test_the_bound_never_exceeds_the_simulation(pipeline: Pipeline, dressed: bool) -> None:
    table, times, p2p = pipeline
    args = table.name, times, p2p, table.microbatches, table.vpp
    options = StepOptions()
    if dressed:  # whatever surrounds the pipeline only adds to it
        some = (0.5,) * table.stages
        options = StepOptions("blocking", DataParallel(some, some, at_start=True))
    simulated = simulate(table, times, p2p, options).step_s
    bound = schedule_bound_seconds(*args)
    assert bound <= simulated * (1 + 1e-12)
    assert bound <= schedule_estimate_seconds(*args) * (1 + 1e-12)
    if table.name == "gpipe" and not dressed:
        assert bound == pytest.approx(simulated)


@given(pipelines(spread=0.2, most_rounds=12), st.sampled_from(["overlapped", "blocking"]))
def test_the_estimate_is_within_5_percent(pipeline: Pipeline, transfer: Transfer) -> None:
    table, times, p2p = pipeline
    simulated = simulate(table, times, p2p, StepOptions(transfer)).step_s
    estimate = schedule_estimate_seconds(
        table.name, times, p2p, table.microbatches, table.vpp, transfer
    )
    assert estimate == pytest.approx(simulated, rel=0.05)
    if table.name == "1f1b" and transfer == "overlapped":
        assert estimate <= simulated * (1 + 1e-12)


@given(pipelines(spread=0.9, names=["1f1b"]))
def test_the_bound_of_1f1b_is_that_of_the_design(pipeline: Pipeline) -> None:
    table, times, p2p = pipeline
    stages = [sum(parts) for parts in zip(
        times.forward_s, times.backward_input_s, times.backward_weight_s, strict=True)]  # fmt: skip
    m = table.microbatches
    design = max(
        m * stages[s] + sum(stages[i] + 2 * p2p[i] for i in range(s)) for s in range(table.pp)
    )
    assert pipeline_bound_seconds(stages, p2p, m) == pytest.approx(design)
    assert schedule_bound_seconds("1f1b", times, p2p, m) == pytest.approx(design)


@given(pipelines(spread=0.2, names=["1f1b"]))
def test_uneven_stages_without_transfers_are_exact(pipeline: Pipeline) -> None:
    """The familiar `(m-1)·max + Σ` is up to 14 % too long here."""
    table, times, p2p = pipeline
    none = [0.0] * len(p2p)
    simulated = simulate(table, times, none).step_s
    estimate = schedule_estimate_seconds("1f1b", times, none, table.microbatches)
    assert estimate == pytest.approx(simulated, rel=1e-3)


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.1, 0.9))
def test_equal_stages_without_transfers_are_exact(p: int, m: int, share: float) -> None:
    estimate = pipeline_estimate_seconds([1.0] * p, [0.0] * (p - 1), m, forward_share=share)
    assert estimate == pytest.approx(m + p - 1)
    assert pipeline_bound_seconds([1.0] * p, [0.0] * (p - 1), m) == pytest.approx(m + p - 1)


def test_transfers_slow_the_steady_state() -> None:
    """Two stages, a round trip of 2·(T + c) shared by two microbatches in flight."""
    estimate = pipeline_estimate_seconds([3.0, 3.0], [1.0], 101)
    times = StageTimes.of([1, 1], [2, 2])
    simulated = simulate(schedule_table("1f1b", 2, 101), times, [1.0]).step_s
    assert estimate == pytest.approx(simulated, rel=1e-3)
    assert estimate >= 51 * 8  # 306 without transfers


def test_long_pipelines_go_on_at_the_pace_of_short_ones() -> None:
    """One slow stage sets the pace of ZB-V exactly."""
    slow = StageTimes((1, 1, 3, 1, 1, 1), (1,) * 6, (1,) * 6)
    few, more = (schedule_estimate_seconds("zb-v", slow, [0.1] * 5, m) for m in (100, 200))
    assert more - few == pytest.approx(100 * 8)
    assert few == pytest.approx(simulate(schedule_table("zb-v", 3, 100), slow, [0.1] * 5).step_s)


def test_bad_pipelines() -> None:
    with pytest.raises(InvalidInput, match="2 stages with 2 transfers"):
        pipeline_bound_seconds([1, 1], [0, 0], 4)
    with pytest.raises(InvalidInput, match="0 microbatches"):
        pipeline_estimate_seconds([1], [], 0)
    three = StageTimes((1,) * 3, (1,) * 3, (1,) * 3)
    with pytest.raises(InvalidInput, match="3 stages on ranks with vpp=2"):
        schedule_bound_seconds("zb-v", three, [0, 0], 4)
    with pytest.raises(InvalidInput, match="5 microbatches do not divide into 2 rounds"):
        schedule_bound_seconds("interleaved", StageTimes.of([1] * 4, [2] * 4), [0] * 3, 5, 2)
