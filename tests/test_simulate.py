"""The simulator against a plain event simulation, the papers' figures, and a run on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_oracle import Spans, pipelines, played, took

from shardwright.costmodel.overlap import overlap_cost_fraction
from shardwright.costmodel.simulate import DataParallel, StageTimes, StepOptions, simulate
from shardwright.costmodel.timeline import Timeline
from shardwright.ir.errors import InvalidInput
from shardwright.ir.plan import ScheduleName
from shardwright.ir.schedule import ScheduleTable
from shardwright.ir.schedule_rows import schedule_table

Pipeline = tuple[ScheduleTable, StageTimes, tuple[float, ...]]


def spans(timeline: Timeline) -> Spans:
    return {action: (start, end) for _, action, start, end in timeline.events()}


def equal(found: Spans, expected: Spans) -> None:
    assert found.keys() == expected.keys()
    for action, span in expected.items():
        assert found[action] == pytest.approx(span, rel=1e-12, abs=1e-12), action


def ones(count: int) -> tuple[float, ...]:
    return (1.0,) * count


# --- against the plain simulation ----------------------------------------------------------------


@given(pipelines(spread=0.9), st.booleans())
def test_every_action_starts_and_ends_as_in_a_plain_simulation(
    pipeline: Pipeline, blocking: bool
) -> None:
    table, times, p2p = pipeline
    options = StepOptions(transfer="blocking" if blocking else "overlapped")
    timeline = simulate(table, times, p2p, options)
    expected = played(table.rows, table.placement, times, p2p, blocking=blocking)
    equal(spans(timeline), expected)
    assert timeline.step_s == pytest.approx(max(end for _, end in expected.values()))
    for rank, row in enumerate(table.rows):
        busy = sum(took(times, action) for action in row)
        assert timeline.bubble_s[rank] == pytest.approx(timeline.step_s - busy)


@given(pipelines(spread=0.5))
def test_a_rank_waits_for_transfers_only_where_there_are_any(pipeline: Pipeline) -> None:
    table, times, p2p = pipeline
    none = simulate(table, times, [0.0] * len(p2p))
    assert none.exposed_transfer_s == pytest.approx(np.zeros(table.pp), abs=1e-9)
    some = simulate(table, times, p2p)
    blocking = simulate(table, times, p2p, StepOptions("blocking"))
    assert none.step_s <= some.step_s * (1 + 1e-12)
    assert some.step_s <= blocking.step_s * (1 + 1e-12)
    slower = some.step_s - none.step_s
    assert slower <= some.exposed_transfer_s.sum() * (1 + 1e-9) + 1e-9


# --- known figures -------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.1, 0.9))
def test_bubbles_of_gpipe_and_1f1b(p: int, m: int, share: float) -> None:
    """(p - 1) / (m + p - 1), whatever share of a stage the forward has (Narayanan et al. 2021)."""
    backward = (1 - share) / 2
    times = StageTimes((share,) * p, (backward,) * p, (backward,) * p)
    names: list[ScheduleName] = ["gpipe", "1f1b"]
    for name in names:
        timeline = simulate(schedule_table(name, p, m), times, [0.0] * (p - 1))
        assert timeline.step_s == pytest.approx(m + p - 1)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 4), st.floats(0.2, 0.6))
def test_bubble_of_interleaved(p: int, rounds: int, v: int, share: float) -> None:
    """(p - 1) / (v·m + p - 1) (the same paper, section 2.2.2)."""
    m, stages, half = rounds * p, v * p, (1 - share) / 2
    times = StageTimes((share,) * stages, (half,) * stages, (half,) * stages)
    timeline = simulate(schedule_table("interleaved", p, m, v), times, [0.0] * (stages - 1))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))


@given(st.integers(1, 9), st.integers(0, 20), st.floats(0.3, 1.0))
def test_bubble_of_zb_h1(p: int, more: int, weights: float) -> None:
    """(p - 1)·(F + I - W) in seconds, for W no longer than F = I (arXiv:2401.10241, table 2); a
    third of 1F1B's where all are equal."""
    m = p + more
    times = StageTimes(ones(p), ones(p), (weights,) * p)
    timeline = simulate(schedule_table("zb-h1", p, m), times, [0.0] * (p - 1))
    assert timeline.bubble_s == pytest.approx([(p - 1) * (2 - weights)] * p)


