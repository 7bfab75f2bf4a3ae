"""Primitives, transformations and parameter trees one by one: the traced graph computes what the
function computes, loss and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from eager_parity import compare
from flax import linen
from jax.ad_checkpoint import checkpoint_name

import shardwright as sw
from shardwright.backends.parity import Function, verify_layouts
from shardwright.ir import Model, UnsupportedOp
from shardwright.ir.from_jax import trace

H = 8


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


WEIGHTS = {"w": shape(H, H), "v": shape(H, H)}
FEATURES = (shape(2, 16, H),)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def checked(function: Any, params: Any = WEIGHTS, inputs: Any = FEATURES) -> Model:
    with jax.enable_x64(False):
        model = trace(function, params, inputs)
    compare(function, params, inputs, model)
    return model


def kinds(model: Model) -> list[str]:
    return [op.kind for graph in model.blocks.values() for op in graph.ops]


# -- ops ------------------------------------------------------------------------------------------


@jax.custom_vjp
def swish(x: Any) -> Any:
    """x · tanh(x), with its derivative written by hand."""
    return x * jnp.tanh(x)


swish.defvjp(
    lambda x: (swish(x), x),
    lambda x, g: (g * (jnp.tanh(x) + x * (1 - jnp.tanh(x) ** 2)),),
)


@jax.custom_jvp
def cube(x: Any) -> Any:
    return x**3


cube.defjvp(lambda x, dx: (x[0] ** 3, 3 * x[0] ** 2 * dx[0]))

MIDDLES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "stop_gradient": (lambda y, p: y - jax.lax.stop_gradient(y @ p["v"]), "stop_gradient"),
    "stop_gradient of a parameter": (
        lambda y, p: y @ jax.lax.stop_gradient(p["v"]), "stop_gradient",
    ),
    "leaky_relu": (lambda y, p: jax.nn.leaky_relu(y, 0.2), "leaky_relu"),
    "checkpoint_name": (lambda y, p: checkpoint_name(y, "middle"), "linear_io"),
    "custom_vjp": (lambda y, p: swish(y), "tanh"),
    "custom_jvp": (lambda y, p: cube(y), "power"),
    "cumsum": (lambda y, p: jnp.cumsum(y, axis=-1), "cumsum"),
    "cumsum over the sequence": (lambda y, p: jnp.cumsum(y, axis=1), "cumsum"),
    "sort": (lambda y, p: jnp.sort(y, axis=-1), "sort"),
    "dynamic_update_slice": (
        lambda y, p: jax.lax.dynamic_update_slice(y, (y @ p["v"])[..., :3], (0, 0, 2)), "concat",
    ),
    "scatter": (lambda y, p: y.at[..., :4].set((y @ p["v"])[..., :4]), "concat"),
    "scatter of a number": (lambda y, p: y.at[..., 2].set(1.5), "concat"),
    "scatter_add": (lambda y, p: y.at[..., 5].add((y @ p["v"])[..., 0]), "concat"),
    "clip": (lambda y, p: jnp.clip(y, -0.5, 0.25), "relu"),
    "elu": (lambda y, p: jax.nn.elu(y, 0.5), "elu"),
    "celu": (lambda y, p: jax.nn.celu(y, 0.7), "expm1"),
    "selu": (lambda y, p: jax.nn.selu(y), "elu"),
    "relu6": (lambda y, p: jax.nn.relu6(4 * y), "relu"),
    "hard_tanh": (lambda y, p: jax.nn.hard_tanh(2 * y), "relu"),
    "hard_swish": (lambda y, p: jax.nn.hard_swish(2 * y), "relu"),
    "glu": (lambda y, p: jax.nn.glu(jnp.concatenate([y, y @ p["v"]], -1)), "sigmoid"),
    "squareplus": (lambda y, p: jax.nn.squareplus(y), "sqrt"),
    "mish": (lambda y, p: jax.nn.mish(y), "softplus"),
    "soft_sign": (lambda y, p: jax.nn.soft_sign(y), "abs"),
    "log_sigmoid": (lambda y, p: jax.nn.log_sigmoid(y), "softplus"),
    "log1p": (lambda y, p: jnp.log1p(y * y), "log1p"),
    "the greater by where": (lambda y, p: jnp.where(y > 0.2, y, 0.2), "relu"),
    "the lesser by where": (lambda y, p: jnp.where(y < 0.2, y, 0.2), "relu"),
    "minimum": (lambda y, p: jnp.minimum(y, 0.3), "relu"),
    "remat": (lambda y, p: jax.checkpoint(jnp.tanh)(y), "tanh"),
    "pjit": (lambda y, p: jax.jit(jnp.tanh)(y), "tanh"),
    "einsum": (lambda y, p: jnp.einsum("bsh,ho->bso", y, p["v"]), "linear_io"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIDDLES)
def test_op(name: str) -> None:
    middle, kind = MIDDLES[name]

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean((middle(x @ p["w"], p) @ p["v"]) ** 2)

    assert kind in kinds(checked(loss))


def test_bounds_in_the_wrong_order_are_no_clip() -> None:
    """where(y > 1, min(y, 0), 1) is 0 above 1, which is not the greater of min(y, 0) and 1."""

    def loss(p: Any, x: Any) -> Any:
        y = x @ p["w"]
        least = jnp.where(y > 0, 0.0, y)
        return jnp.mean((jnp.where(y > 1, least, 1.0) @ p["v"]) ** 2)

    with pytest.raises(UnsupportedOp, match="select_n"):
        trace(loss, WEIGHTS, FEATURES)


def test_dropout_of_flax_takes_a_key() -> None:
    """A graph has no numbers of its own: dropout is an op, and its key no input."""
    drop = linen.Dropout(0.25, deterministic=False)

    def loss(p: Any, x: Any, key: Any) -> Any:
        y = drop.apply({}, x @ p["w"], rngs={"dropout": key})
        return jnp.mean((y @ p["v"]) ** 2)

    with jax.enable_x64(False):
        key = jax.eval_shape(lambda: jax.random.key(0))
        model = trace(loss, WEIGHTS, (*FEATURES, key))
    (found,) = (op for graph in model.blocks.values() for op in graph.ops if op.kind == "dropout")
    assert found.attributes["p"] == pytest.approx(0.25)
    assert [value.name for value in model.inputs] == ["x"]


# -- trees of parameters --------------------------------------------------------------------------


class Pair(NamedTuple):
    w: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    w: Any
    b: Any


@jax.tree_util.register_pytree_with_keys_class
class Own:
    """A class that was registered by hand, with names for what it holds."""

    def __init__(self, w: Any, b: Any) -> None:
        self.w, self.b = w, b

    def tree_flatten_with_keys(self) -> Any:
        key = jax.tree_util.GetAttrKey
        return ((key("w"), self.w), (key("b"), self.b)), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> Own:
        return cls(*leaves)


@pytest.mark.parametrize("kind", [Pair, Data, Own])
def test_layers_in_any_container(kind: Any) -> None:
    def loss(p: Any, x: Any) -> Any:
        for each in p["layers"]:
            x = x + jnp.tanh(x @ each.w + each.b)
        return jnp.mean((x @ p["head"]) ** 2)

    layers = [kind(shape(H, H), shape(H)) for _ in range(4)]
    model = checked(loss, {"layers": layers, "head": shape(H, 4)})
    assert {"layers.2.w", "layers.2.b", "head"} < set(model.parameters)
    assert [s.module for s in model.segments[:4]] == [f"layers.{i}" for i in range(4)]


def haiku_params(layers: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Haiku's dict of modules by path, of which the first has no number."""
    names = ["net/~/linear" + (f"_{i}" if i else "") for i in range(layers)]
    return {name: {"w": shape(H, H), "b": shape(H)} for name in names} | {
        "net/~/head": {"w": shape(H, 4)}
    }


