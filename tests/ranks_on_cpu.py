"""Starts workers as ranks of gloo, and reads what they leave in `--out`."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_mover import Arrays

SERVER = Path(__file__).with_name("rank_server.py")

_numbers = itertools.count()


@functools.cache
def _server(worker: Path) -> subprocess.Popen[str]:
    """The process that has a worker's libraries; it ends with this one, whose pipe it reads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(SERVER), str(worker)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def start(worker: Path, ranks: int, *arguments: Any) -> None:
    """Ranks of a worker, from start to end; fails with what they said last."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, f"{worker.stem}{next(_numbers)}.log")
        job = {"ranks": ranks, "arguments": [str(word) for word in arguments], "log": str(log)}
        server = _server(worker)
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(job), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
    assert answer, f"{worker.name} ended with {server.wait()}"
    assert json.loads(answer)["status"] == 0, said


def run(worker: Path, out: Path, *, ranks: int = 2, **flags: Any) -> dict[int, float]:
    """The losses of a run by step; its states are in `out`."""
    said = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items() if v is not False]
    start(worker, ranks, f"--out={out}", *said)
    return {int(k): v for k, v in json.loads((out / "losses.json").read_text()).items()}


def states(out: Path) -> Arrays:
    """What the framework says its weights, masters and moments are."""
    with np.load(out / "states.npz") as file:
        return {(k.split()[0], k.split()[1]): file[k] for k in file.files}