@given(st.integers(1, 8), st.integers(0, 20))
def test_zb_v_has_no_bubble(p: int, more: int) -> None:
    """With equal parts no rank stands still between its first and its last action, once the
    pipeline can be filled (2p - 1 microbatches); the first actions start one after the other."""
    m = 2 * p - 1 + more
    times = StageTimes(ones(2 * p), ones(2 * p), ones(2 * p))
    timeline = simulate(schedule_table("zb-v", p, m), times, [0.0] * (2 * p - 1))
    assert timeline.inner_bubble_s == pytest.approx(np.zeros(p))
    assert timeline.step_s == pytest.approx(6 * m + p - 1)


# --- around the pipeline -------------------------------------------------------------------------


@given(pipelines(spread=0.5, most_rounds=3), st.data())
def test_gradients_are_reduced_as_buckets_become_ready(
    pipeline: Pipeline, data: st.DataObject
) -> None:
    table, times, p2p = pipeline
    seconds = st.lists(st.floats(0, 3), min_size=table.stages, max_size=table.stages)
    sync = DataParallel(
        tuple(data.draw(seconds)), (0.0,) * table.stages, data.draw(st.integers(1, 5))
    )
    timeline = simulate(table, times, p2p, StepOptions(data_parallel=sync))
    assert simulate(table, times, p2p).end_s.tolist() == timeline.end_s.tolist()
    free = [0.0] * table.pp
    for rank, row in enumerate(table.rows):
        last = {a.stage: a for a in row if a.kind in "BW"}
        for action in sorted(last.values(), key=row.index):
            start, end = spans(timeline)[action]
            for part in range(1, sync.buckets + 1):
                ready = start + (end - start) * part / sync.buckets
                gradients = sync.gradients_s[action.stage] / sync.buckets
                free[rank] = max(free[rank], ready) + gradients
    reduced = np.maximum(free, timeline.compute_end_s)
    hidden = (timeline.gradients_end_s - reduced) / overlap_cost_fraction()
    total = np.bincount(table.placement, sync.gradients_s, minlength=table.pp)
    assert (hidden >= -1e-9).all()
    assert (hidden <= total + 1e-9).all()
    stopped = replace(sync, overlapped=False)
    waits = simulate(table, times, p2p, StepOptions(data_parallel=stopped)).exposed_sync_s
    assert waits == pytest.approx(total)


def test_the_loss_beside_reduction_is_that_of_the_compute_it_runs_beside() -> None:
    """Two stages on one rank: gradients of the upper leave while the backward of the lower runs."""
    table = schedule_table("interleaved", 1, 1, 2)
    times = StageTimes((1.0, 1.0), (2.0, 1.0), (2.0, 1.0))
    sync = DataParallel((0.0, 3.0), (0.0, 0.0))
    timeline = simulate(table, times, [0.0], StepOptions(data_parallel=sync))
    assert timeline.compute_end_s[0] == 8
    assert timeline.exposed_sync_s[0] == pytest.approx(3 * overlap_cost_fraction())


@given(pipelines(spread=0.5, most_rounds=3), st.data())
def test_forwards_wait_for_their_parameters(pipeline: Pipeline, data: st.DataObject) -> None:
    table, times, p2p = pipeline
    seconds = st.lists(st.floats(0, 3), min_size=table.stages, max_size=table.stages)
    gathers, buckets = tuple(data.draw(seconds)), data.draw(st.integers(1, 5))
    overlapped = data.draw(st.booleans())
    sync = DataParallel((0.0,) * table.stages, gathers, buckets, overlapped, at_start=True)
    timeline = simulate(table, times, p2p, StepOptions(data_parallel=sync))
    released = [0.0] * table.stages
    for rank in range(table.pp):
        at = 0.0
        for stage in table.stages_of(rank):
            # part j of the forward starts after part j of the gather, j = 1 … buckets
            f = times.forward_s[stage]
            released[stage] = max(
                at + gathers[stage] * j / buckets - f * (j - 1) / buckets
                for j in range(1, buckets + 1)
            )
            at += gathers[stage]
        if not overlapped:
            for stage in table.stages_of(rank):
                released[stage] = at
    equal(spans(timeline), played(table.rows, table.placement, times, p2p, released=released))


