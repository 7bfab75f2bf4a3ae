"""Layouts: logical → stored → logical is the identity, over any mesh and over several layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoint_models import Values, gpt2, llama, models, read, write
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.checkpoint.boxes import Boxes
from shardwright.checkpoint.contents import WEIGHT, Array, Contents
from shardwright.checkpoint.layout import (
    Layout,
    choose_layout,
    choose_target_layout,
    layout_of,
    load_layout,
)
from shardwright.checkpoint.spec import builtin
from shardwright.ir import CorruptCheckpoint, InvalidInput


def same(one: Values, other: Values) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=str(key))


LAYOUTS = {
    "llama": ["megatron-llama", "megatron-dist-llama", "identity"],
    "mixtral": ["megatron-mixtral", "megatron-dist-mixtral", "identity"],
    "qwen3-moe": ["megatron-qwen3-moe", "megatron-dist-qwen3-moe", "identity"],
    "gpt2": ["megatron-gpt2", "megatron-dist-gpt2", "identity"],
}
MESHES = st.fixed_dictionaries({"tp": st.sampled_from([1, 2, 4])})


@settings(max_examples=25, deadline=None)
@given(models(), st.lists(st.tuples(st.integers(0, 2), MESHES), min_size=1, max_size=3))
def test_over_any_layouts_and_back(model, hops) -> None:
    family, values, facts = model
    now = values
    for number, mesh in hops:
        layout = load_layout(LAYOUTS[family][number])
        axes = ("tp",) if layout.rules else ()
        now = read(write(now, layout, mesh, facts, axes), layout)
    same(now, values)


@pytest.mark.parametrize("name", builtin())
def test_built_in_layouts_are_what_they_say(name) -> None:
    layout = load_layout(name)
    assert layout.name == name
    assert layout.rules


def by_name(values: Values) -> dict[str, np.ndarray]:
    return {name: value for (state, name), value in values.items() if state == "weight"}


def test_the_fused_projection_is_megatrons() -> None:
    """Against plain numpy: groups outermost, and in every group its queries, then key and value."""
    values, facts = llama(layers=1, groups=2, per_group=3, head_dim=4, states=("weight",))
    store = write(values, load_layout("megatron-llama"), {"tp": 1}, facts)
    array = store.contents.arrays["weight", "decoder.layers.0.self_attention.linear_qkv.weight"]
    got = store.buffers[int(array.where().record[0])][:-1].reshape(array.shape[1:])
    one = by_name(values)
    q, k, v = (one[f"model.layers.0.self_attn.{x}_proj.weight"].reshape(2, -1, 24) for x in "qkv")
    np.testing.assert_array_equal(got, np.concatenate([q, k, v], 1).reshape(-1, 24))


def test_gate_and_up_of_every_rank_lie_together() -> None:
    values, facts = llama(layers=1, ffn=6, states=("weight",))
    store = write(values, load_layout("megatron-llama"), {"tp": 2}, facts)
    array = store.contents.arrays["weight", "decoder.layers.0.mlp.linear_fc1.weight"]
    table = array.where()
    one = by_name(values)
    gate, up = (one[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for rank in range(2):
        got = store.buffers[int(table.record[rank])][:-1].reshape(array.shape[1:])
        mine = slice(3 * rank, 3 * rank + 3)
        np.testing.assert_array_equal(got, np.concatenate([gate[mine], up[mine]]))


@pytest.mark.parametrize(("order", "fact"), [("kind first", "qkv_by_kind"), ("kind last", "qkv_kind_innermost")])  # fmt: skip  # noqa: E501
def test_older_orders_of_the_fused_projection(order, fact) -> None:
    """Checkpoint versions 0 and 1 of Megatron: [3, heads, d] and [heads, d, 3]."""
    values, facts = llama(layers=1, groups=4, per_group=1, head_dim=2, states=("weight",))
    facts = {**facts, fact: True}
    layout = load_layout("megatron-llama")
    same(read(write(values, layout, {"tp": 2}, facts), layout), values)
    store = write(values, layout, {"tp": 1}, facts)
    array = store.contents.arrays["weight", "decoder.layers.0.self_attention.linear_qkv.weight"]
    got = store.buffers[int(array.where().record[0])][:-1].reshape(array.shape[1:])
    one = by_name(values)
    q, k, v = (one[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    axis = 0 if order == "kind first" else 1
    np.testing.assert_array_equal(got, np.stack([q, k, v], axis).reshape(24, 8))


def test_meta_rows_pair_neighbours() -> None:
    """The permutation of Hugging Face's own converter, applied backwards."""
    values, facts = llama(groups=2, per_group=2, head_dim=6, vocab=12, states=("weight",))
    layout = load_layout("meta-llama")
    store = write(values, layout, {"tp": 2}, facts)
    same(read(store, layout), values)
    whole = write(values, layout, {"tp": 1}, facts)
    array = whole.contents.arrays["weight", "layers.0.attention.wq.weight"]
    stored = whole.buffers[int(array.where().record[0])][:-1].reshape(array.shape[1:])
    permuted = stored.reshape(4, 3, 2, 24).transpose(0, 2, 1, 3).reshape(24, 24)
    np.testing.assert_array_equal(
        permuted, by_name(values)["model.layers.0.self_attn.q_proj.weight"]
    )


