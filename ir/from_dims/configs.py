"""Dimensions from Hugging Face configs, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InvalidInput
from .dims import Experts, LatentAttention, TransformerDims

Fields = dict[str, Any]
"""Arguments of TransformerDims."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


class _Config:
    """A config that says what it misses."""

    def __init__(self, data: Mapping[str, Any], kind: str) -> None:
        self.data, self.kind = data, kind

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the names that has a value (a config and its aliases)."""
        return next((v for n in names if (v := self.data.get(n)) is not None), default)

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number; raises InvalidInput where it is missing or none."""
        value = self.get(*names, default=default)
        if value is None:
            raise InvalidInput(
                f"model config ({self.kind}): {names[0]!r} is missing; expected a whole number"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(
                f"model config ({self.kind}): {names[0]} is {value!r}, expected a whole number"
            )
        return value

    def activation(self, *names: str, default: str) -> str:
        name = self.get(*names, default=default)
        if name not in _ACTIVATIONS:
            raise InvalidInput(
                f"model config ({self.kind}): {names[0]} is {name!r}, expected one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer in turn; what `layer_types` says, else one for all."""
        window = self.get("sliding_window")
        if window is None or self.get("use_sliding_window") is False:
            return (None,)
        size = self.size("sliding_window")
        types: Sequence[str] = self.get("layer_types", default=())
        if not types:
            whole = self.size("max_window_layers", default=0)
            if not whole:
                return (size,)
            types = ["full_attention"] * whole
            types += ["sliding_attention"] * (self.size("num_hidden_layers") - whole)
        if unknown := set(types) - {"full_attention", "sliding_attention"}:
            raise InvalidInput(
                f"model config ({self.kind}): layer_types has {min(unknown)!r}, expected "
                "full_attention or sliding_attention"
            )
        return _period([size if t == "sliding_attention" else None for t in types])


def _period(values: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shortest prefix that gives all when it is repeated."""
    for length in range(1, len(values) + 1):
        if all(v == values[i % length] for i, v in enumerate(values)):
            return tuple(values[:length])
    return tuple(values)


def dims_of_config(config: Mapping[str, Any]) -> TransformerDims:
    """The dimensions of a Hugging Face config, given as the contents of its config.json.

    Knows llama, mistral, qwen2, qwen3, gpt2, bloom, mixtral, qwen3_moe, deepseek_v2, deepseek_v3
    and gpt_oss. As in transformers: modules that predict further tokens (DeepSeek-V3's
    num_nextn_predict_layers) are not part of the model, so set `mtp_layers` where they are trained.
    Left out: the attention sinks of gpt_oss (one number per head) and the scaling of rotary
    tables.

    Raises InvalidInput for an unknown model_type and for a missing or unfit size.
    """
    kind = config.get("model_type")
    if kind not in _READERS:
        raise InvalidInput(
            f"model config: model_type is {kind!r}, expected one of {', '.join(sorted(_READERS))}"
        )
    return TransformerDims(**_READERS[kind](_Config(config, kind)))


def _llama(c: _Config) -> Fields:
    attention = bool(c.get("attention_bias", default=False))
    if not attention and c.get("mlp_bias"):
        raise InvalidInput(
            f"model config ({c.kind}): mlp_bias is {c.get('mlp_bias')} and attention_bias is "
            "false; expected biases on both, on attention alone, or on none"
        )
    theta = c.get("rope_theta", default=(c.get("rope_parameters") or {}).get("rope_theta", 1e4))
    return dict(
        layers=c.size("num_hidden_layers"),
        hidden=c.size("hidden_size"),
        heads=c.size("num_attention_heads"),
        kv_heads=c.size("num_key_value_heads", default=c.size("num_attention_heads")),
        head_dim=c.size("head_dim", default=0),
        ffn=c.size("intermediate_size"),
        vocab=c.size("vocab_size"),
        activation=c.activation("hidden_act", default="silu"),
        bias=attention and bool(c.get("mlp_bias", default=False)),
        attention_bias="all" if attention else "none",
        max_positions=c.size("max_position_embeddings", default=0),
        rotary_base=float(theta),
        tied=bool(c.get("tie_word_embeddings", default=False)),
        attention_dropout=float(c.get("attention_dropout", default=0.0)),
        norm_eps=float(c.get("rms_norm_eps", default=1e-6)),
    )


def _windowed(c: _Config) -> Fields:
    return _llama(c) | dict(windows=c.windows())


def _qwen2(c: _Config) -> Fields:
    window = c.get("use_sliding_window", default=False)
    fields = _windowed(c) if window else _llama(c)
    return fields | dict(attention_bias="qkv")


def _qwen3(c: _Config) -> Fields:
    window = c.get("use_sliding_window", default=False)
    fields = _windowed(c) if window else _llama(c)
    head_dim = c.size("head_dim", default=128)  # transformers' default, whatever hidden / heads is
    return fields | dict(head_dim=head_dim, qk_norm=True)


def _mixtral(c: _Config) -> Fields:
    experts = Experts(
        count=c.size("num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        ffn=c.size("intermediate_size"),
    )
    return _windowed(c) | dict(experts=experts)


def _qwen3_moe(c: _Config) -> Fields:
    dense = c.get("mlp_only_layers", default=[])
    if list(dense) != list(range(len(dense))):
        raise InvalidInput(
            f"model config ({c.kind}): mlp_only_layers is {dense}, expected the first layers "
            "without a gap"
        )
    experts = Experts(
        count=c.size("num_experts", "num_local_experts"),
        top_k=c.size("num_experts_per_tok"),
        ffn=c.size("moe_intermediate_size"),
        dense_layers=len(dense),
        every=c.size("decoder_sparse_step", default=1),
        normalise=bool(c.get("norm_topk_prob", default=False)),
    )
    head_dim = c.size("head_dim", default=c.size("hidden_size") // c.size("num_attention_heads"))
    return _qwen3(c) | dict(head_dim=head_dim, experts=experts)


def _deepseek(c: _Config) -> Fields:
    latent = LatentAttention(
        q_rank=c.size("q_lora_rank", default=0),
        kv_rank=c.size("kv_lora_rank"),
        nope_dim=c.size("qk_nope_head_dim"),
        rope_dim=c.size("qk_rope_head_dim"),
        v_dim=c.size("v_head_dim"),
    )
    third = c.kind == "deepseek_v3"
    experts = Experts(
        count=c.size("n_routed_experts"),
        top_k=c.size("num_experts_per_tok"),
        ffn=c.size("moe_intermediate_size"),
        shared=c.size("n_shared_experts", default=0),
        dense_layers=c.size("first_k_dense_replace", default=0),
        every=c.size("moe_layer_freq", default=1),
        scoring="sigmoid" if third else "softmax",
        normalise=bool(c.get("norm_topk_prob", default=third)),
    )
    return _llama(c) | dict(head_dim=0, latent=latent, experts=experts)


def _gpt_oss(c: _Config) -> Fields:
    experts = Experts(
        count=c.size("num_local_experts"),
        top_k=c.size("num_experts_per_tok", "experts_per_token"),
        ffn=c.size("intermediate_size"),
    )
    return _windowed(c) | dict(bias=True, experts=experts, head_dim=c.size("head_dim", default=64))


def _gpt2(c: _Config) -> Fields:
    hidden = c.size("n_embd", "hidden_size")
    rates = {float(c.get(n, default=0.1)) for n in ("resid_pdrop", "embd_pdrop")}
    if len(rates) > 1:
        raise InvalidInput(
            f"model config ({c.kind}): resid_pdrop and embd_pdrop are {sorted(rates)}, expected "
            "the same dropout"
        )
    return dict(
        layers=c.size("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=c.size("n_head", "num_attention_heads"),
        ffn=c.size("n_inner", default=4 * hidden),
        vocab=c.size("vocab_size"),
        gated=False,
        norm="layer_norm",
        activation=c.activation("activation_function", default="gelu_new"),
        bias=True,
        positions="learned",
        max_positions=c.size("n_positions", "max_position_embeddings"),
        tied=bool(c.get("tie_word_embeddings", default=True)),
        fused_qkv=True,
        dropout=rates.pop(),
        attention_dropout=float(c.get("attn_pdrop", default=0.1)),
        norm_eps=float(c.get("layer_norm_epsilon", default=1e-5)),
    )


def _bloom(c: _Config) -> Fields:
    hidden = c.size("hidden_size", "n_embed")
    return dict(
        layers=c.size("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=c.size("n_head", "num_attention_heads"),
        ffn=4 * hidden,
        vocab=c.size("vocab_size"),
        gated=False,
        norm="layer_norm",
        activation="gelu",
        bias=True,
        positions="alibi",
        embedding_norm=True,
        tied=bool(c.get("tie_word_embeddings", default=True)),
        fused_qkv=True,
        dropout=float(c.get("hidden_dropout", default=0.0)),
        attention_dropout=float(c.get("attention_dropout", default=0.0)),
        norm_eps=float(c.get("layer_norm_epsilon", default=1e-5)),
    )


_READERS: dict[str, Callable[[_Config], Fields]] = {
    "llama": _llama,
    "mistral": _windowed,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
}
