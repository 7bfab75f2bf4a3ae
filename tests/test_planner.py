"""Planning real models: known layouts are found, bounds hold, pins hold, errors say what to do."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import shardwright as sw
from shardwright.ir import AxisType, InvalidInput, Mesh
from shardwright.ir.graph import Model, Pin
from shardwright.planner import Fix, Request, Search
from shardwright.planner.bounds import variant_floors
from shardwright.planner.candidates import unemittable
from shardwright.planner.costs import ModelCosts
from shardwright.planner.inner import evaluate
from shardwright.planner.sbp_program import solve
from shardwright.planner.solving import Outcome
from shardwright.planner.space import candidates

LAYER = "model.layers.0."


def llama(layers: int = 32, hidden: int = 4096, heads: int = 32, kv_heads: int = 8) -> Model:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=128256, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    ids = {n: torch.zeros(2, 32, dtype=torch.long, device="meta") for n in ("input_ids", "labels")}
    return sw.trace(module, ids)


@pytest.fixture(scope="module")
def model() -> Model:
    return llama()


def types_of(plan: sw.Plan, axis: str = "tp") -> dict[str, str]:
    return {name: str(kind[axis]) for name, kind in plan.parameter_types().items()}


@pytest.mark.parametrize(("seq_len", "micro_batch"), [(2048, 1), (4096, 1), (8192, 1), (4096, 2)])
def test_a_fast_axis_gets_tensor_and_sequence_parallelism(
    model: Model, seq_len: int, micro_batch: int
) -> None:
    """Megatron-LM's layout, unaided: Shoeybi et al. 2019, Korthikanti et al. 2022."""
    work = sw.Workload(global_batch=8, seq_len=seq_len)
    plan = sw.plan(model, "h100-sxm:1", work, fix={"tp": 8, "micro_batch": micro_batch})
    types = types_of(plan)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert types[f"{LAYER}self_attn.{name}.weight"] == "S(0)"
    for name in ("gate_proj", "up_proj"):
        assert types[f"{LAYER}mlp.{name}.weight"] == "S(0)"
    assert types[f"{LAYER}self_attn.o_proj.weight"] == "S(1)"
    assert types[f"{LAYER}mlp.down_proj.weight"] == "S(1)"
    annotation = plan.annotations["LlamaDecoderLayer"]
    assert str(annotation.inputs[0]["tp"]) == str(annotation.outputs[0]["tp"]) == "S(1)"
    for name, types_in in annotation.ops.items():
        if "rms_norm" in name:
            assert str(types_in.operands[0]["tp"]) == "S(1)"


def test_a_slow_axis_gets_data_parallelism_with_zero(model: Model) -> None:
    work = sw.Workload(global_batch=64, seq_len=8192)
    free = sw.plan(model, "h100-sxm:8x1", work).strategy
    assert free.tp == 1 and free.dp > 1 and free.zero >= 1
    flat = sw.plan(model, "h100-sxm:8x1", work, fix="pp=1").strategy
    assert (flat.dp, flat.tp) == (8, 1) and flat.zero >= 1


