"""The emitted folder as text: what a reader gets, and what the rest of the program relies on."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emit_cases import scaled, small_plan, traced
from hypothesis import given
from hypothesis import strategies as st

import shardwright as sw
from shardwright.backends.to_torch import TEMPLATES, emit
from shardwright.backends.to_torch.program import model_source
from shardwright.ir import UnsupportedOp
from shardwright.ir.plan import Recompute, Stage

LAYER = """\
        # tp: S(1) → R (all-gather; backward: reduce-scatter)
        x = spmd.all_gather(x, tp, src=S(1), dst=R)
        gate = F.linear(x, local(self.mlp.gate_proj.weight))
        up = F.linear(x, local(self.mlp.up_proj.weight))
        x = F.silu(gate) * up
        x = F.linear(x, local(self.mlp.down_proj.weight))
        # tp: P → S(1) (reduce-scatter; backward: all-gather)
        x = spmd.reduce_scatter(x, tp, src=P, dst=S(1))
        return hidden + x
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tensor and sequence parallelism, as the planner types it at its real size."""
    return emit(scaled("llama", 4, tp=2), tmp_path_factory.mktemp("emitted") / "program")


def test_a_layer_reads_as_a_person_would_write_it(folder: Path) -> None:
    assert LAYER in (folder / "model.py").read_text()


def test_the_folder_stands_alone_and_is_tidy(folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("*.py"))
    assert {"model.py", "parameters.py", "settings.py", "layout.py", "ops.py"} <= set(files)
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path.name} says nothing of itself"
        imported = {
            name.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        assert not any("shardwright" in name for name in imported), path.name
    generated = [str(folder / name) for name in ("model.py", "parameters.py", "settings.py")]
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--no-cache", "--isolated", "--line-length", "100", *generated]
    for arguments in (["check", "--select", "E,F,W,I,UP,B"], ["format", "--check"]):
        run = subprocess.run([*ruff, *arguments, *options], cwd=folder, capture_output=True)
        assert run.returncode == 0, run.stdout.decode()


def test_the_same_plan_gives_the_same_text(folder: Path, tmp_path: Path) -> None:
    again = emit(scaled("llama", 4, tp=2), tmp_path)
    for path in folder.glob("*.py"):
        assert (again / path.name).read_text() == path.read_text()


def test_depth_adds_no_lines() -> None:
    sources = [
        model_source(small_plan("llama", "tp=2,dp=1,pp=2", 4, layers=layers)) for layers in (4, 8)
    ]
    assert len({source.count("\n") for source in sources}) == 1


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_each_run_of_layers_with_one_mode_is_a_loop(mode: Recompute) -> None:
    plan = small_plan("llama", "tp=1,dp=1,pp=1", 1)
    modes: list[Recompute] = ["full", "full", "full", "none", mode, mode, mode, "none"]
    plan = replace(plan, stages=(Stage(0, len(modes), tuple(modes)),))
    source = model_source(plan)
    assert source.count("for layer in") == 2
    assert ('self.get_submodule("model.layers.2")(hidden' in source) == (mode != "none")
    assert "list(self.model.layers.children())[:2]:" in source
    assert source.count("context_fn=selective") == (mode == "selective")


def test_bfloat16_gradients_say_how_they_are_summed() -> None:
    assert "OWN_DTYPE" not in model_source(scaled("llama", 4, tp=2))
    source = model_source(scaled("llama", 4, tp=2, precision="bf16"))
    assert "dst=R, backward_options=OWN_DTYPE)" in source


def test_what_others_rely_on(folder: Path) -> None:
    with loaded(folder, "layout", "settings", "parameters") as (layout, settings, parameters):
        assert settings.MESH == {"pp": 1, "dp": 2, "tp": 2}
        assert list(parameters.PARAMETERS) == list(traced("llama").parameters)
        down = parameters.PARAMETERS["model.layers.5.mlp.down_proj.weight"]
        assert (down.shape, dict(down.types), down.init) == (
            (32, 64),
            {"tp": "S(1)"},
            ("normal", 0.02),
        )
        assert layout.local_shape(down, settings.MESH) == (32, 32)


def test_tied_parameters_name_all_their_stages() -> None:
    from shardwright.backends.emission.parameters import parameters_source

    source = parameters_source(small_plan("gpt2", "tp=1,dp=1,pp=2", 2))
    (line,) = [x for x in source.splitlines() if '"transformer.wte.weight"' in x]
    assert "(0, 1)" in line


def test_weights_are_written_beside_the_program(tmp_path: Path) -> None:
    plan = small_plan("gpt2", "tp=1,dp=1,pp=1", 1)
    emit(plan, tmp_path, weights={"a": torch.ones(2), "b": torch.ones(3).t()})
    assert 'WEIGHTS = "weights.safetensors"' in (tmp_path / "settings.py").read_text()
    with pytest.raises(sw.InvalidInput, match="no such file"):
        emit(plan, tmp_path, weights=tmp_path / "missing")


def test_an_op_without_a_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwright.backends.to_torch import optable

    monkeypatch.delitem(optable.TEMPLATES, "silu")
    with pytest.raises(UnsupportedOp, match=r"'silu' at .*act_fn.*optable\.py"):
        model_source(small_plan("llama", "tp=1,dp=1,pp=1", 1))


# --- layout.py ------------------------------------------------------------------------------------


class loaded:  # noqa: N801 - used as a function
    """Modules of a folder, under their own names as long as the context lasts."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names

    def __enter__(self) -> list[ModuleType]:
        found = []
        for name in self.names:
            spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(module)
        return found

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def layout() -> Iterator[ModuleType]:
    with loaded(TEMPLATES, "layout") as (module,):
        yield module


