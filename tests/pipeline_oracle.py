"""The slow, plain reading of a schedule: an event simulation in which ranks pass messages.

Nothing here uses the arrays or the waves of a table: rows of actions, a clock per rank, a mailbox.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import assume
from hypothesis import strategies as st

from shardwright.costmodel.simulate import StageTimes
from shardwright.ir.plan import ScheduleName
from shardwright.ir.schedule import Action, ScheduleTable
from shardwright.ir.schedule_rows import schedule_table

Spans = dict[Action, tuple[float, float]]


def played(
    rows: Sequence[Sequence[Action]],
    placement: Sequence[int],
    times: StageTimes,
    p2p_s: Sequence[float],
    *,
    blocking: bool = False,
    released: Sequence[float] | None = None,
) -> Spans:
    """Start and end of every action. `released`: when a stage may start its first forward."""
    stages = len(placement)
    mail: dict[tuple[str, int, int], tuple[float, float]] = {}  # → sent at, seconds on the way
    spans: Spans = {}
    clock, sending = [0.0] * len(rows), [0.0] * len(rows)
    waiting = [list(row) for row in rows]
    started: set[int] = set()
    while any(waiting):
        moved = False
        for rank, queue in enumerate(waiting):
            while queue:
                action = queue[0]
                kind, stage, microbatch = action
                if kind == "F":
                    inbox = ("activation", stage, microbatch) if stage else None
                elif kind == "W":
                    inbox = ("split", stage, microbatch)
                else:
                    inbox = ("gradient", stage, microbatch)
                if inbox and inbox not in mail:
                    break
                sent_at, way = mail[inbox] if inbox else (0.0, 0.0)
                if blocking:  # sends the last output and takes the next input at the same time
                    start = max(clock[rank] + sending[rank], max(clock[rank], sent_at) + way)
                else:
                    start = max(clock[rank], sent_at + way)
                if released and kind == "F" and stage not in started:
                    start = max(start, released[stage])
                    started.add(stage)
                end = start + took(times, action)
                spans[action] = start, end
                clock[rank], sending[rank] = end, 0.0
                target = {"F": stage + 1, "B": stage - 1, "I": stage - 1}.get(kind, -1)
                if kind == "I":
                    mail["split", stage, microbatch] = end, 0.0
                if kind == "F" and target == stages:
                    mail["gradient", stage, microbatch] = end, 0.0
                elif 0 <= target < stages:
                    apart = placement[target] != placement[stage]
                    sending[rank] = p2p_s[min(stage, target)] if apart else 0.0
                    what = "activation" if kind == "F" else "gradient"
                    mail[what, target, microbatch] = end, sending[rank]
                queue.pop(0)
                moved = True
        assert moved, "the ranks wait for each other"
    return spans


def took(times: StageTimes, action: Action) -> float:
    parts = {
        "F": times.forward_s,
        "I": times.backward_input_s,
        "W": times.backward_weight_s,
    }
    if action.kind == "B":
        return parts["I"][action.stage] + parts["W"][action.stage]
    return parts[action.kind][action.stage]


@st.composite
def pipelines(
    draw: st.DrawFn,
    spread: float,
    names: Sequence[ScheduleName] = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"),
    most_ranks: int = 6,
    most_rounds: int = 6,
) -> tuple[ScheduleTable, StageTimes, tuple[float, ...]]:
    """A table, stages around 3 s of which a third each is F, I and W, and transfers up to a tenth
    of a stage. A stage varies as a whole or each part by itself."""
    name = draw(st.sampled_from(names))
    pp = draw(st.integers(1, most_ranks))
    microbatches = draw(st.integers(1, most_rounds * pp))
    vpp = {"interleaved": draw(st.integers(2, 3)), "zb-v": 2}.get(name, 1)
    assume(name != "interleaved" or microbatches % max(1, microbatches // pp) == 0)
    stages = pp * vpp
    around = st.lists(st.floats(1 - spread, 1 + spread), min_size=stages, max_size=stages)
    forward, inputs, weights = (
        [draw(around)] * 3 if draw(st.booleans()) else [draw(around) for _ in range(3)]
    )
    p2p = draw(st.lists(st.floats(0, 0.3), min_size=stages - 1, max_size=stages - 1))
    times = StageTimes(tuple(forward), tuple(inputs), tuple(weights))
    return schedule_table(name, pp, microbatches, vpp), times, tuple(p2p)
