"""Plans that cost least or take least energy, on as many nodes as suit that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright.costmodel import Spending, what_if
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner import Fix, Request, Search
from shardwright.planner.fewer_nodes import choices
from shardwright.planner.search import TIE
from shardwright.planner.solving import Solving

WORK = sw.Workload(48, 2048)


@pytest.fixture(scope="module")
def model() -> Model:
    dims = TransformerDims(layers=12, hidden=2048, heads=16, ffn=8192, vocab=32000)
    return transformer(dims, name="gpt")


def cluster(name: str = "h100-sxm", nodes: int = 4, **figures: float) -> sw.Cluster:
    base = sw.Cluster.preset(name, nodes=nodes, devices_per_node=4).model_dump()
    return sw.Cluster(**{**base, "device": {**base["device"], **figures}})


def islands(new: dict[str, float], old: dict[str, float]) -> sw.Cluster:
    """Two nodes of A100s and two of V100s, each with figures of their own."""
    base = sw.Cluster.preset("a100-80g", nodes=4).model_dump()
    parts = [
        {"name": "new", "nodes": 2, "device": {"preset": "a100-80g", **new}},
        {"name": "old", "nodes": 2, "device": {"preset": "v100", **old}},
    ]
    return sw.Cluster(**{**base, "curves": (), "islands": parts})


@pytest.mark.parametrize(
    ("objective", "figures"),
    [
        ("cost", {"price_per_hour": 3.0}),
        ("energy", {"power_watts": 700.0}),
        ("energy", {"power_watts": 700.0, "idle_watts": 90.0}),
    ],
)
def test_no_number_of_nodes_spends_less(
    model: Model, objective: str, figures: dict[str, float]
) -> None:
    """Every number of nodes, each searched to its end."""
    where = cluster(**figures)
    plan = sw.plan(model, where, WORK, objective=objective)
    spent = []
    for left_out in choices(where):
        request = Request.on(model, where.without(left_out), WORK, Fix())
        found = Search(request, objective=objective).run(top=1)
        spent.append(found.spent(found.outcomes[0]))
        assert plan.certificate.bound <= spent[-1] * (1 + 1e-9)
    assert len(spent) == where.nodes
    assert plan.certificate.spent <= min(spent) * (1 + TIE)
    assert plan.certificate.gap == pytest.approx(
        1 - plan.certificate.bound / plan.certificate.spent
    )
    assert plan.certificate.objective == objective in str(plan)


def test_what_is_spent_is_what_the_devices_say(model: Model) -> None:
    where = cluster(price_per_hour=3.6)
    plan = sw.plan(model, where, WORK, objective="cost")
    devices = plan.strategy.ranks
    expected = plan.predicted.step_seconds * devices * 3.6 / 3600
    assert plan.certificate.spent == pytest.approx(expected, rel=1e-9)
    always = Spending.on("energy", cluster(power_watts=700.0))
    idle = Spending.on("energy", cluster(power_watts=700.0, idle_watts=100.0))
    assert always.of(2.0, 0.5) == 16 * 700 * 2.0
    assert idle.of(2.0, 0.5) == pytest.approx(16 * (100 * 1.5 + 700 * 0.5))
    assert idle.of(2.0, 2.0) == pytest.approx(always.of(2.0, 2.0))


def test_time_is_bought_with_more_nodes_than_money_wants(model: Model) -> None:
    """More devices are faster; each device-second is best used on few."""
    where = cluster(price_per_hour=3.0)
    fast, cheap = (sw.plan(model, where, WORK, objective=name) for name in ("time", "cost"))
    assert fast.predicted.step_seconds < cheap.predicted.step_seconds
    assert fast.strategy.ranks > cheap.strategy.ranks
    assert fast.predicted.step_seconds * fast.strategy.ranks > (
        cheap.predicted.step_seconds * cheap.strategy.ranks
    )
    nodes = cheap.cluster["nodes"]
    assert any(f"uses {nodes} of 4 nodes" in line for line in cheap.advice)


def test_dear_devices_are_left_out(model: Model) -> None:
    work = sw.Workload(64, 1024, precision="fp16")
    dear_old = islands({"price_per_hour": 2.0}, {"price_per_hour": 50.0})
    dear_new = islands({"price_per_hour": 500.0}, {"price_per_hour": 0.5})
    for where, kept in ((dear_old, "a100-80g"), (dear_new, "v100")):
        plan = sw.plan(model, where, work, objective="cost", top=1)
        used = sw.Cluster(**dict(plan.cluster))
        assert {device.name for device in used.device_kinds} == {kept}


def test_a_fixed_part_holds_on_fewer_nodes(model: Model) -> None:
    where = cluster(price_per_hour=3.0)
    plan = sw.plan(model, where, WORK, objective="cost", fix="tp=2")
    assert plan.strategy.tp == 2
    fixed = sw.plan(model, where, WORK, objective="cost", fix="tp=2,dp=8,pp=1")
    assert fixed.cluster["nodes"] == 4  # no other number of nodes has these degrees


def test_the_plan_file_keeps_what_was_least(model: Model, tmp_path: Path) -> None:
    plan = sw.plan(model, cluster(price_per_hour=3.0), WORK, objective="cost", top=2)
    plan.save(tmp_path / "plan.json")
    again = sw.Plan.load(tmp_path / "plan.json")
    assert again.certificate == plan.certificate
    data: dict[str, Any] = again.to_json()["certificate"]
    assert data["objective"] == "cost" and data["spent"] >= data["bound"] > 0


def test_bad_objectives_are_one_line(model: Model) -> None:
    with pytest.raises(sw.InvalidInput, match=r"no price_per_hour.*preset: h100-sxm"):
        sw.plan(model, cluster(), WORK, objective="cost")
    with pytest.raises(sw.InvalidInput, match="expected one of time, cost, energy"):
        sw.plan(model, cluster(), WORK, objective="speed")
    with pytest.raises(sw.InvalidInput, match=r"v100 has no price_per_hour"):
        sw.plan(model, islands({"price_per_hour": 2.0}, {}), WORK, objective="cost")
    with pytest.raises(ValueError, match="idle_watts is 900, expected at most power_watts"):
        cluster(power_watts=700.0, idle_watts=900.0)


def test_a_device_in_a_file_is_a_preset_and_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    level = "name: nvlink, span_devices: cluster, latency_s: 1.0e-6, bandwidth_bytes_per_s: 1.0e+11"
    path.write_text(
        "name: mine\nnodes: 1\ndevices_per_node: 8\n"
        f"device: {{preset: h100-sxm, price_per_hour: 2.5}}\nlevels: [{{{level}}}]\n"
    )
    device = sw.Cluster.load(path).device
    assert device == sw.Device.preset("h100-sxm").model_copy(update={"price_per_hour": 2.5})
    path.write_text(path.read_text().replace("h100-sxm", "h100"))
    with pytest.raises(sw.InvalidInput, match="h100-sxm"):
        sw.Cluster.load(path)
    path.write_text(path.read_text().replace("preset: h100,", "preset: h100-sxm, prize: 3,"))
    with pytest.raises(sw.InvalidInput, match="prize"):
        sw.Cluster.load(path)


def test_an_interrupted_search_over_nodes_keeps_what_it_has(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late: what was found stays, and the bound is below what was not looked at."""
    where = cluster(price_per_hour=3.0)
    whole = sw.plan(model, where, WORK, objective="cost", top=1)
    solve, calls = Solving.solve, [0]

    def interrupted(self: Solving, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == last:
            raise KeyboardInterrupt
        return solve(self, *arguments)

    monkeypatch.setattr(Solving, "solve", interrupted)
    for last in (3, 6, 9):
        calls[0] = 0
        plan = sw.plan(model, where, WORK, objective="cost", top=1)
        assert plan.certificate.bound <= whole.certificate.spent * (1 + 1e-9)
        assert plan.certificate.spent >= whole.certificate.spent * (1 - TIE)
        if calls[0] >= last:
            assert any("interrupted" in line for line in plan.advice)
    last, calls[0] = 1, 0
    with pytest.raises(KeyboardInterrupt):
        sw.plan(model, where, WORK, objective="cost")


def test_an_island_that_slows_a_job_is_named(model: Model) -> None:
    """Two nodes of V100s over 1 Gb/s: the A100s alone are faster, and the plan says so."""
    where = islands({}, {})
    slow = what_if.with_level(where, len(where.levels) - 1, 0.001)
    work = sw.Workload(64, 1024, precision="fp16")
    plan = sw.plan(model, slow, work, top=1)
    (line,) = [line for line in plan.advice if line.startswith("without nodes 2, 3 ")]
    alone = sw.plan(model, slow.without([2, 3]), work, top=1).predicted.step_seconds
    assert f"{alone:.4g} s" in line and alone < plan.predicted.step_seconds


def test_every_stage_has_the_memory_of_its_own_devices(model: Model) -> None:
    where = islands({}, {})
    work = sw.Workload(64, 1024, precision="fp16")
    plan = sw.plan(model, where, work, fix="pp=2", top=1)
    limits = [sw.Device.preset(name).memory_limit_bytes for name in ("a100-80g", "v100")]
    assert list(plan.predicted.limits_bytes) == limits
    assert all(used <= 1 for used in plan.explain()._used())
    layers = "-".join(map(str, plan.strategy.layers))
    s = plan.strategy
    fix = f"pp=2,dp={s.dp},tp={s.tp},zero={s.zero},micro_batch={s.micro_batch},stages={layers}"
    found = sw.predict(model, where, work, f"{fix},recompute={s.recompute},schedule={s.schedule}")
    assert list(found.memory_limits_bytes) == limits and found.fits
