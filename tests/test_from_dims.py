"""Transformers from dimensions, against the model traced from transformers: the same graph, cost,
memory and plan. Mixtures of experts: test_from_dims_experts.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel import Precision, block_bytes, local_sizes, op_flops
from shardwright.ir import Graph, InvalidInput, Mesh, Model
from shardwright.ir.check import illegal_axes
from shardwright.ir.from_dims import (
    Experts,
    LatentAttention,
    TransformerDims,
    dims_of_config,
    expert_binding,
    transformer,
)
from shardwright.ir.from_torch import load_model, preset_config, trace_loaded
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import data_parallel_types

transformers = pytest.importorskip("transformers")

BF16 = Precision.preset("bf16")
SMALL: dict[str, Any] = dict(layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64)
LATENT = LatentAttention(q_rank=12, kv_rank=20, nope_dim=8, rope_dim=4, v_dim=6)

# --- the traced model is the oracle -------------------------------------------------------------


def fingerprints(model: Model) -> dict[str, int]:
    """Per block what it computes, whatever ops and values are called and in whatever order."""
    return {
        name: hash(tuple(_print(graph, output, {}) for output in graph.outputs))
        for name, graph in model.blocks.items()
    }


def _print(graph: Graph, value: str, known: dict[str, int]) -> int:
    if value not in known:
        known[value] = hash(("leaf", value, graph.values[value].dims))
        made = graph.producer().get(value)
        if made:
            op, index = made
            read = [_print(graph, operand, known) for operand in op.operands]
            attributes = sorted((k, _rounded(v)) for k, v in op.attributes.items())
            described = graph.values[value]
            known[value] = hash(
                (op.kind, tuple(sorted(read) if op.kind == "add" else read), str(op.rule), index,
                 tuple(op.sizes.items()), str(attributes), described.dims, described.dtype,
                 described.grad)
            )  # fmt: skip
    return known[value]


def _rounded(value: Any) -> Any:
    return round(value, 9) if isinstance(value, float) else value


def flops_by_class(model: Model, binding: Mapping[str, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for segment in model.segments:
        for op in model.blocks[segment.block].ops:
            found[TABLE[op.kind].work] += int(op_flops(op, local_sizes(op, binding)))
    return found


def kept_bytes(model: Model, binding: Mapping[str, int], recompute: Any) -> list[int]:
    """Bytes that every segment keeps for its backward pass."""
    kept = {
        name: block_bytes(
            graph, data_parallel_types(graph), Mesh.of(dp=1), binding, BF16, recompute
        ).kept
        for name, graph in model.blocks.items()
    }
    return [kept[segment.block] for segment in model.segments]


def both(name: str, small: bool) -> tuple[Model, Model]:
    """A preset traced, and built from its dimensions."""
    loaded = load_model(name, small=small, tp=2, layers=3)
    config = loaded.module.config.to_dict()
    return trace_loaded(loaded), transformer(dims_of_config(config), name)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        *((name, True) for name in ("llama-3.1-8b", "gpt2", "mistral-7b", "qwen3-8b", "qwen2-7b")),
        ("llama-3.1-70b", False),
        ("gpt2-xl", False),
        ("qwen3-32b", False),
    ],
)
def test_built_is_traced(name: str, small: bool) -> None:
    traced, built = both(name, small)
    assert {n: p.shape for n, p in built.parameters.items()} == {
        n: p.shape for n, p in traced.parameters.items()
    }
    assert {n: p.init for n, p in built.parameters.items()} == {
        n: p.init for n, p in traced.parameters.items()
    }
    assert built.inputs == traced.inputs
    outside = [(s.module, set(s.parameters), s.inputs, s.outputs) for s in traced.segments]
    assert [(s.module, set(s.parameters), s.inputs, s.outputs) for s in built.segments] == outside
    prints, expected = fingerprints(built), fingerprints(traced)
    for mine, theirs in zip(built.segments, traced.segments, strict=True):
        assert prints[mine.block] == expected[theirs.block], mine.module
    binding = {"b": 2, "s": 512}
    assert flops_by_class(built, binding) == flops_by_class(traced, binding)
    for recompute in ("none", "selective", "full"):
        assert kept_bytes(built, binding, recompute) == kept_bytes(traced, binding, recompute)


def test_plans_are_equal() -> None:
    traced, built = both("llama-3.2-1b", small=False)
    cluster = sw.Cluster.preset("a100-80g", nodes=1)
    work = sw.Workload(global_batch=16, seq_len=1024)
    ours, theirs = sw.plan(built, cluster, work), sw.plan(traced, cluster, work)
    assert ours.strategy == theirs.strategy
    assert ours.predicted.step_seconds == pytest.approx(theirs.predicted.step_seconds, rel=1e-9)
    assert ours.predicted.memory_bytes == theirs.predicted.memory_bytes


def test_fingerprints_tell_models_apart() -> None:
    prints = fingerprints(transformer(TransformerDims(**SMALL)))
    for change in (dict(qk_norm=True), dict(activation="relu"), dict(windows=(5,))):
        other = fingerprints(transformer(TransformerDims(**SMALL, **change)))
        assert {name for name in prints if prints[name] != other[name]} == {"DecoderLayer"}


# --- laws ---------------------------------------------------------------------------------------


@st.composite
def any_dims(draw: Any) -> TransformerDims:
    heads = draw(st.sampled_from([1, 2, 4]))
    fields: dict[str, Any] = dict(
        layers=draw(st.integers(1, 5)),
        hidden=heads * draw(st.sampled_from([4, 6, 8])),
        heads=heads,
        ffn=draw(st.sampled_from([10, 48])),
        vocab=draw(st.sampled_from([30, 64])),
        gated=draw(st.booleans()),
        norm=draw(st.sampled_from(["layer_norm", "rms_norm"])),
        activation=draw(st.sampled_from(["gelu", "silu", "relu"])),
        bias=draw(st.booleans()),
        attention_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        tied=draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        windows=draw(st.sampled_from([(None,), (5,), (5, None)])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        mtp_layers=draw(st.integers(0, 2)),
    )
    if draw(st.booleans()):
        fields["latent"] = replace(LATENT, q_rank=draw(st.sampled_from([0, 12])))
    else:
        fields["positions"] = draw(st.sampled_from(["learned", "rotary", "alibi", "none"]))
        fields["max_positions"] = 40
        fields["fused_qkv"] = draw(st.booleans())
        fields["qk_norm"] = draw(st.booleans())
        if not fields["fused_qkv"]:
            fields["kv_heads"] = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    if draw(st.booleans()):
        fields["experts"] = Experts(
            count=draw(st.sampled_from([2, 6])),
            top_k=draw(st.integers(1, 2)),
            ffn=12,
            shared=draw(st.integers(0, 2)),
            dense_layers=draw(st.integers(0, 1)),
            every=draw(st.integers(1, 2)),
            scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
            normalise=draw(st.booleans()),
        )
    return TransformerDims(**fields)


def graphs_of(model: Model) -> Iterator[Graph]:
    yield model.preamble
    yield from model.blocks.values()


def matrix_elements(model: Model, top_k_share: float) -> float:
    """Elements of weights that a token meets in a contraction; of experts, its share."""
    total = 0.0
    for segment in model.segments:
        graph = model.blocks[segment.block]
        for op in graph.ops:
            if TABLE[op.kind].work == "contraction":
                elements = model.parameters[
                    dict(zip(graph.parameters, segment.parameters, strict=True))[op.operands[1]]
                ].elements
                total += elements * (top_k_share if op.kind == "grouped_linear" else 1)
    return total


@settings(max_examples=60)
@given(dims=any_dims())
def test_any_dims_make_a_model(dims: TransformerDims) -> None:
    """Well formed, legal under data parallelism, 2 FLOPs per weight that a token meets."""
    model = transformer(dims)
    model.check()
    assert len(model.segments) == dims.layers + 2
    for graph in graphs_of(model):
        types = data_parallel_types(graph)
        for op in graph.ops:
            assert not list(illegal_axes(op, types.ops[op.name], graph.values, ["dp"])), op.name
    share = dims.experts.top_k / dims.experts.count if dims.experts else 1.0
    tokens = {"b": 2, "s": 12}
    flops = flops_by_class(model, expert_binding(model, tokens))["contraction"]
    assert flops == pytest.approx(2 * 24 * matrix_elements(model, share))
    assert expert_binding(dims, tokens) == expert_binding(model, tokens)


# --- what repeats --------------------------------------------------------------------------------


def test_layers_alternate() -> None:
    """gpt-oss alternates windows; DeepSeek-V3 has 3 dense layers; experts in every second layer."""
    oss = transformers.AutoConfig.for_model("gpt_oss").to_dict()
    assert dims_of_config(oss).windows == (128, None)
    blocks = [s.block for s in transformer(dims_of_config(oss)).segments]
    assert blocks[1:5] == ["Window128ExpertLayer", "ExpertLayer"] * 2
    deep = [s.block for s in transformer(dims_of_config(preset_config("deepseek-v3"))).segments]
    assert Counter(deep) == {"Embedding": 1, "DecoderLayer": 3, "ExpertLayer": 58, "Head": 1}
    every = Experts(count=4, top_k=1, ffn=8, every=2)
    blocks = [s.block for s in transformer(TransformerDims(**SMALL, experts=every)).segments]
    assert blocks[1:-1] == ["DecoderLayer", "ExpertLayer", "DecoderLayer"]


def test_depth_adds_segments_only() -> None:
    shallow, deep = (transformer(TransformerDims(**SMALL | {"layers": n})) for n in (2, 1000))
    assert deep.blocks == shallow.blocks
    assert len(deep.segments) == 1002
    assert deep.elements - shallow.elements == 998 * sum(
        deep.parameters[name].elements for name in deep.segments[1].parameters
    )


def test_further_tokens_are_part_of_the_head() -> None:
    """One activation crosses every cut; the head reads the embedding and its own layers."""
    dims = TransformerDims(**SMALL, mtp_layers=2)
    head = transformer(dims).segments[-1]
    assert [name for name in head.inputs if name.startswith("hidden")] == ["hidden_3"]
    assert "model.embed_tokens.weight" in head.parameters
    assert {n.split(".")[2] for n in head.parameters if ".layers." in n} == {"3", "4"}


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers=0), r"layers is 0: expected a whole number of at least 1"),
        (dict(hidden=1.5), r"hidden is 1\.5"),
        (dict(hidden=30), r"head_dim is 0: hidden 30 is no multiple of 4 heads"),
        (dict(kv_heads=3), r"kv_heads is 3: expected a divisor of the 4 heads"),
        (dict(head_dim=7), r"head_dim is 7: rotary positions need an even one"),
        (dict(norm="batch_norm"), r"norm is 'batch_norm': expected one of layer_norm, rms_norm"),
        (dict(positions="learned"), r"max_positions is 0: learned positions need rows"),
        (dict(fused_qkv=True), r"kv_heads is 2: fused_qkv needs as many as the 4 heads"),
        (dict(dropout=True), r"dropout is True: expected a probability"),
        (dict(windows=()), r"windows is \(\)"),
        (dict(latent=LATENT), r"latent attention has keys for every head"),
    ],
)
def test_bad_dims(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        TransformerDims(**SMALL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(count=1), r"count is 1: expected at least 2"),
        (dict(top_k=9), r"top_k is 9: a token cannot take more than 8 experts"),
        (dict(every=0), r"every is 0"),
        (dict(scoring="hash"), r"scoring is 'hash': expected one of softmax, sigmoid"),
    ],
)
def test_bad_experts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Experts(**dict(count=8, top_k=2, ffn=8) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mamba"), r"model_type is 'mamba', expected one of bloom"),
        (dict(model_type=None), r"model_type is None"),
        (dict(hidden_size=None), r"\(llama\): 'hidden_size' is missing"),
        (dict(vocab_size="many"), r"\(llama\): vocab_size is 'many', expected a whole number"),
        (dict(hidden_act="mish"), r"hidden_act is 'mish', expected one of silu"),
        (dict(mlp_bias=True), r"mlp_bias is True and attention_bias is false"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        dims_of_config(preset_config("llama-2-7b") | change)
    assert "\n" not in str(caught.value)


def test_transformer_takes_dims_only() -> None:
    with pytest.raises(InvalidInput, match="got dict, expected TransformerDims"):
        transformer(SMALL)  # type: ignore[arg-type]