def test_known_layouts_are_no_better(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's, plain ZeRO's and AutoParallel's documented plan (8x8 mesh) as pins, under the
    same costs; what is found on one axis is the layout that is known to be right there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    layouts = importlib.import_module("block_layouts")
    found = {key: layouts.solved(model, problem) for key, problem in layouts.PROBLEMS.items()}
    for title, (key, pins) in layouts.known_layouts(model).items():
        known = layouts.solved(model, layouts.PROBLEMS[key], pins)
        assert found[key].objective <= known.objective * (1 + 1e-9), title
        if key != "both":
            assert found[key].objective == pytest.approx(known.objective, rel=1e-9), title
        assert known.method == found[key].method == "integral"
    graph = model.blocks[layouts.LAYER]
    types = found["slow"].annotations[layouts.LAYER].parameters
    slow = dict(zip(graph.parameters, types, strict=True))
    assert str(slow["mlp.up_proj.weight"]["dp"]) == "S(0)"  # ZeRO-3


def test_what_a_typing_costs_is_the_objective(model: Model) -> None:
    """Two axes jointly: the annotations, priced again, add up to what the solver minimised."""
    request = Request(model, sw.Cluster.parse("h100-sxm:2"), sw.Workload(16, 4096), Fix())
    search = Search(request)
    mesh = Mesh.of(dp=2, tp=8).factored("tp", (2, 4))
    axes = (mesh["tp0"], mesh["tp1"])
    binding = {"b": 1, "s": 4096}
    costs = ModelCosts(request.cluster, mesh, axes, binding, request.precision, model.blocks)
    found = solve(search.solving.insides.chain, axes, binding, costs)
    total = sum(evaluate(search.solving.insides.chain, found.annotations, costs).values())
    assert total == pytest.approx(found.objective, rel=1e-9)


def test_best_first_finds_what_exhaustion_finds(model: Model) -> None:
    request = Request(model, sw.Cluster.parse("a100-40g:2"), sw.Workload(32, 4096), Fix())
    found = Search(request).run(top=1)
    exhaustive = Search(request)
    every = [
        outcome
        for candidate in candidates(request)
        if unemittable(candidate) is None
        and exhaustive.solving.inners(candidate) is not None
        and isinstance(outcome := exhaustive.solving.solve(candidate), Outcome)
    ]
    best = min(outcome.seconds for outcome in every)
    assert found.outcomes[0].seconds <= best * 1.001
    assert found.bound <= best
    assert found.pruned > 0
    for outcome in every:  # the bounds that prune are below what they bound
        (floor,) = variant_floors(request, [outcome.candidate], outcome.inners)
        assert floor <= outcome.seconds * (1 + 1e-9)
        assert outcome.floor_seconds <= outcome.seconds * (1 + 1e-9)


def test_memory_is_a_hard_constraint(model: Model) -> None:
    for spec, seq_len in (("a100-40g:2", 8192), ("v100:2", 8192), ("h100-sxm:1", 65536)):
        plan = sw.plan(model, spec, sw.Workload(global_batch=64, seq_len=seq_len))
        assert max(plan.predicted.memory_bytes) <= plan.predicted.memory_limit_bytes
    modes = {mode for stage in plan.stages for mode in stage.recompute}
    assert modes != {"none"}  # such sequences do not fit without recomputation


def test_depth_costs_no_solves() -> None:
    found = {
        layers: Search(
            Request(
                llama(layers=layers, hidden=1024, heads=16),
                sw.Cluster.parse("h100-sxm:1"),
                sw.Workload(16, 2048),
                Fix(),
            )
        ).run()
        for layers in (4, 40)
    }
    assert found[4].methods == found[40].methods


def test_uneven_stages_hold_embedding_and_head(model: Model) -> None:
    plan = sw.plan(model, "h100-sxm:2", sw.Workload(64, 8192), fix="pp=4,tp=4,dp=1")
    assert sum(plan.strategy.layers) == 32
    assert plan.strategy.layers[-1] < plan.strategy.layers[1]  # the head is worth layers
    assert plan.parameter_stages()["model.embed_tokens.weight"] == [0]
    assert plan.parameter_stages()["lm_head.weight"] == [3]
    fixed = sw.plan(model, "h100-sxm:2", sw.Workload(64, 8192), fix="tp=4,dp=1,stages=9-9-7-7")
    assert fixed.strategy.layers == (9, 9, 7, 7)


def test_sub_axes_where_key_value_heads_are_fewer_than_ranks() -> None:
    small = llama(layers=2, hidden=512, heads=8, kv_heads=2)
    plan = sw.plan(small, "local:4", sw.Workload(8, 64, precision="fp32"), fix="tp=4")
    assert plan.tensor_axes == ("tp0", "tp1")
    layer = plan.annotations["LlamaDecoderLayer"]
    attention = next(types for name, types in layer.ops.items() if "attention" in name)
    split = {str(kind) for axis, kind in attention.operands[0] if axis in plan.tensor_axes}
    assert split == {"S(1)", "S(1.1)"}  # key-value groups, and the queries of each


# --- pins ---------------------------------------------------------------------------------------


def with_pins(model: Model, *pins: Pin) -> Model:
    return replace(model, pins=pins)


def test_a_pinned_parameter_keeps_its_type(model: Model) -> None:
    pinned = with_pins(model, Pin("parameter", "lm_head.weight", {"tp": "S(1)"}))
    plan = sw.plan(pinned, "h100-sxm:1", sw.Workload(8, 4096), fix="tp=8")
    assert types_of(plan)["lm_head.weight"] == "S(1)"
    free = sw.plan(model, "h100-sxm:1", sw.Workload(8, 4096), fix="tp=8")
    assert types_of(free)["lm_head.weight"] != "S(1)"


def test_a_pinned_stage_holds_its_module(model: Model) -> None:
    pinned = with_pins(model, Pin("stage", "model.layers.3", stage=1))
    plan = sw.plan(pinned, "h100-sxm:1", sw.Workload(16, 4096), fix="pp=2,tp=4")
    assert plan.parameter_stages()["model.layers.3.mlp.up_proj.weight"] == [1]


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        (Pin("parameter", "lm_head.weight", {"tp": "S(7)"}), "lm_head.weight"),
        (Pin("parameter", "no.such", {"tp": "S(0)"}), "no.such"),
        (Pin("parameter", "model.norm.weight", {"cp": "S(0)"}), "cp"),
        (Pin("stage", "model.layers.99", stage=0), "model.layers.99"),
        (Pin("parameter", "model.layers.0.mlp.up_proj.weight", {"tp": "P"}), "up_proj"),
    ],
)
def test_a_pin_that_cannot_hold_is_named(model: Model, pin: Pin, said: str) -> None:
    with pytest.raises(sw.ShardwrightError, match=re.escape(said)):
        sw.plan(with_pins(model, pin), "h100-sxm:1", sw.Workload(8, 4096), fix="tp=8")


