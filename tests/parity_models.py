"""Plain modules for parity: what a user's own model looks like."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardwright as sw

VOCAB, WIDTH, HEADS, LENGTH = 96, 48, 12, 32


class Block(nn.Module):
    """Pre-norm attention with fused q, k, v and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Decoder(nn.Module):
    """Tokens to logits; learned positions."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def decoder() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """A decoder whose output is logits, with its loss."""
    ids = {name: torch.zeros(2, 16, dtype=torch.long) for name in ("input_ids", "labels")}
    return Decoder(), ids, token_loss


class Regressor(nn.Module):
    """An MLP without any repetition, and a mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 36)
        self.third, self.last = nn.Linear(36, 48, bias=False), nn.Linear(48, 12)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.tanh(self.second(x))
        return F.mse_loss(self.last(F.silu(self.third(x))), target)


def regressor() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rows of features; no sequence at all."""
    return Regressor(), {"x": torch.zeros(4, 24), "target": torch.zeros(4, 12)}


class Pinned(Decoder):
    """A decoder whose author knows where some tensors go."""

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = sw.annotate(self.tokens(input_ids) + self.places(places), tp="I")
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pinned() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Pins on an activation, a parameter, a module's output and stages."""
    model = Pinned()
    sw.annotate(model.head.weight, tp="S(1)")
    sw.annotate(model.blocks[5], stage=1)
    sw.annotate(model.norm, tp="I")
    return model, decoder()[1], token_loss


class Summed(Regressor):
    """A loss that is a sum over the batch: it cannot be taken apart over ranks."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return ((self.last(torch.relu(self.first(x))) - target) ** 2).sum()


def summed() -> tuple[nn.Module, dict[str, Tensor]]:
    """One microbatch, no data parallelism; tensor parallelism is fine."""
    return Summed(), {"x": torch.zeros(4, 24), "target": torch.zeros(4, 12)}


class OutsideSkips(nn.Module):
    """Two inputs; the residuals are added outside of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 24), nn.Linear(6, 24)
        layers = (nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24)) for _ in range(3))
        self.layers, self.last = nn.ModuleList(layers), nn.Linear(24, 6)

    def forward(self, x: Tensor, other: Tensor, target: Tensor) -> Tensor:
        y = self.left(x) + self.right(other)
        for layer in self.layers:
            y = y + layer(y)
        return F.mse_loss(self.last(y), target)


def outside_skips() -> tuple[nn.Module, dict[str, Tensor]]:
    """Layers that are not the whole of what is repeated."""
    return OutsideSkips(), {
        "x": torch.zeros(4, 12), "other": torch.zeros(4, 6), "target": torch.zeros(4, 6),
    }  # fmt: skip


class OneLevel(nn.Module):
    """A decoder written out at the top level, without any inner module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x)


def one_level() -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Embedding, MLP with a residual, head."""
    return OneLevel(), decoder()[1], token_loss


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """An image classifier as transformers makes it, from a config: patches by convolution."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=8, problem_type="single_label_classification",
    )  # fmt: skip
    inputs = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.zeros(2).long()}
    return ViTForImageClassification(config), inputs
