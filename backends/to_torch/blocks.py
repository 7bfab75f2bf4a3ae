"""One class per distinct block: parameters as local shards, `forward` with explicit conversions."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.graph import Graph
from ...ir.plan import Plan
from ...ir.types import NdType
from ..emission.blocks import BlockClass, described, drop_count, graph_body
from ..emission.naming import Writer, returning
from ..emission.peephole import simplify
from ..emission.target import Target, shown
from ..emission.text import indented, text_block
from .language import TORCH


def write_class(plan: Plan, target: Target, block: BlockClass, constants: dict[str, str]) -> str:
    """The source of a block's class."""
    graph, annotation = plan.model.blocks[block.block], plan.annotations[block.block]
    segments = [plan.model.segments[i] for i in block.segments]
    all_types = plan.parameter_types()
    stored = {
        path: all_types[name]
        for path, name in zip(block.paths, segments[0].parameters, strict=True)
    }
    body = graph_body(target, TORCH, graph, annotation, block.paths, stored, constants)
    drop_count(plan, segments[0], body)
    simplify(body)
    writer = Writer(body)
    lines, result = writer.lines(), writer.result()
    arguments = "".join(f", {v}: Tensor" for v in body.inputs.values())
    arguments += ", draw: Draw | None" if block.draws else ""
    returns = "Tensor" if len(result) == 1 else "tuple[Tensor, ...]"
    shapes = parameter_lines(target, graph, block.paths, stored)
    frozen = [
        p
        for p, n in zip(block.paths, segments[0].parameters, strict=True)
        if not plan.model.parameters[n].trainable
    ]
    parts = [
        f"class {block.name}(nn.Module):",
        indented(text_block(described(target, body, segments, graph))),
        "",
        f"    def __init__(self{', path: str' if block.draws else ''}) -> None:",
        "        super().__init__()",
        *(["        self.path = path"] if block.draws else []),
        indented(_register("self", shapes, frozen), 2),
        "",
        f"    def forward(self{arguments}) -> {returns}:",
        indented("\n".join(returning(lines, result)), 2),
    ]
    return "\n".join(parts)


def parameter_lines(
    target: Target, graph: Graph, paths: tuple[str, ...], stored: Mapping[str, NdType]
) -> list[str]:
    """`"self_attn.q_proj.weight": (128, 256),  # tp: S(0) of (256, 256)`"""
    found = []
    for name, path in zip(graph.parameters, paths, strict=True):
        value, types = graph.values[name], target.live(stored[path])
        here, whole = target.local_shape(value, types), value.shape({})
        tensor = NdType(tuple((a, k) for a, k in types if a != "dp"))
        note = shown(tensor) + (f" of {whole}" if here != whole else "")
        found.append(f'"{path}": {here},' + (f"  # {note}" if note else ""))
    return found


def _register(module: str, shapes: list[str], frozen: list[str]) -> str:
    if not shapes:
        return "pass"
    tail = f"\n    frozen={tuple(frozen)!r}," if frozen else ""
    listed = "\n".join(f"        {line}" for line in shapes)
    return f"add_parameters(\n    {module},\n    {{\n{listed}\n    }},{tail}\n)"
