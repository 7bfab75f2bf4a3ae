"""What ZeRO keeps on a device, by XLA's own account of the compiled training step."""

from __future__ import annotations

from pathlib import Path

import jax_models
import pytest
from test_collectives_jax import compiled

from shardwright.backends.parity import Function, layout_plan
from shardwright.ir.graph import Model

pytestmark = pytest.mark.slow

DP = 8
WIDTH = 4  # bytes of float32


def llama(layers: int) -> Model:
    """Large in parameters, small in activations."""
    sizes = {"vocabulary": 64, "hidden": 128, "ffn": 384, "heads": 8, "kv_heads": 4}
    return Function(*jax_models.linen_llama(True, layers=layers, **sizes)).trace()


def test_what_is_kept_between_steps(tmp_path: Path) -> None:
    """Parameters and AdamW's two moments: whole, the moments split, and all split."""
    model = llama(4)
    layouts = [f"dp={DP},zero={zero},micro_batch=1" for zero in (0, 1, 2, 3)]
    found = compiled([layout_plan(model, each, "float32") for each in layouts], tmp_path)
    kept = [each["memory"]["arguments"] for each in found]
    whole = model.elements * WIDTH
    assert kept[0] == pytest.approx(3 * whole, rel=0.01)
    for stage in (1, 2):
        assert kept[stage] == pytest.approx(whole + 2 * whole / DP, rel=0.01)
    assert kept[3] == pytest.approx(3 * whole / DP, rel=0.01)
    assert all(each["memory"]["alias"] > 0.99 * each["memory"]["arguments"] for each in found)
    temporary = [each["memory"]["temporary"] for each in found]
    # ZeRO 2 keeps an eighth of the accumulated gradients, ZeRO 3 none whole
    assert temporary[1] - temporary[2] > 0.8 * (1 - 1 / DP) * whole
    assert temporary[3] < 0.5 * temporary[2]


def test_layers_are_gathered_one_at_a_time(tmp_path: Path) -> None:
    """Eight more layers take the room of eight more shards (gradients and their sum), not of eight
    layers."""
    few, many = llama(4), llama(12)
    layout = f"dp={DP},zero=3,micro_batch=1,recompute=full"
    found = compiled([layout_plan(model, layout, "float32") for model in (few, many)], tmp_path)
    layers = (many.elements - few.elements) * WIDTH
    more = found[1]["memory"]["temporary"] - found[0]["memory"]["temporary"]
    assert 1 / DP < more / layers < 3 / DP
