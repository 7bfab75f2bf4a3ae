"""Probing links: who measures when, what repeated measurements say, and ranks that fail."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import Cluster, Device
from shardwright.costmodel.probe.cluster_of import cluster_of
from shardwright.costmodel.probe.exchange import moved_bytes
from shardwright.costmodel.probe.findings import findings
from shardwright.costmodel.probe.fit import Line, fitted_line
from shardwright.costmodel.probe.noise import (
    lasting_excess,
    repeats_of,
    slow_ends_and_links,
    symmetrised,
    threshold_fraction,
)
from shardwright.costmodel.probe.rounds import Nodes, families, nodes_of, rounds
from shardwright.costmodel.probe.run import Measured, _work_off
from shardwright.costmodel.probe.schedule import (
    COLLECTIVES,
    SIZES_BYTES,
    Item,
    Lot,
    Series,
    affordable,
    next_batch,
    shuffled,
    spent_s,
)
from shardwright.costmodel.probe.table import report

WORKER = Path(__file__).with_name("probe_worker.py")
HOSTS = tuple(f"gpu{k:02}" for k in range(64))


def machine(nodes: int, per_node: int) -> Nodes:
    return Nodes(nodes, per_node, HOSTS[:nodes])


machines = st.builds(machine, st.integers(1, 6), st.integers(1, 9)).filter(
    lambda nodes: nodes.world_size > 1
)


# --- who measures with whom ----------------------------------------------------------------------


@given(st.integers(2, 41))
def test_rounds_hold_every_pair_once_and_no_rank_twice(ranks: int) -> None:
    turns = rounds(ranks)
    assert len(turns) == ranks - 1 + ranks % 2
    for pairs in turns:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)) == ranks - ranks % 2
    assert Counter(pair for pairs in turns for pair in pairs) == Counter(
        combinations(range(ranks), 2)
    )


@given(machines)
def test_groups_of_a_family_are_disjoint_and_have_its_shape(nodes: Nodes) -> None:
    found = families(nodes)
    assert len({family.shape for family in found}) == len(found)
    assert any(family.size == nodes.world_size for family in found)
    for family in found:
        members = [rank for group in family.groups for rank in group]
        assert len(members) == len(set(members)) and set(members) <= set(range(nodes.world_size))
        for group in family.groups:
            per_node = set(Counter(map(nodes.node_of, group)).values())
            assert len(per_node) == 1  # as many on every node that it touches
            levels = [per_node.pop(), len({nodes.node_of(rank) for rank in group})]
            if nodes.devices_per_node == 1:
                levels = levels[1:]
            while levels[-1] == 1:
                levels.pop()
            assert family.shape[: len(levels)] == tuple(levels)
            assert prod(family.shape) == len(group)
            assert all(family.group_of(rank) == group for rank in group)


@given(machines)
def test_nodes_are_read_from_host_names(nodes: Nodes) -> None:
    hosts = tuple(host for host in nodes.hosts for _ in range(nodes.devices_per_node))
    assert nodes_of(hosts) == nodes


@given(st.sampled_from((*COLLECTIVES, "send")), st.sampled_from(SIZES_BYTES), st.integers(2, 64))
def test_moved_bytes_divide_over_the_group(kind: str, bytes: int, size: int) -> None:
    moved = moved_bytes(kind, bytes, size)  # type: ignore[arg-type]
    assert 0 <= moved - bytes < 4 * size * size
    if kind in ("all_gather", "reduce_scatter"):
        assert moved % (4 * size) == 0
    if kind == "all_to_all":
        assert moved % (4 * size * size) == 0


# --- what fits the time --------------------------------------------------------------------------

lots = st.lists(
    st.builds(
        Lot,
        st.builds(Series, st.sampled_from(("all_reduce", "send")), st.integers(0, 2)),
        st.sampled_from(SIZES_BYTES),
        st.floats(1e-3, 10.0),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda lot: (lot.series, lot.bytes),
)


@given(lots, st.floats(0.0, 200.0))
def test_what_is_kept_fits_the_budget_without_holes(given_lots: list[Lot], budget_s: float) -> None:
    kept = affordable(given_lots, budget_s)
    smallest = {}
    for lot in sorted(given_lots, key=lambda lot: -lot.bytes):
        smallest[lot.series] = lot
    assert set(smallest.values()) <= kept.keys()
    only_least = kept == dict.fromkeys(kept, 1) and kept.keys() == set(smallest.values())
    assert spent_s(kept) <= budget_s + 1e-9 or only_least
    for lot in given_lots:
        if lot not in kept:
            larger = [x for x in given_lots if x.series == lot.series and x.bytes > lot.bytes]
            assert not kept.keys() & set(larger)
    if spent_s(dict.fromkeys(given_lots, 5)) <= budget_s:
        assert kept == dict.fromkeys(given_lots, 5)


@given(lots, st.integers(0, 5), st.integers(0, 3))
def test_every_repeat_holds_each_measurement_once_in_its_own_order(
    given_lots: list[Lot], most: int, seed: int
) -> None:
    repeats = {lot: 1 + i % (most + 1) for i, lot in enumerate(given_lots)}
    items = shuffled(repeats, seed)
    assert items == shuffled(repeats, seed)
    assert Counter(items) == Counter(
        {item: times for lot, times in repeats.items() for item in lot.items()}
    )
    first = items[: sum(len(lot.items()) for lot in repeats)]
    assert len(set(first)) == len(first)


@given(lots, st.floats(0.0, 30.0))
def test_batches_take_no_longer_than_asked_and_never_stall(
    given_lots: list[Lot], at_most_s: float
) -> None:
    items = [item for lot in given_lots for item in lot.items()]
    cost = {(lot.series, lot.bytes): lot.seconds for lot in given_lots}
    batch = next_batch(items, cost, at_most_s)
    assert batch == items[: len(batch)] and batch
    total = sum(cost[item.series, item.bytes] for item in batch)
    assert total <= at_most_s or len(batch) == 1


# --- what the measurements say -------------------------------------------------------------------


@given(st.floats(0.0, 1e-3), st.floats(1e7, 1e12))
def test_an_exact_line_is_found_again(latency_s: float, bandwidth: float) -> None:
    line = Line(latency_s, bandwidth)
    found = fitted_line(SIZES_BYTES, [line.seconds(size) for size in SIZES_BYTES])
    for size in SIZES_BYTES:
        assert found.seconds(size) == pytest.approx(line.seconds(size), rel=1e-6)


@given(st.lists(st.floats(1e-6, 1e2), min_size=1, max_size=8))
def test_no_line_has_a_negative_term(seconds: list[float]) -> None:
    line = fitted_line(SIZES_BYTES[: len(seconds)], seconds)
    assert line.latency_s >= 0 and 0 < line.bandwidth_bytes_per_s < np.inf


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_the_spread_of_measurements_is_found_and_outliers_counted(repeats: int) -> None:
    draw = np.random.default_rng(0)
    samples = np.exp(draw.normal(-7, 3, (500, 1)) + draw.normal(0, 0.03, (500, repeats)))
    noise = repeats_of(samples).noise
    assert noise.sigma_fraction == pytest.approx(0.03, rel=0.15)
    assert noise.outliers == 0 and noise.count == 500 * repeats
    # The floor is the real spread of medians about what was measured.
    medians = np.log(np.median(samples, axis=1))
    again = np.random.default_rng(1).normal(0, 0.03, (500, repeats))
    spread = float(np.std(np.median(again, axis=1)))
    assert noise.floor_fraction == pytest.approx(spread, rel=0.2)
    assert repeats_of(samples).median == pytest.approx(np.exp(medians))
    if repeats > 2:
        samples[7, 0] *= 10
        spoiled = repeats_of(samples)
        assert spoiled.noise.outliers == 1
        assert spoiled.median[7] == pytest.approx(np.exp(medians[7]), rel=0.1)


def noisy(size: int, sigma: float, seed: int) -> np.ndarray:
    """Seconds between all pairs of a machine of equal links, as they would be measured."""
    draw = np.random.default_rng(seed)
    return symmetrised(np.exp(draw.normal(-5, sigma, (size, size))))


@pytest.mark.parametrize("size", [3, 4, 8, 16, 40])
def test_equal_links_are_not_called_slow(size: int) -> None:
    kinds = np.zeros((size, size), dtype=np.int64)
    for seed in range(20):
        excess = lasting_excess([noisy(size, 0.04, seed)], kinds)
        pairs = size * (size - 1) // 2
        assert slow_ends_and_links(excess, threshold_fraction(0.04, pairs)) == ((), ())


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_slow_link_and_a_slow_end_are_told_apart(size: int) -> None:
    kinds = np.zeros((size, size), dtype=np.int64)
    threshold = threshold_fraction(0.02, size * (size - 1) // 2)
    link, end = noisy(size, 0.02, 1), noisy(size, 0.02, 2)
    link[1, 3] = link[3, 1] = link[3, 1] * 1.5
    end[2, :] *= 1.5
    end[:, 2] *= 1.5
    ends, links = slow_ends_and_links(lasting_excess([link], kinds), threshold)
    assert ends == () and [slow.ends for slow in links] == [(1, 3)]
    assert links[0].times_longer == pytest.approx(1.5, rel=0.1)
    ends, links = slow_ends_and_links(lasting_excess([end], kinds), threshold)
    assert links == () and [slow.ends for slow in ends] == [(2,)]
    assert ends[0].times_longer == pytest.approx(1.5, rel=0.1)


def test_a_burst_at_one_size_makes_no_link_slow() -> None:
    kinds = np.zeros((8, 8), dtype=np.int64)
    sizes = [noisy(8, 0.02, seed) for seed in range(3)]
    sizes[1][1, 3] = sizes[1][3, 1] = 9 * sizes[1][1, 3]
    assert slow_ends_and_links(lasting_excess(sizes, kinds), 0.2) == ((), ())


INSIDE, ACROSS = Line(5e-6, 200e9), Line(12e-6, 25e9)


def simulated(nodes: Nodes, slow: dict[tuple[int, int], float], sigma: float = 0.01) -> Measured:
    """A probe of a machine with known links: three repeats of everything, with noise.

    `slow` divides the bandwidth between two ranks. A collective takes what its slowest message
    would, so that curves can be compared with a line.
    """
    turns, kinds = rounds(nodes.world_size), families(nodes)
    draw = np.random.default_rng(3)
    items = [Item(Series("send"), size, at) for size in SIZES_BYTES for at in range(len(turns))]
    items += [
        Item(Series(kind, at), size)
        for kind in COLLECTIVES
        for at in range(len(kinds))
        for size in SIZES_BYTES
    ]
    items = [item for item in items for _ in range(3)]
    seconds = np.full((nodes.world_size, len(items)), np.nan)
    for column, item in enumerate(items):
        if item.series.kind == "send":
            for pair in turns[item.round]:
                line = INSIDE if len(set(map(nodes.node_of, pair))) == 1 else ACROSS
                taken = line.latency_s + item.bytes * slow.get(pair, 1.0) / (
                    line.bandwidth_bytes_per_s
                )
                seconds[list(pair), column] = taken
        else:
            family = kinds[item.series.family]
            line = INSIDE if len(family.shape) == 1 else ACROSS
            for group in family.groups:
                seconds[list(group), column] = line.seconds(item.bytes)
    seconds *= np.exp(draw.normal(0, sigma, seconds.shape))
    waited = draw.uniform(0, 1e-4, seconds.shape)
    return Measured(nodes, kinds, turns, tuple(items), seconds, waited, (), None)


def test_a_machine_is_found_as_it_is(tmp_path: Path) -> None:
    nodes = machine(3, 4)
    seen = simulated(nodes, {(1, 2): 2.0, (3, 9): 1.5})
    found = findings(seen, "simulated")
    cluster = cluster_of(found, Device.preset("a100-80g"), "simulated")
    cluster.save(tmp_path / "cluster.yaml")
    assert Cluster.load(tmp_path / "cluster.yaml") == cluster

    assert (cluster.nodes, cluster.devices_per_node) == (3, 4)
    for level, line in zip(cluster.levels, (INSIDE, ACROSS), strict=True):
        assert level.latency_s == pytest.approx(line.latency_s, rel=0.03)
        assert level.reached_bytes_per_s(1) == pytest.approx(line.bandwidth_bytes_per_s, rel=0.03)
    assert {pair.devices for pair in cluster.pairs} == {(1, 2), (3, 9)}
    assert cluster.pair(1, 2).bandwidth_bytes_per_s == pytest.approx(100e9, rel=0.05)
    assert cluster.pair(9, 3).bandwidth_bytes_per_s == pytest.approx(25e9 / 1.5, rel=0.05)
    assert not cluster.pair(0, 1).measured
    assert not found.late

    curves = {(curve.collective, curve.shape): curve for curve in cluster.curves}
    assert {shape for kind, shape in curves if kind == "send"} == {(2,), (1, 2)}
    assert {shape for kind, shape in curves if kind == "all_reduce"} == {
        family.shape for family in seen.families
    }
    for (_, shape), curve in curves.items():
        line = INSIDE if len(shape) == 1 else ACROSS
        for bytes, seconds in zip(curve.bytes, curve.seconds, strict=True):
            assert seconds == pytest.approx(line.seconds(bytes), rel=0.06)


def test_a_slow_node_is_one_entry_and_a_late_rank_is_named() -> None:
    nodes = machine(4, 2)
    slow = {
        pair: 1.6
        for pair in combinations(range(8), 2)
        if 2 in map(nodes.node_of, pair) and len(set(map(nodes.node_of, pair))) == 2
    }
    seen = simulated(nodes, slow)
    seen.waited_s[5] = 0.0
    seen.waited_s[[r for r in range(8) if r != 5]] += 2e-3
    found = findings(seen, "simulated")
    cluster = cluster_of(found, Device.preset("h100-sxm"), "simulated")
    assert [entry.nodes for entry in cluster.degraded] == [(2,)]
    assert cluster.degraded[0].bandwidth_fraction == pytest.approx(1 / 1.6, rel=0.05)
    assert cluster.pairs == ()
    assert [late.rank for late in found.late] == [5]
    assert found.late[0].late_s == pytest.approx(2e-3, rel=0.1)
    told = "\n".join(str(line) for line in report(found, seen).renderables)  # type: ignore[attr-defined]
    assert "slow node: node 2 (gpu02, ranks 4-5) takes 1.5" in told
    assert "late: rank 5 on gpu02" in told


def test_a_size_that_was_cut_off_in_the_middle_is_left_out() -> None:
    nodes = machine(1, 4)
    seen = simulated(nodes, {})
    cut = [
        column
        for column, item in enumerate(seen.items)
        if item.series.kind == "send" and item.bytes == SIZES_BYTES[-1] and item.round
    ]
    kept = [column for column in range(len(seen.items)) if column not in cut]
    short = Measured(
        nodes, seen.families, seen.rounds, tuple(seen.items[c] for c in kept),
        seen.seconds[:, kept], seen.waited_s[:, kept], (), None,
    )  # fmt: skip
    found = findings(short, "simulated")
    (send,) = (curve for curve in found.curves if curve.collective == "send")
    assert send.bytes == tuple(map(float, SIZES_BYTES[:-1]))


def test_every_pair_is_asked_once_however_late_it_is() -> None:
    """Estimates may take the whole budget where a machine is busy."""
    ran: list[Item] = []
    items = [
        Item(Series(kind), size, turn)
        for kind in ("send", "all_reduce")
        for size in (8192, 65536)
        for turn in (range(3) if kind == "send" else range(1))
        for _ in range(2)
    ]
    took = {(item.series, item.bytes): 1.0 for item in items}
    _work_off(
        SimpleNamespace(told=lambda decide: decide()),  # type: ignore[arg-type]
        SimpleNamespace(took_s=took, run=ran.extend),  # type: ignore[arg-type]
        items,
        deadline=0.0,
        report=lambda share, what: None,
    )
    assert sorted((item.series.kind, item.bytes, item.round) for item in ran) == [
        ("send", 8192, turn) for turn in range(3)
    ]
