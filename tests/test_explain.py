"""Explanations: what a plan would take otherwise, what binds, and where the runners-up lose."""

from __future__ import annotations

from dataclasses import replace

import pytest

import shardwright as sw
from shardwright.costmodel import what_if
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner.sensitivity import LESS, MORE, _Variations, sensitivity

CASES = [
    ("h100-sxm:2x4", "tp=2,pp=2", 16),
    ("h100-sxm:4x4", "pp=4", 64),
    ("a100-80g:2", "pp=2,dp=2,tp=4", 64),
    ("a100-40g:1", "tp=1,pp=1", 32),
]


@pytest.fixture(scope="module")
def model() -> Model:
    dims = TransformerDims(layers=12, hidden=2048, heads=16, ffn=8192, vocab=32000)
    return transformer(dims, name="gpt")


def saves(plan: sw.Plan, what: str, factor: float = MORE) -> float:
    return next(
        c.saves for c in sensitivity(plan) if c.factor == factor and c.what.startswith(what)
    )


@pytest.mark.parametrize(("where", "fix", "batch"), CASES)
def test_a_plan_priced_again_takes_as_long(model: Model, where: str, fix: str, batch: int) -> None:
    """From the file alone, types as they were written: what is varied is the plan itself."""
    plan = sw.plan(model, where, sw.Workload(batch, 2048), fix=fix, top=1)
    varied = _Variations(plan)
    assert varied._as_it_is(varied.cluster) == pytest.approx(plan.predicted.step_seconds, rel=1e-9)


@pytest.mark.parametrize(("where", "fix", "batch"), CASES)
def test_more_of_everything_is_no_slower(model: Model, where: str, fix: str, batch: int) -> None:
    """And a tenth more saves at most an eleventh."""
    plan = sw.plan(model, where, sw.Workload(batch, 2048), fix=fix, top=1)
    changes = sensitivity(plan)
    for change in changes:
        if change.factor == MORE:
            assert -1e-9 <= change.saves <= 1 - 1 / MORE + 1e-9, change
    total = sum(c.saves for c in changes if c.factor == MORE and c.what != "memory")
    assert 0.5 * (1 - 1 / MORE) < total < 1.1 * (1 - 1 / MORE)  # of time, but for latencies
    assert saves(plan, "arithmetic") > saves(plan, "memory bandwidth")


def test_the_slow_link_is_what_binds(model: Model) -> None:
    base = sw.Cluster.preset("h100-sxm", nodes=2)
    slow = what_if.with_level(base, len(base.levels) - 1, 0.002)
    plan = sw.plan(model, slow, sw.Workload(32, 2048), fix="pp=1,tp=1", top=1)
    name = base.levels[-1].name
    assert plan.explain().binds[0][0] == f"links of level {name}"
    fast = sw.plan(model, base, sw.Workload(1024, 2048), fix="pp=1,tp=1", top=1)
    assert fast.explain().binds[0][0] == "arithmetic of the devices"


def test_memory_binds_where_layers_are_recomputed(model: Model) -> None:
    base = sw.Cluster.preset("a100-40g", nodes=1)
    work = sw.Workload(64, 2048)
    roomy = sw.plan(model, base, work, fix="tp=1,pp=1,micro_batch=4,zero=1", top=1)
    # what it holds of activations is a quarter too much
    held = roomy.predicted.memory[0]["activations"]
    limit = max(roomy.predicted.memory_bytes) - held // 4
    tight = what_if.with_memory(base, limit / base.device.memory_limit_bytes)
    plan = sw.plan(model, tight, work, fix="tp=1,pp=1,micro_batch=4,zero=1", top=1)
    assert plan.strategy.recompute != "none"
    found = plan.explain()
    assert saves(plan, "memory", MORE) > 0 >= saves(plan, "memory", LESS)
    assert any(what.startswith("memory of stage 0") for what, _ in found.binds)
    assert "memory of stage 0" in str(found)


def test_a_larger_batch_dilutes_the_bubble(model: Model) -> None:
    plan = sw.plan(model, "h100-sxm:4x4", sw.Workload(32, 2048), fix="pp=4,micro_batch=1", top=1)
    assert saves(plan, "global batch", 2.0) > 0 > saves(plan, "global batch", 0.5)
    twice = sw.plan(
        model, "h100-sxm:4x4", sw.Workload(64, 2048), top=1,
        fix={"pp": 4, "micro_batch": 1, "dp": plan.strategy.dp, "tp": plan.strategy.tp,
             "zero": plan.strategy.zero},
    )  # fmt: skip
    ratio = twice.predicted.step_seconds / (2 * plan.predicted.step_seconds)
    assert 1 - saves(plan, "global batch", 2.0) == pytest.approx(ratio, rel=1e-6)


def test_losses_of_runners_up_add_up(model: Model) -> None:
    plan = sw.plan(model, "h100-sxm:2x4", sw.Workload(32, 2048), top=5)
    assert len(plan.alternatives) == 4
    found = plan.explain()
    for other, lost in zip(plan.alternatives, found.losses, strict=True):
        assert other.step_seconds is not None
        slower = other.step_seconds - plan.predicted.step_seconds
        assert sum(lost.values()) == pytest.approx(slower, abs=1e-12)
    data = found.to_json()
    assert [each["loses"] for each in data["alternatives"]] == [dict(lost) for lost in found.losses]
    assert data["binds"] and {"what", "saves"} == data["binds"][0].keys()
    assert sum(data["time"].values()) == pytest.approx(data["step_seconds"])


def test_a_plan_without_seconds_of_its_runners_up_is_explained(model: Model) -> None:
    plan = sw.plan(model, "h100-sxm:1x2", sw.Workload(8, 2048), top=2)
    bare = sw.Plan._of(
        replace(plan, alternatives=tuple(replace(o, time={}) for o in plan.alternatives))
    )
    assert "Where runners-up lose" not in str(bare.explain())
    assert "Where runners-up lose" in str(plan.explain())


def test_faster_measured_links_are_no_slower(model: Model) -> None:
    """A matrix that was measured is a kind of link too; the plan's nodes stay where they are."""
    base = sw.Cluster.preset("a100-80g", nodes=4, devices_per_node=2)
    rows = [[0, 9000, 5000, 9000], [9000, 0, 9000, 4000], [5000, 9000, 0, 9000],
            [9000, 4000, 9000, 0]]  # fmt: skip
    where = sw.Cluster(**{**base.model_dump(), "matrix": {"rows": rows}})
    plan = sw.plan(model, where, sw.Workload(32, 2048), fix="pp=4", top=1)
    assert plan.mapping is not None
    varied = _Variations(plan)
    assert varied._as_it_is(varied.cluster) == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert saves(plan, f"links of level {where.levels[-1].name}") > 0
