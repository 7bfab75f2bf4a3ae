"""What the SBP program finds inside a Llama-3-8B block, beside layouts the field knows.

    python benchmarks/block_layouts.py

One fast axis (8 GPUs of a node), one slow axis (8 nodes), and both jointly (the 8x8 mesh on which
AutoParallel documents a plan: q/k/v and gate/up column-parallel, attention over batch x heads, the
output projection sequence-parallel, down row-parallel, parameters split over both axes). Known
layouts are stated as pins and priced by the same program under the same costs. A byte of parameter
state costs a little (less than recomputation would pay for it), so that ZeRO, which is as fast as
plain data parallelism here, is preferred to it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

import shardwright as sw
from shardwright.costmodel import Cluster
from shardwright.costmodel.precision import Precision
from shardwright.ir import AxisType, Mesh, NdType
from shardwright.ir.graph import Model
from shardwright.planner.chain import Chain
from shardwright.planner.costs import ModelCosts
from shardwright.planner.sbp_program import Typing, solve

Pins = Mapping[str, Mapping[str, str]]
"""Value of the layer block → axis → SBP type."""

LAYER = "LlamaDecoderLayer"

STATE_PRICE_S_PER_BYTE = 1e-12
STATE_BYTES = 18
"""bf16 copy, float32 gradient, master weight and two moments of a parameter."""


@dataclass(frozen=True)
class Problem:
    """Axes to decide over, and what each microbatch is."""

    title: str
    mesh: Mesh
    axes: tuple[str, ...]
    sequences: int
    cluster: str


PROBLEMS = {
    "fast": Problem("one fast axis: 8 GPUs of a node", Mesh.of(tp=8), ("tp",), 1, "h100-sxm:1"),
    "slow": Problem("one slow axis: 8 nodes", Mesh.of(dp=8), ("dp",), 8, "h100-sxm:8x1"),
    "both": Problem("8x8 mesh", Mesh.of(dp=8, tp=8), ("dp", "tp"), 64, "h100-sxm:8"),
}


def layer_values(model: Model) -> dict[str, str]:
    """The results of a layer's projections and of its attention, by role."""
    graph = model.blocks[LAYER]
    found: dict[str, str] = {}
    for op in graph.ops:
        if op.kind == "attention":
            found["attention"] = op.results[0]
        for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            if op.kind == "linear" and op.module.endswith(role):
                found[role] = op.results[0]
    return found


def known_layouts(model: Model) -> dict[str, tuple[str, Pins]]:
    """Title → (problem, pins)."""
    names = layer_values(model)
    column = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

    def pins(axis: str, o_proj: str, down: str) -> dict[str, dict[str, str]]:
        found = {names[role]: {axis: "S(2)"} for role in column}
        found[names["attention"]] = {axis: "S(1)"}
        return found | {names["o_proj"]: {axis: o_proj}, names["down_proj"]: {axis: down}}

    both = {v: {**types, "dp": "S(0)"} for v, types in pins("tp", "S(1)", "P").items()}
    every = {names[role]: {"dp": "S(0)"} for role in names}
    return {
        "Megatron tensor + sequence parallel": ("fast", pins("tp", "P", "P")),
        "data parallel with ZeRO": ("slow", every),
        "AutoParallel's documented plan": ("both", both),
        "data parallel x Megatron": (
            "both", {v: {**t, "dp": "S(0)"} for v, t in pins("tp", "P", "P").items()},
        ),
    }  # fmt: skip


def solved(model: Model, problem: Problem, pins: Pins | None = None) -> Typing:
    """The program of a problem, with the layer's values pinned."""
    axes = tuple(problem.mesh[axis] for axis in problem.axes)
    binding = {"b": problem.sequences, "s": 8192}
    costs = ModelCosts(
        Cluster.parse(problem.cluster),
        problem.mesh,
        axes,
        binding,
        Precision.preset("bf16"),
        model.blocks,
        gather_parameters=True,
        memory_price_s_per_byte=STATE_PRICE_S_PER_BYTE,
        state_bytes=STATE_BYTES,
    )
    types = {
        (LAYER, value): {axis: AxisType.parse(kind) for axis, kind in kinds.items()}
        for value, kinds in (pins or {}).items()
    }
    return solve(Chain.of(model, types), axes, binding, costs)


def shown(model: Model, typing: Typing) -> str:
    """The parameters of the layer and their types."""
    graph, types = model.blocks[LAYER], typing.annotations[LAYER]
    parts: list[str] = []
    for name, kind in zip(graph.parameters, types.parameters, strict=True):
        parts.append(f"{name.removesuffix('.weight').split('.')[-1]} {_short(kind)}")
    return ", ".join(parts)


def _short(kind: NdType) -> str:
    return "x".join(str(k) for _, k in kind)


def main() -> None:
    """Prints the table."""
    model = sw.trace("llama-3.1-8b")
    table = Table("problem", "layout", "ms per microbatch", "CPU s", "solved as", "parameters")
    best: dict[str, float] = {}
    for key, problem in PROBLEMS.items():
        began = time.process_time()
        found = solved(model, problem)
        seconds = time.process_time() - began
        best[key] = found.objective
        table.add_row(
            problem.title, "found", f"{found.objective * 1e3:.2f}", f"{seconds:.2f}",
            found.method, shown(model, found),
        )  # fmt: skip
    for title, (key, pins) in known_layouts(model).items():
        found = solved(model, PROBLEMS[key], pins)
        ratio = found.objective / best[key]
        table.add_row(
            PROBLEMS[key].title, title, f"{found.objective * 1e3:.2f} ({ratio:.3f}x)", "",
            found.method, shown(model, found),
        )  # fmt: skip
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
