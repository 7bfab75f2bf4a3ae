"""JAX functions in JAX programs and in torch programs: the loss and every gradient, in float64.

The judge is the function itself on one device. Weights are carried over by their key paths.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

import shardwright as sw
from shardwright.backends import emission
from shardwright.backends.emission.weights import by_name
from shardwright.backends.parity import Function, layout_plan, verify_layouts
from shardwright.backends.to_jax.reference import FunctionReference
from shardwright.backends.to_torch.names import _TAKEN, torch_names
from shardwright.cli import app

MODELS = ["mlp", "plain_scan", "linen_llama", "linen_scan", "linen_vit", "nnx_net", "equinox_gpt"]
LAYOUTS = ["tp=2", "dp=2,zero=1", "dp=2,zero=3", "tp=2,dp=2"]
Shape = jax.ShapeDtypeStruct
WEIGHT = {"w": Shape((8, 8), jnp.float32)}
ROWS = (Shape((2, 8), jnp.float32),)


def function(name: str) -> Function:
    return Function(*getattr(jax_models, name)())


def square(p: Any, x: Any) -> Any:
    return jnp.mean((x @ p["w"]) ** 2)


# -- programs compute what the function computes --------------------------------------------------


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_programs_of_a_function(name: str, backend: str) -> None:
    results = verify_layouts(function(name), LAYOUTS, backend=backend)
    losses = set()
    for layout, result in zip(LAYOUTS, results, strict=True):
        assert "error" not in result, (layout, result["error"])
        assert result["worst_gradient"]["relative_error"] <= 1e-10, (layout, result)
        single, sharded = result["loss"]["single"], result["loss"]["sharded"]
        assert abs(single - sharded) <= 1e-10 * abs(single), (layout, result["loss"])
        assert result["equal"], layout
        losses.add(round(single, 9))
    assert len(losses) == 2  # one batch for one replica, a larger one for two


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_float32_is_verified_too(backend: str) -> None:
    result = sw.verify(
        square, params=WEIGHT, example_inputs=ROWS, layout="dp=2", dtype="float32", backend=backend
    )
    assert result["equal"] and result["tolerance"] == 1e-5


def test_a_wrong_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's weights are another's: what is compared does differ."""
    changed = FunctionReference.save

    def save(self: FunctionReference, path: Path) -> None:
        self.values["w"] = self.values["w"] + 1e-7
        changed(self, path)
        self.values["w"] = self.values["w"] - 1e-7

    monkeypatch.setattr(FunctionReference, "save", save)
    made = sw.verify(square, params=WEIGHT, example_inputs=ROWS, layout="dp=2", backend="jax")
    assert "error" not in made
    assert not made["equal"]


def test_labels_that_a_function_leaves_out_are_in_its_batch() -> None:
    for name, ignores in (("nnx_net", True), ("plain_scan", False)):
        given = function(name)
        plan = layout_plan(given.trace(), "dp=2")
        reference = FunctionReference(
            given.function, given.params, given.example_inputs, plan.model.parameters
        )
        counts = (reference.batch(plan)["labels"] == -100).sum(axis=1)
        assert (len(set(counts.tolist())) > 1) == ignores, name


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_synthetic_tokens_are_of_the_dtype_that_a_function_takes(backend: str) -> None:
    """JAX's are int32, of which torch's and JAX's `data.py` made normal numbers once."""
    file = Path(emission.__file__).parents[1] / f"to_{backend}" / "templates" / "data.py"
    spec = importlib.util.spec_from_file_location(f"data_of_{backend}", file)
    assert spec is not None and spec.loader is not None
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    tokens = data.batch(range(8), {"tokens": ("int32", ("b", "s"), 5)}, 64, 0)["tokens"]
    assert "int32" in str(tokens.dtype) and tuple(tokens.shape) == (8, 64)
    assert sorted(np.unique(np.asarray(tokens)).tolist()) == [0, 1, 2, 3, 4]


# -- names ----------------------------------------------------------------------------------------


def test_slices_of_a_stack_keep_their_names_in_jax(tmp_path: Path) -> None:
    plan = layout_plan(function("plain_scan").trace(), "tp=2")
    sw.Plan._of(plan).emit("jax", tmp_path)
    assert '"layers.wq[2]": Parameter(' in (tmp_path / "parameters.py").read_text()
    source = (tmp_path / "model.py").read_text()
    assert 'layers(layer, under(params, "layers[0-2]")' in source
    assert 'local(p["wq"])' in source


def test_layers_that_are_numbered_are_one_scan_each_kind(tmp_path: Path) -> None:
    """`layers_0 … layers_2` has no parent; of an MLP's layers only like ones are stacked."""
    sw.Plan._of(layout_plan(function("linen_llama").trace(), "dp=2")).emit("jax", tmp_path / "a")
    assert 'under(params, "layers_0-2")' in (tmp_path / "a" / "model.py").read_text()
    sw.Plan._of(layout_plan(function("mlp").trace(), "dp=2")).emit("jax", tmp_path / "b")
    source = (tmp_path / "b" / "model.py").read_text()
    for call in ('run(layer, under(params, "0")', 'layers(layer2, under(params, "1-2")',
                 'run(layer3, under(params, "3")'):  # fmt: skip
        assert call in source


def test_torch_holds_the_layers_of_a_stack_one_by_one() -> None:
    model = function("linen_scan").trace()
    names = torch_names(model)
    assert names["layers.self_attn.q_proj.kernel[1]"] == "layers.1.self_attn.q_proj.kernel"
    assert names["lm_head.kernel"] == "lm_head.kernel"
    assert len(set(names.values())) == len(names)


