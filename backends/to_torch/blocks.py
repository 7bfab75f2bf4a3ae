"""One class per distinct block: parameters as local shards, `forward` with explicit conversions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.graph import Graph, Segment
from ...ir.plan import Annotation, Plan
from ...ir.types import NdType
from .body import Body
from .lines import draws
from .naming import Writer, identifier, returning
from .peephole import simplify
from .source import indented, text_block
from .target import LiveType, Target, shown


@dataclass(frozen=True, slots=True)
class BlockClass:
    """A class to emit: the block it runs, its name, and the paths of its parameters within it."""

    name: str
    block: str
    paths: tuple[str, ...]
    segments: tuple[int, ...]
    draws: bool = False


def block_classes(plan: Plan) -> list[BlockClass]:
    """The classes for all segments that are calls of modules, in order of first use."""
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, segment in enumerate(plan.model.segments):
        if segment.module:
            found.setdefault((segment.block, relative(segment)), []).append(i)
    classes: list[BlockClass] = []
    taken: set[str] = set()
    for (block, paths), segments in found.items():
        name = class_name(block)
        while name in taken:
            name += "_"
        taken.add(name)
        drawing = draws(plan.model.blocks[block])
        classes.append(BlockClass(name, block, paths, tuple(segments), drawing))
    return classes


def class_name(block: str) -> str:
    """A Python class name for a block."""
    name = identifier(block.rpartition(".")[2])
    return name[0].upper() + name[1:]


def relative(segment: Segment) -> tuple[str, ...]:
    """Paths of a segment's parameters below its module; others stay as they are, after a `/`."""
    prefix = segment.module + "." if segment.module else ""
    return tuple(
        name.removeprefix(prefix) if name.startswith(prefix) else f"/{name}"
        for name in segment.parameters
    )


def graph_body(
    target: Target,
    graph: Graph,
    annotation: Annotation,
    paths: tuple[str, ...],
    stored: Mapping[str, NdType],
    constants: dict[str, str],
) -> Body:
    """The body of a function that runs a graph. `stored` are the parameters' types by path."""
    body = Body(target, constants=constants)
    taken: set[str] = set()
    for name, types in zip(graph.inputs, annotation.inputs, strict=True):
        variable = identifier(name.rpartition(".")[2])
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


def write_class(plan: Plan, target: Target, block: BlockClass, constants: dict[str, str]) -> str:
    """The source of a block's class."""
    graph, annotation = plan.model.blocks[block.block], plan.annotations[block.block]
    segments = [plan.model.segments[i] for i in block.segments]
    all_types = plan.parameter_types()
    stored = {
        path: all_types[name]
        for path, name in zip(block.paths, segments[0].parameters, strict=True)
    }
    body = graph_body(target, graph, annotation, block.paths, stored, constants)
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
        indented(text_block(_doc(target, body, segments, graph))),
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


def _doc(target: Target, body: Body, segments: list[Segment], graph: Graph) -> str:
    """What the class is: where it stands, what it takes and gives."""
    lines = [f"{_places([s.module for s in segments])}.", ""]
    for name, variable in body.inputs.items():
        lines.append(f"{variable}: {_described(target, graph, name, body.made[name])}")
    for name, types in body.outputs:
        lines.append(f"returns: {_described(target, graph, name, types)}")
    return "\n".join(lines)


def _described(target: Target, graph: Graph, name: str, types: LiveType) -> str:
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