def test_a_pin_on_tp_holds_for_its_sub_axes(model: Model) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    pinned = with_pins(model, Pin("parameter", name, {"tp": "S(0)"}))
    plan = sw.plan(pinned, "h100-sxm:2", sw.Workload(16, 4096), fix="tp=16,micro_batch=1")
    kind = plan.parameter_types()[name]
    assert len(plan.tensor_axes) == 2  # 8 key-value heads, so not one axis of 16
    assert all(kind[axis].is_split and kind[axis].dim == 0 for axis in plan.tensor_axes)


def test_a_pin_that_some_tp_cannot_hold_leaves_the_others() -> None:
    small = llama(layers=2, hidden=64, heads=8, kv_heads=8)
    block, graph = next((b, g) for b, g in small.blocks.items() if "Layer" in b)
    pin = Pin("activation", f"{block}:{graph.outputs[0]}", {"tp": "S(1)"})
    work = sw.Workload(8, 36)  # 36 tokens divide by 4, not by 8
    plan = sw.plan(with_pins(small, pin), "h100-sxm:1", work, top=100)
    degrees = {plan.strategy.tp, *(other.strategy.tp for other in plan.alternatives)}
    assert {1, 2, 4} >= degrees
    with pytest.raises(sw.Infeasible, match=r"tp=S\(1\) cannot hold"):
        sw.plan(with_pins(small, pin), "h100-sxm:1", work, fix="tp=8")


@pytest.mark.parametrize(("sp", "handed_on"), [(0, "I"), (1, "S(1)")])
def test_sp_decides_what_blocks_hand_on(model: Model, sp: int, handed_on: str) -> None:
    plan = sw.plan(model, "h100-sxm:1", sw.Workload(8, 4096), fix=f"tp=8,sp={sp}")
    layer = next(block for block in plan.annotations if "Layer" in block)
    assert str(plan.annotations[layer].outputs[0]["tp"]) == handed_on


def test_sp_needs_a_sequence_that_divides(model: Model) -> None:
    with pytest.raises(sw.Infeasible, match=r"sp=1: the sequence length 4097"):
        sw.plan(model, "h100-sxm:1", sw.Workload(8, 4097), fix="tp=8,sp=1")


