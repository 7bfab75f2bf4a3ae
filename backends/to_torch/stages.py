"""One class per pipeline stage: what it holds, and a forward pass that reads top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.graph import Segment
from ...ir.plan import Plan, Recompute
from ...ir.types import NdType, R
from .blocks import BlockClass, drop_count, graph_body, parameter_lines
from .body import Body, Form, Statement, Text, needed_inputs
from .lines import draws
from .naming import Writer, identifier, keyword_name, returning
from .peephole import simplify
from .source import indented, text_block
from .target import shown
from .wiring import Wiring


@dataclass(slots=True)
class StageWriter:
    """Writes the class of one stage."""

    wiring: Wiring
    index: int
    classes: Sequence[BlockClass]
    constants: dict[str, str]
    methods: dict[int, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.wiring.plan

    @property
    def segments(self) -> list[tuple[int, Segment]]:
        stage = self.plan.stages[self.index]
        return [(i, self.plan.model.segments[i]) for i in range(stage.first, stage.last)]

    def source(self) -> str:
        """The class."""
        methods = [self._method(i, s) for i, s in self.segments if not s.module]
        parts = [
            f"class Stage{self.index}(nn.Module):",
            indented(text_block(self._doc())),
            "",
            "    def __init__(self) -> None:",
            "        super().__init__()",
            *[indented(line, 2) for line in self._init()],
            "",
            indented(self._forward()),
        ]
        for method in methods:
            parts += ["", indented(method)]
        return "\n".join(parts)

    def _doc(self) -> str:
        names = [s.module or s.block for _, s in self.segments]
        held = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        stages = len(self.plan.stages)
        if stages == 1:
            return f"The whole model: {held}."
        return f"Stage {self.index} of {stages}: {held}."

    # --- what the stage holds

    def _init(self) -> list[str]:
        plan, target = self.plan, self.wiring.target
        lines: list[str] = []
        stored = plan.parameter_types()
        shapes: dict[str, str] = {}
        frozen = []
        for _, segment in self.segments:
            if segment.module:
                continue
            graph = plan.model.blocks[segment.block]
            texts = parameter_lines(target, graph, segment.parameters, stored)
            shapes |= dict(zip(segment.parameters, texts, strict=True))
            frozen += [n for n in segment.parameters if not plan.model.parameters[n].trainable]
        if shapes:
            listed = "\n".join(f"        {text}" for text in shapes.values())
            tail = f"\n    frozen={tuple(frozen)!r}," if frozen else ""
            lines.append(f"add_parameters(\n    self,\n    {{\n{listed}\n    }},{tail}\n)")
        for run in self._children():
            lines.append(run)
        if any(self._draws(i) for i, _ in self.segments):
            lines += ['self.path = ""', "self.forwards = 0"]
        return lines or ["pass"]

    def _children(self) -> list[str]:
        """`add_modules(self, {f"model.layers.{i}": LlamaDecoderLayer() for i in range(16)})`"""
        runs: list[tuple[str, str, list[str]]] = []  # class, parent, names
        for i, segment in self.segments:
            if not segment.module:
                continue
            parent, _, leaf = segment.module.rpartition(".")
            name = self._class(i).name
            if runs and runs[-1][:2] == (name, parent) and _follows(runs[-1][2][-1], leaf):
                runs[-1][2].append(leaf)
            else:
                runs.append((name, parent, [leaf]))
        lines: list[str] = []
        for name, parent, leaves in runs:
            dot = f"{parent}." if parent else ""
            if len(leaves) == 1:
                path = f'"{dot}{leaves[0]}"'
                lines.append(f"add_modules(self, {{{path}: {self._make(name, path)}}})")
            else:
                span = f"range({leaves[0]}, {int(leaves[-1]) + 1})"
                span = f"range({len(leaves)})" if leaves[0] == "0" else span
                path = f'f"{dot}{{i}}"'
                made = self._make(name, path)
                lines.append(f"add_modules(self, {{{path}: {made} for i in {span}}})")
        return lines

    def _make(self, name: str, path: str) -> str:
        block = next(c for c in self.classes if c.name == name)
        return f"{name}({path})" if block.draws else f"{name}()"

    def _class(self, segment: int) -> BlockClass:
        return next(c for c in self.classes if segment in c.segments)

    def _draws(self, segment: int) -> bool:
        return draws(self.plan.model.blocks[self.plan.model.segments[segment].block])

    # --- the forward pass

    def _forward(self) -> str:
        body, positional = self.body()
        simplify(body)
        writer = Writer(body)
        lines, result = writer.lines(), writer.result()
        if any(self._draws(i) for i, _ in self.segments):
            lines[:0] = [
                "draw = Draw.of(self.forwards, MICROBATCHES, MICRO_BATCH)",
                "draw = draw if self.training else None",
                "self.forwards += 1",
            ]
        variables = list(body.inputs.values())
        arguments = ["self", *(f"{v}: Tensor" for v in variables[:positional])]
        if variables[positional:]:
            arguments += ["*", *(f"{v}: Tensor" for v in variables[positional:])]
        arguments.append("**_: Tensor")
        returns = "Tensor" if len(result) == 1 else "tuple[Tensor, ...]"
        head = f"def forward({', '.join(arguments)}) -> {returns}:"
        return "\n".join([head, indented("\n".join(returning(lines, result)))])

    def body(self) -> tuple[Body, int]:
        """The statements of the forward pass, and how many arguments are positional."""
        plan, target = self.plan, self.wiring.target
        body = Body(target, constants=self.constants)
        carried = self.wiring.carried(self.index - 1) if self.index else []
        for name in carried:
            body.argument(self.wiring.values[name], self.wiring.types[name], self._wish(name))
        read = {name for _, segment in self.segments for name in segment.inputs}
        tables = read & set(plan.model.preamble.outputs)
        batch = needed_inputs(plan.model.preamble, tables) | read
        for value in plan.model.inputs:
            if value.name in batch:
                body.argument(value, self.wiring.types[value.name], keyword_name(value.name))
        add_constants(body, plan, batch)
        body.add_graph(plan.model.preamble, plan.preamble, tables)
        self._calls(body)
        if self.index + 1 < len(plan.stages):
            names = self.wiring.carried(self.index)
        else:
            names = [plan.model.loss[0]]
        body.outputs = [body.need(name, self.wiring.types[name]) for name in names]
        return body, len(carried)

    def _wish(self, name: str) -> str:
        """What the function that reads a value calls it."""
        for segment in self.plan.model.segments:
            if name in segment.inputs:
                graph = self.plan.model.blocks[segment.block]
                inner = graph.inputs[segment.inputs.index(name)]
                return identifier(inner.rpartition(".")[2])
        return "loss"

    def _calls(self, body: Body) -> None:
        position = 0
        segments = self.segments
        while position < len(segments):
            _, segment = segments[position]
            count = 1
            if segment.module:
                while position + count < len(segments) and self._joins(
                    segments[position + count - 1], segments[position + count]
                ):
                    count += 1
            run = [i for i, _ in segments[position : position + count]]
            body.add(self._call(body, run))
            position += count

    def _joins(self, before: tuple[int, Segment], after: tuple[int, Segment]) -> bool:
        """Whether two calls can be passes of one loop."""
        (i, first), (j, second) = before, after
        if not second.module or first.module.rpartition(".")[0] != second.module.rpartition(".")[0]:
            return False
        if not first.module.rpartition(".")[0] or len(first.outputs) != 1 != len(second.outputs):
            return False
        chain = self._chain(first)
        uses = [s for s in self.plan.model.segments if first.outputs[0] in s.inputs]
        one, two = (self.plan.annotations[s.block] for s in (first, second))
        return (
            self._mode(i) == self._mode(j)
            and self._draws(i) == self._draws(j)
            and chain == self._chain(second)
            and second.inputs[chain] == first.outputs[0]
            and uses == [second]
            and _without(first.inputs, chain) == _without(second.inputs, chain)
            and [self.wiring.target.live(t) for t in one.inputs]
            == [self.wiring.target.live(t) for t in two.inputs]
            and self.wiring.target.live(one.outputs[0])
            == self.wiring.target.live(two.inputs[chain])
        )

    def _chain(self, segment: Segment) -> int:
        """Position of the input that another segment made."""
        made = [k for k, name in enumerate(segment.inputs) if name in self.wiring.made_by]
        return made[0] if made else 0

    def _mode(self, segment: int) -> Recompute:
        stage = self.plan.stages[self.index]
        return stage.recompute[segment - stage.first]

    def _call(self, body: Body, run: list[int]) -> Statement:
        """One call, or a loop of calls."""
        segment = self.plan.model.segments[run[0]]
        annotation = self.plan.annotations[segment.block]
        reads: list[Form] = [
            body.need(name, self.wiring.target.live(types))
            for name, types in zip(segment.inputs, annotation.inputs, strict=True)
        ]
        last = self.plan.model.segments[run[-1]]
        names = [name for name in last.outputs if name != self.plan.model.loss[1]]
        writes = [body.know(self.wiring.values[n], self.wiring.types[n]) for n in names]
        chain = self._chain(segment) if len(run) > 1 else 0
        parent = segment.module.rpartition(".")[0]
        loop = ""
        if not segment.module:
            callee = f"self.{self.methods[run[0]]}"
        elif len(run) == 1:
            callee = _path(segment.module)
        else:
            callee, loop = "layer", f"layer in {self._layers(parent, run)}"
        extra = ["draw"] if self._draws(run[0]) else []
        order = [reads[chain], *_without(reads, chain)]
        return Statement(
            order,
            writes,
            _call_text(callee, self._mode(run[0]), chain, extra),
            [self._wish(name) for name in names],
            loop=loop,
        )

    def _layers(self, parent: str, run: list[int]) -> str:
        held = [i for i, s in self.segments if s.module and s.module.rpartition(".")[0] == parent]
        children = f"{_path(parent)}.children()"
        if held == run:
            return children
        first = held.index(run[0])
        stop = first + len(run)
        return f"list({children})[{first or ''}:{stop if stop < len(held) else ''}]"

    # --- the model's own ops

    def _method(self, index: int, segment: Segment) -> str:
        plan, target = self.plan, self.wiring.target
        graph, annotation = plan.model.blocks[segment.block], plan.annotations[segment.block]
        stored = plan.parameter_types()
        body = graph_body(target, graph, annotation, segment.parameters, stored, self.constants)
        drop_count(plan, segment, body)
        simplify(body)
        writer = Writer(body)
        lines, result = writer.lines(), writer.result()
        held = {s.module.split(".")[0] for _, s in self.segments}
        held |= {path.split(".")[0] for _, s in self.segments for path in s.parameters}
        name = _method_name(segment.block)
        if name in held | _TAKEN:
            name = f"run_{name}"
        while name in self.methods.values():
            name += "_"
        self.methods[index] = name
        draw = ", draw: Draw | None" if body.draws else ""
        arguments = "".join(f", {v}: Tensor" for v in body.inputs.values())
        returns = "Tensor" if len(result) == 1 else "tuple[Tensor, ...]"
        types = "; ".join(shown(form[1]) for form in body.outputs)
        head = f"def {name}(self{arguments}{draw}) -> {returns}:"
        doc = f'"""The model\'s own ops. Returns {types or "plain tensors"}."""'
        return "\n".join([head, indented("\n".join([doc, *returning(lines, result)]))])


