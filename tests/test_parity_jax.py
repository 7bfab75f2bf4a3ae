"""Emitted JAX programs compute what the torch model computes: loss and every gradient, in float64.

One process with eight host devices serves all layouts of a model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.backends.parity import verify_layouts

pytestmark = pytest.mark.slow

LAYOUTS = [
    "tp=2",
    "tp=4",
    "dp=2",
    "dp=2,zero=1",
    "dp=2,zero=2,micro_batch=1",
    "tp=2,dp=2",
    "tp=2,dp=2,zero=3",
    "tp=4,dp=2,zero=2",
    "tp=2,recompute=selective",
    "dp=2,zero=3,recompute=full",
]


def config(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def check(model: str, layouts: list[str]) -> None:
    results = verify_layouts(model, layouts, backend="jax")
    for layout, result in zip(layouts, results, strict=True):
        assert "error" not in result, (layout, result["error"])
        assert result["worst_gradient"]["relative_error"] <= 1e-10, (layout, result)
        single, sharded = result["loss"]["single"], result["loss"]["sharded"]
        assert abs(single - sharded) <= 1e-10 * abs(single), (layout, result["loss"])
        assert result["equal"], layout


def test_llama_with_two_key_value_heads(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    check(model, LAYOUTS)


def test_gpt2_with_tied_embeddings_and_fused_qkv(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="gpt2", n_embd=48, n_layer=3, n_head=12, vocab_size=96,
        n_positions=64,
    )  # fmt: skip
    check(model, ["tp=2", "tp=4", "tp=3", "dp=2,zero=3", "tp=2,dp=2,zero=1"])


def test_a_plain_decoder_and_an_mlp() -> None:
    check("parity_models:decoder", ["tp=2,dp=2,zero=3", "tp=4"])
    check("parity_models:regressor", ["tp=2", "dp=2,zero=3"])
