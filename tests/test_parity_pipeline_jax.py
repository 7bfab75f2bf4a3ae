"""JAX pipelines compute what one device computes: loss and every gradient, in float64, to 1e-10.

The judges are the torch module, or the JAX function itself. `schedule=gpipe` with equal stages is
the single-program form, all others are a program for each stage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax_models
import pytest

from shardwright.backends.parity import Function, verify_layouts

pytestmark = pytest.mark.slow


def check(model: Any, layouts: list[str]) -> None:
    for layout, result in zip(layouts, verify_layouts(model, layouts, backend="jax"), strict=True):
        assert "error" not in result, (layout, result["error"])
        assert result["worst_gradient"]["relative_error"] <= 1e-10, (layout, result)
        single, sharded = result["loss"]["single"], result["loss"]["sharded"]
        assert abs(single - sharded) <= 1e-10 * abs(single), (layout, result["loss"])
        assert result["equal"], layout


STAGES = [
    "pp=4",
    "pp=2,tp=2",
    "pp=2,dp=2,zero=0",
    "pp=2,dp=2,zero=1",
    "pp=2,dp=2,zero=2",
    "pp=2,dp=2,zero=3",
    "pp=2,tp=2,dp=2,zero=3,recompute=selective",
    "pp=2,vpp=2",
    "pp=2,vpp=2,tp=2,dp=2,zero=2",
    "pp=2,stages=5-3",
    "pp=3,stages=4-2-2,recompute=full",
    "pp=3,stages=4-2-2,schedule=gpipe",
]
TICKS = [
    "pp=2,schedule=gpipe",
    "pp=4,schedule=gpipe",
    "pp=2,tp=2,schedule=gpipe",
    *(f"pp=2,dp=2,zero={zero},schedule=gpipe" for zero in range(4)),
    "pp=2,tp=2,dp=2,zero=3,schedule=gpipe,recompute=selective",
]


def config(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("layouts", [STAGES, TICKS], ids=["stages", "ticks"])
def test_a_llama_from_torch(layouts: list[str], tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    check(model, layouts)


def test_a_gpt2_from_torch_whose_ends_share_a_parameter(tmp_path: Path) -> None:
    model = config(
        tmp_path, model_type="gpt2", n_embd=48, n_layer=3, n_head=12, vocab_size=96,
        n_positions=64,
    )  # fmt: skip
    check(model, ["pp=2,tp=4,zero=0", "pp=2,vpp=2,dp=2,zero=2", "pp=2,tp=3,schedule=gpipe"])


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("linen_llama", ["pp=2", "pp=3,dp=2,zero=3", "pp=2,stages=2-1,tp=2"]),
        ("linen_scan", ["pp=2,tp=2,dp=2,zero=1", "pp=3,schedule=gpipe"]),
        ("equinox_gpt", ["pp=2", "pp=3,zero=1", "pp=2,dp=2,zero=2", "pp=2,vpp=2,dp=2,zero=3",
                         "pp=2,stages=2-1,tp=2,dp=2,zero=1", "pp=3,tp=2,schedule=gpipe"]),
        ("mlp", ["pp=2", "pp=4", "pp=2,dp=2,zero=3", "pp=2,schedule=gpipe"]),
    ],
)  # fmt: skip
def test_functions_of_jax(name: str, layouts: list[str]) -> None:
    check(Function(*getattr(jax_models, name)()), layouts)
