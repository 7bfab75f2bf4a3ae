"""Replanning after nodes are lost: everything arrives, as little as possible moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import shardwright as sw
from shardwright.cli import app
from shardwright.costmodel.cluster import Cluster, Degraded, Island, Pair, PairMatrix
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.region import Region
from shardwright.planner.fix import Fix
from shardwright.planner.holdings import Holdings
from shardwright.planner.migration import Migrating
from shardwright.planner.rank_order import Seats
from shardwright.planner.request import Request
from shardwright.planner.search import Search
from shardwright.planner.space import heads
from shardwright.planner.waiting import Waiting

DIMS = TransformerDims(layers=6, hidden=256, heads=8, kv_heads=4, ffn=512, vocab=1024, tied=True)
MODEL = transformer(DIMS, name="small")
WORK = sw.Workload(global_batch=48, seq_len=128)
CLUSTER = Cluster.preset("a100-80g", nodes=4, devices_per_node=2)

PLANS = (
    "pp=2,dp=2,tp=2,zero=1", "pp=1,dp=4,tp=2,zero=3", "pp=4,dp=1,tp=2", "pp=1,dp=8,tp=1,zero=0",
    "pp=2,dp=4,tp=1,zero=2",
)  # fmt: skip


@cache
def planned(fix: str, nodes: int = 4) -> sw.Plan:
    return sw.plan(MODEL, CLUSTER.resized(nodes), WORK, fix=fix)


def arrived(moving: Migrating) -> None:
    """Every rank of the new plan has all it keeps: what was there, and what the moves bring."""
    old, new = moving.old, moving.new
    result = moving.result()
    brought: dict[tuple[str, int], np.ndarray] = {}  # type: ignore[type-arg]
    shape = {name: tuple(p.shape) for name, p in new.plan.model.parameters.items()}

    def cells(name: str, regions: list) -> np.ndarray:  # type: ignore[type-arg]
        found = np.zeros(shape[name], int)
        for region in regions:
            for offsets, sizes in region.boxes():
                found[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
        return found

    for move in result.moves:
        key = move.name, move.target
        brought[key] = brought.get(key, np.zeros(shape[move.name], int))
        brought[key] += cells(move.name, [move.region])
        assert move.bytes == move.region.elements * new.state_bytes
        if move.source is not None:  # who sends it has it
            rank = moving.rank_on[move.source]
            stage, corner = divmod(rank, old.corners)
            assert stage in old.stages[move.name]
            block, index = old.where[move.name]
            assert move.region & old.regions[block][index][corner] == move.region
    for rank, device in enumerate(moving.device_of):
        stage, corner = divmod(rank, new.corners)
        for name, (block, index) in new.where.items():
            if stage not in new.stages[name]:
                assert (name, device) not in brought
                continue
            wanted = cells(name, [new.regions[block][index][corner]])
            here = np.zeros(shape[name], int)
            if device in moving.rank_on:
                at, there = divmod(moving.rank_on[device], old.corners)
                if at in old.stages[name]:
                    here = cells(name, [old.regions[block][index][there]])
            total = wanted * here + brought.get((name, device), 0)
            assert (total == wanted).all(), (name, device)


@pytest.mark.parametrize("old", PLANS)
@pytest.mark.parametrize(
    "new", ["pp=1,dp=3,tp=2,zero=3", "pp=3,dp=1,tp=2", "pp=1,dp=6,tp=1,zero=1"]
)
def test_everything_arrives(old: str, new: str) -> None:
    before, after = Holdings(planned(old)), Holdings(planned(new, nodes=3))
    moving = Migrating(before, after, CLUSTER, (0, 2, 3))
    arrived(moving)
    result = moving.result()
    assert sorted(result.node_of) == [0, 2, 3]
    assert result.bound_bytes <= result.moved_bytes + result.lost_bytes


def test_joined_nodes_are_used() -> None:
    before, after = Holdings(planned(PLANS[0])), Holdings(planned("pp=3,dp=2,tp=2,zero=1", nodes=6))
    moving = Migrating(before, after, CLUSTER, tuple(range(6)))
    arrived(moving)
    assert set(moving.device_of) == set(range(12))


@pytest.mark.parametrize("fix", PLANS)
def test_a_plan_that_stays_moves_nothing(fix: str) -> None:
    held = Holdings(planned(fix))
    result = Migrating(held, held, CLUSTER, (0, 1, 2, 3)).result()
    assert (result.moved_bytes, result.lost_bytes, result.moves) == (0, 0, ())
    assert result.node_of == (0, 1, 2, 3) or held.plan.strategy.zero == 0


def test_the_assignment_moves_least() -> None:
    before, after = Holdings(planned(PLANS[0])), Holdings(planned("pp=3,dp=1,tp=2", nodes=3))
    moving = Migrating(before, after, CLUSTER, (0, 1, 2))
    result = moving.result()
    wanted = after.rank_bytes.sum()

    def found(devices: tuple[int, ...]) -> float:
        return sum(moving.kept[rank, device] for rank, device in enumerate(devices))

    free = max(found(devices) for devices in permutations(range(6)))
    by_node = max(
        found(tuple(2 * node + slot for node in nodes for slot in range(2)))
        for nodes in permutations(range(3))
    )
    assert result.bound_bytes == pytest.approx(wanted - free)
    assert result.moved_bytes + result.lost_bytes == pytest.approx(wanted - by_node)


def groups(plan: sw.Plan, devices: Sequence[int]) -> set[frozenset[int]]:
    """The devices of every tensor- and data-parallel group."""
    strategy = plan.strategy
    at = np.array(devices).reshape(strategy.pp, strategy.dp, -1)
    rows = [*at.reshape(-1, at.shape[2]), *at.swapaxes(1, 2).reshape(-1, strategy.dp)]
    return {frozenset(map(int, row)) for row in rows}


@pytest.mark.parametrize("old", PLANS)
@pytest.mark.parametrize(
    "new", ["pp=1,dp=3,tp=2,zero=3", "pp=3,dp=2,tp=1,zero=1", "pp=2,dp=3,tp=1,zero=1"]
)
def test_ranks_change_places_and_groups_do_not(old: str, new: str) -> None:
    before, after = Holdings(planned(old)), Holdings(planned(new, nodes=3))
    moving = Migrating(before, after, CLUSTER, (0, 2, 3))
    seats = Seats(after.plan, CLUSTER, (0, 2, 3), moving.kept)
    assert sorted(moving.device_of) == [0, 1, 4, 5, 6, 7]
    orders = [seats.in_order(nodes) for nodes in permutations((0, 2, 3))]
    assert any(groups(after.plan, each) == groups(after.plan, moving.device_of) for each in orders)
    assert seats.found(moving.device_of) >= max(map(seats.found, orders[:1]))
    apart = Migrating(before, after, CLUSTER, (0, 2, 3), given=(2, 0, 3)).device_of
    assert [device // 2 for device in apart] == [2, 2, 0, 0, 3, 3]  # as links say


def test_data_parallel_ranks_find_what_they_can() -> None:
    """Without other axes any rank may be anywhere: the bound is reached, leaving out the node that
    has least as well."""
    before = Holdings(planned("pp=2,dp=2,tp=2,zero=1"))
    after = Holdings(planned("pp=1,dp=6,tp=1,zero=3", nodes=3))
    moving = Migrating(before, after, CLUSTER, (0, 1, 3))
    result = moving.result()
    most = max(
        sum(moving.kept[rank, device] for rank, device in enumerate(devices))
        for devices in permutations((0, 1, 2, 3, 6, 7))
    )
    assert result.moved_bytes + result.lost_bytes == after.rank_bytes.sum() - most
    assert result.bound_bytes == result.moved_bytes + result.lost_bytes
    in_order = Seats(after.plan, CLUSTER, (0, 1, 3), moving.kept).in_order((0, 1, 3))
    assert most > sum(moving.kept[rank, device] for rank, device in enumerate(in_order))


def test_lost_shards_come_from_a_checkpoint() -> None:
    sharded, whole = (Holdings(planned(f"pp=1,dp=8,tp=1,zero={z}")) for z in (3, 0))
    after = Holdings(planned("pp=1,dp=6,tp=1,zero=3", nodes=3))
    for before, copies in ((sharded, 1), (whole, 8)):
        result = Migrating(before, after, CLUSTER, (0, 1, 3)).result()
        assert (result.lost_bytes > 0) == (copies == 1)
    state = sharded.state_bytes * MODEL.elements
    lost = Migrating(sharded, after, CLUSTER, (0, 1, 3)).result().lost_bytes
    assert lost == pytest.approx(state / 4, rel=0.02)  # what the two lost devices of eight had


def test_holdings_are_the_state_of_the_model() -> None:
    held = Holdings(planned("pp=1,dp=4,tp=2,zero=3"))
    norms = sum(p.elements for n, p in MODEL.parameters.items() if "norm" in n)
    assert held.state_bytes == 12
    assert held.rank_bytes.sum() == 12 * (MODEL.elements + norms)  # norms on both tensor ranks


# --- the whole -----------------------------------------------------------------------------------


def test_a_lost_node_is_replanned(tmp_path: Path) -> None:
    plan = planned(PLANS[0])
    found = sw.replan(plan, [1])
    assert found.plan.cluster["nodes"] <= 3
    assert found.plan.workload["global_batch"] == 48
    assert sw.replan(plan, [1], fix="tp=2").plan.strategy.tp == 2
    assert 1 not in found.migration.node_of
    with pytest.raises(InvalidInput, match="node 4: expected 0 to 3"):
        sw.replan(plan, [4])
    with pytest.raises(InvalidInput, match="all 4 nodes are lost"):
        sw.replan(plan, [0, 1, 2, 3])
    with pytest.raises(InvalidInput, match="nothing changed"):
        sw.replan(plan)
    for node in (1.5, True, "1"):
        with pytest.raises(InvalidInput, match="expected a whole number"):
            sw.replan(plan, [node])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="tp=3"):
        sw.replan(plan, [1], fix="tp=3,dp=1,pp=2")
    assert sw.replan(plan, [1, 1], fix="tp=2").lost == (1,)


def test_a_replan_may_use_all_that_the_plan_did() -> None:
    """Mixtures, and what is fixed beyond what is emitted, are searched as they were planned."""
    work = sw.Workload(64, 2048)
    plan = sw.plan("mixtral-8x7b", "h100-sxm:4", work, top=1)
    found = sw.replan(plan, [3])
    alone = sw.plan("mixtral-8x7b", "h100-sxm:3", work, top=1)
    assert found.plan.predicted.step_seconds <= alone.predicted.step_seconds * 1.001
    context = sw.plan(MODEL, CLUSTER, WORK, fix="cp=2", top=1)
    assert sw.replan(context, [0], fix="cp=2").plan.strategy.cp == 2


def test_fewer_nodes_are_used_where_they_are_faster() -> None:
    """Losing one more node makes no job faster."""
    plan = sw.plan(MODEL, CLUSTER, WORK, top=1)
    one = sw.replan(plan, [2])
    two = sw.replan(plan, [2, 3])
    assert one.plan.predicted.step_seconds <= two.plan.predicted.step_seconds * 1.001


def test_all_nodes_may_be_replaced() -> None:
    plan = sw.plan(MODEL, CLUSTER.resized(1), WORK, top=1)
    found = sw.replan(plan, [0], gained=1)
    assert found.migration.node_of == (1,) and found.migration.moved_bytes == 0
    with pytest.raises(InvalidInput, match="all 1 nodes are lost"):
        sw.replan(plan, [0])


def test_the_objective_stays() -> None:
    dear = CLUSTER.with_device(CLUSTER.device.model_copy(update={"price_per_hour": 2.0}))
    plan = sw.plan(MODEL, dear, WORK, objective="cost", top=1)
    found = sw.replan(plan, gained=1)
    assert found.plan.certificate.objective == "cost"
    assert found.plan.certificate.spent <= plan.certificate.spent * 1.001


@pytest.mark.parametrize("nodes", [3, 4])
def test_what_is_not_typed_is_not_faster(nodes: int) -> None:
    """What a search leaves out as too slow is too slow."""
    search = Search(Request.on(MODEL, CLUSTER.resized(nodes), WORK, Fix()))
    every = heads(search.request)
    floors = [search._untyped(head, 0.0) for head in every]
    assert min(floors) > 0
    for head, floor in zip(every, floors, strict=True):
        typed = search._typed(head, 0.0)
        assert not typed or floor <= typed[0][0], head
    best = search.run(top=1)
    seconds = best.outcomes[0].seconds
    again = Search(search.request).attempt(top=1, limit=seconds)
    assert again.outcomes[0].seconds == seconds
    none = Search(search.request).attempt(top=1, limit=best.bound * 0.99)
    assert not none.outcomes
    assert best.bound * 0.99 < none.bound <= seconds


def kept_after(found: sw.Replanned, moving: Migrating) -> dict[int, set[tuple[str, Region]]]:
    """Device → what it has of every parameter after the moves."""
    new = moving.new
    return {
        found.migration.device_of[rank]: {
            (name, new.regions[block][index][rank % new.corners])
            for name, (block, index) in new.where.items()
            if rank // new.corners in new.stages[name]
        }
        for rank in range(new.plan.mesh.size)
    }


def test_a_second_replan_finds_what_the_first_left() -> None:
    """The plan and its mapping alone say which device has what."""
    first = sw.replan(planned(PLANS[4]), [1], fix="tp=1")
    left = Holdings(first.plan)
    moved = kept_after(first, Migrating(left, left, CLUSTER, (0, 1, 2)))
    again = Migrating(left, left, CLUSTER.resized(3), (0, 1, 2))
    names = sorted(first.migration.node_of)
    for device, rank in again.rank_on.items():
        old_device = names[device // 2] * 2 + device % 2
        has = {
            (name, left.regions[block][index][rank % left.corners])
            for name, (block, index) in left.where.items()
            if rank // left.corners in left.stages[name]
        }
        assert moved[old_device] == has


def test_slow_nodes_are_the_ones_left_out() -> None:
    model = transformer(TransformerDims(layers=6, hidden=1024, heads=8, ffn=4096, vocab=1024))
    slow = CLUSTER.resized(6).model_copy(
        update={"degraded": (Degraded(nodes=(2,), compute_fraction=0.1),)}
    )
    plan = sw.plan(model, slow, WORK, fix="pp=3,dp=2,tp=2")
    found = sw.replan(plan, [5], fix="tp=2")
    assert 2 not in found.migration.node_of
    assert found.plan.cluster["degraded"] == []
    kept = slow.without([5]).without([2])
    strategy = found.plan.strategy
    fix = {
        "pp": strategy.pp, "dp": strategy.dp, "tp": 2, "zero": strategy.zero,
        "micro_batch": strategy.micro_batch, "recompute": strategy.recompute,
        "stages": list(strategy.layers),
    }  # fmt: skip
    if len(found.migration.node_of) == kept.nodes:
        again = sw.predict(model, kept, WORK, fix)
        assert again.step_seconds == pytest.approx(found.plan.predicted.step_seconds, rel=0.05)


def test_the_command_writes_plan_and_moves(tmp_path: Path) -> None:
    plan, new, moves = (tmp_path / name for name in ("plan.json", "new.json", "moves.jsonl"))
    planned(PLANS[0]).save(plan)
    arguments = ["replan", str(plan), "--lost", "0", "3", "-o", str(new), "--moves", str(moves)]
    arguments += ["--fix", "dp=2,tp=2"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["replan"]["lost"] == [0, 3]
    assert sw.Plan.load(new).cluster["nodes"] == 2
    first, *lines = [json.loads(line) for line in moves.read_text().splitlines()]
    assert first["before"] == list(range(8)) and first["lost"] == [0, 1, 6, 7]
    assert sorted(first["after"]) == [2, 3, 4, 5]
    assert len(lines) == shown["replan"]["migration"]["moves"]
    peers = sum(line["bytes"] for line in lines if line["source"] is not None)
    assert peers == shown["replan"]["migration"]["moved_bytes"]
    text = CliRunner().invoke(app, arguments).stdout
    assert "lost nodes 0, 3: " in text and "waiting for the repair instead" in text
    again = CliRunner().invoke(app, ["replan", str(new), "--gained", "2"])
    assert again.exit_code == 0 and "nodes joined: " in again.stdout
    wrong = CliRunner().invoke(app, ["replan", str(plan), "3"])
    assert wrong.exit_code == 2 and "expected --lost before" in wrong.stderr


def test_waiting_is_set_beside_the_new_plan() -> None:
    wait = Waiting(before_seconds=2.0, after_seconds=3.0, move_seconds=10.0, steps=100)
    assert wait.break_even_seconds == pytest.approx(110.0)
    assert wait.wait_seconds is None
    for repair_s, faster in ((109.0, "wait"), (111.0, "replan")):
        found = replace(wait, repair_seconds=repair_s)
        shown = found.to_json()
        assert shown["faster"] == faster
        assert shown["wait_seconds"] == pytest.approx(repair_s + 200)
        assert shown["replan_seconds"] == pytest.approx(310)
    # at the break-even of moving back, as many steps are done as by waiting
    returning = wait.returning_seconds
    assert (returning - 10) / 3.0 == pytest.approx(10 / 2.0)
    assert replace(wait, after_seconds=1.0).break_even_seconds == 0


def test_the_command_compares_with_a_repair(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    planned(PLANS[0]).save(plan)
    arguments = ["replan", str(plan), "--lost", "1", "--fix", "tp=2", "--repair-seconds"]
    shown = CliRunner().invoke(app, [*arguments, "1000000", "--json"])
    assert shown.exit_code == 0, shown.output
    entry = json.loads(shown.stdout)["replan"]
    wait, moved = entry["wait"], entry["migration"]["seconds"]
    slower = entry["after"]["step_seconds"] - entry["before"]["step_seconds"]
    assert wait["break_even_seconds"] == pytest.approx(max(0, moved + 1000 * slower))
    assert wait["repair_seconds"] == 1e6 and wait["faster"] == "replan"
    text = CliRunner().invoke(app, [*arguments, "0"]).stdout
    assert "waiting for the repair         " in text and "1,000 steps" in text
    for option, message in (("-1", "repair_seconds=-1"), ("inf", "repair_seconds=inf")):
        wrong = CliRunner().invoke(app, [*arguments, option])
        assert wrong.exit_code == 2 and message in wrong.stderr
    nothing = ["replan", str(plan), "--gained", "1", "--repair-seconds", "5"]
    wrong = CliRunner().invoke(app, nothing)
    assert wrong.exit_code == 2 and "but no node is lost" in wrong.stderr


def test_nodes_left_keep_what_is_known_of_them() -> None:
    measured = np.array([[0, 5, 6, 7], [5, 0, 8, 9], [6, 8, 0, 10], [7, 9, 10, 0]]) * 1e9
    cluster = CLUSTER.with_pairs(PairMatrix.of(measured)).with_pairs(
        [Pair(nodes=(1, 3), bandwidth_fraction=0.5), Pair(devices=(2, 7), latency_s=1e-3),
         Pair(nodes=(0, 1), bandwidth_fraction=0.5)]
    )  # fmt: skip
    cluster = cluster.model_copy(
        update={"degraded": (Degraded(nodes=(0, 2), compute_fraction=0.5),),
                "islands": (Island(name="a", nodes=1), Island(name="b", nodes=3))}
    )  # fmt: skip
    left = cluster.without([0])
    assert left.nodes == 3 and [island.name for island in left.islands] == ["b"]
    assert [pair.ends for pair in left.pairs] == [(0, 2), (0, 5)]
    assert [entry.nodes for entry in left.degraded] == [(1,)]
    assert left.matrix is not None
    assert left.matrix.bandwidth_bytes_per_s[0, 1] == pytest.approx(8e9)
    assert cluster.without([]) is cluster
    assert cluster.without([1, 2, 3]).matrix is None


def test_racks_stay_what_they_were() -> None:
    racks = Cluster.preset("gb200-nvl72", nodes=36, devices_per_node=4)
    left = racks.without([0, 1])
    nvlink, network = racks.pair(0, 4), racks.pair(0, 4 * 18)
    for a in range(left.nodes):
        for b in range(a):
            together = (a + 2) // 18 == (b + 2) // 18
            link = left.pair(4 * a, 4 * b)
            assert together or link.bandwidth_bytes_per_s == network.bandwidth_bytes_per_s
    assert nvlink.bandwidth_bytes_per_s > network.bandwidth_bytes_per_s
