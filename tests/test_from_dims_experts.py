"""Latent attention and mixtures of experts: what transformers computes, the laws of the ops, and
figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import graph_interpreter
import pytest
import test_laws
import torch
from graph_interpreter import run_model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from op_cases import DATA, Case, Draw, cases
from op_semantics import SEMANTICS
from simulated import int_sizes, shape_of
from test_from_dims import BF16, LATENT, SMALL, graphs_of
from torch import Tensor, nn

from shardwright.backends.emission.language import fill
from shardwright.backends.to_torch.optable import TEMPLATES
from shardwright.costmodel import block_bytes, local_sizes, op_flops, saves
from shardwright.ir import (
    Graph,
    InvalidInput,
    Mesh,
    Model,
    S,
    UnsupportedOp,
    collective,
    signatures,
)
from shardwright.ir.from_dims import (
    Experts,
    TransformerDims,
    dims_of_config,
    expert_binding,
    transformer,
)
from shardwright.ir.from_torch import Widen, preset_config
from shardwright.ir.graph import bind
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import data_parallel_types

transformers = pytest.importorskip("transformers")

# --- what transformers computes is the oracle ---------------------------------------------------

HF_SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PARITY: dict[str, dict[str, Any]] = {
    "mixtral": HF_SMALL | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": HF_SMALL | dict(
        head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
        norm_topk_prob=False, decoder_sparse_step=2),
    "deepseek_v3": HF_SMALL | dict(
        num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=8, num_experts_per_tok=3, n_group=1,
        topk_group=1, moe_intermediate_size=20, n_shared_experts=2, first_k_dense_replace=1,
        routed_scaling_factor=1.0, rope_interleave=False),
    "bloom": dict(hidden_size=32, n_layer=3, n_head=4, vocab_size=64),
}  # fmt: skip


def module_of(kind: str, **changes: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, **(PARITY[kind] | changes))
    config.use_cache, config._experts_implementation = False, "eager"
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def parameters_of(module: nn.Module, kind: str) -> dict[str, Tensor]:
    """Parameters under our names; BLOOM's fused projections are stored (n three d) h."""
    found = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    if kind != "bloom":
        return found
    renamed: dict[str, Tensor] = {}
    heads = module.config.n_head
    for name, p in found.items():
        for old, new in {
            "word_embeddings.": "wte.", "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2", "self_attention.query_key_value": "attn.c_attn",
            "self_attention.dense": "attn.c_proj", "mlp.dense_h_to_4h": "mlp.c_fc",
            "mlp.dense_4h_to_h": "mlp.c_proj",
        }.items():  # fmt: skip
            name = name.replace(old, new)
        if "c_attn" in name:
            p = p.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if p.dim() == 2 and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
            p = p.T
        renamed[name] = p
    return renamed


