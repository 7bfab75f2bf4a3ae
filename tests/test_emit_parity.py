"""Emitted programs on real ranks against the single-device model, in float64.

test_verify.py and the parity list cover the layouts that a planner chooses; here types are drawn
at random, so that every conversion and every way of running an op occurs, also those that nobody
would plan.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emit_cases import mean_square, module, random_plan, scaled, small_plan

from shardwright.backends.to_torch import emit
from shardwright.backends.to_torch.verify import verify_many
from shardwright.ir.check import check_plan
from shardwright.ir.mesh import Mesh

# mesh, tensor sub-axes, how many annotations are drawn
MESHES = [
    (Mesh.of(pp=1, dp=1, tp=2), (2,), 8),
    (Mesh.of(pp=1, dp=1, tp=4), (2, 2), 4),
    (Mesh.of(pp=2, dp=1, tp=2), (2,), 2),
    (Mesh.of(pp=1, dp=2, tp=2), (2,), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "plain"])
def test_any_annotation_gives_the_same_numbers(name: str) -> None:
    plans = [scaled(name, 4, tp=2)]
    for mesh, tensor, count in MESHES:
        pp, dp = mesh["pp"].size, mesh["dp"].size
        base = small_plan(name, f"pp={pp},dp={dp},tp=1", pp * dp, layers=2, global_batch=4)
        for seed in range(count):
            plans.append(random_plan(base, mesh.factored("tp", tensor), seed))
            check_plan(plans[-1])
    loss = mean_square if name == "plain" else None
    wrong = {
        i: result
        for i, result in enumerate(
            [
                *verify_many(plans[:1], model=module(name), loss=loss),
                *verify_many(plans[1:], model=module(name, 2), loss=loss),
            ]
        )
        if not result["equal"]
    }
    assert wrong == {}


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Same losses on every layout, micro-batch size and recompute mode, and others without it."""
    layouts = [
        "tp=1,dp=1,pp=1,micro_batch=4",
        "tp=2,dp=1,pp=2,micro_batch=2,recompute=full",
        "tp=2,dp=2,pp=1,micro_batch=1,zero=3,recompute=selective",
    ]
    runs = [("dropout", layout) for layout in layouts] + [("gpt2", layouts[0])]
    losses = [trained(*run, tmp_path / f"run-{i}") for i, run in enumerate(runs)]
    assert losses[1] == losses[0]
    assert losses[2] == losses[0]
    assert losses[3] != losses[0]


def trained(name: str, layout: str, folder: Path) -> list[float]:
    """The losses of two steps of the emitted program, to six decimals."""
    degrees = dict(re.findall(r"(tp|dp|pp)=(\d)", layout))
    ranks = 1
    for degree in degrees.values():
        ranks *= int(degree)
    emit(small_plan(name, layout, ranks, layers=2, global_batch=8), folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, "train.py", "--steps", "2"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run.stdout)]
    assert len(losses) == 2
    return losses
