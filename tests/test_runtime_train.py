"""Whole runs of train.py under torchrun: losses, checkpoints across layouts, errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from handwritten import Handwritten, imported, ranks, write

pytestmark = pytest.mark.slow

TIMEOUT_S = 240

HOOK = """
import data

def batch(samples, inputs, seq_len, seed):
    return {name: rows + 1 for name, rows in data.batch(samples, inputs, seq_len, seed).items()}
"""


def run(folder: Path, world: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """train.py as a user starts it."""
    command = [sys.executable]
    if world > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        command += [f"--master-port={port}"]
    command += [str(folder / "train.py"), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def trained(folder: Path, *arguments: object, **settings: Any) -> list[dict[str, float]]:
    """What a run logs, one entry per step."""
    write(folder, **settings)
    log = folder / "metrics.jsonl"
    done = run(folder, ranks(**settings), "--metrics", log, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


LEAVING = """
import atexit
from pathlib import Path

import data

class Kept:
    def __del__(self):
        Path("taken-down").touch()

kept = Kept()
atexit.register(Path("hooked").touch)

def batch(samples, inputs, seq_len, seed):
    if not {well}:
        raise ValueError("no more data")
    return data.batch(samples, inputs, seq_len, seed)
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Four steps on one rank."""
    folder = tmp_path_factory.mktemp("single") / "program"
    return trained(folder, "--steps", 4, "--warmup", 2, "--decay", "cosine", "--clip", 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, single: list[dict[str, float]]) -> Path:
    """A checkpoint after two of these four steps on tp=2 × dp=2."""
    root = tmp_path_factory.mktemp("saved")
    settings: dict[str, Any] = dict(dp=2, tp=2, zero=3)
    schedule = ("--steps", 4, "--warmup", 2, "--decay", "cosine", "--clip", 4)
    entries = trained(
        root / "program", *schedule, "--save", root / "kept", "--save-every", 2, **settings
    )
    compare(entries, single)
    return root / "kept" / "step-00000002"


def compare(entries: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Equal loss, gradient norm and learning rate at every step that was run."""
    by_step = {entry["step"]: entry for entry in expected}
    for entry in entries:
        for key in ("loss", "gradient_norm", "learning_rate"):
            assert entry[key] == pytest.approx(by_step[entry["step"]][key], rel=1e-11), entry


def test_training_learns_and_clips(single: list[dict[str, float]]) -> None:
    assert [entry["step"] for entry in single] == [1, 2, 3, 4]
    assert max(entry["gradient_norm"] for entry in single) > 4  # so that clipping matters
    rates = [entry["learning_rate"] for entry in single]
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4 * (0.1 + 0.9 / 2)])


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(tp=4),
        dict(pp=2, dp=2, zero=2),
        dict(pp=2, tp=2),
    ],
    ids=str,
)
def test_a_run_resumes_in_any_layout(
    settings: dict[str, int], saved: Path, single: list[dict[str, float]], tmp_path: Path
) -> None:
    schedule = ("--steps", 4, "--warmup", 2, "--decay", "cosine", "--clip", 4)
    entries = trained(tmp_path / "program", *schedule, "--resume", saved, **settings)
    assert [entry["step"] for entry in entries] == [3, 4]
    compare(entries, single)


def test_processes_take_the_ranks_that_settings_say(
    single: list[dict[str, float]], tmp_path: Path
) -> None:
    folder, log = write(tmp_path / "program", dp=2, tp=2, zero=3), tmp_path / "metrics"
    with (folder / "settings.py").open("a") as settings:
        settings.write("RANKS = (2, 0, 3, 1)\n")
    schedule = ("--steps", 4, "--warmup", 2, "--decay", "cosine", "--clip", 4)
    done = run(folder, 4, *schedule, "--metrics", log)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    compare(entries, single)


def test_a_checkpoint_has_every_weight_at_its_full_shape(saved: Path) -> None:
    shapes = {name: tuple(p.shape) for name, p in Handwritten().named_parameters()}
    metadata = dcp.FileSystemReader(saved).read_metadata().state_dict_metadata
    stored = {name: tuple(m.size) for name, m in metadata.items()}
    for name, shape in shapes.items():
        for key in (name, f"optimizer.exp_avg.{name}", f"optimizer.exp_avg_sq.{name}"):
            assert stored.pop(key) == shape
    assert set(stored) == {"train.step", "train.samples", "train.seed"}


def test_mixed_precision_follows_full_precision(
    single: list[dict[str, float]], tmp_path: Path
) -> None:
    schedule = ("--steps", 4, "--warmup", 2, "--decay", "cosine", "--clip", 4)
    settings: dict[str, Any] = dict(pp=2, dp=2, zero=2, schedule="gpipe", precision="bf16")
    entries = trained(tmp_path / "program", *schedule, **settings)
    for entry, expected in zip(entries, single, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert entry["loss"] != pytest.approx(expected["loss"], rel=1e-6)


def test_plain_weights_and_own_data(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    model = Handwritten().double()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    write(folder)
    (folder / "hook.py").write_text(HOOK)
    log = folder / "metrics"
    done = run(
        folder, 1, "--steps", 1, "--weights", tmp_path / "weights.pt", "--data", "hook:batch",
        "--metrics", log,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with imported(folder, "hook", "model", "settings") as program:
        batch = program.hook.batch(range(8), program.model.BATCH, program.settings.SEQ_LEN, 0)
    assert json.loads(log.read_text())["loss"] == pytest.approx(model(**batch).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (dict(tp=2), (), "start this program with: torchrun --nproc-per-node 2 train.py"),
        (dict(), ("--data", "nowhere:batch"), "--data nowhere:batch: expected module:function"),
        (dict(), ("--data", "data"), "--data data: expected module:function"),
        (dict(), ("--resume", "nowhere"), "no checkpoint in nowhere"),
        (dict(), ("--weights", "nowhere"), "weights nowhere: expected a .safetensors or .pt file"),
    ],
    ids=str,
)
def test_errors_are_one_line(
    settings: dict[str, int], arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(write(tmp_path / "program", **settings), 1, *arguments)
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert message in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("well", [True, False], ids=["well", "failed"])
def test_a_run_that_went_well_does_not_take_the_interpreter_down(
    well: bool, tmp_path: Path
) -> None:
    # gloo's threads may ask for it while it goes down, which aborts the process
    folder = write(tmp_path / "program")
    (folder / "hook.py").write_text(LEAVING.format(well=well))
    done = run(folder, 1, "--steps", 1, "--data", "hook:batch")
    assert (done.returncode == 0) == well, done.stderr
    assert ("step      1" in done.stdout) == well
    assert (folder / "hooked").exists()  # what others want to run at the end still does
    assert (folder / "taken-down").exists() != well


@pytest.mark.parametrize("cut", ["[1:]", "[:, 1:]"], ids=["rows", "positions"])
def test_data_of_another_shape_is_said(cut: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "program")
    (folder / "hook.py").write_text(HOOK.replace("rows + 1", f"(rows + 1){cut}"))
    done = run(folder, 1, "--steps", 1, "--data", "hook:batch")
    assert done.returncode != 0
    assert "ValueError: the data function gave input_ids as (" in done.stderr


def test_a_wrong_number_of_ranks_is_said(tmp_path: Path) -> None:
    done = run(write(tmp_path / "program", tp=2, dp=2), 2)
    assert done.returncode != 0
    assert "this program runs on 4 ranks (pp=1 × dp=2 × tp=2), but 2 were started" in done.stderr