def haiku_loss(p: Any, x: Any) -> Any:
    for name in (n for n in p if "linear" in n):
        x = x + jnp.tanh(x @ p[name]["w"] + p[name]["b"])
    return jnp.mean((x @ p["net/~/head"]["w"]) ** 2)


def test_haiku_style() -> None:
    params = haiku_params(4)
    model = checked(haiku_loss, params)
    assert {"net/~/linear.w", "net/~/linear_3.b", "net/~/head.w"} <= set(model.parameters)
    assert "net/~/linear_2" in [s.module for s in model.segments]


def alternating(p: Any, x: Any) -> Any:
    for i, layer in enumerate(p["layers"]):
        if i % 2:
            x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
        else:
            x = x + jnp.tanh(x @ layer["w"])
    return jnp.mean((x @ p["head"]) ** 2)


ALTERNATING = {
    "layers": [
        {"up": shape(H, 2 * H), "down": shape(2 * H, H)} if i % 2 else {"w": shape(H, H)}
        for i in range(6)
    ],
    "head": shape(H, 4),
}


def test_two_kinds_of_layers_take_turns() -> None:
    model = checked(alternating, ALTERNATING)
    blocks = [s.block for s in model.segments if s.module]
    assert len(set(blocks[1:-1])) == 2  # at the ends, the model's own ops may join a layer
    assert blocks[1] == blocks[3] and blocks[2] == blocks[4]


# -- programs -------------------------------------------------------------------------------------

PROGRAMS: dict[str, tuple[Any, Any]] = {
    "haiku": (haiku_loss, haiku_params(3)),
    "alternating": (alternating, ALTERNATING),
    "ops": (
        lambda p, x: jnp.mean((
            jnp.cumsum(jax.nn.leaky_relu(x @ p["w"], 0.1), axis=-1)
            + jnp.sort(jax.lax.stop_gradient(x @ p["v"]), axis=-1)
        ) @ p["v"]),
        WEIGHTS,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, backend: str) -> None:
    function, params = PROGRAMS[name]
    with jax.enable_x64(False):
        results = verify_layouts(
            Function(function, params, FEATURES), ["tp=2", "dp=2,zero=3"], backend=backend
        )
    for result in results:
        assert result.get("error") is None and result["equal"], result


@pytest.mark.slow
def test_a_gradient_that_is_not_the_functions_is_found() -> None:
    """A custom_vjp that says something else (straight-through) is not what the graph computes; the
    judge is the function itself, so that this is no silent error."""

    @jax.custom_vjp
    def through(x: Any) -> Any:
        return jnp.tanh(x)

    through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean((through(x @ p["w"]) @ p["v"]) ** 2)

    with jax.enable_x64(False):
        found = sw.verify(
            loss, params=WEIGHTS, example_inputs=FEATURES, layout="dp=2", backend="jax"
        )
    assert not found["equal"]
