"""JAX pipelines: the order of work, which form a plan gets, what a reader sees, what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from emit_cases import small_plan
from hypothesis import given
from hypothesis import strategies as st

import shardwright as sw
from shardwright.backends.to_jax import TEMPLATES, emit
from shardwright.backends.to_jax.pipeline import ends_apart, program_form
from shardwright.ir.plan import Plan, ScheduleName
from shardwright.ir.schedule_rows import schedule_table


@pytest.fixture(scope="module")
def schedule() -> ModuleType:
    """schedule.py of emitted programs."""
    file = TEMPLATES / "stages" / "schedule.py"
    spec = importlib.util.spec_from_file_location("emitted_schedule", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the order of work ----------------------------------------------------------------------------


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved"]),
    pp=st.integers(2, 6), microbatches=st.integers(1, 13), vpp=st.integers(2, 4),
)  # fmt: skip
def test_ranks_run_what_was_planned(
    schedule: ModuleType, name: ScheduleName, pp: int, microbatches: int, vpp: int
) -> None:
    here = vpp if name == "interleaved" else 1
    try:
        table = schedule_table(name, pp, microbatches, here)
    except sw.InvalidInput:  # rounds that do not divide
        assert name == "interleaved" and microbatches % max(1, microbatches // pp)
        return
    for rank in range(pp):
        row = schedule.row(name, pp, pp * here, microbatches, rank)
        assert [tuple(a) for a in row] == [tuple(a) for a in table.rows[rank]]


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved"]),
    pp=st.integers(2, 5), rounds=st.integers(1, 3), vpp=st.integers(2, 3),
)  # fmt: skip
def test_waves_have_every_action_after_what_it_needs(
    schedule: ModuleType, name: ScheduleName, pp: int, rounds: int, vpp: int
) -> None:
    stages, microbatches = pp * (vpp if name == "interleaved" else 1), pp * rounds
    waves = schedule.waves(name, pp, stages, microbatches)
    at = {tuple(action): i for i, wave in enumerate(waves) for action in wave}
    assert len(at) == 2 * stages * microbatches == sum(map(len, waves))
    for (kind, stage, microbatch), wave in at.items():
        other = stage - 1 if kind == "F" else stage + 1
        if 0 <= other < stages:
            assert at[kind, other, microbatch] < wave
        elif kind == "B":
            assert at["F", stage, microbatch] < wave
    for wave in waves:
        assert len({action.stage % pp for action in wave}) == len(wave)


# -- which form a plan gets -----------------------------------------------------------------------


def plan_of(layout: str, name: str = "llama", layers: int = 4) -> Plan:
    pp = int(layout.partition("pp=")[2][0])
    return small_plan(name, f"tp=1,dp=1,{layout}", pp, layers=layers, global_batch=2 * pp)


def test_equal_stages_of_gpipe_are_one_program(tmp_path: Path) -> None:
    plan = plan_of("pp=2,schedule=gpipe")
    assert program_form(plan).kind == "ticks"
    assert [(s.first, s.last) for s in ends_apart(plan).stages] == [(0, 1), (1, 5), (5, 6)]
    source = (emit(plan, tmp_path) / "model.py").read_text()
    assert "One program has all 2 stages, of 2-2 layers: stages are equal" in source
    assert 'PIPELINED = "model.layers.0-3"' in source and "def stage(params" in source
    assert (tmp_path / "ticks.py").exists() and not (tmp_path / "pipeline.py").exists()


@pytest.mark.parametrize(
    ("layout", "name", "why"),
    [
        ("pp=2", "llama", "the schedule is 1f1b"),
        ("pp=2,schedule=gpipe,stages=3-1", "llama", "stages have 3-1 layers"),
        ("pp=2,schedule=gpipe", "dropout", "layers draw random numbers"),
    ],
)
def test_others_are_a_program_for_each_stage(
    layout: str, name: str, why: str, tmp_path: Path
) -> None:
    plan = plan_of(layout, name)
    form = program_form(plan)
    assert form.kind == "stages" and why in form.reason
    source = (emit(plan, tmp_path) / "model.py").read_text()
    assert why in " ".join(source.split())
    assert "STAGES = (stage_0, stage_1)" in source and "CARRIED = (" in source
    assert (tmp_path / "pipeline.py").exists() and not (tmp_path / "ticks.py").exists()


def test_layers_that_recompute_differently_are_not_equal() -> None:
    plan = plan_of("pp=2,schedule=gpipe")
    second = replace(plan.stages[1], recompute=("full", "none", "none"))
    other = replace(plan, stages=(plan.stages[0], second))
    assert program_form(other).reason == "recomputation differs between layers"


def test_what_is_written_is_tidy(tmp_path: Path) -> None:
    for layout in ("pp=2", "pp=2,schedule=gpipe"):
        folder = emit(plan_of(layout, "gpt2"), tmp_path / layout)
        names = [str(folder / name) for name in ("model.py", "parameters.py", "settings.py")]
        for arguments in (["check", "--select", "E,F,W,UP,B"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--isolated",
                       "--line-length", "100", *names]  # fmt: skip
            run = subprocess.run(command, cwd=folder, capture_output=True)
            assert run.returncode == 0, run.stdout.decode()


def test_a_pipeline_is_planned_and_emitted_from_python(tmp_path: Path) -> None:
    plan = sw.plan("llama-3.1-8b", "h100-sxm:1", sw.Workload(64, 512), fix="pp=2,tp=4,vpp=2",
                   backend="jax")  # fmt: skip
    source = (plan.emit("jax", tmp_path) / "model.py").read_text()
    assert "STAGES = (stage_0, stage_1, stage_2, stage_3)" in source


# -- what is refused ------------------------------------------------------------------------------


def test_schedules_that_jax_does_not_run_are_named(tmp_path: Path) -> None:
    plan = plan_of("pp=2")
    halves = replace(plan, strategy=replace(plan.strategy, schedule="zb-h1"))
    with pytest.raises(sw.InvalidInput, match=r"schedule=zb-h1: jax programs run 1f1b, gpipe, int"):
        emit(halves, tmp_path)
    assert not list(tmp_path.iterdir())
    interleaved = replace(plan, strategy=replace(plan.strategy, schedule="interleaved", vpp=2))
    with pytest.raises(sw.InvalidInput, match="interleaved schedules, but for jax"):
        sw.Plan._of(interleaved).emit("torch", tmp_path)
