"""Pipelines across islands: stages at their own pace and over their own links."""

from __future__ import annotations

from typing import Any

import pytest

import shardwright as sw
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner import Fix, Request, Search
from shardwright.planner.candidates import Candidate
from shardwright.planner.request import repeated
from shardwright.planner.sites import Sites

SLOW = 0.4e9
"""Bytes per second and device of 25 Gb/s Ethernet that eight devices share."""


@pytest.fixture(scope="module")
def model() -> Model:
    dims = TransformerDims(layers=24, hidden=2048, heads=16, ffn=8192, vocab=51200)
    return transformer(dims, name="gpt")


def cluster(**changes: Any) -> sw.Cluster:
    base = sw.Cluster.preset("a100-80g", nodes=4).model_dump()
    return sw.Cluster(**{**base, "curves": (), **changes})


def network(bandwidth: float) -> list[dict[str, Any]]:
    levels = [level.model_dump() for level in sw.Cluster.preset("a100-80g", nodes=4).levels]
    levels[-1]["bandwidth_bytes_per_s"] = bandwidth
    return levels


def joined_by_ethernet() -> sw.Cluster:
    """Two nodes on InfiniBand, two on RoCE, nothing but Ethernet between them (Holmes, 2023)."""
    outer = network(25e9)[-1]["name"]
    roce = {"name": "roce", "nodes": 2, "levels": [{"name": outer, "bandwidth_bytes_per_s": 20e9}]}
    return cluster(
        levels=network(25e9),
        islands=[{"name": "infiniband", "nodes": 2}, roce],
        pairs=[{"islands": ("infiniband", "roce"), "bandwidth_bytes_per_s": SLOW}],
    )


def seconds(model: Model, where: sw.Cluster, batch: int = 128) -> float:
    return sw.plan(model, where, sw.Workload(batch, 2048), top=1).predicted.step_seconds


def test_data_parallelism_stays_inside_an_island(model: Model) -> None:
    """Nobody says so: only the pipeline crosses the Ethernet, and the plan is far from as slow as
    on Ethernet throughout."""
    plan = sw.plan(model, joined_by_ethernet(), sw.Workload(128, 2048), top=1)
    assert plan.strategy.pp >= 2 and plan.strategy.pp % 2 == 0
    half = len(plan.strategy.layers) // 2
    assert sum(plan.strategy.layers[:half]) >= sum(plan.strategy.layers[half:])  # InfiniBand first
    mixed = plan.predicted.step_seconds
    assert seconds(model, cluster(levels=network(25e9))) <= mixed * 1.001
    assert mixed < seconds(model, cluster(levels=network(SLOW)))


def test_stages_are_in_proportion_to_speed(model: Model) -> None:
    where = cluster(
        islands=[{"name": "new", "nodes": 2}, {"name": "old", "nodes": 2, "device": "v100"}]
    )
    work = sw.Workload(256, 2048, precision="fp16")
    plan = sw.plan(model, where, work, fix="pp=2", top=1)
    fast, slow = plan.strategy.layers
    ratio = 312 / (125 * 0.70 / 0.75)  # peaks, and how much of theirs they reach, about
    assert fast / slow == pytest.approx(ratio, rel=0.5) and fast > slow
    even = sw.plan(model, where, work, fix="pp=2,stages=12-12", top=1)
    assert plan.predicted.step_seconds < even.predicted.step_seconds
    four = sw.plan(model, where, work, fix="pp=4,stages=6-6-6-6", top=1)
    free = sw.plan(model, where, work, top=1)
    assert (
        free.predicted.step_seconds
        <= min(plan.predicted.step_seconds, four.predicted.step_seconds) * 1.001
    )


def test_the_order_of_islands_is_the_order_of_stages(model: Model) -> None:
    new, old = {"name": "new", "nodes": 2}, {"name": "old", "nodes": 2, "device": "v100"}
    work = sw.Workload(256, 2048, precision="fp16")
    layers = [
        sw.plan(model, cluster(islands=islands), work, fix="pp=2", top=1).strategy.layers
        for islands in ([new, old], [old, new])
    ]
    assert layers[0][0] > layers[0][1] and layers[1][0] < layers[1][1]


def test_predict_and_plan_agree_on_islands(model: Model) -> None:
    where, work = joined_by_ethernet(), sw.Workload(128, 2048)
    plan = sw.plan(model, where, work, fix="pp=2,zero=1,micro_batch=2,recompute=none", top=1)
    stages = "-".join(map(str, plan.strategy.layers))
    fix = f"pp=2,dp=16,tp={plan.strategy.tp},zero=1,micro_batch=2,stages={stages}"
    fix += f",schedule={plan.strategy.schedule}"
    if plan.strategy.tp == 1:
        found = sw.predict(model, where, work, fix)
        assert found.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-3)


def test_ranks_within_an_island_share_its_view() -> None:
    where = joined_by_ethernet()
    sites = Sites.of(where, where.at_slowest())
    four = sites.views(Candidate(4, 8, 1, 0, 1, 8))
    assert four[0] is four[1] and four[2] is four[3] and four[0] is not four[2]
    assert four[0].worst_levels[-1].bandwidth_bytes_per_s == 25e9
    (whole,) = set(sites.views(Candidate(1, 32, 1, 0, 1, 8)))
    assert whole.world_size == 32
    alike = sw.Cluster.preset("h100-sxm", nodes=4)
    assert Sites.of(alike, alike).alike


def test_a_slow_node_slows_its_own_stage_alone(model: Model) -> None:
    where = cluster(degraded=[{"nodes": (3,), "compute_fraction": 0.5}])
    request = Request.on(model, where, sw.Workload(128, 2048), Fix.parse("pp=4,tp=1"))
    best = Search(request).run(top=1).outcomes[0]
    layers = repeated(model).per_stage(best.cut.bounds)
    assert layers[3] < min(layers[:3])
