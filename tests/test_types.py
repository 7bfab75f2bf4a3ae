"""Emitted stages under spmd_types' checker: global mode, fake process groups of 8 and of 64 ranks.

The checker and its types are not ours: it infers from torch's ops and the collectives what every
value is, so a program that lacks a conversion is rejected. Declared in our own words are only the
lifted ops (`lifted`, through spmd_types' local_map) and a few views.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from emit_cases import random_plan, scaled, small_plan

from shardwright.backends.to_torch import emit
from shardwright.ir.mesh import Mesh

WORKER = Path(__file__).with_name("typecheck_worker.py")

# The layouts of the parity list, with as much data parallelism as the ranks leave.
LAYOUTS = {
    8: ["tp=2,dp=4,pp=1", "tp=4,dp=2,pp=1", "tp=1,dp=8,pp=1", "tp=2,dp=2,pp=2", "tp=1,dp=4,pp=2",
        "tp=2,dp=1,pp=4,stages=1-2-1-2", "tp=2,dp=4,pp=1,recompute=full",
        "tp=2,dp=4,pp=1,recompute=selective"],
    64: ["tp=2,dp=32,pp=1", "tp=4,dp=16,pp=1", "tp=1,dp=64,pp=1", "tp=2,dp=16,pp=2",
         "tp=2,dp=8,pp=4,stages=1-2-1-2"],
}  # fmt: skip
MODELS = ("llama", "gpt2", "plain")


def checked(world: int, folders: list[Path]) -> dict[str, list[str | None]]:
    """What the checker says of every stage of every folder."""
    command = [sys.executable, str(WORKER), str(world), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, list[str | None]] = json.loads(run.stdout.strip().splitlines()[-1])
    return {Path(folder).name: said for folder, said in found.items()}


def complaints(said: Mapping[str, list[str | None]]) -> dict[str, list[str]]:
    return {name: [m for m in all_ if m] for name, all_ in said.items() if any(all_)}


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_every_stage_is_well_typed(world: int, precision: str, tmp_path: Path) -> None:
    folders = []
    for name in MODELS:
        for i, layout in enumerate(LAYOUTS[world]):
            plan = small_plan(name, layout, world, precision=precision)
            folders.append(emit(plan, tmp_path / f"{name}-{i}"))
        planned = scaled(name, world, tp=2, precision=precision)
        folders.append(emit(planned, tmp_path / f"{name}-scaled"))
    said = checked(world, folders)
    assert complaints(said) == {}
    stages = sum(4 if "pp=4" in x else 2 if "pp=2" in x else 1 for x in LAYOUTS[world]) + 1
    assert sum(map(len, said.values())) == stages * len(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_any_annotation_gives_a_well_typed_program(name: str, tmp_path: Path) -> None:
    """Also those that no planner would choose."""
    mesh = Mesh.of(pp=1, dp=2, tp=4).factored("tp", (2, 2))
    base = small_plan(name, "pp=1,dp=2,tp=1", 2)
    folders = [emit(random_plan(base, mesh, seed), tmp_path / f"seed-{seed}") for seed in range(12)]
    assert complaints(checked(8, folders)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_missing_conversion_is_rejected(name: str, tmp_path: Path) -> None:
    """Every single conversion of a program is needed: without it, the checker objects."""
    good = emit(scaled(name, 8, tp=2), tmp_path / "good")
    source = (good / "model.py").read_text()
    calls = conversions(source)
    assert len(calls) >= 6
    folders = [good]
    for i, call in enumerate(calls):
        folders.append(tmp_path / f"without-{i}")
        mutate(good, folders[-1], call, ast.unparse(call.args[0]))
    gathers = [c for c in calls if ast.unparse(c.func).endswith("all_gather")]
    for i, call in enumerate(gathers):  # a gradient that would not be summed
        folders.append(tmp_path / f"invariant-{i}")
        mutate(good, folders[-1], call, ast.unparse(call).replace("dst=R", "dst=I"))
    said = checked(8, folders)
    assert complaints({"good": said.pop("good")}) == {}
    accepted = [name for name, all_ in said.items() if not any(all_)]
    assert accepted == []


def conversions(source: str) -> list[ast.Call]:
    """The calls of spmd_types in the source, in order."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("spmd.")
    ]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def mutate(good: Path, folder: Path, call: ast.Call, text: str) -> None:
    """A copy of a program with one call replaced."""
    folder.mkdir()
    for path in good.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    source = (good / "model.py").read_text()
    segment = ast.get_source_segment(source, call)
    lines = source.splitlines(keepends=True)
    # columns of ast are in bytes; conversions are ASCII up to their end
    start = sum(map(len, lines[: call.lineno - 1])) + call.col_offset
    assert segment and source[start : start + len(segment)] == segment
    (folder / "model.py").write_text(source[:start] + text + source[start + len(segment) :])
