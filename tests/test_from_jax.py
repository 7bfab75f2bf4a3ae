"""JAX functions become the same graphs as torch modules: their values and gradients, their blocks,
their plans, their pins, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
import torch
from eager_parity import compare
from graph_interpreter import run_model
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import shardwright as sw
from shardwright.ir import Model
from shardwright.ir.from_jax import trace, widen
from shardwright.ir.from_jax.trees import named_leaves

MODELS = ["mlp", "plain_llama", "plain_scan", "linen_llama", "linen_scan", "linen_vit", "nnx_net",
          "equinox_gpt"]  # fmt: skip
Shape = jax.ShapeDtypeStruct
WEIGHT = {"w": Shape((8, 8), jnp.float32)}
ROWS = (Shape((2, 8), jnp.float32),)


@pytest.fixture(scope="module")
def traced() -> Callable[[str], Model]:
    found: dict[str, Model] = {}

    def of(name: str) -> Model:
        if name not in found:
            found[name] = trace(*getattr(jax_models, name)())
        return found[name]

    return of


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_function(
    name: str, traced: Callable[[str], Model], double: None
) -> None:
    compare(*getattr(jax_models, name)(), traced(name))


def test_labels_that_are_left_out_do_not_count(
    traced: Callable[[str], Model], double: None
) -> None:
    function, params, _ = jax_models.nnx_net()
    generator = np.random.default_rng(1)
    leaves = [jnp.asarray(generator.normal(size=leaf.shape)) for leaf in jax.tree.leaves(params)]
    tokens, labels = generator.integers(0, 10, (2, 2, 18))
    labels[:, ::4] = -100
    tree = jax.tree.unflatten(jax.tree.structure(params), leaves)
    want = widen(function)(tree, jnp.asarray(tokens), jnp.asarray(labels))
    names = named_leaves(params, "params")[0]
    stored = dict(zip(names, (torch.tensor(np.asarray(x)) for x in leaves), strict=True))
    given = {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels)}
    total, count = run_model(traced("nnx_net"), stored, given)
    assert int(count) == int((labels != -100).sum())
    assert float(total / count) == pytest.approx(float(want), rel=1e-12)


# -- the graph ------------------------------------------------------------------------------------


def kinds(model: Model, block: str) -> list[str]:
    return [op.kind for op in model.blocks[block].ops]


@pytest.mark.parametrize("name", ["plain_llama", "plain_scan", "linen_llama", "linen_scan"])
def test_a_llama_is_lifted_to_the_ops_that_torch_lifts_to(
    name: str, traced: Callable[[str], Model]
) -> None:
    model = traced(name)
    assert [s.block for s in model.segments] == ["Embedding", *["Layer"] * 3, "Head"]
    found = kinds(model, "Layer")
    for kind, count in (("rms_norm", 2), ("rotary", 2), ("attention", 1), ("linear_io", 7)):
        assert found.count(kind) == count, kind
    (attention,) = (op for op in model.blocks["Layer"].ops if op.kind == "attention")
    assert attention.attributes["causal"] and attention.sizes["k"] == jax_models.KV_HEADS
    assert kinds(model, "Head").count("cross_entropy") == 1
    assert {op.kind for op in model.preamble.ops} == {"positions", "rotary_table"}


def test_names_are_key_paths(traced: Callable[[str], Model]) -> None:
    assert "layers_1.self_attn.q_proj.kernel" in traced("linen_llama").parameters
    scanned = traced("linen_scan")
    assert "layers.self_attn.q_proj.kernel[1]" in scanned.parameters
    assert scanned.segments[2].module == "layers[1]"
    assert "self_attn.q_proj.kernel" in scanned.blocks["Layer"].parameters
    assert "blocks.1.qkv.weight" in traced("equinox_gpt").parameters
    assert "blocks.1.up.kernel" in traced("nnx_net").parameters
    assert "layers.0.wq" in traced("plain_llama").parameters
    assert [v.name for v in traced("plain_llama").inputs] == ["tokens", "labels"]


def test_tied_embeddings_are_one_parameter(traced: Callable[[str], Model]) -> None:
    assert traced("equinox_gpt").tied == {"wte"}


def test_patches_are_a_linear_layer(traced: Callable[[str], Model]) -> None:
    model = traced("linen_vit")
    assert kinds(model, "Embedding").count("linear_io") == 1
    assert kinds(model, "Block").count("attention") == 1
    assert kinds(model, "Block").count("layer_norm") == 2


@pytest.mark.parametrize("make", [jax_models.plain_scan, jax_models.plain_llama])
def test_layers_are_one_block_however_many(make: Any) -> None:
    model = trace(*make(12 if make is jax_models.plain_llama else 126))
    layers = [s.block for s in model.segments[1:-1]]
    assert set(layers) == {"Layer"}
    assert len(layers) == (12 if make is jax_models.plain_llama else 126)
    assert model.segments[-2].parameters[0].endswith("[125]" if len(layers) == 126 else "attn_norm")


def test_a_405b_llama_is_traced_from_shapes() -> None:
    function, params, inputs = jax_models.linen_llama(
        True, layers=126, vocabulary=128256, hidden=16384, ffn=53248, heads=128, kv_heads=8
    )
    model = trace(function, params, inputs)
    assert model.elements == 405_853_388_800
    assert len(model.segments) == 128 and len(model.blocks) == 3


def test_scan_with_a_growing_output_is_written_out() -> None:
    def loss(params: Any, x: Any) -> Any:
        def body(x: Any, w: Any) -> tuple[Any, Any]:
            x = jnp.tanh(x @ w)
            return x, x

        x, every = jax.lax.scan(body, x, params["w"])
        return jnp.mean(every**2) + jnp.mean(x**2) * 0

    with pytest.raises(sw.UnsupportedOp, match="the loss ends in"):
        trace(loss, {"w": Shape((3, 8, 8), jnp.float32)}, (Shape((2, 8), jnp.float32),))


def test_pairs_that_turn_are_rotary_too() -> None:
    def loss(p: Any, x: Any) -> Any:
        q = (x @ p["w"]).reshape(*x.shape[:2], 2, 4)
        angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(0, 4, 2) / 4)
        cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
        even, odd = q[..., ::2], q[..., 1::2]
        q = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(q.shape)
        return jnp.mean(q.reshape(x.shape) @ p["w"])

    model = trace(loss, WEIGHT, (Shape((2, 16, 8), jnp.float32),))
    (rotary,) = (op for op in model.blocks["Program"].ops if op.kind == "rotary")
    assert rotary.attributes["style"] == "interleaved"


def test_windows_and_grouped_heads_of_jaxs_own_attention() -> None:
    def loss(p: Any, x: Any) -> Any:
        q = (x @ p["q"]).reshape(*x.shape[:2], 4, 4)
        k = (x @ p["k"]).reshape(*x.shape[:2], 2, 4)
        y = jax.nn.dot_product_attention(q, k, k, is_causal=True, local_window_size=(3, 0))
        return jnp.mean(y.reshape(x.shape) @ p["q"])

    size = {"q": Shape((16, 16), jnp.float32), "k": Shape((16, 8), jnp.float32)}
    model = trace(loss, size, (Shape((2, 16, 16), jnp.float32),))
    (attention,) = (op for op in model.blocks["Program"].ops if op.kind == "attention")
    assert attention.attributes["causal"] and attention.attributes["window"] == 4
    assert attention.sizes["k"] == 2


@pytest.mark.parametrize(
    ("function", "kind", "attributes"),
    [
        (jax.nn.softplus, "softplus", {}),
        (jax.nn.silu, "silu", {}),
        (lambda x: jax.nn.gelu(x, approximate=False), "gelu", {"approximate": "none"}),
        (jax.nn.gelu, "gelu", {"approximate": "tanh"}),
        (jax.nn.relu, "relu", {}),
    ],
)
def test_activations_are_one_op(function: Any, kind: str, attributes: dict[str, Any]) -> None:
    model = trace(lambda p, x: jnp.mean(function(x @ p["w"])), WEIGHT, ROWS)
    (found,) = (op for op in model.blocks["Program"].ops if op.kind == kind)
    assert dict(found.attributes) == attributes


def test_dropout_is_one_op() -> None:
    def loss(p: Any, x: Any, key: Any) -> Any:
        y = x @ p["w"]
        return jnp.mean(jnp.where(jax.random.bernoulli(key, 0.9, y.shape), y / 0.9, 0.0))

    model = trace(loss, WEIGHT, (*ROWS, Shape((2,), jnp.uint32)))
    (found,) = (op for op in model.blocks["Program"].ops if op.kind == "dropout")
    assert found.attributes["p"] == pytest.approx(0.1)
    assert [value.name for value in model.inputs] == ["x"]


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_plans(name: str, traced: Callable[[str], Model]) -> None:
    plan = sw.plan(traced(name), "h100-sxm:1x4", sw.Workload(8, 64), top=1)
    assert plan.predicted.step_seconds > 0
    assert set(plan.to_json()["parameters"]) == set(traced(name).parameters)


def test_tensor_parallel_types_of_a_llama_are_megatrons() -> None:
    function, params, inputs = jax_models.linen_llama(
        True, layers=4, vocabulary=32000, hidden=4096, ffn=14336, heads=32, kv_heads=8
    )
    work = sw.Workload(8, 4096)
    plan = sw.plan(
        function, "h100-sxm:1", work, fix="tp=8,pp=1,dp=1", params=params,
        example_inputs=inputs, top=1,
    )  # fmt: skip
    types = {n: p["sbp"]["tp"] for n, p in plan.to_json()["parameters"].items()}
    prefix = "layers."
    for part, dim in (("self_attn.q_proj", 1), ("self_attn.o_proj", 0), ("gate_proj", 1),
                      ("up_proj", 1), ("down_proj", 0)):  # fmt: skip
        assert types[f"{prefix}{part}.kernel[2]"] == f"S({dim})", part
    assert types["lm_head.kernel"] == "S(1)"


def test_the_command_line_takes_a_jax_callable(repository: Any) -> None:
    run = [sys.executable, "-m", "shardwright", "plan", "jax_models:plain_scan", "--cluster",
           "h100-sxm:1x4", "--global-batch", "8", "--seq-len", "64"]  # fmt: skip
    done = subprocess.run(run, cwd=repository / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain_scan" in done.stdout


def test_torch_is_not_needed(repository: Any) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import shardwright as sw, jax_models\n"
        "f, p, x = jax_models.plain_scan()\n"
        "plan = sw.plan(f, 'h100-sxm:1x4', sw.Workload(8, 64), params=p, example_inputs=x)\n"
        "other = sw.trace('jax_models:plain_scan')\n"
        "print(len(plan.model.segments), len(other.segments))\n"
    )
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, cwd=repository / "tests", capture_output=True, text=True)
    assert out.stdout.split() == ["5", "5"], out.stderr


# -- pins -----------------------------------------------------------------------------------------


def pinned(x: Any) -> Any:
    return sw.annotate(x, tp="S(2)")


def pins_of(through: Callable[[Any], Any], **params: Any) -> dict[str, dict[str, str]]:
    def loss(p: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(through(x @ p["up"])) @ p["down"])

    stored = {"up": Shape((8, 16), jnp.float32), "down": Shape((16, 8), jnp.float32)} | params
    model = trace(loss, stored, (Shape((2, 4, 8), jnp.float32),))
    return {f"{pin.target} {pin.name}": dict(pin.types) for pin in model.pins}


def test_an_annotated_activation_is_pinned() -> None:
    assert pins_of(pinned) == {"activation Program:up_1": {"tp": "S(2)"}}
    assert pins_of(jax.checkpoint(pinned)) == pins_of(pinned)


def test_sharding_constraints_are_pins() -> None:
    mesh = AbstractMesh((2, 4), ("dp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    spec = NamedSharding(mesh, PartitionSpec("dp", None, "tp"))
    found = pins_of(lambda x: jax.lax.with_sharding_constraint(x, spec))
    assert found == {"activation Program:up_1": {"dp": "S(0)", "tp": "S(2)"}}


def test_shardings_of_parameters_are_pins() -> None:
    mesh = AbstractMesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    up = Shape((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "tp")))
    assert pins_of(lambda x: x, up=up) == {"parameter up": {"tp": "S(1)"}}


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "params", "inputs", "says"),
    [
        (lambda p, x: x @ p["w"], WEIGHT, ROWS, "expected one scalar, the loss"),
        (lambda p, x: (x @ p["w"]).sum() if x.sum() > 0 else x.sum(), WEIGHT, ROWS, "control flow"),
        (lambda p, x: x.sum(), {"w": "text"}, ROWS, "params w: str is no array"),
        (lambda p, x: x.sum(), object(), ROWS, "expected a pytree"),
        (lambda p, x: x.sum(), {}, ROWS, "params has no arrays"),
        (lambda p, x: x.sum(), WEIGHT, (*ROWS, *ROWS), "the function takes x"),
        (lambda p, x: x.sum(), WEIGHT, ROWS, "does not depend on any parameter"),
        (lambda p, x: np.asarray(x @ p["w"]).mean(), WEIGHT, ROWS, "use jax.numpy"),
        (lambda p, x: p["w"].sum() * x, WEIGHT, (Shape((), jnp.float32),), "none has a batch dim"),
        (
            lambda p, x, y: (x @ p["w"]).sum() + y.sum(),
            WEIGHT,
            (*ROWS, Shape((3, 8), jnp.float32)),
            "x [2, 8] and y [3, 8]: dim 0 is the batch",
        ),
        (lambda p, x: (x.reshape(2, 8) @ p["w"]).mean(), WEIGHT, ROWS, "one batch size only"),
    ],
)
def test_bad_input_is_one_line(function: Any, params: Any, inputs: Any, says: str) -> None:
    with pytest.raises(sw.InvalidInput, match=re.escape(says)) as caught:
        trace(function, params, inputs)
    assert "\n" not in str(caught.value)


def test_an_op_without_a_rule_is_named_with_its_line() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.mean(jnp.sin(x @ p["w"]))

    with pytest.raises(sw.UnsupportedOp, match=r"op sin at test_from_jax.py:\d+.*no rule"):
        trace(loss, WEIGHT, ROWS)


def test_a_function_needs_its_parameters() -> None:
    with pytest.raises(sw.InvalidInput, match="params="):
        sw.trace(lambda p, x: x.sum(), ROWS)
