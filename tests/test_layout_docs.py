"""The examples of docs/layout-language.md do what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from checkpoint_models import llama, read, write

from shardwright.checkpoint.layout import Layout, layout_of

TEXT = (Path(__file__).parent.parent / "docs" / "layout-language.md").read_text()
EXAMPLES = {
    found[1]: yaml.safe_load(found[0])
    for found in (
        (block, re.match(r"# example: (\w+)", block)[1])
        for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    )
}


def shards(layout: Layout, values, mesh, facts, name: str, axes=("tp",)) -> list[np.ndarray]:
    store = write(values, layout, mesh, facts, axes)
    array = store.contents.arrays[("weight", name)]
    table = array.where()
    local = array.shape[len(axes) :]
    return [store.buffers[int(r)][:-1].reshape(local) for r in table.record]


def some(values, *endings: str):
    return {key: value for key, value in values.items() if key[1].endswith(endings)}


def test_fused() -> None:
    layout = layout_of(EXAMPLES["fused"])
    made, facts = llama(groups=2, per_group=2, ffn=6)
    values = some(made, "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                  "up_proj.weight")  # fmt: skip
    back = read(write(values, layout, {"tp": 2}, facts), layout)
    assert all((back[key] == value).all() for key, value in values.items())
    own = shards(layout, values, {"tp": 2}, facts, "blocks.1.mlp.in")
    gate = values["weight", "model.layers.1.mlp.gate_proj.weight"]
    up = values["weight", "model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(own[1], np.concatenate([gate[3:], up[3:]]))


def test_vocabulary() -> None:
    layout = layout_of(EXAMPLES["vocabulary"])
    made, facts = llama(vocab=21)
    values = {
        key: value
        for key, value in some(made, "embed_tokens.weight", "model.norm.weight").items()
        if key[0] == "weight"
    }
    store = write(values, layout, {"tp": 2}, facts)
    assert {name for _, name in store.contents.arrays} == {"embedding", "head", "norm"}
    assert store.contents.arrays["weight", "head"].shape == (2, 16, 16)
    logical = layout.logical(store.contents)
    assert logical["weight", "model.embed_tokens.weight"].shape == (21, 16)
    assert logical["weight", "model.norm.weight"].combine == "mean"
    back = read(store, layout)
    assert all((back[key] == value).all() for key, value in values.items())


def test_experts() -> None:
    layout = layout_of(EXAMPLES["experts"])
    made, facts = llama(layers=3, experts=4, family="qwen3-moe", ffn=6)
    values = some(made, "down_proj.weight")
    mesh = {"ep": 2, "tp": 2}
    store = write(values, layout, mesh, facts, ("ep", "tp"))
    assert {name for _, name in store.contents.arrays} == {
        "layers.experts.down", "optim.exp_avg.layers.experts.down",
        "optim.exp_avg_sq.layers.experts.down",
    }  # fmt: skip
    assert store.contents.arrays["weight", "layers.experts.down"].shape == (2, 2, 3, 2, 3, 16)
    back = read(store, layout)
    assert all((back[key] == value).all() for key, value in values.items())
