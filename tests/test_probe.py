"""Probing links: who measures when, what repeated measurements say, and ranks that fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from itertools import combinations
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import Cluster, Device
from shardwright.costmodel.probe import run_probe
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
from shardwright.costmodel.probe.run import Measured
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
from shardwright.costmodel.ranks import launched, listed
from shardwright.costmodel.ranks.launch import first_host
from shardwright.costmodel.ranks.watch import LOST_S, SILENCE_S, Beats
from shardwright.ir import InvalidInput

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


# --- ranks ---------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu00",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[003-004,017],login",
}  # fmt: skip


def test_launchers_are_understood() -> None:
    by_torchrun, by_srun = launched(TORCHRUN, "probe"), launched(SRUN, "probe")
    for launch in (by_torchrun, by_srun):
        assert (launch.rank, launch.local_rank, launch.world_size) == (3, 1, 4)
    assert (by_torchrun.address, by_torchrun.port) == ("gpu00", 29500)
    assert by_torchrun.agent_store and not by_srun.agent_store
    assert by_srun.address == "gpu003" and 20_000 <= by_srun.port < 50_000
    assert launched(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}, "probe").port == 7


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[7-9]", "n7"), ("n[07,9]x,m", "n07x"), ("r[1-2]n[3-4]", "r1n3")],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.sets(st.integers(0, 40), min_size=1))
def test_listed_ranks_are_those(ranks: set[int]) -> None:
    read = set()
    for part in listed(ranks).split(", "):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == ranks


@given(st.sets(st.integers(0, 7), max_size=7), st.floats(0.1, 100.0))
def test_the_dead_are_those_whose_beats_ended(dead: set[int], pause_s: float) -> None:
    beats = Beats(HOSTS[:8], 0.0)
    for rank in range(8):
        beats.read(rank, b"1:5", 1.0)
    now_s = 1.0 + pause_s
    for rank in set(range(8)) - dead:
        beats.read(rank, b"2:5", now_s)
    for for_s in (SILENCE_S, LOST_S):
        assert beats.silent(for_s, now_s) == (sorted(dead) if pause_s >= for_s else [])
    said = beats.verdict("an error", now_s)
    if dead and pause_s >= SILENCE_S:
        assert listed(dead) in said and f"{8 - len(dead)} of 8 ranks are left" in said
        assert all(HOSTS[rank] in said for rank in sorted(dead)[:4])
    else:
        assert said == "an error"


def test_a_rank_that_fell_behind_is_named() -> None:
    beats = Beats(HOSTS[:3], 0.0)
    for rank, step in enumerate((17, 9, 17)):
        beats.read(rank, b"1:%d" % step, 1.0)
    assert beats.verdict("timed out", 1.0) == (
        "rank 1 (host gpu01) did not keep up with the others: timed out"
    )


def started(
    ranks: list[int], world: int, output: Path, budget_s: float, *more: str
) -> list[subprocess.CompletedProcess[str]]:
    """Starts ranks of a probe as a launcher would, and waits for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(WORKER), str(output), str(budget_s), *more]
    running = [
        subprocess.Popen(
            command,
            env=os.environ
            | {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip
    ended = []
    try:
        for process in running:
            out, err = process.communicate(timeout=150)
            ended.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
    return ended


@pytest.mark.slow
def test_four_ranks_on_two_hosts_write_their_cluster(tmp_path: Path) -> None:
    output = tmp_path / "cluster.yaml"
    ended = started([0, 1, 2, 3], 4, output, 4.0, "2")
    assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * 4
    assert "Messages between two devices" in ended[0].stdout and "noise:" in ended[0].stdout
    assert all(done.stdout == "" for done in ended[1:])
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.yaml"]
    cluster = Cluster.load(output)
    assert (cluster.nodes, cluster.devices_per_node) == (2, 2)
    assert [level.name for level in cluster.levels] == ["node", "network"]
    assert {(curve.collective, curve.shape) for curve in cluster.curves} == {
        ("send", (2,)),
        ("send", (1, 2)),
        *((kind, shape) for kind in COLLECTIVES for shape in ((2,), (1, 2), (2, 2))),
    }
    assert all(curve.bytes[0] == SIZES_BYTES[0] for curve in cluster.curves)


@pytest.mark.slow
def test_a_rank_that_is_slow_is_waited_for_and_named(tmp_path: Path) -> None:
    ended = started([0, 1, 2], 3, tmp_path / "cluster.yaml", 4.0, "3", "slow:1")
    assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * 3
    assert "late: rank 1 on host0 comes last" in ended[0].stdout
    assert Cluster.load(tmp_path / "cluster.yaml").world_size == 3


@pytest.mark.slow
@pytest.mark.parametrize(("world", "dead"), [(2, 0), (3, 2)])
def test_a_rank_that_dies_is_named_in_one_line(tmp_path: Path, world: int, dead: int) -> None:
    """Rank 0 takes the store of the ranks with it; of others it is their beats that end."""
    ranks = list(range(world))
    ended = started(ranks, world, tmp_path / "cluster.yaml", 30.0, "1", f"kill:{dead}")
    assert [done.returncode for done in ended] == [-9 if rank == dead else 2 for rank in ranks]
    said = "".join(done.stderr for done in ended)
    assert said.startswith(f"shardwright: rank {dead} (host host{dead}) died")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named_in_one_line(tmp_path: Path) -> None:
    ended = started([0, 2], 4, tmp_path / "cluster.yaml", 5.0, "4")
    assert [done.returncode for done in ended] == [2, 2]
    assert ended[0].stderr == (
        "shardwright: ranks 1, 3 of 4 did not come within 10 s: "
        "expected 4 processes (WORLD_SIZE), 2 came\n"
    )
    assert ended[1].stderr == ""


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "RANK is not set, expected one process per device: start it with torchrun"),
        (TORCHRUN | {"RANK": "4"}, "rank is 4, expected 0 to 3"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number from 1"),
        (
            TORCHRUN | {"MASTER_PORT": "70000"},
            "MASTER_PORT is '70000', expected a number from 1 up",
        ),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_JOB_ID"}, "SLURM_JOB_ID is not set"),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "world size is 1, expected two ranks"),
    ],
)
def test_a_bad_start_is_one_line(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=r"^probe: ") as raised:
        run_probe("cluster.yaml", environ=environ)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_s": 0.0}, "--budget is 0, expected seconds above 0"),
        ({"wait_s": -1.0}, "--wait is -1, expected"),
        ({"on": "tpu"}, "--on tpu: expected auto, cpu or cuda"),
        ({"device": "h1000"}, "unknown device 'h1000': did you mean"),
        ({"device": "missing.yaml"}, "missing.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        run_probe("cluster.yaml", environ=TORCHRUN, **arguments)  # type: ignore[arg-type]
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (("a", "b", "a", "b"), "host a has ranks 0, 2 with others between"),
        (("a", "a", "b"), "host b has 1 ranks and host a has 2, expected as many"),
    ],
)
def test_layouts_that_a_cluster_file_cannot_say(hosts: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        nodes_of(hosts)
