"""One class per pipeline stage: what it holds, and a forward pass that reads top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.graph import Segment
from ...ir.plan import Recompute
from ..emission.blocks import drop_count, graph_body
from ..emission.body import Body, Form, Statement, Text
from ..emission.naming import Writer, returning
from ..emission.peephole import simplify
from ..emission.stages import Stage, method_name, without
from ..emission.target import shown
from ..emission.text import indented, text_block
from .blocks import parameter_lines
from .language import TORCH


@dataclass(slots=True)
class StageWriter(Stage):
    """Writes the class of one stage."""

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
        if any(self.draws(i) for i, _ in self.segments):
            lines += ['self.path = ""', "self.forwards = 0"]
        return lines or ["pass"]

    def _children(self) -> list[str]:
        """`add_modules(self, {f"model.layers.{i}": LlamaDecoderLayer() for i in range(16)})`"""
        runs: list[tuple[str, str, list[str]]] = []  # class, parent, names
        for i, segment in self.segments:
            if not segment.module:
                continue
            parent, _, leaf = segment.module.rpartition(".")
            name = self.block_class(i).name
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

    # --- the forward pass

    def _forward(self) -> str:
        body, positional = self.body()
        simplify(body)
        writer = Writer(body)
        lines, result = writer.lines(), writer.result()
        if any(self.draws(i) for i, _ in self.segments):
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

    def call(self, body: Body, run: list[int]) -> Statement:
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
        chain = self.chain(segment) if len(run) > 1 else 0
        parent = segment.module.rpartition(".")[0]
        loop = ""
        if not segment.module:
            callee = f"self.{self.methods[run[0]]}"
        elif len(run) == 1:
            callee = _path(segment.module)
        else:
            callee, loop = "layer", f"layer in {self._layers(parent, run)}"
        extra = ["draw"] if self.draws(run[0]) else []
        order = [reads[chain], *without(reads, chain)]
        return Statement(
            order,
            writes,
            _call_text(callee, self.mode(run[0]), chain, extra),
            [self.wish(name) for name in names],
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
        body = graph_body(
            target, TORCH, graph, annotation, segment.parameters, stored, self.constants
        )
        drop_count(plan, segment, body)
        simplify(body)
        writer = Writer(body)
        lines, result = writer.lines(), writer.result()
        held = {s.module.split(".")[0] for _, s in self.segments}
        held |= {path.split(".")[0] for _, s in self.segments for path in s.parameters}
        name = method_name(segment.block, self.language)
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


def _call_text(callee: str, mode: Recompute, chain: int, extra: list[str]) -> Text:
    def text(x: Sequence[str]) -> str:
        given = [*x[1 : chain + 1], x[0], *x[chain + 1 :], *extra]
        if mode == "none":
            return f"{callee}({', '.join(given)})"
        context = ", context_fn=selective" if mode == "selective" else ""
        return f"checkpoint({callee}, {', '.join(given)}, use_reentrant=False{context})"

    return text


def _follows(before: str, after: str) -> bool:
    return before.isdigit() and after.isdigit() and int(after) == int(before) + 1


def _path(module: str) -> str:
    if all(part.isidentifier() for part in module.split(".")):
        return f"self.{module}"
    return f'self.get_submodule("{module}")'
