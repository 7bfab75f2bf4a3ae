"""Emitted programs compute what the model computes: loss and every gradient, in float64.

One start of the ranks per model serves all of its layouts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.backends.parity import verify_layouts, verify_plan

pytestmark = pytest.mark.slow

SHAPES = [
    "tp=2",
    "dp=2",
    "dp=2,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3",
    "tp=2,dp=2",
    "tp=2,dp=2,zero=3",
    "pp=2",
    "pp=2,tp=2",
    "pp=4,stages=1-2-1-2",
    "dp=3,zero=3",
    "pp=3",
    "tp=2,recompute=selective",
    "pp=2,dp=2,zero=3,recompute=full",
    "pp=2,schedule=gpipe",
]


def config(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def check(model: str, layouts: list[str], dtype: str = "float64") -> None:
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    for layout, result in zip(layouts, verify_layouts(model, layouts, dtype=dtype), strict=True):
        assert "error" not in result, (layout, result["error"])
        worst = result["worst_gradient"]
        assert worst["relative_error"] <= tolerance, (layout, worst)
        single, sharded = result["loss"]["single"], result["loss"]["sharded"]
        assert abs(single - sharded) <= tolerance * abs(single), (layout, result["loss"])
        assert result["equal"], layout


def test_llama_with_two_key_value_heads(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    check(model, [*SHAPES, "tp=4", "tp=3", "tp=4,dp=2,zero=3"])


def test_gpt2_with_tied_embeddings_and_fused_qkv(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="gpt2", n_embd=48, n_layer=6, n_head=12, vocab_size=96,
        n_positions=64,
    )  # fmt: skip
    check(model, [*SHAPES, "tp=4", "tp=3"])


def test_a_plain_decoder() -> None:
    check("parity_models:decoder", [*SHAPES, "tp=4"])


def test_a_plain_mlp() -> None:
    check("parity_models:regressor", ["tp=2", "tp=3", "dp=2,zero=3", "dp=3", "pp=2", "pp=2,tp=2"])


def test_a_vit_of_transformers() -> None:
    check("parity_models:vit", ["tp=2", "dp=2,zero=3", "tp=2,dp=2,zero=1"])


def test_a_summed_loss_and_unused_parameters() -> None:
    check("parity_models:summed", ["tp=2", "tp=3"])


@pytest.mark.parametrize("model", ["outside_skips", "one_level"])
def test_residuals_outside_of_layers(model: str) -> None:
    check(f"parity_models:{model}", ["tp=2", "dp=2,zero=3", "pp=2"])


def test_pins_in_a_model() -> None:
    check("parity_models:pinned", ["pp=2,tp=2", "pp=3", "pp=2,tp=4"])


@pytest.mark.parametrize("model", ["qwen3-8b", "mistral-7b", "gemma-2-9b"])
def test_families(model: str) -> None:
    check(model, ["tp=2,dp=2,zero=3", "pp=2,tp=2"])


def test_float32() -> None:
    check("llama-3.1-8b", ["tp=2,dp=2,zero=3", "pp=2,tp=2"], "float32")


def test_a_plan_file_scaled_down(tmp_path: Path) -> None:
    """The types of a plan for 64 GPUs, run on 8 ranks: stages, sub-axes, ZeRO and recomputation
    are those of the plan."""
    import shardwright as sw

    work = sw.Workload(global_batch=64, seq_len=8192)
    plan = sw.plan("llama-3.1-8b", "h100-sxm:8", work, fix="pp=4,tp=8,recompute=full")
    plan.save(tmp_path / "plan.json")
    result = verify_plan(sw.Plan.load(tmp_path / "plan.json"))
    assert result["equal"], result
    assert result["ranks"] == 8
