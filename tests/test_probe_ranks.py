"""Probing over real ranks: launchers, slow and dead ranks, ranks that do not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_probe import HOSTS, WORKER

from shardwright.costmodel import Cluster
from shardwright.costmodel.probe import run_probe
from shardwright.costmodel.probe.rounds import nodes_of
from shardwright.costmodel.probe.schedule import (
    COLLECTIVES,
    SIZES_BYTES,
)
from shardwright.costmodel.ranks import launched, listed
from shardwright.costmodel.ranks.launch import first_host
from shardwright.costmodel.ranks.watch import LOST_S, SILENCE_S, Beats
from shardwright.ir import InvalidInput

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