def test_flax_stacks_are_transposed() -> None:
    values, facts = llama(layers=3, states=("weight", "exp_avg"))
    layout = load_layout("flax-llama")
    store = write(values, layout, {}, facts, axes=())
    array = store.contents.arrays["weight", "layers.mlp.down_proj.kernel"]
    assert array.shape == (3, 6, 16)
    got = store.buffers[int(array.where().record[0])][:-1].reshape(array.shape)
    for i in range(3):
        expected = by_name(values)[f"model.layers.{i}.mlp.down_proj.weight"].T
        np.testing.assert_array_equal(got[i], expected)
    same(read(store, layout), values)


@pytest.mark.parametrize("vocab", [1, 11, 256, 257])
def test_the_vocabulary_is_padded_and_cut(vocab) -> None:
    values, facts = llama(vocab=vocab, ffn=8, states=("weight",))
    layout = load_layout("megatron-llama")
    store = write(values, layout, {"tp": 4}, facts)
    array = store.contents.arrays["weight", "embedding.word_embeddings.weight"]
    assert array.shape[0] * array.shape[1] == -(-vocab // 512) * 512
    same(read(store, layout), values)


def test_layouts_are_chosen_by_names() -> None:
    for family, made in (
        ("llama", llama()),
        ("mixtral", llama(experts=4, family="mixtral")),
        ("qwen3-moe", llama(experts=4, qk_norm=True, family="qwen3-moe")),
        ("gpt2", gpt2()),
    ):
        values, facts = made
        for kind in ("megatron", "megatron-dist"):
            chosen = choose_target_layout(kind, list(values))
            assert chosen.name == f"{kind}-{family}"
            contents = write(values, chosen, {"tp": 1}, facts).contents
            told = type(contents)(kind, contents.root, {}, [], contents.arrays, facts=facts)
            assert choose_layout(told).name == chosen.name
    assert choose_target_layout("safetensors", list(values)).name == "identity"
    with pytest.raises(InvalidInput, match="target-spec"):
        choose_target_layout("megatron", [("weight", "encoder.block.0.weight")])


# ---------------------------------------------- the patterns of universal checkpointing


RULES = {
    "unique and replicated": (dict(), {"t.0": (6, 4)}),
    "fragment along rows": (dict(types={"tp": "S(0)"}), {"t.0": (8, 3)}),
    "fragment along columns": (dict(types={"tp": "S(1)"}), {"t.0": (3, 8)}),
    "two axes on one dim, nested": (dict(types={"tp": "S(0)", "ep": "S(0)"}), {"t.0": (16, 3)}),
    "two axes on two dims": (dict(types={"tp": "S(0)", "ep": "S(1)"}), {"t.0": (4, 6)}),
    "averaged": (dict(types={"tp": "P(mean)"}), {"t.0": (5,)}),
    "interleaved": (
        dict(dims="(h two d) c", logical="t.{i} as (two h d) c", types={"tp": "S(h)"}),
        {"t.0": (16, 3)},
    ),
    "transposed": (dict(dims="a b", logical="t.{i} as b a", types={"tp": "S(b)"}), {"t.0": (8, 3)}),
    "fused with shares": (
        dict(
            dims="([q k v] d) h",
            parts={"q": "q.{i} as (n d) h", "k": "k.{i} as (m d) h", "v": "v.{i} as (o d) h"},
            types={"tp": "S(0)"},
        ),
        {"q.0": (16, 3), "k.0": (4, 3), "v.0": (4, 3)},
    ),
    "grouped heads with fewer groups than ranks": (
        dict(
            dims="(g [q k v] d) h",
            parts={"q": "q.{i} as (g r d) h", "k": "k.{i} as (g d) h", "v": "v.{i} as (g d) h"},
            types={"tp": ["S(g)", "R"]},
        ),
        {"q.0": (8, 3), "k.0": (4, 3), "v.0": (4, 3)},
    ),
    "experts in the name, stacked in the tensor": (
        dict(stored="s.{i}.{e}", dims="f h", logical="t.{i} as e f h", types={"tp": "S(f)"}),
        {"t.0": (3, 8, 2)},
    ),
    "experts stacked, one name each in the model": (
        dict(stored="s.{i}", dims="e f h", logical="t.{i}.{e} as f h", types={"ep": "S(e)"}),
        {"t.0.0": (4, 2), "t.0.1": (4, 2), "t.0.2": (4, 2), "t.0.3": (4, 2)},
    ),
    "padded": (dict(dims="v h", types={"tp": "S(v)"}, pad={"v": "8 * tp"}), {"t.0": (13, 3)}),
    "a copy under another name": (dict(also=["copy.{i}"]), {"t.0": (4, 3)}),
}  # fmt: skip
SIZES = {"two": 2, "d": 2, "g": 2, "v": 13, "n": 8, "m": 2, "o": 2}


@pytest.mark.parametrize("case", RULES)
def test_patterns_of_universal_checkpointing(case) -> None:
    rule, shapes = RULES[case]
    if "parts" not in rule:
        rule = {"logical": "t.{i}", **rule}
    layout = layout_of(
        {
            "layout": "one",
            "strict": True,
            "sizes": {k: k for k in SIZES},
            "tensors": [{"stored": "s.{i}", **rule}],
        }
    )
    random = np.random.default_rng(1)
    values = {
        ("weight", name): random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    mesh = {"tp": 4, "ep": 2} if "nested" in case or "two dims" in case else {"tp": 4}
    mesh = {"ep": 2, "tp": 1} if "one name each" in case else mesh
    store = write(values, layout, mesh, SIZES, axes=tuple(mesh))
    same(read(store, layout), values)


# ----------------------------------------------------------------------- bad input


def test_what_is_missing_is_named() -> None:
    values, facts = llama(states=("weight",))
    del values["weight", "model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(InvalidInput, match=r"k_proj\.weight not"):
        load_layout("megatron-llama").stored(
            {key: (value.shape, "F32") for key, value in values.items()}, {"tp": 1}, facts
        )


def test_sizes_that_do_not_follow_are_asked_for() -> None:
    values, _ = llama(states=("weight",))
    with pytest.raises(InvalidInput, match="give them, as --sizes d="):
        load_layout("megatron-llama").stored(
            {key: (value.shape, "F32") for key, value in values.items()}, {"tp": 1}, {}
        )


def test_sizes_that_contradict_shapes_are_refused() -> None:
    values, facts = llama(groups=2, head_dim=4, states=("weight",))
    with pytest.raises(InvalidInput, match=r"expected .* with d=8"):
        load_layout("megatron-llama").stored(
            {key: (value.shape, "F32") for key, value in values.items()},
            {"tp": 1},
            {**facts, "d": 8},
        )


def test_sizes_given_by_hand_hold_when_reading() -> None:
    values, facts = gpt2()
    layout = load_layout("megatron-gpt2")
    contents = write(values, layout, {"tp": 2}, facts).contents
    right = (
        values["weight", "transformer.h.0.attn.c_attn.weight"].shape[0]
        // facts["num_attention_heads"]
    )
    layout.logical(contents, {"d": right})
    with pytest.raises(InvalidInput, match=rf"expected .* with d={2 * right}"):
        layout.logical(contents, {"d": 2 * right})


def test_strict_layouts_refuse_what_they_do_not_know() -> None:
    layout = layout_of(
        {"layout": "x", "strict": True, "tensors": [{"stored": "a", "logical": "b"}]}
    )
    plain = Layout.identity()
    values = {("weight", "a"): np.zeros(2, np.float32), ("weight", "c"): np.zeros(2, np.float32)}
    with pytest.raises(InvalidInput, match="no rule for c"):
        read(write(values, plain, {}, {}, ()), layout)
    with pytest.raises(InvalidInput, match="no array of the checkpoint is named a"):
        read(write({}, plain, {}, {}, ()), layout)


def test_shards_without_a_rule_are_refused() -> None:
    values = {("weight", "a"): np.zeros((4, 2), np.float32)}
    split = layout_of({"layout": "x", "default_types": {"tp": "S(0)"}})
    store = write(values, split, {"tp": 2}, {})
    same(read(store, split), values)
    with pytest.raises(InvalidInput, match="no rule says how"):
        read(store, Layout.identity())


def test_a_figure_that_cannot_be_is_corrupt() -> None:
    values, facts = llama(vocab=11, states=("weight",))
    layout = load_layout("megatron-llama")
    store = write(values, layout, {"tp": 1}, facts)
    with pytest.raises(CorruptCheckpoint, match="word_embeddings"):
        read(store, layout, {"vocab_size": 5000})


WRONG = {
    "tensor: Extra": {"layout": "x", "tensor": []},
    "either `logical": {"layout": "x", "tensors": [{"stored": "a"}]},
    "is no type": {
        "layout": "x", "tensors": [{"stored": "a", "logical": "b", "types": {"tp": "T(0)"}}],
    },
    "is no factor": {
        "layout": "x",
        "tensors": [{"stored": "a", "dims": "v h", "logical": "b", "types": {"tp": "S(z)"}}],
    },
    "outermost": {
        "layout": "x",
        "tensors": [{"stored": "a", "dims": "(h v)", "logical": "b", "pad": {"v": 8}}],
    },
}  # fmt: skip


@pytest.mark.parametrize("expected", WRONG)
def test_a_spec_that_is_wrong_says_where(expected) -> None:
    with pytest.raises(InvalidInput, match=expected):
        layout_of(WRONG[expected])


def test_names_alone_make_no_layout_fit() -> None:
    """GPT-2's names over a gated MLP: its first matrix has twice the rows that the second reads."""
    shapes = {
        "decoder.layers.0.mlp.linear_fc1.weight": (192, 64),
        "decoder.layers.0.mlp.linear_fc2.weight": (64, 96),
    }
    arrays = {
        (WEIGHT, name): Array(WEIGHT, name, shape, "F32", partial(Boxes.whole, shape))
        for name, shape in shapes.items()
    }
    contents = Contents("megatron", Path(), {}, [], arrays)
    with pytest.raises(InvalidInput, match=r"factor f is 192 in .*linear_fc1.weight and 96 in"):
        load_layout("megatron-gpt2").logical(contents)


def deepseek(latent: bool) -> Values:
    """A dense layer and one of experts, two of them; attention latent or with grouped heads."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (16, 8), "norm": (8,)}
    for i in range(2):
        attention = (
            {"q_a_proj": (4, 8), "q_a_layernorm": (4,), "q_b_proj": (12, 4), "o_proj": (8, 8),
             "kv_a_proj_with_mqa": (6, 8), "kv_a_layernorm": (4,), "kv_b_proj": (16, 4)}
            if latent
            else {"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 8)}
        )  # fmt: skip
        own = {f"self_attn.{name}": shape for name, shape in attention.items()}
        own |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
        sizes = {"mlp": 8}
        if i:
            own["mlp.gate"] = (2, 8)
            sizes = {"mlp.experts.0": 4, "mlp.experts.1": 4, "mlp.shared_experts": 12}
        for at, ffn in sizes.items():
            own |= {f"{at}.gate_proj": (ffn, 8), f"{at}.up_proj": (ffn, 8)}
            own |= {f"{at}.down_proj": (8, ffn)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    draw = np.random.default_rng(5)
    made = {
        ("weight", f"model.{name}.weight"): draw.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    made["weight", "lm_head.weight"] = draw.normal(size=(16, 8)).astype(np.float32)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    made["weight", bias] = np.arange(2, dtype=np.float32)
    return made


FUSED, APART = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
NORMS = {
    ("", "transformer_engine", True): (FUSED, APART),
    ("", "transformer_engine", False): (FUSED, APART),
    ("", "local", True): (APART, APART),
    ("dist-", "transformer_engine", True): (FUSED, APART),
    ("dist-", "local", True): (APART, APART),
    ("dist-", "local", False): (FUSED, FUSED),
}
"""(layout, layers, latent): the norm before the MLP of the dense layer, of that of experts."""


@pytest.mark.parametrize("case", NORMS)
def test_layers_that_differ_are_named_by_what_is_beside_them(case) -> None:
    """As megatron-core's layer specs name them (`get_gpt_decoder_block_spec`)."""
    kind, layers, latent = case
    layout = load_layout(f"megatron-{kind}deepseek")
    values = deepseek(latent)
    facts = {"transformer_impl": layers, "num_query_groups": 2, "kv_channels": 4,
             "make_vocab_size_divisible_by": 4}  # fmt: skip
    store = write(values, layout, {"tp": 2}, facts)
    same(read(store, layout), values)
    names = {name for _, name in store.contents.arrays}
    for i, norm in enumerate(NORMS[case]):
        assert f"decoder.layers.{i}.{norm}" in names