@given(data=st.data())
def test_intervals_are_where_the_elements_are(layout: ModuleType, data: Any) -> None:
    """The shard is the tensor, unfolded to its factors and chunked along each axis in turn."""
    mesh = {"pp": 1, "dp": 2, "tp0": 2, "tp1": data.draw(st.sampled_from([2, 3]))}
    size = st.sampled_from([1, 2, 3, 12])
    dims = st.lists(size, min_size=1, max_size=3).map(tuple)
    factors = tuple(data.draw(st.lists(dims, min_size=1, max_size=2)))
    places = [f"S({d}.{p})" for d, sizes in enumerate(factors) for p in range(len(sizes))]
    types = {a: data.draw(st.sampled_from(["I", *places])) for a in ("tp0", "tp1")}
    shape = tuple(prod(sizes) for sizes in factors)
    parameter = layout.Parameter(shape, types, factors=factors)
    whole = torch.arange(prod(shape)).reshape([n for sizes in factors for n in sizes])
    starts = [sum(len(sizes) for sizes in factors[:d]) for d in range(len(factors))]
    for i, j in product(range(mesh["tp0"]), range(mesh["tp1"])):
        expected = whole
        for axis, index in (("tp0", i), ("tp1", j)):
            if types[axis] != "I":
                dim, part = layout.split_of(types[axis])
                at = starts[dim] + part
                if expected.shape[at] % mesh[axis]:
                    return
                expected = expected.chunk(mesh[axis], at)[index]
        local = layout.local_shape(parameter, mesh)
        expected = expected.reshape(local)
        where = {"pp": 0, "dp": 1, "tp0": i, "tp1": j}
        runs = layout.intervals(parameter, mesh, where)
        ids = [[o + k for o, n in dim for k in range(n)] for dim in runs]
        picked = whole.reshape(shape)
        for dim, index_list in enumerate(ids):
            picked = picked.index_select(dim, torch.tensor(index_list))
        assert torch.equal(picked, expected)
        plain = all(kind == "I" or kind.endswith(".0)") for kind in types.values())
        assert not plain or all(len(dim) == 1 for dim in runs)


# --- recomputation --------------------------------------------------------------------------------

MEMORY = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, settings, parallel, model
from torch.distributed._tools.mem_tracker import MemTracker
parallel.init_mesh(settings.MESH)
torch.manual_seed(0)
stage = model.Stage0()
with torch.no_grad():
    for parameter in stage.parameters():
        parameter.normal_(0, 0.02)
ids = torch.randint(0, 64, (settings.MICRO_BATCH, settings.SEQ_LEN))
with MemTracker() as tracker:
    loss = stage(input_ids=ids, labels=ids)
    (held,) = tracker.get_tracker_snapshot("current").values()
    loss.backward()
norms = [p.grad.norm().item() for p in stage.parameters()]
print(json.dumps({"bytes": held["Total"], "loss": loss.item(), "norms": norms}))
"""


@pytest.mark.slow
def test_recomputation_saves_memory_and_changes_nothing(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for mode in ("none", "selective", "full"):
        plan = small_plan(
            "llama", f"tp=1,dp=1,pp=1,micro_batch=2,recompute={mode}", 1, precision="fp32"
        )
        emit(plan, tmp_path / mode)
        command = [sys.executable, "-c", MEMORY, str(tmp_path / mode)]
        found[mode] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    none, selective, full = (found[mode] for mode in ("none", "selective", "full"))
    assert full["bytes"] < 0.5 * none["bytes"]
    assert full["bytes"] < selective["bytes"] < 0.75 * none["bytes"]
    for other in (selective, full):
        assert other["loss"] == none["loss"]
        assert other["norms"] == none["norms"]
