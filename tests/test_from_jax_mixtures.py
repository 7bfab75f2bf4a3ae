"""Mixtures of experts in JAX: every spelling becomes the ops of the table, and these compute what
the function computes, loss and gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graph_interpreter
import jax
import jax.numpy as jnp
import pytest
from eager_parity import compare
from jax_mixtures import (
    CAPACITY,
    DENSE,
    EXPERTS,
    LOOPS,
    RAGGED,
    biased_choice,
    listed,
    mixtral,
    route,
    scanned,
    with_biases,
)  # fmt: skip

import shardwright as sw
from shardwright.costmodel import local_sizes, op_flops
from shardwright.ir import Model, UnsupportedOp
from shardwright.ir.from_dims import dims_of_config, expert_binding, transformer
from shardwright.ir.from_jax import trace
from shardwright.ir.from_torch import preset_config

H, F = 8, 12
READ_OFF = graph_interpreter.binding_of


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


MIXTURE = {
    "router": shape(H, EXPERTS), "w1": shape(EXPERTS, H, F), "w3": shape(EXPERTS, H, F),
    "w2": shape(EXPERTS, F, H),
}  # fmt: skip
PARAMS = {"w": shape(H, H), "moe": MIXTURE}


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many slots as there may be tokens, so that none is left out; float64."""
    slots_of(monkeypatch, lambda s: s)
    with jax.enable_x64(True):
        yield


def slots_of(monkeypatch: pytest.MonkeyPatch, number: Callable[[int], int]) -> None:
    """Binds the slots of an expert to a number that may depend on the sequence."""

    def binding(*given: Any) -> dict[str, int]:
        found = READ_OFF(*given)
        return found | {"c": number(found["s"])}

    monkeypatch.setattr(graph_interpreter, "binding_of", binding)


def loss_of(mixture: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def loss(p: Any, x: Any) -> Any:
        return jnp.mean((x + mixture(p["moe"], jnp.tanh(x @ p["w"]))) ** 2)

    return loss


def traced(function: Any, params: Any = PARAMS) -> Model:
    with jax.enable_x64(False):
        return trace(function, params, (shape(2, 16, H),))


def kinds(model: Model) -> list[str]:
    return [op.kind for graph in model.blocks.values() for op in graph.ops]


EXPERT_OPS = [
    "moe_dispatch", "grouped_linear_io", "grouped_linear_io", "silu", "mul", "grouped_linear_io",
    "moe_combine",
]  # fmt: skip


@pytest.mark.parametrize("name", [*RAGGED, *DENSE, *LOOPS])
def test_spellings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = loss_of((RAGGED | DENSE | LOOPS)[name])
    model = traced(function)
    assert sorted(kind for kind in kinds(model) if kind in EXPERT_OPS) == sorted(EXPERT_OPS)
    if name == "capacity":
        slots_of(monkeypatch, lambda _: CAPACITY)
    compare(function, PARAMS, (shape(2, 16, H),), model)


OTHERS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any], dict[str, int]]] = {
    "biased choice": (
        biased_choice, {"shift": shape(EXPERTS)}, {"moe_dispatch": 1, "grouped_linear_io": 3},
    ),
    "biases of experts": (
        with_biases, {"b1": shape(EXPERTS, F), "b2": shape(EXPERTS, H)},
        {"moe_dispatch": 1, "grouped_linear_io": 2, "reshape": 2},
    ),
    "experts in a list": (
        listed, {"experts": [{"w1": shape(H, F), "w2": shape(F, H)} for _ in range(EXPERTS)]},
        {"moe_dispatch": 0, "linear_io": 2 + 2 * EXPERTS, "slice": EXPERTS},
    ),
    "scan over experts": (scanned, {}, {"moe_dispatch": 0, "linear_io": 2 + 3 * EXPERTS}),
}  # fmt: skip
"""Mixture, parameters beside those of all, and how often kinds occur."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms(name: str) -> None:
    mixture, more, expected = OTHERS[name]
    unused = {"w3"} if name == "biases of experts" else set()
    unused = {"w1", "w2", "w3"} if name == "experts in a list" else unused
    given = {n: leaf for n, leaf in MIXTURE.items() if n not in unused}
    params = {"w": shape(H, H), "moe": given | more}
    function = loss_of(mixture)
    model = traced(function, params)
    found = Counter(kinds(model))
    assert {kind: found[kind] for kind in expected} == expected
    compare(function, params, (shape(2, 16, H),), model)


# -- what is refused -------------------------------------------------------------------------------


def unsorted(p: Any, x: Any) -> Any:
    tokens = x.reshape(-1, H)
    weights, experts = route(p, tokens)
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS)
    rows = jax.lax.ragged_dot(jnp.repeat(tokens, 2, axis=0), p["w1"], sizes)
    return (rows[:, :H].reshape(-1, 2, H) * weights[..., None]).sum(1).reshape(x.shape)


def greatest(p: Any, x: Any) -> Any:
    tokens = x.reshape(-1, H)
    _, experts = route(p, tokens)
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS)
    rows = jax.lax.ragged_dot(tokens[order // 2], p["w1"], sizes)[:, :H]
    return rows[jnp.argsort(order)].reshape(-1, 2, H).max(1).reshape(x.shape)


def fixed_groups(p: Any, x: Any) -> Any:
    tokens = x.reshape(-1, H)
    sizes = jnp.full((EXPERTS,), 3, jnp.int32)
    return jax.lax.ragged_dot(tokens, p["w1"], sizes)[:, :H].reshape(x.shape)


def ragged_features(p: Any, x: Any) -> Any:
    """Groups of the summed dim, as in the gradient of the weights."""
    tokens = x.reshape(-1, H)
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    sizes = jnp.full((EXPERTS,), 3, jnp.int32)
    made = jax.lax.ragged_dot_general(tokens, tokens, sizes, numbers)
    return x @ made[0]


def largest(p: Any, x: Any) -> Any:
    values, _ = jax.lax.top_k(x @ p["router"], 2)
    return x + jnp.concatenate([values] * 4, axis=-1)


def first_choices_first(p: Any, x: Any) -> Any:
    """GShard's slots: all first choices before the second ones."""
    weights, experts = route(p, x)
    hot = jax.nn.one_hot(experts, EXPERTS, dtype=x.dtype).swapaxes(1, 2)
    flat = hot.reshape(x.shape[0], -1, EXPERTS)
    place = (jnp.cumsum(flat, 1) * flat).reshape(hot.shape).swapaxes(1, 2) - 1
    slots = jax.nn.one_hot(place, 3, dtype=x.dtype)
    y = jnp.einsum("bsh,bsec->ebch", x, slots.sum(2))
    y = jnp.einsum("ebch,ehf->ebcf", y, p["w1"])
    combine = (slots * weights[..., None, None]).sum(2)
    return jnp.einsum("ebcf,bsec->bsf", y, combine)[..., :H]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (unsorted, r"op ragged_dot at test_from_jax_mixtures.py:\d+.*not the router's tokens, each "
         "taken once"),
        (greatest, r"op reduce_max behind ragged_dot at test_from.*:\d+.*their sum by token"),
        (fixed_groups, r"op ragged_dot at test_from.*:\d+.*sizes do not come from the top_k"),
        (ragged_features, r"op ragged_dot at test_from.*:\d+.*weights \[experts, inputs, outputs"),
        (largest, r"op top_k at test_from.*:\d+.*concat reads it.*expected a router"),
        (first_choices_first, r"op einsum behind top_k at jax_mix.*:\d+.*slots are taken by a "
         "sequence's tokens in their order"),
    ],
)  # fmt: skip
def test_forms_that_are_refused(mixture: Any, message: str) -> None:
    with pytest.raises(UnsupportedOp, match=message):
        traced(loss_of(mixture))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_mixtures_are_planned_and_not_emitted(backend: str, tmp_path: Path) -> None:
    function = loss_of(RAGGED["sorted back"])
    given: dict[str, Any] = dict(params=PARAMS, example_inputs=(shape(2, 16, H),))
    with jax.enable_x64(False):
        plan = sw.plan(function, "h100-sxm:1", sw.Workload(global_batch=8, seq_len=16), **given)
        with pytest.raises(sw.InvalidInput, match="cannot be emitted yet: mixtures of experts"):
            plan.emit(backend, tmp_path)
        with pytest.raises(UnsupportedOp, match=f"the {backend} backend does not write mixtures"):
            sw.verify(function, layout="dp=2", backend=backend, **given)


