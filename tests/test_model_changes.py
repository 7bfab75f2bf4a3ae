"""Changes of the model itself: only when asked for, said when made, and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel.runtime import Runtime
from shardwright.costmodel.work import Work
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.planner import Allow, Fix, Request, Search
from shardwright.planner.bounds import variant_floors
from shardwright.planner.candidates import Candidate
from shardwright.planner.model_changes import follow_each_other, with_changes
from shardwright.planner.solving import Outcome
from shardwright.planner.space import allowed, heads

MODEL = transformer(
    TransformerDims(
        layers=4, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=5632, vocab=32000
    ),
    name="dense",
)
WORK = sw.Workload(16, 4096)
PLAIN = Candidate(1, 4, 2, 0, 1, 4)
RUNTIME = Runtime.preset("torch")


def solved(candidate: Candidate) -> Outcome:
    cluster = sw.Cluster.preset("h100-sxm", 1, candidate.ranks)
    search = Search(Request.on(MODEL, cluster, WORK, Fix()), anything=True)
    outcome = search.solving.solve(candidate)
    assert isinstance(outcome, Outcome)
    return search.solving.placed(outcome, search=False)


def test_nothing_is_changed_unless_asked_for(tmp_path: Path) -> None:
    fix = "tp=4,pp=1,dp=2,cp=1"
    plain = sw.plan(MODEL, "h100-sxm:1", WORK, fix=fix, backend="any", top=1)
    data = plain.to_json()["strategy"]
    assert (data["parallel_block"], data["ladder_residual"], data["local_update"]) == (0, 0, 0)
    assert not any("changes the model" in line for line in plain.advice)
    asked = ["parallel-block", "ladder-residual", "local-update=50"]
    changed = sw.plan(MODEL, "h100-sxm:1", WORK, fix=fix, allow=asked, top=1)
    assert changed.predicted.step_seconds < plain.predicted.step_seconds
    assert changed.strategy.ladder_residual or changed.strategy.parallel_block
    line = next(line for line in changed.advice if line.startswith("changes the model: "))
    assert "arXiv" in line
    changed.save(tmp_path / "plan.json")
    again = sw.Plan.load(tmp_path / "plan.json")
    assert again.strategy == changed.strategy
    with pytest.raises(InvalidInput, match="cannot be emitted yet"):
        again.emit("torch", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("paralel-block", r"'paralel-block' \(did you mean parallel-block\?\)"),
        ("local-update", "expected local-update=H"),
        ("local-update=1", "at least 2 steps"),
        ("local-update=x", "at least 2 steps"),
        ("parallel-block=2", "expected parallel-block alone"),
    ],
)
def test_what_is_not_known_is_refused_in_a_line(text: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=f"--allow: .*{says}|--allow: {says}"):
        Allow.parse(text)
    assert Allow.parse("") == Allow.parse(None) == Allow()
    assert Allow.parse("ladder-residual, local-update=8") == Allow(False, True, 8)


@given(
    compute=st.floats(0, 1), sent=st.floats(1e-6, 1), count=st.integers(1, 8),
    parallel=st.booleans(), ladder=st.booleans(),
)  # fmt: skip
def test_changes_never_cost(
    compute: float, sent: float, count: int, parallel: bool, ladder: bool
) -> None:
    """Half of the collectives; of these what exceeds the compute beside them."""
    work = Work({"matmul": compute, "tensor_parallel": sent}, 10.0, 1.0, 2.0 * count)
    chosen = replace(PLAIN, parallel_block=parallel, ladder_residual=ladder)
    changed = with_changes(work, chosen, RUNTIME)
    left = sent / 2 if parallel else sent
    assert changed.compute_s == work.compute_s and changed.flops == work.flops
    assert changed.collectives == (count if parallel else 2 * count)
    took = changed.seconds["tensor_parallel"]
    assert took == left if not ladder else max(0.0, left - 2 * compute) <= took <= left
    assert with_changes(work, PLAIN, RUNTIME).seconds == work.seconds


def test_only_layers_whose_mlp_waits_for_attention_change() -> None:
    waiting = {block: follow_each_other(graph) for block, graph in MODEL.blocks.items()}
    counts = MODEL.counts
    assert [counts[block] for block, waits in waiting.items() if waits] == [4]


def test_local_updates_that_are_rare_leave_no_communication() -> None:
    steps = (2, 20, 2000, 2 * 10**6)
    times = [solved(replace(PLAIN, local_update=every)) for every in steps]
    spent = [outcome.time["data_parallel"] for outcome in times]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < 1e-6 * times[-1].seconds
    assert times[-1].seconds < solved(PLAIN).seconds


def test_state_is_shared_out_within_groups_that_train_apart() -> None:
    together = replace(PLAIN, zero=3, zero_group=2)
    apart = replace(together, local_update=100)
    assert solved(apart).memory == solved(together).memory
    assert solved(apart).seconds < solved(together).seconds
    cluster = sw.Cluster.preset("h100-sxm", 4, 2)
    request = Request.on(MODEL, cluster, WORK, Fix(), allow=Allow(local_update=100))
    for head in heads(request):
        for each in allowed(request, head, anything=True):
            if each.local_update:  # never over all replicas
                assert not each.zero or 0 < each.zero_group < each.replicas
                assert each.cp == 1


def test_bounds_hold_for_changed_models() -> None:
    request = Request.on(
        MODEL, sw.Cluster.preset("h100-sxm", 2, 4), WORK, Fix(), allow=Allow(True, True, 10)
    )
    search = Search(request, anything=True)
    every = [head for head in heads(request) if head.cp == 1 and head.pp <= 2]
    for head in every[::4]:
        inners, options = search.solving.inners(head), allowed(request, head, anything=True)
        if inners is None:
            continue
        floors = variant_floors(request, options, inners)
        for option, floor in list(zip(options, floors, strict=True))[::5]:
            outcome = search.solving.solve(option)
            if isinstance(outcome, Outcome):
                placed = search.solving.placed(outcome, search=False)
                assert floor <= placed.seconds * (1 + 1e-9), option.key
