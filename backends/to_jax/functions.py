"""The functions of model.py: one per distinct block, and the stages or the loss that call them in
order.

Layers of one kind in a row are a *stack*: their parameters are stored as one array each, and a
`lax.scan` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.graph import Segment
from ...ir.paths import family, owns, span
from ...ir.plan import Plan
from ..emission.blocks import BlockClass, described, drop_count, graph_body
from ..emission.body import Body, Form, Statement, Text
from ..emission.naming import Writer, returning
from ..emission.peephole import simplify
from ..emission.stages import Stage, method_name
from ..emission.target import Target, shown
from ..emission.text import indented, text_block
from .language import JAX


def write_block(
    plan: Plan, target: Target, block: BlockClass, constants: dict[str, str], stage: StageWriter
) -> str:
    """The source of a block's function."""
    graph, annotation = plan.model.blocks[block.block], plan.annotations[block.block]
    segments = [plan.model.segments[i] for i in block.segments]
    all_types = plan.parameter_types()
    names = segments[0].parameters
    stored = {path: all_types[n] for path, n in zip(block.paths, names, strict=True)}
    body = graph_body(target, JAX, graph, annotation, block.paths, stored, constants)
    drop_count(plan, segments[0], body)
    name = function_name(block)
    lines = _function(name, body, described(target, body, segments, graph))
    for i in block.segments:
        stage.methods[i] = name
    return lines


_TAKEN = re.compile(r"loss|count_terms|before|after|stage(_\d+)?")
"""Names of the functions that call the others."""


def function_name(block: BlockClass) -> str:
    """`LlamaDecoderLayer` → `llama_decoder_layer`."""
    return method_name(block.name, JAX)


def _function(name: str, body: Body, doc: str) -> str:
    simplify(body)
    writer = Writer(body)
    lines, result = writer.lines(), writer.result()
    arguments = "".join(f", {v}: Array" for v in body.inputs.values())
    arguments += ", key: Array | None" if body.draws else ""
    returns = "Array" if len(result) == 1 else "tuple[Array, ...]"
    head = f"def {name}(p: Arrays{arguments}) -> {returns}:"
    return "\n".join([head, indented("\n".join([text_block(doc), *returning(lines, result)]))])


