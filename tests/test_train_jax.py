"""An emitted JAX program trains: alike in every layout, saved in one, resumed in another."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from emit_cases import small_plan
from host_devices import environment

from shardwright.backends.to_jax import emit

pytestmark = pytest.mark.slow


def start(folder: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(folder / "train.py"), "--lr", "0.01", *options]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def trained(folder: Path, devices: int, steps: int, *options: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of a run."""
    metrics = folder / "metrics"
    metrics.unlink(missing_ok=True)
    run = start(folder, devices, "--steps", str(steps), "--metrics", str(metrics), *options)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(row["loss"], row["gradient_norm"]) for row in rows]


def program(folder: Path, layout: str, ranks: int, model: str = "llama") -> Path:
    plan = small_plan(model, layout, ranks, layers=4, global_batch=8)
    return emit(plan, folder)


def test_layouts_train_alike_and_resume_each_other(tmp_path: Path) -> None:
    one = program(tmp_path / "one", "tp=1,dp=1,pp=1", 1)
    expected = trained(one, 1, 4)
    assert expected[3][0] < expected[0][0]
    for zero in (1, 2, 3):
        name = f"zero-{zero}"
        layout = f"tp=2,dp=2,pp=1,zero={zero},micro_batch=2"
        folder = program(tmp_path / name, layout, 4)
        found = trained(folder, 4, 2, "--save", str(tmp_path / f"kept-{name}"))
        found += trained(one, 1, 4, "--resume", str(tmp_path / f"kept-{name}"))
        for row, want in zip(found, expected, strict=True):
            assert row == pytest.approx(want, rel=1e-9)


def test_two_processes_are_one_job(tmp_path: Path) -> None:
    folder = program(tmp_path / "two", "tp=2,dp=2,pp=1,zero=1", 4)
    expected = trained(folder, 4, 2)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    metrics = tmp_path / "metrics"
    options = ("--steps", "2", "--metrics", str(metrics), "--coordinator", f"localhost:{port}")
    runs = [start(folder, 2, *options, "--processes", "2", "--process", str(i)) for i in range(2)]
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row, (loss, norm) in zip(found, expected, strict=True):
        assert (row["loss"], row["gradient_norm"]) == pytest.approx((loss, norm), rel=1e-12)


PIPELINES = [
    ("tp=2,dp=2,pp=2,zero=2,micro_batch=1", 8),
    ("tp=1,dp=2,pp=2,zero=3,micro_batch=1,schedule=gpipe", 4),
    ("tp=1,dp=1,pp=2,stages=3-1,micro_batch=1", 2),
    ("tp=1,dp=1,pp=2,vpp=2,schedule=interleaved,micro_batch=1", 2),
]


def test_pipelines_train_as_one_device_does_and_resume_each_other(tmp_path: Path) -> None:
    """Parameters after AdamW with clipping, and its state, are those of one device: the losses and
    norms of later steps are."""
    one = program(tmp_path / "one", "tp=1,dp=1,pp=1", 1)
    expected = trained(one, 1, 4)
    kept = ""
    for number, (layout, ranks) in enumerate(PIPELINES):
        folder = program(tmp_path / str(number), layout, ranks)
        if kept:
            resumed = trained(folder, ranks, 4, "--resume", kept)
            for row, want in zip(resumed, expected[2:], strict=True):
                assert row == pytest.approx(want, rel=1e-9), layout
        kept = str(tmp_path / f"kept-{number}")
        found = trained(folder, ranks, 2, "--save", kept)
        found += trained(one, 1, 4, "--resume", kept)
        for row, want in zip(found, expected, strict=True):
            assert row == pytest.approx(want, rel=1e-9), layout


def test_copies_of_a_tied_parameter_stay_equal(tmp_path: Path) -> None:
    expected = trained(program(tmp_path / "one", "tp=1,dp=1,pp=1", 1, "gpt2"), 1, 4)
    folder = program(tmp_path / "two", "tp=1,dp=2,pp=2,zero=1,micro_batch=1", 4, "gpt2")
    for row, want in zip(trained(folder, 4, 4), expected, strict=True):
        assert row == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_stages_on_two_processes_are_one_job(schedule: str, tmp_path: Path) -> None:
    """What one process saves of its stage, another layout restores."""
    layout = f"tp=1,dp=2,pp=2,zero=1,micro_batch=1,schedule={schedule}"
    folder = program(tmp_path / "two", layout, 4)
    expected = trained(folder, 4, 4)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    metrics, kept = tmp_path / "metrics", str(tmp_path / "kept")
    options = ("--steps", "2", "--metrics", str(metrics), "--save", kept,
               "--coordinator", f"localhost:{port}", "--processes", "2")  # fmt: skip
    runs = [start(folder, 2, *options, "--process", str(i)) for i in range(2)]
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [(row["loss"], row["gradient_norm"]) for row in rows]
    found += trained(folder, 4, 4, "--resume", kept)
    for row, want in zip(found, expected, strict=True):
        assert row == pytest.approx(want, rel=1e-9)


def test_too_few_devices_say_so(tmp_path: Path) -> None:
    folder = program(tmp_path / "few", "tp=2,dp=2,pp=1", 4)
    run = start(folder, 2)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "runs on 4 devices, but there are 2" in said.splitlines()[-1]
