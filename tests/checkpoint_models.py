"""Random models by their logical tensors, and a mover of bytes that is as simple as can be: every
stored array is a buffer per rank, filled and read through the boxes that layouts give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardwright.checkpoint.boxes import Boxes, coverage, distinct
from shardwright.checkpoint.contents import Array, Contents, Key
from shardwright.checkpoint.layout import Layout
from shardwright.checkpoint.placement import places, shard_of, shard_shape

Values = dict[Key, np.ndarray]
MLP = ("gate_proj", "up_proj", "down_proj")
STATES = ("weight", "exp_avg", "exp_avg_sq")


def llama(
    layers: int = 2,
    groups: int = 2,
    per_group: int = 2,
    head_dim: int = 4,
    ffn: int = 6,
    vocab: int = 11,
    tied: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: int = 0,
    family: str = "llama",
    states: tuple[str, ...] = STATES,
    seed: int = 0,
) -> tuple[Values, dict[str, Any]]:
    """The logical tensors of a Llama-like model with random values, and its facts."""
    heads = groups * per_group
    hidden = heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(layers):
        own = f"model.layers.{i}."
        for name, rows in (("q", heads), ("k", groups), ("v", groups)):
            shapes[f"{own}self_attn.{name}_proj.weight"] = (rows * head_dim, hidden)
            if qkv_bias:
                shapes[f"{own}self_attn.{name}_proj.bias"] = (rows * head_dim,)
            if qk_norm and name != "v":
                shapes[f"{own}self_attn.{name}_norm.weight"] = (head_dim,)
        shapes[f"{own}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{own}input_layernorm.weight"] = (hidden,)
        shapes[f"{own}post_attention_layernorm.weight"] = (hidden,)
        if experts:
            mixtral = family == "mixtral"
            inner = "block_sparse_moe" if mixtral else "mlp"
            gate, up, down = (
                ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            )
            shapes[f"{own}{inner}.gate.weight"] = (experts, hidden)
            for e in range(experts):
                at = f"{own}{inner}.experts.{e}."
                shapes[f"{at}{gate}.weight"] = shapes[f"{at}{up}.weight"] = (ffn, hidden)
                shapes[f"{at}{down}.weight"] = (hidden, ffn)
        else:
            shapes[f"{own}mlp.gate_proj.weight"] = shapes[f"{own}mlp.up_proj.weight"] = (
                ffn,
                hidden,
            )
            shapes[f"{own}mlp.down_proj.weight"] = (hidden, ffn)
    facts = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "num_hidden_layers": layers,
    }
    return _values(shapes, states, seed), facts


def gpt2(
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 4,
    vocab: int = 11,
    states: tuple[str, ...] = STATES,
    seed: int = 0,
) -> tuple[Values, dict[str, Any]]:
    """The same of GPT-2: kernels transposed, q, k and v fused, embedding tied."""
    hidden = heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (8, hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    for i in range(layers):
        own = f"transformer.h.{i}."
        for name in ("ln_1", "ln_2"):
            shapes[f"{own}{name}.weight"] = shapes[f"{own}{name}.bias"] = (hidden,)
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            shapes[f"{own}{name}.weight"] = (rows, columns)
            shapes[f"{own}{name}.bias"] = (columns,)
    facts = {
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    return _values(shapes, states, seed), facts


def _values(shapes: Mapping[str, tuple[int, ...]], states: tuple[str, ...], seed: int) -> Values:
    random = np.random.default_rng(seed)
    return {
        (state, name): random.standard_normal(shape).astype(np.float32)
        for state in states
        for name, shape in shapes.items()
    }


@st.composite
def models(draw: st.DrawFn) -> tuple[str, Values, dict[str, Any]]:
    """(family, logical tensors, facts) with grouped heads, ties, experts, biases, odd sizes."""
    family = draw(st.sampled_from(["llama", "mixtral", "qwen3-moe", "gpt2"]))
    layers, vocab = draw(st.integers(1, 4)), draw(st.integers(3, 40))
    seed = draw(st.integers(0, 99))
    states = draw(st.sampled_from([("weight",), STATES]))
    if family == "gpt2":
        heads = draw(st.sampled_from([4, 8]))
        return family, *gpt2(layers, heads, draw(st.integers(1, 3)), vocab, states, seed)
    moe = family != "llama"
    return family, *llama(
        layers=layers,
        groups=draw(st.sampled_from([1, 2, 4])),
        per_group=draw(st.integers(1, 4)) * 4,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn=4 * draw(st.integers(1, 5)),
        vocab=vocab,
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=family == "qwen3-moe" or (not moe and draw(st.booleans())),
        experts=draw(st.sampled_from([2, 4])) if moe else 0,
        family=family,
        states=states,
        seed=seed,
    )


class Store:
    """A checkpoint in memory: a flat array per record."""

    def __init__(self, contents: Contents, buffers: list[np.ndarray]) -> None:
        self.contents, self.buffers = contents, buffers


def view(buffer: np.ndarray, boxes: Boxes, row: int) -> np.ndarray:
    """One box of a buffer."""
    step = buffer.itemsize
    return np.lib.stride_tricks.as_strided(
        buffer[int(boxes.offset[row]) :],
        tuple(int(n) for n in boxes.size[row]),
        tuple(int(n) * step for n in boxes.stride[row]),
    )


def inside(boxes: Boxes, row: int) -> tuple[slice, ...]:
    """Where one box lies in its array."""
    return tuple(
        slice(int(b), int(b + n)) for b, n in zip(boxes.begin[row], boxes.size[row], strict=True)
    )


def shapes_of(values: Values) -> dict[Key, tuple[tuple[int, ...], str]]:
    return {key: (value.shape, "F32") for key, value in values.items()}


def write(
    values: Values,
    layout: Layout,
    mesh: Mapping[str, int],
    facts: Mapping[str, Any],
    axes: tuple[str, ...] = ("tp",),
) -> Store:
    """Logical tensors stored under a layout: the shards of every rank along `axes`."""
    buffers: list[np.ndarray] = []
    arrays: dict[Key, Array] = {}
    for one in layout.stored(shapes_of(values), mesh, facts):
        rows = []
        local: tuple[int, ...] = ()
        for at in places(mesh, axes):
            local = shard_shape(one.wanted, mesh, at)
            buffer = np.full(int(np.prod(local)) + 1, np.nan, np.float32)
            boxes = shard_of(one.wanted, mesh, at, len(buffers))
            for key, made in one.logical(boxes).items():
                for row in range(len(made)):
                    view(buffer, made, row)[...] = values[key][inside(made, row)]
            place = tuple(at.values())
            strides = tuple(int(np.prod(local[k + 1 :])) for k in range(len(local)))
            ones = (1,) * len(axes)
            rows.append(
                ((*place, *(0,) * len(local)), (*ones, *local), (*(0 for _ in axes), *strides),
                 len(buffers), 0)
            )  # fmt: skip
            buffers.append(buffer)
        table = Boxes.of(rows, len(axes) + len(local))
        shape = (*(mesh.get(axis, 1) for axis in axes), *local)
        key = one.wanted.key
        arrays[key] = Array(*key, shape, "F32", _given(table), axes=axes)
    contents = Contents("memory", Path(), {}, [], arrays, mesh=mesh, facts=facts)
    return Store(contents, buffers)


def _given(table: Boxes) -> Any:
    return lambda: table


def read(store: Store, layout: Layout, given: Mapping[str, Any] | None = None) -> Values:
    """The logical tensors of a checkpoint in memory; every element is there, and copies agree."""
    found: Values = {}
    for key, array in layout.logical(store.contents, given).items():
        boxes = array.where()
        told = coverage(distinct(boxes), array.shape)
        assert told.covered >= told.elements, (key, told)
        value = np.full(array.shape, np.nan, np.float32)
        for row in range(len(boxes)):
            piece = view(store.buffers[int(boxes.record[row])], boxes, row)
            there = value[inside(boxes, row)]
            assert (np.isnan(there) | (there == piece)).all(), key
            value[inside(boxes, row)] = piece
        assert not np.isnan(value).any(), key
        found[key] = value
    return found