# -- one graph for both frameworks ----------------------------------------------------------------

VIEWS = ("reshape", "permute", "expand")
SIZES: dict[str, Any] = dict(
    layers=4, hidden=4096, heads=32, kv_heads=8, ffn=14336, experts=8, vocabulary=32000
)


def both() -> tuple[Model, Model]:
    """A Mixtral of four layers of 8x7b's sizes: traced from JAX, and as torch's is."""
    with jax.enable_x64(False):
        traced_ = trace(*mixtral(**SIZES))
    config = preset_config("mixtral-8x7b") | {"num_hidden_layers": SIZES["layers"]}
    return traced_, transformer(dims_of_config(config))


def test_mixtral_is_the_graph_that_torch_has() -> None:
    """Op kinds (views aside: JAX lays heads out otherwise), parameters, FLOPs and the plan."""
    jax_model, torch_model = both()
    assert {n: p.shape for n, p in jax_model.parameters.items()} == {
        n: p.shape for n, p in torch_model.parameters.items()
    }
    assert len(jax_model.blocks) == 3
    for mine, other in zip(jax_model.segments, torch_model.segments, strict=True):
        assert mine.module == other.module
        found = [
            [op.kind for op in model.blocks[segment.block].ops if op.kind not in VIEWS]
            for model, segment in ((jax_model, mine), (torch_model, other))
        ]
        assert Counter(found[0]) == Counter(found[1])
    binding = expert_binding(jax_model, {"b": 1, "s": 4096})
    assert binding == expert_binding(torch_model, {"b": 1, "s": 4096}) == {
        "b": 1, "s": 4096, "c": 1024
    }  # fmt: skip
    flops = [
        sum(op_flops(op, local_sizes(op, binding))
            for s in model.segments for op in model.blocks[s.block].ops)
        for model in (jax_model, torch_model)
    ]  # fmt: skip
    assert flops[0] == flops[1] > 1e12
    work = sw.Workload(global_batch=64, seq_len=4096)
    plans = [sw.plan(model, "h100-sxm:2", work, fix="schedule=1f1b,ep=8")
             for model in (jax_model, torch_model)]  # fmt: skip
    assert plans[0].strategy == plans[1].strategy
    assert plans[0].strategy.ep == 8
    seconds = [plan.predicted.step_seconds for plan in plans]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)  # views launch kernels


def test_mixtral_computes_what_the_function_computes() -> None:
    small = dict(layers=3, hidden=16, heads=4, kv_heads=2, ffn=12, experts=4, vocabulary=16)
    function, params, inputs = mixtral(**small)
    with jax.enable_x64(False):
        model = trace(function, params, inputs)
    assert [s.module for s in model.segments[1:-1]] == [f"model.layers.{i}" for i in range(3)]
    assert len(model.blocks) == 3
    compare(function, params, inputs, model)
