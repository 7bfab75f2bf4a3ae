"""A Hugging Face config made small, with the same structure: what can run beside a test.

Kept: the kind of attention (one key head, groups, all heads), every flag, whether the hidden size
is heads × head size, whether embeddings are tied, which kinds of layers alternate. Every size that
an axis may split is a multiple of `tp`.
"""

from __future__ import annotations

from typing import Any

HEAD_SIZE = 8
_TOKENS_PER_RANK = 32
_WINDOW = 5
_POSITIONS = 64


def scale_config(config: Any, tp: int = 1, layers: int | None = None) -> Any:
    """A copy of a transformers config with small sizes; `layers` layers (4 by default)."""
    small = type(config).from_dict(config.to_dict())
    have = config.to_dict()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    wide = max(2, tp)
    new_keys = 1 if keys == 1 else wide
    group = 1 if keys == heads else 2
    new_heads = new_keys * group if keys > 1 else wide
    hidden = _hidden(config, heads, new_heads)
    layers = layers or 4
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": new_heads,
        "num_key_value_heads": new_keys,
        "head_dim": HEAD_SIZE,
        "hidden_size": hidden,
        "intermediate_size": hidden + 8 * wide,
        "vocab_size": _TOKENS_PER_RANK * wide,
        "query_pre_attn_scalar": HEAD_SIZE,
        "sliding_window": _WINDOW,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # mixtures of experts
        "moe_intermediate_size": 8 * wide,
        "num_local_experts": 2 * wide,
        "num_experts": 2 * wide,
        "n_routed_experts": 4 * wide,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": min(1, layers - 1),
        # multi-head latent attention
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": HEAD_SIZE,
        "qk_rope_head_dim": HEAD_SIZE,
        "v_head_dim": HEAD_SIZE,
    }
    names = {own: alias for alias, own in getattr(config, "attribute_map", {}).items()}
    for name, value in have.items():
        common = names.get(name, name)
        if common in sizes and value is not None:
            setattr(small, name, sizes[common])
    if have.get("layer_types"):
        small.layer_types = list(have["layer_types"])[:layers]
        small.layer_types += [have["layer_types"][-1]] * (layers - len(small.layer_types))
    if config.model_type == "gpt2":  # learned positions are a parameter
        small.n_positions = _POSITIONS
    return type(config).from_dict(small.to_dict())


def _hidden(config: Any, heads: int, new_heads: int) -> int:
    """Heads × head size where that was so; else twice as much, so that the two differ."""
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    same = size * heads == config.hidden_size
    return new_heads * HEAD_SIZE * (1 if same else 2)
