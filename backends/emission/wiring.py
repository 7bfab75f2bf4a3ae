"""What flows between the segments of a plan, and in which types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...ir.graph import Value
from ...ir.plan import Plan
from ...ir.types import AxisType, NdType, R, S
from .target import LiveType, Target


@dataclass(slots=True)
class Wiring:
    """Model-level values: what they are, in which types, and which segment makes them."""

    plan: Plan
    target: Target
    values: dict[str, Value] = field(default_factory=dict)
    types: dict[str, LiveType] = field(default_factory=dict)
    made_by: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.plan.model
        for value in model.inputs:
            self.values[value.name] = value
            self.types[value.name] = self.batch_type(value)
        for i, segment in enumerate(model.segments):
            graph, annotation = model.blocks[segment.block], self.plan.annotations[segment.block]
            rows = zip(segment.outputs, graph.outputs, annotation.outputs, strict=True)
            for outer, inner, types in rows:
                self.values[outer] = replace(graph.values[inner], name=outer, role="activation")
                self.types[outer] = self.target.live(types)
                self.made_by[outer] = i

    def batch_type(self, value: Value) -> LiveType:
        """A batch tensor comes with this rank's rows, whole otherwise."""
        rows = next(((d, f.index("b")) for d, f in enumerate(value.dims) if "b" in f), None)
        kinds: dict[str, AxisType] = dict.fromkeys(self.target.axes, R)
        if rows is not None and "dp" in kinds:
            kinds["dp"] = S(*rows)
        return NdType.of(kinds)

    def carried(self, boundary: int) -> list[str]:
        """Values that stage `boundary` sends to the next, in the order they are made."""
        last = self.plan.stages[boundary].last
        later = self.plan.model.segments[last:]
        used = {name for segment in later for name in segment.inputs}
        return [name for name, i in self.made_by.items() if i < last and name in used]
