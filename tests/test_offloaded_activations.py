"""Activations that wait in host memory: what that costs, when it is worth it, what limits it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel.liveness import BlockBytes
from shardwright.costmodel.memory import StateBytes, stage_bytes
from shardwright.costmodel.work import Work
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.planner import Fix, Request, Search
from shardwright.planner.inner import BlockCost

MODEL = transformer(
    TransformerDims(
        layers=8, hidden=1024, heads=8, kv_heads=4, head_dim=128, ffn=2816, vocab=32000
    ),
    name="dense",
)
WORK = sw.Workload(16, 4096)


def cluster(link: float | None, room: float = 1.0, host: int = 1 << 40) -> sw.Cluster:
    """Four H100, with a part of their memory, behind a link to host memory of `link` bytes/s."""
    whole = sw.Cluster.preset("h100-sxm", 1, 4)
    changes = {
        "memory_bytes": whole.device.reserve_bytes + int(room * 2**30),
        "host_link_bytes_per_s": link,
        "host_memory_bytes": host,
    }
    return whole.with_device(whole.device.model_copy(update=changes))


def found(where: sw.Cluster, fix: str = "") -> tuple[float, set[str], int]:
    """Seconds of the best plan, the modes in use, the most bytes of a device in host memory."""
    search = Search(Request.on(MODEL, where, WORK, Fix.parse(fix)), anything=True)
    best = search.run(top=1).outcomes[0]
    used = {mode for stage in best.cut.modes for mode in stage}
    return best.seconds, used, max(stage.host for stage in best.memory)


def test_an_endless_link_costs_nothing_and_an_empty_one_is_never_chosen() -> None:
    assert found(cluster(1e18, 70), "recompute=offload")[0] == pytest.approx(
        found(cluster(1e18, 70), "recompute=none")[0]
    )
    tight = cluster(1e-3, 2)
    seconds, used, host = found(tight)
    assert "offload" not in used and host == 0
    assert seconds == found(cluster(None, 2))[0]


def test_it_is_chosen_where_memory_binds_and_the_link_is_fast() -> None:
    kept = found(cluster(None, 2))
    moved = found(cluster(500e9, 2))
    assert "offload" in moved[1] and moved[2] > 0
    assert moved[0] < kept[0]


def test_host_memory_limits_it() -> None:
    free = found(cluster(500e9, 2))
    half = found(cluster(500e9, 2, host=free[2] // 2))
    assert half[2] <= free[2] // 2
    assert free[0] <= half[0] <= found(cluster(None, 2))[0]


def test_a_plan_says_that_it_offloads(tmp_path: Path) -> None:
    plan = sw.plan(MODEL, cluster(500e9, 70), WORK, fix="recompute=offload", top=1)
    assert plan.strategy.recompute == "offload"
    assert any("offloaded activations" in line for line in plan.advice)
    assert any("wait in host memory" in line for line in plan.advice)
    assert str(plan) and str(plan.explain())
    plan.save(tmp_path / "plan.json")
    again = sw.Plan.load(tmp_path / "plan.json")
    assert again.strategy == plan.strategy and again.stages == plan.stages
    with pytest.raises(InvalidInput, match="cannot be emitted yet: offloaded activations"):
        again.emit("torch", tmp_path / "out")
    by_default = sw.plan(MODEL, cluster(500e9, 2), WORK, top=1)
    assert by_default.strategy.recompute != "offload"


def test_without_a_link_there_is_no_such_mode() -> None:
    with pytest.raises(InvalidInput, match="recompute=offload: device h100-sxm has no host_link"):
        sw.plan(MODEL, cluster(None, 70), WORK, fix="recompute=offload")


def test_prediction_counts_host_memory() -> None:
    fix = "recompute=offload,dp=4"
    assert sw.predict(MODEL, cluster(1e18, 70), WORK, fix).fits
    assert not sw.predict(MODEL, cluster(1e18, 70, host=1 << 20), WORK, fix).fits
    slow, fast = (sw.predict(MODEL, cluster(link, 70), WORK, fix) for link in (1e9, 1e18))
    none = sw.predict(MODEL, cluster(None, 70), WORK, "recompute=none,dp=4")
    assert fast.step_seconds == pytest.approx(none.step_seconds)
    assert slow.time["offload"] > 0
    assert slow.step_seconds > none.step_seconds
    assert max(fast.memory_bytes) < max(none.memory_bytes)


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), in_flight=st.integers(1, 8))
def test_two_blocks_at_most_are_on_the_device(sizes: list[int], in_flight: int) -> None:
    plain = [BlockBytes(kept, 100) for kept in sizes]
    moved = [BlockBytes(0, 100, offloaded=kept) for kept in sizes]
    state = StateBytes(0, 0, 0)
    here, away = stage_bytes(state, plain, in_flight), stage_bytes(state, moved, in_flight)
    assert away.host == here.activations
    assert away.buffers == min(here.activations, 2 * max(sizes))
    assert away.activations == 0
    assert away.workspace == 100


@settings(max_examples=50)
@given(
    passes=st.tuples(*[st.floats(0.1, 1.0)] * 2),
    moved=st.floats(0, 3.0),
    more=st.floats(0.0, 0.3),
)
def test_bounds_see_no_more_than_a_share_forward(
    passes: tuple[float, float], moved: float, more: float
) -> None:
    """No longer than it is, no shorter than without moving, and F <= share * T where that holds of
    what is kept."""
    plain = BlockCost(Work({"matmul": passes[0]}), Work({"matmul": passes[1]}), 0.0, None)  # type: ignore[arg-type]
    cost = BlockCost(
        Work({"matmul": max(passes[0], moved)}), Work({"matmul": max(passes[1], moved)}), 0.0, None
    )  # type: ignore[arg-type]
    share = min(0.99, passes[0] / sum(passes) + more)
    least = cost.least_seconds(plain, share)
    assert plain.seconds * (1 - 1e-9) <= least <= cost.seconds * (1 + 1e-9)
    forward = least - cost.backward.total_s
    assert forward <= share * least * (1 + 1e-9)
