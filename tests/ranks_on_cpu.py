"""Starts workers as ranks under torchrun, and reads what they leave in `--out`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_mover import Arrays


def run(worker: Path, out: Path, *, ranks: int = 2, **flags: Any) -> dict[int, float]:
    """The losses of a run by step; its states are in `out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items() if v is not False]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
        f"--master-port={port}", str(worker), f"--out={out}", *said,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(k): v for k, v in json.loads((out / "losses.json").read_text()).items()}


def states(out: Path) -> Arrays:
    """What the framework says its weights, masters and moments are."""
    with np.load(out / "states.npz") as file:
        return {(k.split()[0], k.split()[1]): file[k] for k in file.files}