def test_names_that_torch_has_itself_are_known() -> None:
    assert {n for n in dir(torch.nn.Module()) if not n.startswith("_")} <= _TAKEN


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("form", ["tree", "flat"])
def test_weights_are_carried_over_by_name(tmp_path: Path, backend: str, form: str) -> None:
    given = function("plain_scan")
    generator = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), given.params)
    stored = {f"layers.{name}": array for name, array in tree["layers"].items()}
    stored |= {name: array for name, array in tree.items() if name != "layers"}
    plan = sw.Plan._of(layout_plan(given.trace(), "tp=2"))
    folder = plan.emit(backend, tmp_path, weights=tree if form == "tree" else stored)
    written = load_file(folder / "weights.safetensors")
    if backend == "jax":
        assert all(np.array_equal(written[name], array) for name, array in stored.items())
    else:
        assert np.array_equal(written["layers.2.wq"], stored["layers.wq"][2])
        assert set(written) == set(torch_names(plan.model).values())


def test_weights_of_other_names_are_refused(tmp_path: Path) -> None:
    plan = sw.Plan._of(layout_plan(function("plain_scan").trace(), "tp=2"))
    with pytest.raises(sw.InvalidInput, match="weights: embed is missing; there are wte"):
        plan.emit("torch", tmp_path, weights={"wte": np.zeros((4, 4))})
    with pytest.raises(sw.InvalidInput, match="a shape has no values"):
        plan.emit("jax", tmp_path, weights=function("plain_scan").params)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(sw.InvalidInput, match="slices of stacked arrays"):
        plan.emit("torch", tmp_path / "out", weights=tmp_path / "w.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_slice_is_found_in_its_stack() -> None:
    stack = np.arange(6).reshape(3, 2)
    found = by_name({"a.w": stack, "b": stack[0]}, ["a.w[2]", "b"])
    assert found["a.w[2]"].tolist() == [4, 5] and found["b"].tolist() == [0, 1]


# -- ways in --------------------------------------------------------------------------------------


def test_a_function_is_verified_from_python() -> None:
    result = sw.verify(
        square, params={"w": np.eye(8)}, example_inputs=ROWS, layout="tp=2,dp=2", backend="jax"
    )
    assert result["equal"] and result["ranks"] == 4


def test_the_command_line_verifies_jax_without_torch(repository: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from shardwright.__main__ import main\n"
        "sys.argv = ['shardwright', *sys.argv[1:]]; main()\n"
    )
    command = [sys.executable, "-c", script, "verify", "jax_models:mlp", "--layout", "tp=2"]
    for backend, status in (("jax", 0), ("torch", 2)):
        done = subprocess.run([*command, "--backend", backend, "--json"], capture_output=True,
                              text=True, cwd=repository / "tests")  # fmt: skip
        assert done.returncode == status, done.stderr
        if backend == "jax":
            assert json.loads(done.stdout)["equal"]
        else:
            assert "torch is not installed" in done.stderr


def test_a_plan_of_a_jax_path_is_verified(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    plan = sw.plan("jax_models:mlp", "h100-sxm:1x4", sw.Workload(16, 64), backend="jax",
                   fix="tp=2,dp=2")  # fmt: skip
    plan.save(tmp_path / "plan.json")
    result = sw.verify(sw.Plan.load(tmp_path / "plan.json"), backend="jax")
    assert result["equal"] and result["ranks"] == 4


BAD = {
    "control_flow": "use jax.lax.cond",
    "numpy_inside": "use jax.numpy",
    "container": "Weights is no array; expected a pytree",
    "no_scalar": "expected one scalar, the loss",
    "no_batch": "none has a batch dim",
    "unknown_op": "op sin at bad_jax_models.py",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["plan", "verify"])
def test_bad_functions_end_in_one_line(name: str, command: str, monkeypatch: Any) -> None:
    """On the command line: exit code 2, and what to do."""
    monkeypatch.chdir(Path(__file__).parent)
    options = {
        "plan": ["--cluster", "h100-sxm:1x4", "--global-batch", "8", "--seq-len", "16"],
        "verify": ["--layout", "dp=2", "--backend", "jax"],
    }
    done = CliRunner().invoke(app, [command, f"bad_jax_models:{name}", *options[command]])
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.output
    assert BAD[name] in done.stderr


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sw.verify(square, params=WEIGHT, layout="tp=2"), "example_inputs:"),
        (
            lambda: sw.verify(
                square, params=WEIGHT, example_inputs=ROWS, layout="pp=2", backend="jax"
            ),
            "pp",
        ),
        (
            lambda: sw.verify(
                square, params={"w": Shape((8, 8 * 10**8), jnp.float32)}, example_inputs=ROWS,
                layout="tp=2", backend="jax",
            ),
            "6,400,000,000 parameters",
        ),
        (
            lambda: sw.verify(
                square, params=WEIGHT, example_inputs=ROWS, layout="tp=2", dtype="bf16"
            ),
            "dtype 'bf16'",
        ),
        (
            lambda: verify_layouts(
                Function(lambda p, x: jnp.mean(x @ p["train"]),
                         {"train": Shape((8, 8), jnp.float32)}, ROWS), ["dp=2"]
            ),
            "parameter train: 'train' is an attribute of torch.nn.Module",
        ),
        (
            lambda: verify_layouts(
                Function(lambda p, x: jnp.mean(jnp.sin(x @ p["w"])), WEIGHT, ROWS), ["dp=2"]
            ),
            "op sin at test_across.py",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(sw.ShardwrightError, match=re.escape(says)) as caught:
        call()
    assert "\n" not in str(caught.value)
