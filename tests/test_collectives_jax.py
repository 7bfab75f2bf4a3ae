"""All collectives in the compiled program are those of the plan, and depth costs no compiling.

The plan's own count comes from its types alone: one collective for every step of a conversion that
is not local, and one for its dual in the backward pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from emit_cases import scaled, small_plan

from shardwright.backends.emission.target import Target
from shardwright.backends.to_jax import emit
from shardwright.ir.conversion import LOCAL, steps
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import Plan

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("hlo_worker.py")


def compiled(plan: Plan, folder: Path) -> dict[str, Any]:
    emit(plan, folder)
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={plan.mesh.size}",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run([sys.executable, "-P", str(WORKER), str(folder)],
                         env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def planned(plan: Plan, arrays: int) -> Counter[str]:
    """Collectives of a step's loss and gradients; `arrays` are reduced along dp after it."""
    live = Target(plan.mesh).live
    found: Counter[str] = Counter()
    for segment in plan.model.segments:
        graph, annotation = plan.model.blocks[segment.block], plan.annotations[segment.block]
        made = annotation.produced(graph)
        for name, needs in annotation.needed(graph).items():
            if name not in made or name == plan.model.loss[1]:
                continue
            seen = set()
            for want in needs:
                form = live(made[name])
                for step in steps(form, live(want)):
                    form = form.replace(step.axis, step.target)
                    if form not in seen:
                        found[step.forward] += 1
                        found[step.backward] += graph.values[name].grad
                    seen.add(form)
        for op in graph.ops:
            if TABLE[op.kind].work == "loss":  # the maximum, and the sums
                types = live(annotation.ops[op.name].operands[0])
                last = len(graph.values[op.operands[0]].dims) - 1
                found["all_reduce"] += 2 * len(types.splitting(last))
    for kind in found:
        found[kind] *= plan.microbatches
    if plan.strategy.dp > 1:
        found["all_reduce"] += 2  # the count of terms, and the loss
        found["all_reduce" if plan.strategy.zero == 0 else "reduce_scatter"] += arrays
    named = {kind.replace("_", "-"): n for kind, n in found.items() if kind not in LOCAL and n}
    return Counter(named)


@pytest.mark.parametrize("kind", ["sequence", "tensor"])
def test_collectives_of_a_llama_on_tp_and_dp(kind: str, tmp_path: Path) -> None:
    if kind == "sequence":
        plan = scaled("llama", 4, tp=2, precision="fp32")
    else:
        plan = small_plan("llama", "tp=2,dp=2,pp=1,zero=0,micro_batch=2", 4, precision="fp32")
    found = compiled(plan, tmp_path)
    assert planned(plan, found["arrays"]) == Counter(found["collectives"])
    assert found["collectives"]["all-reduce"] > 1


def test_depth_costs_no_instructions(tmp_path: Path) -> None:
    sizes = []
    for layers in (6, 12):
        plan = small_plan("llama", "tp=2,dp=1,pp=1", 2, layers=layers, precision="fp32")
        sizes.append(compiled(plan, tmp_path / str(layers))["instructions"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