@pytest.mark.parametrize("kind", PARITY)
def test_built_computes_what_transformers_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in float64, with slots for every token that may come."""
    module = module_of(kind)
    ids = torch.randint(0, 64, (3, 11))
    with Widen():
        expected = module(input_ids=ids, labels=ids).loss
        expected.backward()
    read_off = graph_interpreter.binding_of
    monkeypatch.setattr(
        graph_interpreter, "binding_of", lambda *given: read_off(*given) | {"c": ids.shape[1]}
    )
    model = transformer(dims_of_config(module.config.to_dict()))
    parameters = parameters_of(module, kind)
    assert {n: p.shape for n, p in model.parameters.items()} == {
        n: tuple(p.shape) for n, p in parameters.items()
    }
    total, count = run_model(model, parameters, {"input_ids": ids, "labels": ids})
    # transformers keeps rotary frequencies in float32
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-8)
    if kind == "bloom":
        return  # its parameters are views of the module's
    (total / count).backward()
    for name, p in module.named_parameters():
        mine = parameters[name].grad
        assert mine is not None and p.grad is not None, name
        assert float((mine - p.grad).norm()) <= 1e-7 * float(p.grad.norm()), name


def test_slots_that_are_too_few_leave_tokens_out() -> None:
    """The dispatch of 5 tokens to an expert with 3 slots keeps the first 3."""
    tokens = torch.arange(5).double()[None, :, None] + 1
    chosen = torch.ones(1, 5, 1, dtype=torch.bool)
    (slots,) = SEMANTICS["moe_dispatch"]([tokens, chosen], {}, [(1, 3, 1)])
    assert slots.flatten().tolist() == [1, 2, 3]
    back = SEMANTICS["moe_combine"]([slots, chosen.double() * 2, chosen], {}, [(1, 5, 1)])
    assert back[0].flatten().tolist() == [2, 4, 6, 0, 0]


@pytest.mark.parametrize(
    ("name", "missing"),
    [("mixtral-8x7b", 0), ("qwen3-30b-a3b", 0), ("deepseek-v3", 0), ("gpt3-175b", 0),
     ("gpt_oss", 36 * 64), ("bloom", 0)],
)  # fmt: skip
def test_parameter_counts(name: str, missing: int) -> None:
    """As in transformers on meta, but for the attention sinks of gpt_oss."""
    sizes = {"gpt_oss": {"model_type": "gpt_oss"}, "bloom": {"model_type": "bloom", "n_layer": 70,
             "n_head": 112, "hidden_size": 14336}}.get(name) or preset_config(name)  # fmt: skip
    given = {key: value for key, value in sizes.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(sizes["model_type"], **given)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    model = transformer(dims_of_config(config.to_dict()))
    assert model.elements == sum(p.numel() for p in module.parameters()) - missing


def test_known_sizes() -> None:
    """From the papers: BLOOM's 176,247,271,424 (arXiv:2211.05100), GPT-3's 174.6 billion,
    DeepSeek-V3's 671 and, with one module for further tokens, 685 billion with its own copies of
    embedding and head (arXiv:2412.19437; the copies are 2 x 129280 x 7168)."""
    bloom = dict(model_type="bloom", n_layer=70, n_head=112, hidden_size=14336, vocab_size=250880)
    assert transformer(dims_of_config(bloom)).elements == 176_247_271_424
    gpt3 = transformer(TransformerDims.gpt(96, 12288, 96, 50257, 2048))
    assert round(gpt3.elements / 1e9, 1) == 174.6
    dims = dims_of_config(preset_config("deepseek-v3"))
    further = transformer(replace(dims, mtp_layers=1))
    assert round(transformer(dims).elements / 1e9) == 671
    assert round((further.elements + 2 * 129280 * 7168) / 1e9) in (684, 685)


# --- laws ---------------------------------------------------------------------------------------


def moe_model() -> Model:
    return transformer(
        TransformerDims(
            layers=2, hidden=16, heads=4, ffn=24, vocab=24, latent=LATENT, bias=True,
            experts=Experts(count=4, top_k=2, ffn=12, shared=1, dense_layers=1), mtp_layers=1,
        )
    )  # fmt: skip


def test_ops_of_a_mixture_keep_the_law() -> None:
    """Every op of a model with latent attention, experts and a module for further tokens, in every
    signature."""
    torch.manual_seed(0)
    binding = {"b": 2, "s": 2, "c": 2}
    seen, split = set(), 0
    model = moe_model()
    for graph in graphs_of(model):
        values = {n: replace(v, dims=int_sizes(v.dims, binding)) for n, v in graph.values.items()}
        for op in graph.ops:
            sizes = {factor: bind(size, binding) for factor, size in op.sizes.items()}
            shapes = [shape_of(int_sizes(values[name].dims, {})) for name in op.operands]
            operands = []
            for k, shape in enumerate(shapes):
                made = DATA.get((op.kind, k))
                x = made(Draw(None, 2), shape, shapes[0]) if made else torch.randn(shape)
                operands.append(x.double() if x.is_floating_point() else x)
            case = Case(replace(op, sizes=sizes), values, tuple(operands))
            if (key := (op.kind, str(case), op.kind == "sum" and op.name)) not in seen:
                seen.add(key)
                split += test_laws.check_all(case, Mesh.of(a=2))
    assert split > 150


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("moe_dispatch", "b s h, b s e -> e (b c) h; c!"),  # places are counted from the start
        ("moe_combine", "e (b c) h, b s e, b s e -> b s h; c!"),
        ("moe_combine", "e (b c) h, b s e, b s e -> b s h; s!"),
        ("top_k", "... e -> ... e, ... e"),
    ],
)
def test_wrong_rule_of_a_mixture_is_caught(
    kind: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, kind, replace(TABLE[kind], rules=(rule,)))

    @settings(test_laws.examples(60), derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def law(data: Any) -> None:
        test_laws.check_all(data.draw(cases(kind, 2)), Mesh.of(a=2))

    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        law()


def test_expert_parallelism_is_a_conversion() -> None:
    """Slots split by sequence (dp) become slots split by expert (ep) by an all-to-all; experts need
    the tokens, and what they return is a partial sum over them."""
    graph = moe_model().blocks["ExpertLayer"]
    by_kind = {op.kind: op for op in graph.ops}
    dispatch = data_parallel_types(graph).ops[by_kind["moe_dispatch"].name]
    assert dispatch.results[0]["dp"] == S(1, 0)

    def along(kind: str, factor: str) -> str:
        op = by_kind[kind]
        return next(str(s) for s in signatures(op, graph.values) if s.factor == factor)

    assert along("moe_dispatch", "e") == "R, S(2) -> S(0)"
    assert along("grouped_linear", "e") == "S(0), S(0) -> S(0)"
    assert along("moe_combine", "e") == "S(0), S(2), S(2) -> P"
    assert collective(S(1, 0), S(0)) == "all_to_all"


# --- figures worked out by hand -----------------------------------------------------------------


def test_what_a_mixture_costs_and_keeps() -> None:
    """Mixtral-like: 3 products of every token with top_k experts; and bytes kept per token."""
    hidden, ffn, count, top_k, b, s = 64, 96, 8, 2, 2, 32
    experts = Experts(count=count, top_k=top_k, ffn=ffn)
    dims = TransformerDims(layers=1, hidden=hidden, heads=4, ffn=1, vocab=64, experts=experts)
    graph = transformer(dims).blocks["ExpertLayer"]
    binding = expert_binding(dims, {"b": b, "s": s})
    assert binding["c"] == s * top_k // count
    grouped = [op for op in graph.ops if op.kind == "grouped_linear"]
    flops = sum(op_flops(op, local_sizes(op, binding)) for op in grouped)
    assert flops == 2 * 3 * hidden * ffn * b * s * top_k

    kept = saves(grouped[0], graph.values).operands
    dispatched = next(op for op in graph.ops if op.kind == "moe_dispatch")
    assert grouped[0].operands[kept[0]] == dispatched.results[0]

    def kept_by(graph: Graph) -> int:
        types = data_parallel_types(graph)
        return block_bytes(graph, types, Mesh.of(dp=1), binding, BF16).kept

    dense = transformer(replace(dims, experts=None, ffn=top_k * ffn)).blocks["DecoderLayer"]
    # beside a dense MLP of the same width: slots in and out of the experts in bf16; of the router
    # scores, chosen scores and their sum in float32, gates in bf16, the choice in bytes
    router = count * (4 + 4 + 2 + 1) + 4
    assert kept_by(graph) - kept_by(dense) == b * s * (2 * top_k * hidden * 2 + router)


def test_expert_binding() -> None:
    dims = TransformerDims(**SMALL, experts=Experts(count=8, top_k=3, ffn=8))
    assert expert_binding(dims, {"b": 1, "s": 64}) == {"b": 1, "s": 64, "c": 24}
    assert expert_binding(dims, {"b": 1, "s": 3})["c"] == 2  # rounded up
    assert expert_binding(TransformerDims(**SMALL), {"b": 1, "s": 3}) == {"b": 1, "s": 3}
    with pytest.raises(InvalidInput, match="'s' is not bound"):
        expert_binding(dims, {"b": 1})


@pytest.mark.parametrize("kind", ["top_k", "moe_dispatch", "moe_combine"])
def test_mixtures_are_not_emitted(kind: str) -> None:
    with pytest.raises(UnsupportedOp, match=f"'{kind}': the torch backend does not write mixtures"):
        fill(TEMPLATES[kind], ["x"], {})
