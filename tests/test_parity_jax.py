"""Emitted JAX programs compute what the model computes, of torch or of JAX: loss and every
gradient, in float64 to 1e-10.

One process with eight host devices serves all layouts of a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax_models
import pytest

from shardwright.backends.parity import Function, verify_layouts

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

EIGHT = [
    "tp=8",
    "dp=8",
    "tp=2,dp=4",
    "tp=2,dp=4,zero=1",
    "tp=4,dp=2,zero=2",
    "tp=2,dp=4,zero=3",
    "dp=8,zero=2,micro_batch=1",
    "tp=2,dp=2,zero=3,recompute=selective",
    "tp=2,dp=2,zero=2,recompute=full",
]
"""Products on up to eight devices, every ZeRO stage among them; two microbatches everywhere."""


def config(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def check(model: Any, layouts: list[str], dtype: str = "float64") -> None:
    limit = {"float64": 1e-10, "float32": 1e-5}[dtype]
    results = verify_layouts(model, layouts, backend="jax", dtype=dtype)
    for layout, result in zip(layouts, results, strict=True):
        assert "error" not in result, (layout, result["error"])
        assert result["worst_gradient"]["relative_error"] <= limit, (layout, result)
        single, sharded = result["loss"]["single"], result["loss"]["sharded"]
        assert abs(single - sharded) <= limit * abs(single), (layout, result["loss"])
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
    check("parity_models:regressor", ["dp=8,zero=1", "tp=2,dp=4,zero=2"])


def test_a_vit_of_transformers() -> None:
    check("parity_models:vit", ["tp=4", "dp=4,zero=2", "dp=2,zero=3", "tp=2,dp=4,zero=1"])


@pytest.mark.parametrize("name", ["mlp", "linen_llama", "equinox_gpt", "linen_vit"])
def test_functions_on_eight_devices(name: str) -> None:
    """A plain MLP, a flax Llama, an equinox GPT with tied embeddings, a flax ViT with
    convolution; those that have four heads are split over no more."""
    layouts = [each for each in EIGHT if name == "mlp" or each != "tp=8"]
    check(Function(*getattr(jax_models, name)()), layouts)


@pytest.mark.parametrize("name", ["mlp", "linen_scan", "equinox_gpt"])
def test_functions_in_float32(name: str) -> None:
    check(Function(*getattr(jax_models, name)()), ["tp=2,dp=4,zero=1", "dp=2,zero=3"], "float32")


def test_a_llama_of_torch_in_float32(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    check(model, ["tp=2,dp=2,zero=2", "tp=4"], "float32")
