"""A job that loses a rank trains on under another plan: the loss curve is that of a run that did
not lose any."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from handwritten import imported, write

import shardwright as sw
from shardwright.costmodel.cluster import Cluster

STEPS, LOST_AT, SAVED_AT = 8, 5, 3  # of steps counted from 1: the lost rank has no part in the 5th
WORKER = Path(__file__).with_name("migrate_worker.py")
CLUSTER = Cluster.preset("a100-80g", nodes=4, devices_per_node=1)
WORK = sw.Workload(global_batch=12, seq_len=16, precision="fp32")
LLAMA = dict(
    model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=6,
    num_attention_heads=6, num_key_value_heads=6, vocab_size=96,
)  # fmt: skip
ARGUMENTS = ["--steps", str(STEPS), "--warmup", "2", "--decay", "cosine", "--lr", "0.01"]

DYING = """
import os

import data

def batch(samples, inputs, seq_len, seed):
    if os.environ["RANK"] == "{rank}" and samples.start >= {samples}:
        os._exit(0)  # without a word to anyone
    return data.batch(samples, inputs, seq_len, seed)
"""


@dataclass(frozen=True)
class Case:
    """A job under one plan that loses a node and goes on under another."""

    before: str
    after: str
    lost: int
    checkpoint: bool  # whether what only the lost node had comes from one
    joined: int = 0


CASES = (
    Case("dp=2,tp=2,zero=0", "dp=3,zero=3", lost=3, checkpoint=False),
    Case("dp=4,zero=2", "pp=3", lost=3, checkpoint=True),
    Case("pp=2,dp=2,zero=0", "tp=3,dp=1", lost=1, checkpoint=False),
    Case("dp=4,zero=0", "dp=2,zero=1", lost=0, checkpoint=False),  # one that is left is not used
    Case("dp=2,tp=2,zero=0", "pp=2,dp=2,zero=1", lost=2, checkpoint=False, joined=1),
)


def job(folder: Path, ranks: int, *arguments: object, joining: Path | None = None) -> Any:
    """The processes of a run, as a launcher starts them; the last one joins a later program."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [
        {
            "folder": str(folder),
            "arguments": [*ARGUMENTS, *map(str, arguments)],
            "environment": {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            },
        }
        for rank in range(ranks)
    ]  # fmt: skip
    if joining is not None:
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        said = [*ARGUMENTS, *map(str, arguments), "--joins"]
        processes.append({"folder": str(joining), "arguments": said, "environment": environment})
    return {"processes": processes, "timeout_s": 180}


def losses(log: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in entries]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[tuple[int, float]]]:
    """Steps and losses of every case, and of a run on one rank."""
    root = tmp_path_factory.mktemp("migrate")
    (root / "config.json").write_text(json.dumps(LLAMA))
    model = str(root / "config.json")
    single = sw.plan(model, CLUSTER.resized(1), WORK, fix="tp=1")
    single.emit("torch", root / "single")
    jobs = [job(root / "single", 1, "--metrics", root / "single.jsonl")]
    for i, case in enumerate(CASES):
        folder = root / str(i)
        plan = sw.plan(model, CLUSTER, WORK, fix=case.before)
        plan.emit("torch", folder / "program")
        found = sw.replan(plan, [case.lost], gained=case.joined, fix=case.after)
        assert (found.migration.lost_bytes > 0) == case.checkpoint
        sw.Plan.load(saved(found.plan, folder)).emit("torch", folder / "next" / "1")
        (folder / "next" / "1" / "moves.jsonl").write_text(found.moves_text())
        dying = DYING.format(rank=case.lost, samples=12 * (LOST_AT - 1))
        (root / f"dying{i}.py").write_text(dying)
        jobs.append(
            job(
                folder / "program", 4, "--next", folder / "next", "--data", f"dying{i}:batch",
                "--metrics", folder / "log.jsonl", "--save", folder / "kept",
                "--save-every", SAVED_AT, "--lost-after", 60,
                joining=folder / "next" / "1" if case.joined else None,
            )
        )  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(root / "jobs.json")],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    found_curves: dict[Any, list[tuple[int, float]]] = {
        case: losses(root / str(i) / "log.jsonl") for i, case in enumerate(CASES)
    }
    return found_curves | {"single": losses(root / "single.jsonl")}


def saved(plan: sw.Plan, folder: Path) -> Path:
    plan.save(folder / "new.json")
    return folder / "new.json"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_curve_goes_on(case: Case, curves: dict[Any, list[tuple[int, float]]]) -> None:
    undisturbed = dict(curves["single"])
    assert list(undisturbed) == list(range(1, STEPS + 1))
    assert undisturbed[STEPS] < 0.95 * undisturbed[1]  # it learns, so that lost state would show
    # with lost parts the steps since the checkpoint are done again
    again = range(SAVED_AT + 1 if case.checkpoint else LOST_AT, STEPS + 1)
    assert [step for step, _ in curves[case]] == [*range(1, LOST_AT), *again]
    for step, loss in curves[case]:
        assert loss == pytest.approx(undisturbed[step], rel=1e-5), step


# --- what is said where it cannot go on ----------------------------------------------------------

FIRST = {"before": [0, 1], "after": [0], "lost": [1]}


def test_moves_that_do_not_fit_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "1")
    move = {"name": "a", "source": None, "target": 0, "boxes": [[[0], [4]]], "bytes": 48}

    def moves(first: dict[str, list[int]]) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in (first, move))
        (folder / "moves.jsonl").write_text(lines)

    with imported(folder, "migrate", "checkpoint") as program:
        state = program.migrate.Held(0, program.checkpoint.Progress(5, 60), [])
        moves(FIRST)
        with pytest.raises(SystemExit, match="no checkpoint to go back to: expected a run with"):
            program.migrate.exchange(state, folder)
        moves(FIRST | {"after": [0, 2]})
        with pytest.raises(SystemExit, match="moves to 2 ranks, a program for 1"):
            program.migrate.exchange(state, folder)
        with pytest.raises(SystemExit, match=r"does not hold .* which it is to send"):
            program.migrate._cut([], "a", [0], [4])
        joined = program.migrate.Moves.read(folder / "moves.jsonl")
        assert joined.members == [0, 2] and joined.device(None) == 2 and joined.device(1) == 1


def test_rounds_keep_every_move_and_bound_what_a_device_sends(tmp_path: Path) -> None:
    with imported(write(tmp_path / "1"), "migrate") as program:
        migrate = program.migrate
        sizes = [migrate.ROUND_BYTES // n for n in (3, 2, 5, 1, 4, 4, 2, 3, 7)]
        moves = [
            {"source": i % 2, "target": 2 + i % 3, "bytes": size} for i, size in enumerate(sizes)
        ]
        moves.insert(3, {"source": None, "target": 2, "bytes": 8})
        rounds = list(migrate._rounds(moves))
        assert [m for each in rounds for m in each] == [m for m in moves if m["source"] is not None]
        assert len(rounds) > 1
        for each in rounds:
            for end in ("source", "target"):
                for device in range(5):
                    sent = [m["bytes"] for m in each if m[end] == device]
                    assert sum(sent[:-1]) < migrate.ROUND_BYTES
