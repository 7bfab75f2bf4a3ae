"""Whole journeys: train, save, convert, go on under another plan; the losses are the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from emit_cases import small_plan

import shardwright as sw
from shardwright.checkpoint import convert, list_reads

pytestmark = pytest.mark.slow

SAVED, STEPS = 10, 20


def trained(plan: sw.Plan, folder: Path, *arguments: object) -> dict[int, float]:
    """Losses by step of the plan's program, emitted and started as a user does."""
    plan.emit("torch", folder)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={plan.mesh.size}",
        f"--master-port={port}", "train.py", f"--steps={STEPS}", "--metrics=metrics.jsonl",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def plan_of(layout: str, ranks: int = 4) -> sw.Plan:
    return small_plan("llama", layout, ranks, layers=4, precision="fp32", global_batch=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Path]:
    """The losses of a run that nothing interrupts, and what it saved half way."""
    root = tmp_path_factory.mktemp("run")
    saving = ("--save", root / "saved", "--save-every", SAVED)
    losses = trained(plan_of("tp=2,dp=2,zero=1"), root / "program", *saving)
    return losses, root / "saved" / f"step-{SAVED:08d}"


@pytest.mark.parametrize(
    ("hops", "layout", "ranks"),
    [
        ([], "pp=2,dp=2,zero=3", 4),
        ([("deepspeed", {"dp": 3}, {"stage": 3})], "tp=4", 4),
        ([("megatron", {"tp": 2, "pp": 2}, {}), ("universal", {}, {})], "tp=1,dp=2,zero=2", 2),
        ([("safetensors", {}, {}), ("dcp", {"dp": 4}, {})], "pp=4", 4),
    ],
    ids=["as it is", "deepspeed", "megatron and ours", "safetensors and dcp"],
)
def test_training_goes_on_after_any_conversion(
    hops: list[tuple[str, dict[str, int], dict[str, int]]],
    layout: str,
    ranks: int,
    run: tuple[dict[int, float], Path],
    tmp_path: Path,
) -> None:
    losses, source = run
    for number, (form, mesh, flags) in enumerate(hops):
        target = tmp_path / f"{number}-{form}"
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2} if form == "megatron" else {}
        convert(source, target, form, mesh=mesh, flags=flags, sizes=sizes, verify=True)
        source = target
    plan = plan_of(layout, ranks)
    list_reads(source, tmp_path / "list", plan)
    rest = trained(plan, tmp_path / "program", "--resume", tmp_path / "list")
    assert sorted(rest) == list(range(SAVED + 1, STEPS + 1))
    for step, loss in rest.items():
        assert loss == pytest.approx(losses[step], rel=1e-6), step
