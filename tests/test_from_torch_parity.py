"""A traced model computes what the module does: loss and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_interpreter import run_model
from torch import Tensor, nn

from shardwright.ir.from_torch import Widen, trace
from shardwright.ir.graph import Model

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama-3.1-rope": (
        "LlamaConfig",
        dict(rope_parameters=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16, rope_theta=5e5)),
    ),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama-one-layer": ("LlamaConfig", dict(num_hidden_layers=1)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=12)),
    "mistral-window": ("MistralConfig", dict(sliding_window=5, head_dim=8)),
    "gemma": ("GemmaConfig", dict(head_dim=8, pad_token_id=0)),
    "gemma2": (
        "Gemma2Config",
        dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8, pad_token_id=0),
    ),
    "gpt2": (
        "GPT2Config",
        dict(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1,
             eos_token_id=2),
    ),
}  # fmt: skip


def hugging_face(name: str) -> nn.Module:
    kind, extra = CONFIGS[name]
    settings = extra if kind == "GPT2Config" else {**SMALL, **extra}
    config = getattr(transformers, kind)(**settings)
    config.use_cache = False
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def tokens(b: int = 3, s: int = 11, vocabulary: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary, (b, s))
    labels = ids.clone()
    labels[0, 3:6] = -100
    labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same(
    model: Model, module: nn.Module, inputs: Mapping[str, Tensor], reference: Callable[[], Tensor]
) -> None:
    """Loss and gradients of the interpreted model against the module's own, to 1e-10."""
    own = dict(module.named_parameters())
    assert set(model.parameters) == set(own)
    for name, parameter in model.parameters.items():
        assert parameter.shape == tuple(own[name].shape)
    with Widen():
        want = reference()
    wanted = torch.autograd.grad(want, list(own.values()))
    total, count = run_model(model, own, inputs)
    have = total / count
    found = torch.autograd.grad(have, list(own.values()))
    assert abs(float(have - want)) <= 1e-10 * abs(float(want))
    largest = max(float(g.norm()) for g in wanted)
    for name, ours, theirs in zip(own, found, wanted, strict=True):
        scale = max(float(theirs.norm()), 1e-6 * largest)
        assert float((ours - theirs).norm()) <= 1e-10 * scale, name


def perturbed(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with no parameter at a special value such as 0 or 1."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face(name: str) -> None:
    module = hugging_face(name)
    inputs = tokens()
    model = trace(module, inputs)
    module = perturbed(module)
    assert_same(model, module, inputs, lambda: module(**inputs).loss)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, h))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """No list: layers are attributes; learned positions; the usual shift written out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 32)
        self.positions = nn.Parameter(torch.randn(1, 24, 32) * 0.02)
        self.block1, self.block2 = Layer(32), Layer(32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        x = self.block2(self.block1(x))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))


def test_plain_transformer() -> None:
    torch.manual_seed(0)
    module = Plain()
    inputs = {"ids": tokens()["input_ids"]}
    model = trace(module, inputs)
    assert [s.block for s in model.segments].count("Layer") == 2
    module = perturbed(module)
    assert_same(model, module, inputs, lambda: module(**inputs))


def test_mlp_with_mse() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 5),
    )  # fmt: skip
    x, y = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model = trace(module, [x, y], loss=F.mse_loss)
    assert [v.name for v in model.inputs] == ["input", "target"]
    module = perturbed(module)
    inputs = {"input": x, "target": y}
    assert_same(model, module, inputs, lambda: F.mse_loss(module(x), y))
