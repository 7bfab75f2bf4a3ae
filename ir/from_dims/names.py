"""What modules are called: as in Hugging Face's GPT-2 (fused projections) and in its Llama."""

from __future__ import annotations

from dataclasses import dataclass

from .dims import TransformerDims


@dataclass(frozen=True, slots=True)
class Names:
    """Module paths; those of a layer are relative to it. `weight_io`: linear layers of the blocks
    store [in, out] rather than [out, in]."""

    tokens: str
    positions: str
    embedding_norm: str
    embedding_dropout: str
    layers: str
    norms: tuple[str, str]
    attention: str
    output: str
    up: str
    down: str
    final_norm: str
    weight_io: bool


LLAMA = Names(
    tokens="model.embed_tokens",
    positions="model.embed_positions",
    embedding_norm="model.embed_layernorm",
    embedding_dropout="model.dropout",
    layers="model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    output="o_proj",
    up="up_proj",
    down="down_proj",
    final_norm="model.norm",
    weight_io=False,
)
GPT = Names(
    tokens="transformer.wte",
    positions="transformer.wpe",
    embedding_norm="transformer.word_embeddings_layernorm",
    embedding_dropout="transformer.drop",
    layers="transformer.h",
    norms=("ln_1", "ln_2"),
    attention="attn",
    output="c_proj",
    up="c_fc",
    down="c_proj",
    final_norm="transformer.ln_f",
    weight_io=True,
)


def names_of(dims: TransformerDims) -> Names:
    """The names of a model: GPT-2's where its projections are fused."""
    return GPT if dims.fused_qkv else LLAMA
