"""What the `arch` column says of a model beyond its sizes, and the dimensions of a row's model.

Sizes come from the row; what a family of models has in common (norm, bias, positions, ranks of
latent attention) from the published configuration that each entry names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardwright import InvalidInput
from shardwright.ir.from_dims import Experts, LatentAttention, TransformerDims

from .rows import Run

# Megatron-LM's GPT: learned positions, biases, tied embeddings, one linear layer for queries, keys
# and values; dropout of 0.1 is the default of its arguments
_GPT: dict[str, Any] = dict(
    norm="layer_norm", activation="gelu", positions="learned", bias=True, tied=True, fused_qkv=True,
    dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
_LLAMA: dict[str, Any] = dict(norm="rms_norm", activation="silu", positions="rotary")
# config.json of deepseek-ai/DeepSeek-V2, deepseek-ai/DeepSeek-V3 and moonshotai/Kimi-K2-Base
_MLA = LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt": _GPT,
    # bigscience train/tr11-176B-ml: --position-embedding-type alibi --embed-layernorm
    "gpt(alibi)": {**_GPT, "positions": "alibi", "embedding_norm": True},
    # llm-foundry scripts/train/benchmarking/README.md: the printed numbers of parameters are those
    # of learned positions (max_seq_len of them) and all biases, whatever else a label says
    "mpt": {**_GPT, "dropout": 0.0, "attention_dropout": 0.0},
    "llama": _LLAMA,
    # InternLM-7B's config.json: Llama with `bias: true`, on the four projections of attention
    "llama(internlm)": {**_LLAMA, "attention_bias": "all"},
    "qwen3-moe": {**_LLAMA, "qk_norm": True},
    # openai/gpt-oss-120b: attention_bias; the window comes from the row
    "gpt-oss": {**_LLAMA, "attention_bias": "all"},
    "deepseek-v2": {**_LLAMA, "latent": _MLA},
    "deepseek-v3": {**_LLAMA, "latent": _MLA},
    "kimi-k2": {**_LLAMA, "latent": _MLA},
}  # fmt: skip
SIGMOID_ROUTERS = ("deepseek-v3", "kimi-k2")
"""Families whose gates are sigmoids (arXiv:2412.19437, section 2.1.2); the others use softmax."""


def dims_of(run: Run) -> TransformerDims:
    """Dimensions of a row's model; raises InvalidInput where the row does not say enough."""
    text = run.arch.lower()
    family = max((key for key in FAMILIES if text.startswith(key)), key=len, default=None)
    if family is None:
        raise InvalidInput(f"arch is {run.arch!r}, which is no known family")
    for name in ("layers", "hidden", "heads", "vocab", "seq"):
        if getattr(run, name) is None:
            raise InvalidInput(f"{name} is empty")
    assert run.layers and run.hidden and run.heads and run.vocab and run.seq
    given = dict(FAMILIES[family])
    kv_heads = run.kv_heads or run.heads
    if given.get("fused_qkv") and kv_heads != run.heads:
        given["fused_qkv"] = False
    if window := re.search(r"sliding window (\d+)", text):
        given["windows"] = (int(window[1]), None)  # "alternating", the first layer with it
    if given["positions"] == "learned":
        given["max_positions"] = run.seq
    gated = run.gated_mlp if run.gated_mlp is not None else given["activation"] == "silu"
    return TransformerDims(
        layers=run.layers,
        hidden=run.hidden,
        heads=run.heads,
        kv_heads=kv_heads,
        head_dim=run.head_dim or 0,
        ffn=run.ffn or 4 * run.hidden,
        vocab=run.vocab,
        gated=gated,
        experts=_experts(run, family, text),
        mtp_layers=int(bool(re.search(r"\bmtp\b", text))),
        **given,
    )


def _experts(run: Run, family: str, text: str) -> Experts | None:
    if not run.n_experts:
        return None
    if not (run.top_k and run.moe_ffn):
        raise InvalidInput(f"n_experts is {run.n_experts}, but top_k or moe_ffn is empty")
    dense = re.search(r"(\d+) dense layer", text)
    shared = re.search(r"(\d+) shared expert", text)
    return Experts(
        count=run.n_experts,
        top_k=run.top_k,
        ffn=run.moe_ffn,
        dense_layers=int(dense[1]) if dense else 0,
        shared=int(shared[1]) if shared else 0,
        scoring="sigmoid" if family in SIGMOID_ROUTERS else "softmax",
    )
