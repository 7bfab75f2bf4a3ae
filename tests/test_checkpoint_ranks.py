"""Conversions shared by ranks of a job: shares, lost ranks, and who may write a target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_checkpoint_formats import command, folder

from shardwright.checkpoint import convert
from shardwright.checkpoint.engine.ranks import LostRank, Ranks, from_environment
from shardwright.ir import InvalidInput


@pytest.mark.slow
def test_ranks_share_a_conversion_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    convert(source, tmp_path / "alone", "universal")
    runs = [
        command(
            "convert", str(source), str(tmp_path / "out"), "--to", "universal", "--json",
            RANK=str(rank), WORLD_SIZE="3",
        )
        for rank in (2, 0, 1)
    ]  # fmt: skip
    said = [(run.communicate(timeout=100), run.returncode) for run in runs]
    assert [code for _, code in said] == [0, 0, 0], said
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "hf", "out"]
    assert [bool(out) for (out, _), _ in said] == [False, True, False]
    fields = json.loads(said[1][0][0])
    assert fields.keys() >= {"tensors", "bytes", "seconds", "peak_bytes", "verified"}


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    one = Ranks(tmp_path, 0, 2, silence_seconds=0.3)
    one.start("same")
    with pytest.raises(LostRank, match="rank 1 of 2 has not been heard of"):
        one.prepared("same", lambda: None)
    one.stop()


SLOW = """
import sys, time
from shardwright.checkpoint import convert
from shardwright.checkpoint.engine import ranks, run, streaming
from shardwright.ir import ShardwrightError
ranks.SILENCE_SECONDS = 1e6  # nothing but the process itself tells that it is gone
ranks.Ranks.__init__.__defaults__ = (1e6,)
streaming.TASK_BYTES = 1
moved = streaming.Stream._run
def slowly(self, task):
    open(sys.argv[3], "w").close()
    time.sleep(float(sys.argv[4]))
    moved(self, task)
streaming.Stream._run = slowly
try:
    convert(sys.argv[1], sys.argv[2], "universal", threads=1)
except ShardwrightError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def slow_ranks(root: Path, seconds: float, world: int = 3) -> list[subprocess.Popen[str]]:
    """Ranks at one conversion, each task taking so many seconds, as srun starts them."""
    (root / "slow.py").write_text(SLOW)
    return [
        subprocess.Popen(
            [sys.executable, str(root / "slow.py"), str(root / "hf"), str(root / "out"),
             str(root / f"begun-{rank}"), str(seconds)],
            env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_all_go_on(victim: int, tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    convert(source, tmp_path / "alone", "universal")
    runs = slow_ranks(tmp_path, 0.5)
    while not all((tmp_path / f"begun-{rank}").exists() for rank in range(3)):
        assert all(run.poll() is None for run in runs), [run.communicate() for run in runs]
        time.sleep(0.02)
    runs[victim].kill()
    for rank, run in enumerate(runs):
        said, _ = run.communicate(timeout=100)
        if rank != victim:
            assert run.returncode == 2 and said.count("\n") == 1, said
            assert f"rank {victim} of 3 was killed; start all ranks again" in said
    assert not (tmp_path / "out").exists()
    again = slow_ranks(tmp_path, 0.0)
    for run in again:
        said, _ = run.communicate(timeout=100)
        assert run.returncode == 0, said
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not (tmp_path / ".out.conversion").exists()


@pytest.mark.slow
def test_a_rank_that_fails_says_why_on_all(tmp_path: Path) -> None:
    """Rank 1 sees another source: all end, at once and with a reason."""
    source, other = folder(tmp_path / "hf"), folder(tmp_path / "other", seed=1)
    (other / "config.json").write_text("{}")
    runs = [
        command("convert", str(path), str(tmp_path / "out"), "--to", "universal",
                RANK=str(rank), WORLD_SIZE="2")
        for rank, path in enumerate((source, other))
    ]  # fmt: skip
    for run in runs:
        _, error = run.communicate(timeout=50)
        assert run.returncode == 2 and error.count("\n") == 1, error
        assert "rank 1 of 2 has other arguments than rank 0" in error


def test_another_job_at_the_same_target_is_turned_away(tmp_path: Path) -> None:
    """And what an earlier start left deceives nobody."""
    left = Ranks(tmp_path, 1, 2)
    left.start("same")
    left._over.set()  # as if it were killed: its hello stays
    job = [Ranks(tmp_path, rank, 2) for rank in range(2)]
    for one in job:
        one.start("same")
    prepared: list[str] = []
    leader = threading.Thread(target=job[0].prepared, args=("same", lambda: prepared.append("0")))
    leader.start()
    job[1].prepared("same", lambda: prepared.append("1"))
    leader.join()
    assert prepared == ["0"]
    other = Ranks(tmp_path, 1, 2)
    other.start("same")
    with pytest.raises(InvalidInput, match="another job converts to the same target"):
        other.prepared("same", lambda: None)
    for one in (*job, other, left):
        one.stop()


def test_ranks_are_read_from_torchrun_and_srun() -> None:
    assert from_environment({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    assert from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == (0, 2)
    assert from_environment({}) == (0, 1)
    with pytest.raises(InvalidInput, match="no rank of any"):
        from_environment({"RANK": "8", "WORLD_SIZE": "8"})