_TAKEN = {"forward", "train", "eval", "apply", "type", "to", "half", "float", "double", "children"}
"""Names that a torch module has a use for."""

_METHODS = {"embedding": "embed"}
"""Blocks whose method has a more usual name than the block's own."""


def add_constants(body: Body, plan: Plan, names: set[str]) -> None:
    """The fixed tensors among these values."""
    for name in sorted(names & set(plan.model.constants)):
        value = plan.model.preamble.values[name]
        types = NdType.uniform(body.target.axes, R)
        literal = body.constant(identifier(name).upper(), plan.model.constants[name])
        device = body.device()
        form = body.know(value, types)
        text = f"torch.tensor({literal}, device={device})"
        body.add(Statement([], [form], _fixed(text), [identifier(name)]))


def _fixed(text: str) -> Text:
    return lambda x: text


def _call_text(callee: str, mode: Recompute, chain: int, extra: list[str]) -> Text:
    def text(x: Sequence[str]) -> str:
        given = [*x[1 : chain + 1], x[0], *x[chain + 1 :], *extra]
        if mode == "none":
            return f"{callee}({', '.join(given)})"
        context = ", context_fn=selective" if mode == "selective" else ""
        return f"checkpoint({callee}, {', '.join(given)}, use_reentrant=False{context})"

    return text


def _without(items: Sequence[Any], position: int) -> list[Any]:
    return [item for i, item in enumerate(items) if i != position]


def _follows(before: str, after: str) -> bool:
    return before.isdigit() and after.isdigit() and int(after) == int(before) + 1


def _path(module: str) -> str:
    if all(part.isidentifier() for part in module.split(".")):
        return f"self.{module}"
    return f'self.get_submodule("{module}")'


def _method_name(block: str) -> str:
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in block.rpartition(".")[2])
    return _METHODS.get(name.strip("_"), identifier(name))
