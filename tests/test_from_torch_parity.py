"""A traced model computes what the module does: loss and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import parity_models
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
    assert abs(have.item() - want.item()) <= 1e-10 * abs(want.item())
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


class ComplexRotary(nn.Module):
    """The reference code of Llama: complex numbers, sequence before heads, a dict of layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (
                nn.Linear(32, n, bias=False) for n in (32, 16, 16, 32)
            )
            self.scale = nn.Parameter(torch.ones(32))

        def norm(self, x: Tensor) -> Tensor:
            wide = x.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)

        def forward(self, x: Tensor, turn: Tensor) -> Tensor:
            b, s, _ = x.shape
            h = self.norm(x) * self.scale
            q, k, v = (f(h).view(b, s, -1, 8) for f in (self.q, self.k, self.v))
            q, k = self.rotate(q, turn), self.rotate(k, turn)
            k, v = (torch.repeat_interleave(t, 2, dim=2).transpose(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
            return x + self.o(y.transpose(1, 2).reshape(b, s, -1))

        @staticmethod
        def rotate(x: Tensor, turn: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turn[None, :, None]).flatten(3).type_as(x)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleDict({str(i): self.Layer() for i in range(4)})
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        inverse = 10000.0 ** (-torch.arange(0, 8, 2).float() / 8)
        angles = torch.outer(torch.arange(ids.shape[1]).float(), inverse)
        turn = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(ids)
        for layer in self.layers.values():
            x = layer(x, turn)
        return self.head(x)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_complex_rotary() -> None:
    torch.manual_seed(0)
    module = ComplexRotary()
    inputs = tokens()
    model = trace(module, list(inputs.values()), loss=cross_entropy)
    assert [s.block for s in model.segments] == ["Embedding", *["Layer"] * 4, "Head"]
    module = perturbed(module)
    given = {"ids": inputs["input_ids"], "labels": inputs["labels"]}
    assert_same(model, module, given, lambda: cross_entropy(module(given["ids"]), given["labels"]))


class WrittenOut(nn.Module):
    """Attention by matrix products, with a stored mask; an update in place; a tied head."""

    class Layer(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32, bias=False)
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
            self.register_buffer("mask", torch.tril(torch.ones(40, 40)).view(1, 1, 40, 40))

        def forward(self, x: Tensor) -> Tensor:
            b, s, h = x.shape
            q, k, v = (
                t.view(b, s, 4, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).split(h, 2)
            )
            scores = (q @ k.transpose(-2, -1)) * (1.0 / k.shape[-1] ** 0.5)
            scores = scores.masked_fill(self.mask[:, :, :s, :s] == 0, float("-inf"))
            y = F.dropout(F.softmax(scores, -1), 0.1, self.training) @ v
            y = self.out(y.transpose(1, 2).contiguous().view(b, s, h))
            y += x
            return y

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(64, 32), nn.Embedding(40, 32)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))
        self.head = nn.Linear(32, 64, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return F.cross_entropy(logits.view(-1, 64), labels.view(-1), ignore_index=-100)


def test_attention_written_out() -> None:
    torch.manual_seed(0)
    module = WrittenOut()
    inputs = tokens()
    given = {"ids": inputs["input_ids"], "labels": inputs["labels"]}
    model = trace(module, given)
    (attention,) = (op for op in model.blocks["Layer"].ops if op.kind == "attention")
    assert attention.attributes["causal"] and attention.attributes["dropout"] == 0.1
    module = perturbed(module)
    assert_same(model, module, given, lambda: module(**given))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up = nn.Parameter(torch.randn(32, 4, 8) / 6)
        self.down = nn.Parameter(torch.randn(4, 8, 64) / 6)

    def forward(self, ids: Tensor) -> Tensor:
        heads = torch.einsum("bsh,hnd->bnsd", self.embed(ids), self.up)
        scores = torch.einsum("bnsd,bntd->bnst", heads, heads) / 11
        mixed = torch.einsum("bnst,bntd->bnsd", scores, heads) + heads
        return torch.einsum("bnsd,ndv->bsv", mixed, self.down)


def test_einsum_and_a_summed_loss() -> None:
    torch.manual_seed(0)
    module = Einsum()
    inputs = tokens()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / 8

    model = trace(module, list(inputs.values()), loss=loss)
    module = perturbed(module)
    given = {"ids": inputs["input_ids"], "labels": inputs["labels"]}
    assert_same(model, module, given, lambda: loss(module(given["ids"]), given["labels"]))


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


def test_a_vision_transformer() -> None:
    """Patches by convolution, a token for the class before them, learned positions."""
    module, _ = parity_models.vit()
    torch.manual_seed(3)
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.randint(0, 8, (3,))}
    model = trace(module, inputs)
    assert [s.block for s in model.segments] == ["Embedding", *["ViTLayer"] * 3, "Head"]
    module = perturbed(module)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    assert_same(model, module, inputs, lambda: module(**inputs).loss)


class Convolved(nn.Module):
    """A convolution whose windows lie side by side, of uneven sides; running sums, and a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(4, 8, (1, 3), stride=(1, 3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.patch(x), 0.2).flatten(2).transpose(1, 2)
        y = y.cumsum(1) - self.out.weight.detach().sum(0)
        return self.out(y).square().mean()


class Exponential(nn.Module):
    """The family of ELU, with and without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = F.elu(y, 0.7) + F.selu(y) + F.celu(y, 0.5)  # torch's celu has 1 / alpha in float32
        return self.out(y).square().mean()


def test_exponential_units() -> None:
    module, x = Exponential(), torch.randn(3, 5, 8)
    model = trace(module, {"x": x})
    kinds = [op.kind for graph in model.blocks.values() for op in graph.ops]
    assert kinds.count("elu") == 3
    module = perturbed(module)
    assert_same(model, module, {"x": x.double()}, lambda: module(x.double()))


def test_a_convolution_of_patches_and_ops_beside_it() -> None:
    module, x = Convolved(), torch.randn(3, 4, 2, 12)
    model = trace(module, {"x": x})
    module = perturbed(module)
    assert_same(model, module, {"x": x.double()}, lambda: module(x.double()))
