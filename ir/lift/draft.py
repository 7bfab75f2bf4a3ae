"""The draft: a graph while it is being lifted, mutable and private to this folder.

A `Wire` is a tensor, an `Op` reads and makes wires. Kinds are those of the op table where a
tensor operation has one; other operations keep the framework's name (`aten.cumsum.default`) until
lifting makes them unnecessary. A wire is *carried* when it depends on a parameter; the others
(masks, tables, labels) depend on inputs and constants alone and can be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InvalidInput
from ..graph import Dims, Dtype

Role = Literal["activation", "parameter", "input", "constant"]


@dataclass(eq=False, slots=True)
class Wire:
    """A tensor of the draft. `source` is the node of the framework's graph that computes it."""

    dims: Dims
    dtype: Dtype
    grad: bool = False
    carried: bool = False
    role: Role = "activation"
    name: str = ""
    source: Any = None
    producer: Op | None = None

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def is_float(self) -> bool:
        return self.dtype in ("model", "wide", "float32", "float64")

    def made_by(self, *kinds: str) -> Op | None:
        """The op that makes this wire, if it is of one of these kinds."""
        return self.producer if self.producer and self.producer.kind in kinds else None


@dataclass(eq=False, slots=True)
class Op:
    """An operation of the draft; `module` is the path of the module it was traced in."""

    kind: str
    operands: list[Wire]
    results: list[Wire]
    attributes: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    sizes: dict[str, int | str] = field(default_factory=dict)

    @property
    def result(self) -> Wire:
        (result,) = self.results
        return result


@dataclass(eq=False, slots=True)
class Draft:
    """Ops in order. Lifting inserts ops, redirects uses and sweeps what nobody reads.

    `pins` are wires whose types the user chose; they are `pin` ops until lifting is done.
    """

    ops: list[Op] = field(default_factory=list)
    inputs: list[Wire] = field(default_factory=list)
    outputs: list[Wire] = field(default_factory=list)
    pins: list[tuple[Wire, dict[str, str]]] = field(default_factory=list)

    def add(
        self,
        kind: str,
        operands: Sequence[Wire],
        dims: Dims | Sequence[Dims],
        *,
        dtype: Dtype | None = None,
        attributes: Mapping[str, Any] | None = None,
        module: str = "",
        before: Op | None = None,
        source: Any = None,
        count: int | None = None,
    ) -> Op:
        """Adds an op at the end, or before another. `dims` is per result where `count` is given."""
        result_dims: Sequence[Any] = [dims] if count is None else dims
        dtype = dtype or _promoted(operands)
        op = Op(kind, list(operands), [], dict(attributes or {}), module)
        carried = any(wire.carried for wire in operands)
        for each in result_dims:
            wire = Wire(tuple(each), dtype, False, carried, "activation", "", source, op)
            wire.grad = wire.is_float and any(o.grad for o in operands)
            op.results.append(wire)
        if before is None:
            self.ops.append(op)
        else:
            self.ops.insert(self.ops.index(before), op)
        return op

    def redirect(self, old: Wire, new: Wire) -> None:
        """Every reader of `old` reads `new`."""
        for op in self.ops:
            op.operands = [new if wire is old else wire for wire in op.operands]
        self.outputs = [new if wire is old else wire for wire in self.outputs]

    def stand_in(self, op: Op, result: Wire) -> None:
        """Every reader of an op's result reads `result`, in the dims and dtype that it had."""
        if op.result.dims != result.dims:
            result = self.add(
                "reshape", [result], op.result.dims, module=op.module, before=op
            ).result
        if op.result.dtype != result.dtype:
            result = self.add(
                "cast", [result], result.dims, dtype=op.result.dtype,
                attributes={"to": op.result.dtype}, module=op.module, before=op,
            ).result  # fmt: skip
        if result.carried and result.source is None:
            result.source = op.result.source
        self.redirect(op.result, result)

    def readers(self, wire: Wire) -> list[Op]:
        """Ops that read the wire, in order."""
        return [op for op in self.ops if wire in op.operands]

    def take_pins(self) -> None:
        """Turns `pin` ops into notes on the wires that they let through."""
        for op in self.each("pin"):
            wire = op.operands[0]
            if not wire.carried or wire.role == "parameter":
                raise InvalidInput(
                    f"sw.annotate at {op.module or 'the top level'}: an activation that no "
                    "parameter takes part in cannot be pinned"
                )
            self.redirect(op.result, wire)
            self.ops.remove(op)
            self.pins.append((wire, dict(op.attributes["types"])))

    def sweep(self) -> None:
        """Drops ops whose results nobody reads."""
        needed = set(self.outputs)
        kept: list[Op] = []
        for op in reversed(self.ops):
            if not needed.isdisjoint(op.results):
                needed.update(op.operands)
                kept.append(op)
        self.ops = kept[::-1]

    def each(self, kind: str | Iterable[str]) -> Iterator[Op]:
        """Ops of a kind (or kinds) that are there now; safe while the draft changes."""
        kinds = {kind} if isinstance(kind, str) else set(kind)
        for op in list(self.ops):
            if op.kind in kinds:
                yield op


_RANK: dict[str, int] = {
    "bool": 0, "int32": 1, "int64": 2, "model": 3, "float32": 4, "wide": 4, "float64": 5,
}  # fmt: skip


def _promoted(operands: Sequence[Wire]) -> Dtype:
    return max((wire.dtype for wire in operands), key=lambda dtype: _RANK[dtype])


def uncast(wire: Wire) -> Wire:
    """The wire before casts between floating dtypes."""
    while (op := wire.made_by("cast")) and op.operands[0].is_float and wire.is_float:
        wire = op.operands[0]
    return wire


def bare(wire: Wire) -> Wire:
    """The wire before casts between floating dtypes, and before dims of size 1 came or went."""
    while True:
        wire = uncast(wire)
        op = wire.made_by("reshape", "expand")
        if op is None or [d for d in op.operands[0].dims if d] != [d for d in wire.dims if d]:
            return wire
        wire = op.operands[0]


def ancestors(wires: Iterable[Wire], stop: Callable[[Wire], bool] | None = None) -> set[Wire]:
    """The wires that these depend on, and themselves; not beyond those where `stop` holds."""
    seen: set[Wire] = set()
    todo = list(wires)
    while todo:
        wire = todo.pop()
        if wire in seen:
            continue
        seen.add(wire)
        if wire.producer and not (stop and stop(wire)):
            todo += wire.producer.operands
    return seen
