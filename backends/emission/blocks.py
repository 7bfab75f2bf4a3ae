"""The distinct blocks of a plan, and the bodies of the functions that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.graph import Graph, Segment
from ...ir.paths import inner_name, owns
from ...ir.plan import Annotation, Plan
from ...ir.types import NdType
from .body import Body
from .language import Language
from .lines import draws
from .target import LiveType, Target, shown
from .text import identifier


@dataclass(frozen=True, slots=True)
class BlockClass:
    """A class to emit: the block it runs, its name, and the paths of its parameters within it."""

    name: str
    block: str
    paths: tuple[str, ...]
    segments: tuple[int, ...]
    draws: bool = False


def block_classes(plan: Plan, language: Language) -> list[BlockClass]:
    """The classes for all segments that are calls of modules, in order of first use."""
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, segment in enumerate(plan.model.segments):
        if segment.module:
            found.setdefault((segment.block, relative(segment)), []).append(i)
    classes: list[BlockClass] = []
    taken: set[str] = set()
    for (block, paths), segments in found.items():
        name = class_name(block, language)
        while name in taken:
            name += "_"
        taken.add(name)
        drawing = draws(plan.model.blocks[block])
        classes.append(BlockClass(name, block, paths, tuple(segments), drawing))
    return classes


def class_name(block: str, language: Language) -> str:
    """A Python class name for a block."""
    name = identifier(block.rpartition(".")[2], language.reserved)
    return name[0].upper() + name[1:]


def relative(segment: Segment) -> tuple[str, ...]:
    """Paths of a segment's parameters below its module; others stay as they are, after a `/`."""
    return tuple(
        inner_name(name, segment.module) if owns(segment.module, name) else f"/{name}"
        for name in segment.parameters
    )


def graph_body(
    target: Target,
    language: Language,
    graph: Graph,
    annotation: Annotation,
    paths: tuple[str, ...],
    stored: Mapping[str, NdType],
    constants: dict[str, str],
) -> Body:
    """The body of a function that runs a graph. `stored` are the parameters' types by path."""
    body = Body(target, language, constants=constants)
    taken: set[str] = set()
    for name, types in zip(graph.inputs, annotation.inputs, strict=True):
        variable = identifier(name.rpartition(".")[2], language.reserved)
        while variable in taken or variable in target.axes:
            variable += "_"
        taken.add(variable)
        body.argument(graph.values[name], target.live(types), variable)
    for name, path in zip(graph.parameters, paths, strict=True):
        body.parameter(graph.values[name], target.live(stored[path]), path)
    body.add_graph(graph, annotation)
    for name, types in zip(graph.outputs, annotation.outputs, strict=True):
        body.outputs.append(body.need(name, target.live(types)))
    return body


def drop_count(plan: Plan, segment: Segment, body: Body) -> None:
    """The count of loss terms is known before (counting.py): no function returns it."""
    kept = zip(segment.outputs, body.outputs, strict=True)
    body.outputs = [form for name, form in kept if name != plan.model.loss[1]]


def described(target: Target, body: Body, segments: list[Segment], graph: Graph) -> str:
    """What the class is: where it stands, what it takes and gives."""
    lines = [f"{_places([s.module for s in segments])}.", ""]
    for name, variable in body.inputs.items():
        lines.append(f"{variable}: {_value(target, graph, name, body.made[name])}")
    for name, types in body.outputs:
        lines.append(f"returns: {_value(target, graph, name, types)}")
    return "\n".join(lines)


def _value(target: Target, graph: Graph, name: str, types: LiveType) -> str:
    return f"{shape_text(target, graph, name, types)}  {shown(types)}".strip()


def shape_text(target: Target, graph: Graph, name: str, types: LiveType) -> str:
    """`[b, s / 2, 256]`: a local shape."""
    dims = []
    for dim in target.local(graph.values[name], types):
        number, symbols = 1, []
        for size in dim:
            number *= size.number or 1
            if size.symbol:
                times = f"{size.times} " if size.times > 1 else ""
                symbols.append(times + size.symbol + (f" / {size.by}" if size.by > 1 else ""))
        dims.append(" · ".join([*symbols, *([str(number)] if number > 1 or not symbols else [])]))
    return f"[{', '.join(dims)}]"


def _places(modules: list[str]) -> str:
    """`model.layers.0 … model.layers.31`"""
    return modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}"
