"""The graph: values, ops with their factor rules, blocks and the model they make up.

A `Model` is a chain of *segments*, the calls of its distinct *blocks* (a block is a `Graph`; a
decoder layer that is repeated 126 times is one block and 126 segments), and a *preamble*: the ops
that depend on no parameter and carry no gradient (shifted labels, rotary tables, positions), cheap
enough that every pipeline stage computes what it needs of it again.

Everything here is immutable data without behaviour of a framework.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from .errors import InvalidInput
from .rule import FactorName, Rule, Size

Dims = tuple[tuple[Size, ...], ...]
"""Per dim the sizes of its factors, outermost first; `()` is a dim of size 1."""

Dtype = Literal["model", "wide", "float64", "float32", "int64", "int32", "bool"]
"""`model`: the dtype the model computes in; `wide`: that, but at least float32."""

Binding = Mapping[str, int]
"""What the symbols stand for: `{"b": micro-batch size in sequences, "s": sequence length}`."""

SLOTS = "c"
"""Symbol of the slots of one expert for one sequence; `from_dims.expert_binding` says how many."""


def bind(size: Size, binding: Binding) -> int:
    """The number a size stands for; raises InvalidInput for an unbound symbol."""
    if isinstance(size, int):
        return size
    if size not in binding:
        raise InvalidInput(f"size {size!r} is not bound: known are {sorted(binding)}")
    return binding[size]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: `dims` holds the factor sizes of each dim.

    `grad` says whether a gradient flows into it; `role` where it comes from.
    """

    name: str
    dims: Dims
    dtype: Dtype = "model"
    role: Literal["activation", "parameter", "input", "constant"] = "activation"
    grad: bool = True

    def shape(self, binding: Binding) -> tuple[int, ...]:
        """The logical shape in elements."""
        return tuple(prod(bind(size, binding) for size in dim) for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    `rule` is bound: its operand and result dims have exactly the factors of the values' dims.
    `sizes` gives each factor's size, `module` the module path it was traced from.
    """

    name: str
    kind: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    rule: Rule
    sizes: Mapping[FactorName, Size]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""

    def factor_size(self, factor: FactorName, binding: Binding) -> int:
        """Number of iterations of a loop factor."""
        return bind(self.sizes[factor], binding)


@dataclass(frozen=True, slots=True)
class Graph:
    """Ops in order. `inputs` come from outside, `parameters` are stored, `outputs` leave."""

    values: Mapping[str, Value]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]

    def producer(self) -> dict[str, tuple[Op, int]]:
        """Value name → (op, index of the result)."""
        return {r: (op, i) for op in self.ops for i, r in enumerate(op.results)}

    def consumers(self) -> dict[str, list[tuple[Op, int]]]:
        """Value name → [(op, index of the operand)], in order."""
        uses: dict[str, list[tuple[Op, int]]] = {name: [] for name in self.values}
        for op in self.ops:
            for i, operand in enumerate(op.operands):
                uses[operand].append((op, i))
        return uses

    def check(self) -> None:
        """Raises InvalidInput where the graph is not well formed."""
        entering = (*self.inputs, *self.parameters)
        mentioned = (*entering, *self.outputs, *(v for op in self.ops for v in op.operands))
        mentioned += tuple(v for op in self.ops for v in op.results)
        if missing := [name for name in mentioned if name not in self.values]:
            raise InvalidInput(f"value {missing[0]!r} is used, but not described")
        for name, value in self.values.items():
            if any(isinstance(size, int) and size < 2 for dim in value.dims for size in dim):
                raise InvalidInput(f"value {name!r}: dims {value.dims} hold a factor below 2")
        known = set(entering)
        names: set[str] = set()
        for op in self.ops:
            if op.name in names:
                raise InvalidInput(f"two ops are called {op.name!r}")
            names.add(op.name)
            self._check_rule(op)
            if unready := set(op.operands) - known:
                raise InvalidInput(f"op {op.name} uses {sorted(unready)} before they are made")
            if known & set(op.results) or len(set(op.results)) < len(op.results):
                raise InvalidInput(f"op {op.name} makes {op.results}, one of them a second time")
            known |= set(op.results)
        if unmade := set(self.outputs) - known:
            raise InvalidInput(f"outputs {sorted(unmade)} are never made")

    def _check_rule(self, op: Op) -> None:
        """Raises InvalidInput where an op's rule is not bound to its values' dims."""
        if unsized := [f for f in op.rule.factors if f not in op.sizes]:
            raise InvalidInput(f"op {op.name}: factors {unsized} of rule {op.rule} have no size")
        for names, shapes in ((op.operands, op.rule.operands), (op.results, op.rule.results)):
            if len(names) != len(shapes):
                raise InvalidInput(f"op {op.name}: {len(names)} values, rule {op.rule}")
            for name, shape in zip(names, shapes, strict=True):
                want = tuple(tuple(op.sizes[f] for f in dim) for dim in shape)
                if self.values[name].dims != want:
                    have = self.values[name].dims
                    raise InvalidInput(f"op {op.name}: {name} has dims {have}, rule {want}")


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: `normal` (value = standard deviation), `uniform` (± value),
    `constant` (value)."""

    kind: Literal["normal", "uniform", "constant"]
    value: float


@dataclass(frozen=True, slots=True)
class Parameter:
    """A logical parameter under its original name; `shape` in elements, as the model stores it."""

    name: str
    shape: tuple[int, ...]
    init: Init
    trainable: bool = True

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """One call of a block.

    `module` is the path of the module it came from (`model.layers.3`; empty for the model's own
    ops). `parameters` are original names, aligned with the block's `parameters`; `inputs` and
    `outputs` are model-level value names, aligned with the block's.
    """

    block: str
    module: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pin:
    """A choice the user made: SBP types by axis of a parameter (by its name) or of an activation
    (`block:value`), or the pipeline stage of a module (by its path)."""

    target: Literal["parameter", "activation", "stage"]
    name: str
    types: Mapping[str, str] = field(default_factory=dict)
    stage: int = -1


@dataclass(frozen=True)
class Model:
    """A traced model: preamble, distinct blocks, and the segments that call them in order.

    `loss` names two scalars of the last segment: the *sum* of the loss over its terms, and the
    *count* of the terms (valid tokens for a cross-entropy); the training loss is their quotient
    over the global batch. `constants` holds small fixed tensors (as nested lists) by value name.
    `inputs` are the batch's tensors, with symbolic dims `b` and `s`.
    """

    name: str
    inputs: tuple[Value, ...]
    preamble: Graph
    blocks: Mapping[str, Graph]
    segments: tuple[Segment, ...]
    parameters: Mapping[str, Parameter]
    loss: tuple[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()

    @property
    def elements(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.elements for p in self.parameters.values())

    @cached_property
    def tied(self) -> frozenset[str]:
        """Names of parameters that are used several times."""
        seen: set[str] = set()
        again: set[str] = set()
        for segment in self.segments:
            again |= seen.intersection(segment.parameters)
            seen.update(segment.parameters)
            if len(set(segment.parameters)) < len(segment.parameters):
                again |= {name for name in segment.parameters if segment.parameters.count(name) > 1}
        return frozenset(again)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How often each block is called."""
        return Counter(segment.block for segment in self.segments)

    @cached_property
    def layer_run(self) -> tuple[int, int]:
        """(first, count) of the segments that count as layers: the stretch whose blocks occur more
        than once (all segments if none does), with layers of another kind next to it."""
        many = [i for i, s in enumerate(self.segments) if self.counts[s.block] > 1]
        if not many:
            return 0, len(self.segments)
        first, last = many[0], many[-1]
        while first > 0 and self._is_layer(first - 1):
            first -= 1
        while last + 1 < len(self.segments) and self._is_layer(last + 1):
            last += 1
        return first, last - first + 1

    def _is_layer(self, segment: int) -> bool:
        """Whether a segment hands on a value of the shape that it takes: a layer of another kind,
        such as the dense one before those with experts."""
        graph = self.blocks[self.segments[segment].block]
        taken = [graph.values[name] for name in graph.inputs if graph.values[name].grad]
        return bool(taken) and any(graph.values[n].dims == taken[0].dims for n in graph.outputs)

    def uses(self) -> dict[str, list[int]]:
        """Parameter name → the segments that use it (several for a tied parameter)."""
        uses: dict[str, list[int]] = {name: [] for name in self.parameters}
        for i, segment in enumerate(self.segments):
            for name in segment.parameters:
                uses[name].append(i)
        return uses

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Maximal runs of consecutive segments of one block, as (block, first, count)."""
        first = 0
        for i in range(1, len(self.segments) + 1):
            at_end = i == len(self.segments)
            if at_end or self.segments[i].block != self.segments[first].block:
                yield self.segments[first].block, first, i - first
                first = i

    def check(self) -> None:
        """Raises InvalidInput where graphs or the wiring between segments are not well formed."""
        self.preamble.check()
        for graph in self.blocks.values():
            graph.check()
        known = {v.name: v.dims for v in self.inputs}
        for name in (*self.preamble.outputs, *self.constants):
            if name not in self.preamble.values:
                raise InvalidInput(f"constant {name!r} is no value of the preamble")
            known[name] = self.preamble.values[name].dims
        for i, segment in enumerate(self.segments):
            where = f"segment {i} ({segment.module or segment.block})"
            if segment.block not in self.blocks:
                raise InvalidInput(f"{where}: no block is called {segment.block!r}")
            self._check_segment(where, segment, known)
            graph = self.blocks[segment.block]
            for outer, inner in zip(segment.outputs, graph.outputs, strict=True):
                known[outer] = graph.values[inner].dims
        if missing := [name for name in self.loss if name not in known]:
            raise InvalidInput(f"the loss {missing[0]!r} is no output of a segment")

    def _check_segment(self, where: str, segment: Segment, known: Mapping[str, Dims]) -> None:
        graph = self.blocks[segment.block]
        for what in ("inputs", "parameters", "outputs"):
            have, want = getattr(segment, what), getattr(graph, what)
            if len(have) != len(want):
                raise InvalidInput(f"{where}: {len(have)} {what}, the block has {len(want)}")
        for outer, inner in zip(segment.inputs, graph.inputs, strict=True):
            if known.get(outer) != graph.values[inner].dims:
                raise InvalidInput(
                    f"{where}: input {outer} has dims {known.get(outer)}, the block expects "
                    f"{graph.values[inner].dims}"
                )
        for name, inner in zip(segment.parameters, graph.parameters, strict=True):
            if name not in self.parameters:
                raise InvalidInput(f"{where}: unknown parameter {name}")
            shape, dims = self.parameters[name].shape, graph.values[inner].dims
            if any(isinstance(size, str) for dim in dims for size in dim):
                raise InvalidInput(f"{where}: parameter {name} has symbolic dims {dims}")
            if shape != graph.values[inner].shape({}):
                raise InvalidInput(f"{where}: {name} has shape {shape}, the block expects {dims}")

    def with_source(self, source: Mapping[str, Any]) -> Model:
        """The same model with a note of where it came from."""
        return replace(self, source=dict(source))
