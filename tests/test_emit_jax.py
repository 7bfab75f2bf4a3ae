"""The JAX folder as text: what a reader gets, what it stands on, and what is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emit_cases import scaled, small_plan
from safetensors.torch import load_file

import shardwright as sw
from shardwright.backends.emission.weights import save
from shardwright.backends.to_jax import emit
from shardwright.backends.to_jax.optable import TEMPLATES
from shardwright.backends.to_jax.program import model_source
from shardwright.ir import UnsupportedOp
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import Stage

LAYER = """\
    # tp: S(1) → R (all-gather; backward: reduce-scatter)
    x = lax.all_gather(x, "tp", axis=1, tiled=True)
    gate = x @ local(p["mlp.gate_proj.weight"]).T
    up = x @ local(p["mlp.up_proj.weight"]).T
    x = nn.silu(gate) * up
    x = x @ local(p["mlp.down_proj.weight"]).T
    # tp: P → S(1) (reduce-scatter; backward: all-gather)
    x = lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True)
    return hidden + x
"""

ALLOWED = {"__future__", "argparse", "collections", "dataclasses", "functools", "importlib", "json",
           "math", "pathlib", "re", "sys", "time", "typing", "zlib", "jax", "numpy", "optax",
           "orbax", "safetensors", "tensorstore", "xxhash"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tensor and sequence parallelism, as the planner types it at its real size."""
    return emit(scaled("llama", 4, tp=2), tmp_path_factory.mktemp("emitted") / "program")


def test_a_layer_reads_as_a_person_would_write_it(folder: Path) -> None:
    assert LAYER in (folder / "model.py").read_text()


def test_the_folder_stands_alone_and_is_tidy(folder: Path) -> None:
    own = {path.stem for path in folder.glob("*.py")}
    assert {"model", "parameters", "settings", "layout", "ops", "step", "train"} <= own
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} says nothing of itself"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [] if names else [alias.name for alias in node.names]
                for name in names:
                    assert str(name).partition(".")[0] in ALLOWED | own, (path.name, name)
    generated = [str(folder / name) for name in ("model.py", "parameters.py", "settings.py")]
    options = ["--no-cache", "--isolated", "--line-length", "100", *generated]
    for arguments in (["check", "--select", "E,F,W,UP,B"], ["format", "--check"]):
        run = subprocess.run([sys.executable, "-m", "ruff", *arguments, *options],
                             cwd=folder, capture_output=True)  # fmt: skip
        assert run.returncode == 0, run.stdout.decode()


def test_emission_imports_no_framework(tmp_path: Path) -> None:
    small_plan_of("llama").save(tmp_path / "plan.json")
    script = (
        "import sys, shardwright as sw; "
        "sw.Plan.load(sys.argv[1]).emit('jax', sys.argv[2]); "
        "assert not {'torch', 'jax', 'transformers'} & set(sys.modules)"
    )
    arguments = [str(tmp_path / "plan.json"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "train.py").exists()


def small_plan_of(name: str) -> sw.Plan:
    plan = small_plan(name, "tp=2,dp=2,pp=1", 4)
    assert isinstance(plan, sw.Plan)
    return plan


def test_depth_adds_no_functions() -> None:
    """Layers are a scan; only the table of stacks names them one by one."""
    sources = [
        model_source(small_plan("llama", "tp=2,dp=1,pp=1", 2, layers=n)).split("# layers whose")[0]
        for n in (4, 8)
    ]
    assert len({source.count("\n") for source in sources}) == 1
    assert all(source.count("layers(llama_decoder_layer") == 1 for source in sources)


def test_each_run_of_layers_with_one_mode_is_a_scan() -> None:
    plan = small_plan("llama", "tp=1,dp=1,pp=1", 1)
    modes = ("full", "full", "full", "none", "full", "full", "full", "none")
    source = model_source(replace(plan, stages=(Stage(0, len(modes), modes),)))
    assert source.count("layers(\n") + source.count("layers(llama") == 3
    for part in ("[:2]", "[2:3]", "[3:]"):
        assert f'under(params, "model.layers.0-5"){part}' in source


def test_every_kind_has_a_template() -> None:
    assert set(TEMPLATES) == set(TABLE)


def test_an_op_without_a_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TEMPLATES, "silu")
    with pytest.raises(UnsupportedOp, match=r"'silu' at .*act_fn.*to_jax/optable\.py"):
        model_source(small_plan("llama", "tp=1,dp=1,pp=1", 1))


def test_what_is_refused_says_what_to_do(tmp_path: Path) -> None:
    plan = small_plan("llama", "tp=1,dp=1,pp=1", 1)
    with pytest.raises(sw.InvalidInput, match="expected torch or jax"):
        plan.emit("mxnet", tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(sw.InvalidInput, match="no such file"):
        emit(small_plan_of("llama"), tmp_path, weights=tmp_path / "missing")


def test_weights_keep_their_bits(tmp_path: Path) -> None:
    """Of torch tensors, in any dtype and order, and of arrays; and torch reads them."""
    kept = {
        "narrow": torch.randn(3, 5).to(torch.bfloat16),
        "turned": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
        "array": np.arange(4, dtype=np.float32),
    }
    save(kept, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(found[name], torch.as_tensor(tensor))
        assert found[name].dtype == torch.as_tensor(tensor).dtype
