"""All collectives of a pipeline's programs are those of the plan: what stages send as well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from emit_cases import small_plan
from host_devices import environment
from planned_collectives import WIDTH, Moved, planned
from test_collectives_jax import compiled

from shardwright.backends.to_jax import emit
from shardwright.backends.to_jax.pipeline import program_form
from shardwright.ir.plan import Plan

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("hlo_stages_worker.py")


def plan_of(layout: str, ranks: int, layers: int = 4) -> Plan:
    return small_plan("llama", layout, ranks, precision="fp32", layers=layers)


def run_stages(plan: Plan, folder: Path) -> dict[str, Any]:
    emit(plan, folder)
    run = subprocess.run([sys.executable, "-P", str(WORKER), str(folder)],
                         env=environment(plan.mesh.size), capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def sent_bytes(plan: Plan) -> int:
    """Of what a microbatch takes from a stage to the next, on one device: the hidden state."""
    width = plan.model.parameters["model.norm.weight"].shape[0]
    return plan.strategy.micro_batch * int(plan.workload["seq_len"]) * width * WIDTH


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("tp=2,dp=2,pp=2,zero=0,micro_batch=1", 8),
        ("tp=1,dp=2,pp=2,zero=1,micro_batch=1", 4),
        ("tp=1,dp=1,pp=2,stages=3-1,micro_batch=1", 2),
    ],
)
def test_stages_send_every_microbatch_once_each_way(
    layout: str, ranks: int, tmp_path: Path
) -> None:
    plan = plan_of(layout, ranks)
    found = run_stages(plan, tmp_path)
    expected = planned(plan, found["arrays"], update=False)
    sends = 2 * plan.microbatches * (len(plan.stages) - 1)
    expected.count["collective-permute"] = sends
    expected.bytes["collective-permute"] = sends * sent_bytes(plan)
    expected.add("all_reduce", 1)  # the loss, from the last stage to all
    assert Counter(found["count"]) == expected.count
    assert Counter(found["bytes"]) == expected.bytes


def test_a_tick_sends_once_each_way(tmp_path: Path) -> None:
    layout = "tp=2,dp=1,pp=2,micro_batch=1,schedule=gpipe"
    plan, deeper = plan_of(layout, 4), plan_of(layout, 4, layers=6)
    assert program_form(plan).kind == "ticks"
    (found,) = compiled([plan], tmp_path)
    pp, micro = plan.strategy.pp, plan.microbatches
    ticks, layers = micro + pp - 1, sum(plan.strategy.layers)
    expected = Moved()
    whole, more = (planned(each, found["arrays"], update=False) for each in (plan, deeper))
    for all_of_it, deep, into in (
        (whole.count, more.count, expected.count),
        (whole.bytes, more.bytes, expected.bytes),
    ):
        for kind in all_of_it:
            of_a_layer = (deep[kind] - all_of_it[kind]) // 2 // micro
            ends = all_of_it[kind] - of_a_layer * layers * micro
            into[kind] = ends + of_a_layer * layers // pp * ticks
    expected.count["collective-permute"] = 2 * ticks
    expected.bytes["collective-permute"] = 2 * ticks * sent_bytes(plan)
    expected.add("all_reduce", 1)  # the loss
    outside = [names for names in found["arrays"] if len(names) == 1]
    for (name,) in outside:  # gradients of embedding, norm and head, from the stages that have them
        shape, split = plan.model.parameters[name].shape, "S" in str(plan.parameter_types()[name])
        expected.add("all_reduce", prod(shape) // (plan.strategy.tp if split else 1))
    expected.add("all_reduce", 1, 3)  # the norm: split along tp, pp, and both
    assert Counter(found["count"]) == expected.count
    assert Counter(found["bytes"]) == expected.bytes
