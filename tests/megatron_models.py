"""The models of the Megatron oracle: GPTModel of each family, small, from the local layer spec.

To be imported after `megatron_cpu`. What the local spec refuses without CUDA kernels, though it is
a matter of arithmetic alone, is put in here: norms with gamma less one, the router's product, and
attention over heads of two sizes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

HIDDEN, HEADS, FFN = 64, 8, 96

_MIXTURE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
"""DeepSeek's: the first layer is dense, experts that all tokens share, a bias of the choice."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 16},
    "gemma": {"layernorm_zero_centered_gamma": True, "activation_func": torch.nn.functional.gelu},
    "gpt2": {
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "num_query_groups": HEADS,
    },
    "moe": {"num_moe_experts": 4, "moe_router_topk": 2},
    "glm": {"num_query_groups": 2, "add_qkv_bias": True},
    "deepseek": {
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "rope_type": "rope",
        "qk_layernorm": True,
    },
}


def config_of(said: argparse.Namespace) -> Any:
    """The TransformerConfig of the worker's arguments."""
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    dtype = getattr(torch, said.dtype)
    options: dict[str, Any] = {
        "num_query_groups": said.groups,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        **FAMILIES[said.family],
    }
    if said.family in ("glm", "deepseek"):
        options |= _MIXTURE | {"moe_layer_freq": [0, *[1] * (said.layers - 1)]}
    if "num_moe_experts" in options:
        options |= {
            "moe_grouped_gemm": said.grouped,
            "moe_token_dispatcher_type": "alltoall",
            "sequence_parallel": said.tp > 1,
        }
    latent = said.family == "deepseek"
    return (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=said.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        use_cpu_initialization=True,
        tensor_model_parallel_size=said.tp,
        pipeline_model_parallel_size=said.pp,
        virtual_pipeline_model_parallel_size=said.vpp if said.vpp > 1 else None,
        expert_model_parallel_size=said.ep,
        expert_tensor_parallel_size=said.etp or said.tp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        layernorm_epsilon=1e-6,
        **options,
    )


def make(said: argparse.Namespace) -> list[Any]:
    """The chunks of this rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    config = config_of(said)
    multiple = said.divisible * said.tp
    vocab = -(-said.vocab // multiple) * multiple
    chunks = []
    for chunk in range(said.vpp):
        virtual = chunk if said.vpp > 1 else None
        model = GPTModel(
            config,
            _spec(config, virtual),
            vocab_size=vocab,
            max_sequence_length=32,
            position_embedding_type="learned_absolute" if said.family == "gpt2" else "rope",
            share_embeddings_and_output_weights=said.tied,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
            vp_stage=virtual,
        )
        if said.family == "gemma" and model.pre_process:  # Gemma scales what it embeds
            model.embedding.register_forward_hook(lambda _, __, out: out * HIDDEN**0.5)
        for name, bias in model.named_buffers():
            if name.endswith("expert_bias"):
                bias.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        chunks.append(model.to(config.params_dtype))
    return chunks


def _spec(config: Any, virtual: int | None) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer import multi_latent_attention, torch_norm
    from megatron.core.transformer.moe import experts, moe_utils

    multi_latent_attention.HAVE_TE = False
    moe_utils.te_general_gemm = None
    experts.gg.assert_grouped_gemm_is_available = lambda: None
    torch_norm.WrappedTorchNorm.__new__ = _norm
    if config.num_moe_experts:
        block = specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization,
            vp_stage=virtual,
        )  # fmt: skip
        if config.multi_latent_attention:
            for layer in block.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = _Attention
        return block
    return specs.get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )


class _Attention(torch.nn.Module):
    """For heads whose queries and values differ in size, which the local one does not know."""

    def __init__(self, *_: Any, softmax_scale: float, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> torch.Tensor:
        heads = [one.permute(1, 2, 0, 3) for one in (q, k, v)]  # of [sequence, batch, head, size]
        made = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=self.scale
        )
        return made.permute(2, 0, 1, 3).flatten(2)


class _ZeroCentered(torch.nn.RMSNorm):
    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


def _norm(_: Any, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
    kind: Any = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
    if config.layernorm_zero_centered_gamma:
        kind = _ZeroCentered
    return kind(normalized_shape=hidden_size, eps=eps)
