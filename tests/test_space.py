"""The whole space: what cannot be emitted is ranked and said, its bounds hold, deep models are
cheap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel import what_if
from shardwright.costmodel.pipeline import (
    least_paces,
    least_passes,
    pipeline_estimate_seconds,
)
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import Experts, TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner import Fix, Request, Search
from shardwright.planner.alike import Alike
from shardwright.planner.bounds import variant_floors
from shardwright.planner.candidates import Candidate, unemittable
from shardwright.planner.request import Layers
from shardwright.planner.solving import Outcome, Solving
from shardwright.planner.space import heads, variants
from shardwright.planner.stages import Cut, Rank, SegmentTable
from shardwright.planner.virtual_stages import cut_virtual, layers_before

DENSE = TransformerDims(
    layers=8, hidden=1024, heads=8, kv_heads=4, head_dim=128, ffn=2816, vocab=32000
)


@pytest.fixture(scope="module")
def dense() -> Model:
    return transformer(DENSE, name="dense")


# --- bounds --------------------------------------------------------------------------------------


@given(
    pp=st.integers(1, 10),
    more=st.integers(0, 30),
    share=st.floats(0.2, 0.6),
    seed=st.integers(0, 10**6),
)
def test_1f1b_takes_so_many_passes_however_it_is_cut(
    pp: int, more: int, share: float, seed: int
) -> None:
    """The estimate is never above the simulation (tests/test_pipeline_seconds.py)."""
    m = pp + more
    rng = np.random.default_rng(seed)
    stages = rng.dirichlet(np.full(pp, rng.uniform(0.5, 50)))
    step = pipeline_estimate_seconds(list(stages), [0.0] * (pp - 1), m, share)
    assert step >= least_passes(pp, m, share) * stages.sum() * (1 - 1e-12)
    assert step >= (stages.sum() + least_paces(pp, m, share) * stages).max() * (1 - 1e-12)
    if m > pp:  # and equal stages reach it
        even = pipeline_estimate_seconds([1 / pp] * pp, [0.0] * (pp - 1), m, share)
        assert least_passes(pp, m, share) == pytest.approx(even)


@settings(max_examples=12)
@given(
    experts=st.booleans(),
    spec=st.sampled_from(["h100-sxm:2x4", "a100-40g:4x2", "v100:8x1"]),
    batch=st.sampled_from([8, 16, 32]),
    seq_len=st.sampled_from([2048, 8192]),
    link=st.sampled_from([None, 20e9, 200e9, 1e13]),
    room=st.sampled_from([0.1, 1.0]),
    fix=st.sampled_from(["", "recompute=offload", "zero=3", "zero=2"]),
    seed=st.integers(0, 10**6),
)
def test_bounds_of_variants_are_below_what_they_bound(
    experts: bool, spec: str, batch: int, seq_len: int, link: float | None, room: float, fix: str,
    seed: int,
) -> None:  # fmt: skip
    """All schedules, ZeRO stages and groups of each state, context and expert degrees, and
    activations in host memory."""
    mixture = Experts(count=8, top_k=2, ffn=1408)
    model = transformer(replace(DENSE, experts=mixture) if experts else DENSE, name="m")
    cluster = sw.Cluster.parse(spec)
    device = cluster.device
    free = int(room * device.memory_limit_bytes)
    cluster = cluster.with_device(device.model_copy(update={
        "memory_bytes": device.reserve_bytes + free, "host_link_bytes_per_s": link,
    }))  # fmt: skip
    given = Fix.parse(fix if link is not None or "offload" not in fix else "")
    request = Request.on(model, cluster, sw.Workload(batch, seq_len), given)
    search = Search(request, anything=True)
    every = heads(request)
    rng = np.random.default_rng(seed)
    for at in rng.permutation(len(every))[:6]:
        inners, options = search.solving.inners(every[at]), variants(request, every[at])
        if inners is None:
            continue
        floors = variant_floors(request, options, inners)
        for i in rng.permutation(len(options))[:6]:
            outcome = search.solving.solve(options[i])
            if not isinstance(outcome, Outcome):
                continue
            simulated = search.solving.placed(outcome, search=False)
            assert floors[i] <= simulated.seconds * (1 + 1e-9), options[i].key
            assert outcome.floor_seconds <= simulated.seconds * (1 + 1e-9), options[i].key
            fullest = max(stage.total for stage in outcome.memory)
            assert fullest <= request.limit_bytes, options[i].key


# --- stages --------------------------------------------------------------------------------------


def test_intervals_of_equal_layers_are_few_sorts() -> None:
    alike = Alike.of(["first", *["layer"] * 100, "last"])
    assert len(alike.counts) < 5 * 102
    seconds = np.array([5.0, *[1.0] * 100, 7.0])
    sums = np.append(alike.sums(seconds), 0.0)
    for first, last in ((0, 1), (0, 102), (3, 17), (90, 102)):
        assert sums[alike.index[first, last]] == seconds[first:last].sum()


@given(layers=st.integers(4, 40), pp=st.integers(2, 4), vpp=st.integers(2, 3))
def test_virtual_stages_are_even_and_cover_the_chain(layers: int, pp: int, vpp: int) -> None:
    if layers < pp * vpp:
        return
    count = layers + 2
    table = SegmentTable(
        ("none", "full"),
        np.array([[0.1, *[1.0] * layers, 1.5], [0.1, *[1.3] * layers, 1.5]]),
        np.array([[1.0, *[4.0] * layers, 1.0], [1.0, *[1.0] * layers, 1.0]]),
        np.zeros((2, count)), np.ones(count),
    )  # fmt: skip
    ranks = [Rank(table, 2.0, 1e9)] * pp
    placement = tuple(range(pp)) * vpp
    cut = cut_virtual(ranks, placement, Layers(1, layers), count, 8)
    assert isinstance(cut, Cut)
    assert (cut.bounds[0], cut.bounds[-1], len(cut.bounds)) == (0, count, pp * vpp + 1)
    inside = Layers(1, layers).per_stage(cut.bounds)
    for first in range(1, pp * vpp):
        assert sum(inside[:first]) >= layers_before(layers, pp * vpp, first)
    work = [sum(cut.seconds[rank::pp]) for rank in range(pp)]
    even = [0] * pp
    for v in range(pp * vpp):
        even[v % pp] += layers // (pp * vpp) + (v >= pp * vpp - layers % (pp * vpp))
    start = [even[r] + (r == 0) * 0.1 + (r == pp - 1) * 1.5 for r in range(pp)]
    assert max(work) <= max(start) + 1e-9  # moving layers never made it slower


# --- what cannot be emitted ----------------------------------------------------------------------


def test_what_cannot_be_emitted_is_planned_when_asked_for(dense: Model, tmp_path: Path) -> None:
    work = sw.Workload(16, 8192)
    plan = sw.plan(dense, "h100-sxm:1", work, fix="cp=2,pp=2,tp=2")
    assert (plan.strategy.cp, plan.strategy.ranks) == (2, 8)
    assert any(
        line.startswith("cannot be emitted yet: ") and "context parallelism" in line
        for line in plan.advice
    )
    plan.save(tmp_path / "plan.json")
    again = sw.Plan.load(tmp_path / "plan.json")
    assert again.strategy == plan.strategy
    with pytest.raises(InvalidInput, match=r"cannot be emitted yet: .*context parallelism"):
        again.emit("torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_by_default_a_plan_can_be_emitted_and_the_whole_space_is_no_slower(dense: Model) -> None:
    work = sw.Workload(64, 4096)
    ours = sw.plan(dense, "a100-40g:4x2", work)
    every = sw.plan(dense, "a100-40g:4x2", work, backend="any")
    assert unemittable(ours.strategy) is None
    assert every.predicted.step_seconds <= ours.predicted.step_seconds * 1.001
    assert every.certificate.lower_bound_seconds <= every.predicted.step_seconds
    with pytest.raises(InvalidInput, match="backend 'jaxx'"):
        sw.plan(dense, "a100-40g:4x2", work, backend="jaxx")


@pytest.mark.parametrize(
    ("fix", "name", "value"),
    [
        ("schedule=interleaved,vpp=2,pp=4", "vpp", 2),
        ("schedule=zb-h1,pp=2", "schedule", "zb-h1"),
        ("zero=1,zero_group=2,tp=1,pp=1", "zero_group", 2),
        ("zero=2,gradient_group=2,tp=1,pp=1", "gradient_group", 2),
        ("zero=3,zero_group=4,parameter_group=2,tp=1,pp=1", "parameter_group", 2),
        ("cp=2,attention=ulysses", "ulysses", 2),
    ],
)
def test_every_part_of_the_space_can_be_fixed(
    dense: Model, fix: str, name: str, value: object
) -> None:
    plan = sw.plan(dense, "h100-sxm:1", sw.Workload(32, 4096), fix=fix)
    assert getattr(plan.strategy, name) == value
    assert str(plan)


def test_mixtures_are_planned_from_their_config() -> None:
    plan = sw.plan("mixtral-8x7b", "h100-sxm:4", sw.Workload(256, 4096), top=1)
    assert plan.strategy.ep * plan.strategy.etp >= 1
    assert max(plan.predicted.memory_bytes) <= plan.predicted.memory_limit_bytes
    assert any("mixtures of experts" in line for line in plan.advice)


def test_the_same_inputs_give_the_same_plan(dense: Model) -> None:
    work = sw.Workload(32, 4096)
    plans = [sw.plan(dense, "h100-sxm:2x4", work, backend="any").to_json() for _ in range(2)]
    for plan in plans:
        plan["certificate"].pop("seconds")
    assert plans[0] == plans[1]


def test_an_interrupted_search_returns_the_best_so_far(dense: Model) -> None:
    request = Request.on(dense, sw.Cluster.parse("h100-sxm:2x4"), sw.Workload(32, 4096), Fix())
    seen: list[str] = []

    def stop(text: str) -> None:
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    found = Search(request, anything=True).run(progress=stop)
    whole = Search(request, anything=True).run(top=1)
    assert found.interrupted and not whole.interrupted
    assert found.bound <= whole.outcomes[0].seconds <= found.outcomes[0].seconds
    nothing = Search(replace(request, fix=Fix(pp=2)))
    with pytest.raises(KeyboardInterrupt):
        nothing.run(progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))


def test_keys_name_what_is_not_the_default() -> None:
    plain = Candidate(2, 4, 1, 0, 1, 8)
    assert plain.key == "pp=2 dp=4 tp=1 zero=0 micro_batch=1"
    every = Candidate(2, 4, 1, 1, 1, 8, "zb-v", 2, 2, 4, 1, 2, 2)
    for part in ("vpp=2", "cp=2", "ulysses=2", "ep=4", "zero_group=2", "schedule=zb-v"):
        assert part in every.key


@pytest.mark.parametrize("part", [0.90, 0.92, 0.94, 0.96, 0.98, 1.0, 1.1])
def test_what_fits_recomputed_fits_if_nothing_is_said(part: float) -> None:
    """However little room is left: where recomputing everything fits, a free choice fits as well,
    and takes no longer."""
    dims = TransformerDims(
        layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocab=128256, gated=True
    )
    model, candidate = transformer(dims, name="llama"), Candidate(1, 8192, 1, 3, 1, 1)
    where = what_if.with_memory(sw.Cluster.preset("h100-sxm", nodes=1024), part)
    full, free = (
        Solving(Request.on(model, where, sw.Workload(8192, 8192), fix)).solve(candidate)
        for fix in (Fix(recompute="full"), Fix())
    )
    assert isinstance(full, Outcome) and isinstance(free, Outcome)
    assert free.seconds <= full.seconds * (1 + 1e-9)
