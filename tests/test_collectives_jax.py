"""All collectives in the compiled program, and their bytes, are those of the plan; and depth costs
no compiling.

XLA's passes stay on: several collectives that it combined into one call count as those, which a
tuple shows, and bytes are the same either way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax_models
import pytest
from emit_cases import scaled, small_plan
from host_devices import environment
from planned_collectives import planned

from shardwright.backends.parity import Function, layout_plan
from shardwright.backends.to_jax import emit
from shardwright.ir.plan import Plan

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("hlo_worker.py")


def compiled(plans: list[Plan], folder: Path) -> list[dict[str, Any]]:
    folders = [str(emit(plan, folder / str(i))) for i, plan in enumerate(plans)]
    devices = max(plan.mesh.size for plan in plans)
    run = subprocess.run([sys.executable, "-P", str(WORKER), *folders],
                         env=environment(devices), capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def check(plans: dict[str, Plan], folder: Path) -> None:
    """Equal in number and in bytes, plan by plan."""
    for (name, plan), found in zip(
        plans.items(), compiled(list(plans.values()), folder), strict=True
    ):
        want = planned(plan, found["arrays"])
        assert Counter(found["count"]) == want.count, name
        assert Counter(found["bytes"]) == want.bytes, name
        if plan.mesh.size > 1:
            assert want.bytes.total() > 500, name


LAYOUTS = [
    "tp=2", "tp=4", "dp=8", "dp=4,zero=1", "dp=4,zero=2", "dp=4,zero=3", "tp=2,dp=4",
    "tp=2,dp=4,zero=1", "tp=4,dp=2,zero=2", "tp=2,dp=4,zero=3", "tp=2,dp=2,zero=2,micro_batch=1",
]  # fmt: skip
"""Two microbatches each: what happens in every one of them, and what once."""


@pytest.mark.parametrize("name", ["linen_llama", "equinox_gpt", "linen_vit", "mlp"])
def test_collectives_of_functions(name: str, tmp_path: Path) -> None:
    graph = Function(*getattr(jax_models, name)()).trace()
    check({layout: layout_plan(graph, layout, "float32") for layout in LAYOUTS}, tmp_path)


def test_collectives_with_sequence_parallelism(tmp_path: Path) -> None:
    """A Llama of torch as the planner types it at its real size, and in other layouts."""
    plans = {"sequence": scaled("llama", 4, tp=2, precision="fp32")}
    assert "S(1)" in str(plans["sequence"].annotations)
    for zero in range(4):
        layout = f"tp=2,dp=2,pp=1,zero={zero},micro_batch=2"
        plans[layout] = small_plan("llama", layout, 4, precision="fp32")
    check(plans, tmp_path)


def test_depth_costs_no_instructions(tmp_path: Path) -> None:
    plans = [small_plan("llama", "tp=2,dp=1,pp=1", 2, layers=n, precision="fp32") for n in (6, 12)]
    few, many = (found["instructions"] for found in compiled(plans, tmp_path))
    assert many == pytest.approx(few, rel=0.02)