# --- memory -------------------------------------------------------------------------------------


def test_only_layers_are_recomputed_and_memory_is_a_hard_limit(model: Model) -> None:
    plan = sw.plan(model, "h100-sxm:2", sw.Workload(64, 4096), fix="tp=16,micro_batch=16")
    modes = plan.stages[0].recompute
    assert "full" in modes and (modes[0], modes[-1]) == ("none", "none")
    assert max(plan.predicted.memory_bytes) <= plan.predicted.memory_limit_bytes


# --- errors -------------------------------------------------------------------------------------


def test_the_smallest_cluster_is_found_where_multiples_do_not_fit(model: Model) -> None:
    """With 7 sequences only node counts that 7 divides, or few stages, are any use."""
    work = sw.Workload(7, 8192)
    with pytest.raises(sw.Infeasible) as caught:
        sw.plan(model, "v100:1x1", work, fix="recompute=full")
    found = re.search(r"smallest cluster that fits is (\d+) nodes", str(caught.value))
    assert found is not None, caught.value
    nodes = int(found.group(1))
    sw.plan(model, f"v100:{nodes}x1", work, fix="recompute=full")
    for fewer in range(1, nodes):
        with pytest.raises(sw.ShardwrightError):
            sw.plan(model, f"v100:{fewer}x1", work, fix="recompute=full")


def test_a_workload_that_is_none_names_the_field() -> None:
    with pytest.raises(InvalidInput, match="global_batch is 0"):
        sw.Workload(0, 8)


def test_too_large_a_model_says_what_is_short_and_what_would_fit() -> None:
    big = llama(layers=80, hidden=8192, heads=64)
    work = sw.Workload(global_batch=256, seq_len=8192)
    with pytest.raises(sw.Infeasible) as caught:
        sw.plan(big, "a100-40g:1", work)
    message = str(caught.value)
    short = re.search(r"needs ([\d.]+) GiB .* has ([\d.]+) GiB usable: ([\d.]+) GiB short", message)
    assert short is not None, message
    needs, has, missing = map(float, short.groups())
    assert needs - has == pytest.approx(missing, abs=0.11)
    smallest = re.search(r"smallest cluster that fits is (\d+) nodes", message)
    assert smallest is not None, message
    nodes = int(smallest.group(1))
    assert sw.plan(big, f"a100-40g:{nodes}", work).strategy.ranks == nodes * 8


@pytest.mark.parametrize(
    ("spec", "batch", "fix", "said"),
    [
        ("h100-sxm:3x1", 8, "dp=3", "8"),
        ("h100-sxm:1", 8, "tp=3", "tp=3"),
        ("h100-sxm:1", 8, "tp=8,pp=2", "16"),
        ("h100-sxm:1", 8, "pp=8,micro_batch=2", "micro_batch=2"),
        ("h100-sxm:1", 8, "stages=9-9", "18"),
        ("h100-sxm:1", 8, "foo=1", "foo"),
        ("h100-sxm:1", 8, "tpp=1", "tp"),
        ("h100-sxm:1", 8, "zero=4", "zero=4"),
        ("h100-sxm:1", 8, "tp=x", "tp=x"),
        ("h100-sxm:1", 8, "tp", "key=value"),
        ("h100-sx:1", 8, "", "h100-sxm"),
    ],
)
def test_bad_requests_are_one_line(
    model: Model, spec: str, batch: int, fix: str, said: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)) as caught:
        sw.plan(model, spec, sw.Workload(batch, 4096), fix=fix)
    assert "\n" not in str(caught.value)


def test_a_degree_that_divides_nothing_is_an_error_when_pinned() -> None:
    odd = llama(layers=2, hidden=320, heads=5, kv_heads=5)  # 1120 and 128256 share no factor 7
    assert 128256 % 11 != 0
    with pytest.raises(InvalidInput, match="tp=11"):
        sw.plan(odd, "local:11", sw.Workload(8, 64), fix="tp=11")


def test_types_parse() -> None:
    assert AxisType.parse("s(1.2)") == AxisType("S", 1, 2)