@dataclass(slots=True)
class StageWriter(Stage):
    """Writes the functions of the model's own ops, and what calls all of them."""

    def functions(self) -> list[str]:
        """The model's own ops."""
        return [self._own(i, s) for i, s in self.segments if not s.module]

    def _own(self, index: int, segment: Segment) -> str:
        plan = self.plan
        graph, annotation = plan.model.blocks[segment.block], plan.annotations[segment.block]
        stored = plan.parameter_types()
        target = self.wiring.target
        body = graph_body(
            target, JAX, graph, annotation, segment.parameters, stored, self.constants
        )
        drop_count(plan, segment, body)
        name = method_name(segment.block, JAX)
        while name in self.methods.values() or _TAKEN.fullmatch(name):
            name += "_"
        self.methods[index] = name
        types = "; ".join(shown(form[1]) for form in body.outputs)
        return _function(name, body, f"The model's own ops. Returns {types or 'plain arrays'}.")

    def function(self, name: str, doc: str) -> str:
        """The source of what calls the blocks: `loss(params, **batch)`, or a stage, which takes
        what it is sent first."""
        body, positional = self.body()
        simplify(body)
        writer = Writer(body)
        lines, result = writer.lines(), writer.result()
        given = list(body.inputs.values())
        sent = "".join(f", {v}: Array" for v in given[:positional])
        rows = "".join(f"{v}: Array, " for v in given[positional:])
        rows += "key: Array | None = None, **_: Array"
        returns = "Array" if len(result) == 1 else "tuple[Array, ...]"
        head = f"def {name}(params: Params{sent}, *, {rows}) -> {returns}:"
        return "\n".join([head, indented("\n".join([text_block(doc), *returning(lines, result)]))])

    def _joins(self, before: tuple[int, Segment], after: tuple[int, Segment]) -> bool:
        """Whether two calls can be steps of one scan."""
        same = self.mode(before[0]) == self.mode(after[0])
        return same and self.stacked(before, after)

    def siblings(self, first: str, second: str) -> bool:
        """Arrays are stacked whatever holds them: a parent, or numbers alone (`layers_3`)."""
        numbered = family(first) != first and family(first) == family(second)
        return numbered or Stage.siblings(self, first, second)

    def stacked(self, before: tuple[int, Segment], after: tuple[int, Segment]) -> bool:
        """Whether the parameters of two layers are in one stack."""
        (i, first), (j, second) = before, after
        tied = self.plan.model.tied
        return (
            self._alike(before, after)
            and self.block_class(i).name == self.block_class(j).name
            and not any(name in tied for s in (first, second) for name in s.parameters)
            and all(owns(s.module, n) for s in (first, second) for n in s.parameters)
        )

    def call(self, body: Body, run: list[int]) -> Statement:
        """One call of a block, or a scan over layers."""
        live = self.wiring.target.live
        segment = self.plan.model.segments[run[0]]
        annotation = self.plan.annotations[segment.block]
        reads: list[Form] = [
            body.need(name, live(types))
            for name, types in zip(segment.inputs, annotation.inputs, strict=True)
        ]
        last = self.plan.model.segments[run[-1]]
        names = [name for name in last.outputs if name != self.plan.model.loss[1]]
        writes = [body.know(self.wiring.values[n], self.wiring.types[n]) for n in names]
        function = self.methods[run[0]]
        stack, first, count = self._stack(run[0])
        mode = self.mode(run[0])
        options = "" if mode == "none" else f', recompute="{mode}"'
        if self.draws(run[0]):
            options += f", key=fold(key, {run[0]})"
        text: Text
        if stack:
            part = f'under(params, "{stack}")'
            if len(run) < count:
                at = run[0] - first
                part += f"[{at or ''}:{at + len(run) if at + len(run) < count else ''}]"
            carry = self.chain(segment)
            options = (f", carry={carry}" if carry else "") + options
            text = lambda x: f"layers({function}, {part}, {', '.join(x)}{options})"  # noqa: E731
        else:
            part = self._part(segment)
            text = lambda x: f"run({', '.join([function, part, *x])}{options})"  # noqa: E731
        return Statement(reads, writes, text, [self.wish(name) for name in names])

    def _part(self, segment: Segment) -> str:
        """The parameters of one call."""
        if segment.module and all(owns(segment.module, n) for n in segment.parameters):
            return f'under(params, "{segment.module}")'
        return f"own({', '.join(['params', *(repr(n) for n in segment.parameters)])})".replace(
            "'", '"'
        )

    def _stack(self, segment: int) -> tuple[str, int, int]:
        """The stack of a layer, its first segment, and its length; "" where it is in none."""
        for key, run in stack_runs(self).items():
            if segment in run:
                return key, run[0], len(run)
        return "", segment, 1


def stack_runs(stage: StageWriter) -> dict[str, list[int]]:
    """Stack → its segments: `model.layers.0-31`."""
    runs: list[list[tuple[int, Segment]]] = []
    for entry in stage.segments:
        if (
            runs
            and entry[1].module
            and runs[-1][-1][1].module
            and stage.stacked(runs[-1][-1], entry)
        ):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    found: dict[str, list[int]] = {}
    for run in runs:
        if len(run) > 1:
            found[span(run[0][1].module, run[-1][1].module)] = [i for i, _ in run]
    return found


def stacks_of(stage: StageWriter) -> dict[str, Sequence[str]]:
    """Stack → the modules in it."""
    return {
        key: [stage.plan.model.segments[i].module for i in run]
        for key, run in stack_runs(stage).items()
    }
