"""One pipeline stage: which segments it runs, in which loops, and the body of its forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.graph import Segment
from ...ir.plan import Plan, Recompute
from .blocks import BlockClass
from .body import Body, Statement, needed_inputs
from .language import Language
from .lines import draws
from .text import identifier, keyword_name
from .wiring import Wiring


@dataclass(slots=True)
class Stage(ABC):
    """What a stage does; a backend's writer adds how a call is written (`call`)."""

    wiring: Wiring
    index: int
    classes: Sequence[BlockClass]
    constants: dict[str, str]
    language: Language
    methods: dict[int, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.wiring.plan

    @property
    def segments(self) -> list[tuple[int, Segment]]:
        """The segments of the stage, with their positions in the model."""
        stage = self.plan.stages[self.index]
        return [(i, self.plan.model.segments[i]) for i in range(stage.first, stage.last)]

    def block_class(self, segment: int) -> BlockClass:
        """The block that a segment calls."""
        return next(c for c in self.classes if segment in c.segments)

    def draws(self, segment: int) -> bool:
        """Whether a segment draws random numbers."""
        return draws(self.plan.model.blocks[self.plan.model.segments[segment].block])

    def body(self) -> tuple[Body, int]:
        """The statements of the forward pass, and how many arguments are positional."""
        plan, target = self.plan, self.wiring.target
        body = Body(target, self.language, constants=self.constants)
        carried = self.wiring.carried(self.index - 1) if self.index else []
        for name in carried:
            body.argument(self.wiring.values[name], self.wiring.types[name], self.wish(name))
        read = {name for _, segment in self.segments for name in segment.inputs}
        tables = read & set(plan.model.preamble.outputs)
        batch = needed_inputs(plan.model.preamble, tables) | read
        for value in plan.model.inputs:
            if value.name in batch:
                body.argument(value, self.wiring.types[value.name], keyword_name(value.name))
        body.add_constants(plan.model, batch)
        body.add_graph(plan.model.preamble, plan.preamble, tables)
        self._calls(body)
        if self.index + 1 < len(plan.stages):
            names = self.wiring.carried(self.index)
        else:
            names = [plan.model.loss[0]]
        body.outputs = [body.need(name, self.wiring.types[name]) for name in names]
        return body, len(carried)

    def wish(self, name: str) -> str:
        """What the function that reads a value calls it."""
        for segment in self.plan.model.segments:
            if name in segment.inputs:
                graph = self.plan.model.blocks[segment.block]
                inner = graph.inputs[segment.inputs.index(name)]
                return identifier(inner.rpartition(".")[2], self.language.reserved)
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
            body.add(self.call(body, run))
            position += count

    @abstractmethod
    def call(self, body: Body, run: list[int]) -> Statement:
        """One call, or a loop of calls."""

    def _joins(self, before: tuple[int, Segment], after: tuple[int, Segment]) -> bool:
        """Whether two calls can be passes of one loop."""
        return self.mode(before[0]) == self.mode(after[0]) and self._alike(before, after)

    def siblings(self, first: str, second: str) -> bool:
        """Whether a program can run through these modules in a loop: they have one parent."""
        parent = first.rpartition(".")[0]
        return bool(parent) and parent == second.rpartition(".")[0]

    def _alike(self, before: tuple[int, Segment], after: tuple[int, Segment]) -> bool:
        """Whether two calls can be, but for what is computed again of them."""
        (i, first), (j, second) = before, after
        if not second.module or not self.siblings(first.module, second.module):
            return False
        if len(first.outputs) != 1 != len(second.outputs):
            return False
        chain = self.chain(first)
        uses = [s for s in self.plan.model.segments if first.outputs[0] in s.inputs]
        one, two = (self.plan.annotations[s.block] for s in (first, second))
        return (
            self.draws(i) == self.draws(j)
            and chain == self.chain(second)
            and second.inputs[chain] == first.outputs[0]
            and uses == [second]
            and without(first.inputs, chain) == without(second.inputs, chain)
            and [self.wiring.target.live(t) for t in one.inputs]
            == [self.wiring.target.live(t) for t in two.inputs]
            and self.wiring.target.live(one.outputs[0])
            == self.wiring.target.live(two.inputs[chain])
        )

    def chain(self, segment: Segment) -> int:
        """Position of the input that another segment made."""
        made = [k for k, name in enumerate(segment.inputs) if name in self.wiring.made_by]
        return made[0] if made else 0

    def mode(self, segment: int) -> Recompute:
        """What is computed again of a segment."""
        stage = self.plan.stages[self.index]
        return stage.recompute[segment - stage.first]


def without(items: Sequence[Any], position: int) -> list[Any]:
    """All items but one."""
    return [item for i, item in enumerate(items) if i != position]


_METHODS = {"embedding": "embed"}
"""Blocks whose method has a more usual name than the block's own."""


def method_name(block: str, language: Language) -> str:
    """What the function of the model's own ops is called."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in block.rpartition(".")[2])
    return _METHODS.get(name.strip("_"), identifier(name, language.reserved))