def test_the_optimizer_waits_for_all_ranks_or_only_for_its_own() -> None:
    table, times = schedule_table("zb-v", 3, 6), StageTimes(ones(6), ones(6), ones(6))
    options = StepOptions(optimizer_s=(5.0, 1.0, 1.0))
    together = simulate(table, times, [0.0] * 5, options)
    assert together.rank_end_s.tolist() == [38 + 5, 38 + 1, 38 + 1]
    alone = simulate(table, times, [0.0] * 5, replace(options, barrier=False))
    assert alone.rank_end_s.tolist() == [36 + 5, 37 + 1, 38 + 1]
    sync = DataParallel((0.0,) * 6, ones(6))
    after = simulate(table, times, [0.0] * 5, replace(options, data_parallel=sync))
    assert after.rank_end_s.tolist() == [45, 41, 41]


# --- bad input -----------------------------------------------------------------------------------


THREE = StageTimes(ones(3), ones(3), ones(3))


@pytest.mark.parametrize(
    ("times", "p2p", "options", "message"),
    [
        (replace(THREE, forward_s=ones(2)), [0, 0], {}, "forward_s has 2 values, expected 3"),
        (THREE, [0], {}, "p2p_s has 1 values, expected 2"),
        (THREE, [0, -1], {}, "p2p_s has -1: expected seconds, 0 or more"),
        (replace(THREE, forward_s=(1, 1, float("nan"))), [0, 0], {}, "forward_s has nan"),
        (THREE, [0, 0], {"optimizer_s": (1.0,)}, "optimizer_s has 1 values, expected 3"),
        (THREE, [0, 0], {"data_parallel": DataParallel(ones(3), ones(3), 0)}, "buckets=0"),
    ],
)
def test_bad_times(
    times: StageTimes, p2p: list[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        simulate(schedule_table("1f1b", 3, 4), times, p2p, StepOptions(**options))


# --- a real run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_ranks_run_in_the_order_of_the_timeline(tmp_path: Path) -> None:
    """torch's schedules on 4 gloo ranks: each rank in the simulated order, and no action before
    what it depends on, here and there."""
    microbatches = 8
    worker = Path(__file__).with_name("pipeline_worker.py")
    run = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), str(microbatches)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "events.json").read_text())
    assert set(found) == {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"}
    for name, events in found.items():
        vpp = 2 if name in ("interleaved", "zb-v") else 1
        table = schedule_table(name, 4, microbatches, vpp)
        stages = table.stages
        timeline = simulate(
            table, StageTimes(ones(stages), ones(stages), ones(stages)), [0.1] * (stages - 1)
        )
        simulated = {str(action): span for action, span in spans(timeline).items()}
        real = {action: (start, end) for _, action, start, end in events}
        assert real.keys() == simulated.keys()
        for rank in range(4):
            mine = [event for event in events if event[0] == rank]
            here = sorted(
                (start, str(action)) for at, action, start, _ in timeline.events() if at == rank
            )
            assert [action for _, action in here] == [
                e[1] for e in sorted(mine, key=lambda e: e[2])
            ]
        order = table.order
        actions = [str(action) for row in table.rows for action in row]
        for at, needs in zip(order.actions.tolist(), order.needs.tolist(), strict=True):
            if needs:
                earlier, later = actions[order.actions[needs - 1]], actions[at]
                assert real[earlier][1] <= real[later][0], (name, earlier, later)
                assert simulated[earlier][1] <= simulated[later][0]
