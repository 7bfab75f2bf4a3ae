"""The body of a function: statements over typed values, before they have variable names.

Built from a graph and its annotation; conversions appear as statements of their own, right before
the first line that needs them. `naming` then gives variables, `peephole` joins lines.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...ir.conversion import Step, steps
from ...ir.graph import Graph, Model, Op, Value
from ...ir.plan import Annotation
from ...ir.rule import Size
from ...ir.types import NdType, R
from .language import Language, literal
from .target import LiveType, LocalSize, Target
from .text import identifier

Form = tuple[str, LiveType]
"""A value in one of its types: what a variable holds."""

Text = Callable[[Sequence[str]], str]
"""From the expressions of what is read to the expression of the result."""


@dataclass(slots=True)
class Statement:
    """`writes = text(reads)`.

    `role` steers joining lines: a `leaf` (a parameter) goes into whatever reads it, a `view` into
    another view, a `pointwise` function of one operand into arithmetic. `names` are what the
    results would like to be called. `loop` is the header of a `for` around the line, which then
    reads its first operand and writes it again.
    """

    reads: list[Form]
    writes: list[Form]
    text: Text
    names: list[str]
    role: str = "op"
    op: Op | None = None
    step: Step | None = None
    comment: str = ""
    loop: str = ""
    absorbed: list[Form] = field(default_factory=list)
    """What was read by a line of its own before it was joined to this one."""


@dataclass(slots=True)
class Body:
    """Statements in order, and what the function returns."""

    target: Target
    language: Language
    statements: list[Statement] = field(default_factory=list)
    outputs: list[Form] = field(default_factory=list)
    made: dict[str, LiveType] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Value name → variable name of an argument of the function."""
    paths: dict[str, str] = field(default_factory=dict)
    """Parameter value → its dotted path from `self`."""
    constants: dict[str, str] = field(default_factory=dict)
    """Literals that deserve a name at the top of the file; shared by all bodies of a program."""
    axes: set[str] = field(default_factory=set)
    """Axes whose process groups the lines name."""
    draws: bool = False
    """Whether a line draws random numbers, from a variable `draw`."""
    symbols: dict[str, str] = field(default_factory=lambda: {"b": "MICRO_BATCH", "s": "SEQ_LEN"})
    _have: set[Form] = field(default_factory=set)

    def argument(self, value: Value, types: LiveType, variable: str) -> None:
        """An argument of the function."""
        self.know(value, types)
        self.inputs[value.name] = variable

    def parameter(self, value: Value, types: LiveType, path: str) -> None:
        """A parameter under `self`."""
        form = self.know(replace(value, role="parameter"), types)
        self.paths[value.name] = path
        text = self.language.parameter(path)
        name = path.rpartition(".")[2]
        self.add(Statement([], [form], lambda x: text, [name], role="leaf"))

    def know(self, value: Value, types: LiveType) -> Form:
        """Notes in which type a value comes into being."""
        form = (value.name, types)
        self.values[value.name] = value
        self.made[value.name] = types
        self._have.add(form)
        return form

    def add(self, statement: Statement) -> None:
        """Appends a statement."""
        self.statements.append(statement)
        self._have.update(statement.writes)

    def need(self, name: str, types: LiveType) -> Form:
        """The value in this type; adds the conversions that are not there yet."""
        value, have = self.values[name], self.made[name]
        form = (name, have)
        for step in steps(have, types):
            after = (name, form[1].replace(step.axis, step.target))
            if not value.grad and {step.source.kind, step.target.kind} == {"I", "R"}:
                after = self._same(form, after)  # they differ by the gradient alone
            elif after not in self._have:
                self.add(self.language.conversion(self, form, after, step))
            form = after
        return form

    def _same(self, form: Form, after: Form) -> Form:
        if after not in self._have:
            self.add(Statement([form], [after], lambda x: x[0], [""], role="alias"))
        return after

    def add_graph(self, graph: Graph, annotation: Annotation, only: set[str] | None = None) -> None:
        """Appends the ops of a graph whose inputs and parameters are known.

        `only` names the values that are wanted; other ops are left out.
        """
        from .lines import line

        wanted = None if only is None else needed_ops(graph, only)
        for op in graph.ops:
            if wanted is not None and op.name not in wanted:
                continue
            types = annotation.ops[op.name]
            reads = [
                self.need(name, self.target.live(kind))
                for name, kind in zip(op.operands, types.operands, strict=True)
            ]
            writes = [
                self.know(graph.values[name], self.target.live(kind))
                for name, kind in zip(op.results, types.results, strict=True)
            ]
            self.add(line(self, op, reads, writes))

    def constant(self, name: str, value: Any) -> str:
        """A name for a literal, at the top of the file."""
        text = literal(value)
        for known, have in self.constants.items():
            if have == text:
                return known
        taken = sum(known.rstrip("_0123456789") == name for known in self.constants)
        name = f"{name}_{taken}" if taken else name
        self.constants[name] = text
        return name

    def constant_values(self) -> dict[str, Any]:
        """The named literals, evaluated."""
        return {name: ast.literal_eval(text) for name, text in self.constants.items()}

    def add_constants(self, model: Model, names: set[str]) -> None:
        """The fixed tensors among these values."""
        for name in sorted(names & set(model.constants)):
            variable = identifier(name, self.language.reserved)
            literal = self.constant(variable.upper(), model.constants[name])
            form = self.know(model.preamble.values[name], NdType.uniform(self.target.axes, R))
            text = self.language.tensor(self, literal)
            self.add(Statement([], [form], _fixed(text), [variable]))

    def size(self, dim: tuple[LocalSize, ...]) -> str:
        """The size of a dim of a shard, as an expression."""
        number = 1
        symbols: list[str] = []
        for size in dim:
            if size.symbol:
                symbols.append(size.text(self.symbols))
            else:
                number *= size.number
        if not symbols:
            return str(number)
        return " * ".join(
            [f"({s})" if "//" in s else s for s in symbols] + [str(number)] * (number > 1)
        )

    def extent(self, size: Size) -> str:
        """The number of elements of a whole dim, read off an argument where one has it."""
        if isinstance(size, int):
            return str(size)
        for name, variable in self.inputs.items():
            local = self.target.local(self.values[name], self.made[name])
            for dim, sizes in enumerate(local):
                if len(sizes) == 1 and sizes[0].symbol == size and sizes[0].times == 1:
                    by = f" * {sizes[0].by}" if sizes[0].by > 1 else ""
                    return f"{variable}.shape[{dim}]{by}"
        return self.symbols[size]

    def uses(self) -> dict[Form, int]:
        """How often every form is read."""
        count: dict[Form, int] = {}
        for form in [f for s in self.statements for f in s.reads] + self.outputs:
            count[form] = count.get(form, 0) + 1
        return count


def _fixed(text: str) -> Text:
    return lambda x: text


def needed_ops(graph: Graph, values: set[str]) -> set[str]:
    """Names of the ops that these values depend on."""
    producer = graph.producer()
    found: set[str] = set()
    pending = [v for v in values if v in producer]
    while pending:
        op, _ = producer[pending.pop()]
        if op.name not in found:
            found.add(op.name)
            pending += [v for v in op.operands if v in producer]
    return found


def needed_inputs(graph: Graph, values: set[str]) -> set[str]:
    """The inputs of a graph that these values depend on."""
    ops = needed_ops(graph, values)
    read = {v for op in graph.ops if op.name in ops for v in op.operands} | values
    return read & set(graph.inputs)
