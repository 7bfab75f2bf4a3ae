"""A raw graph while it is being written: ops in order, values by name, parameters with inits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..graph import Dims, Dtype, Init, Value
from ..refine import RawGraph, RawOp
from ..rule import Size

_FLOATS = frozenset({"model", "wide", "float32", "float64"})


def dims_of(*sizes: Size) -> Dims:
    """Dims of one factor each; a size of 1 has none."""
    return tuple(() if size == 1 else (size,) for size in sizes)


@dataclass(frozen=True, slots=True)
class Sheet:
    """Writes one graph: it fills its own lists. `path` is the module that is written now; `under`
    gives the same sheet inside a module of it. Where a name is taken, a number is added to it."""

    path: str = ""
    values: dict[str, Value] = field(default_factory=dict)
    ops: list[RawOp] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    inits: dict[str, Init] = field(default_factory=dict)
    """Parameters in order, with how they start."""

    def under(self, path: str) -> Sheet:
        """The same sheet, writing inside a module."""
        return replace(self, path=self.full(path))

    def full(self, path: str) -> str:
        """A module's path in the graph."""
        return ".".join(part for part in (self.path, path) if part)

    def input(self, name: str, dims: Dims, dtype: Dtype = "model", *, grad: bool = True) -> str:
        """A value that comes from outside."""
        if name not in self.values:
            self.values[name] = Value(name, dims, dtype, "input", grad)
            self.inputs.append(name)
        return name

    def parameter(self, name: str, shape: Sequence[int], init: Init) -> str:
        """A parameter of the module at hand; one of the same name is the same."""
        name = self.full(name)
        if name not in self.values:
            self.values[name] = Value(name, dims_of(*shape), "model", "parameter")
            self.inits[name] = init
        return name

    def op(
        self,
        kind: str,
        operands: Sequence[str],
        dims: Dims,
        *,
        name: str = "",
        at: str = "",
        dtype: Dtype | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes an op with one result; the result's name."""
        (result,) = self.op_of_several(
            kind, operands, (dims,), (name or kind,), at=at, dtypes=(dtype,), attributes=attributes
        )
        return result

    def op_of_several(
        self,
        kind: str,
        operands: Sequence[str],
        dims: Sequence[Dims],
        names: Sequence[str],
        *,
        at: str = "",
        dtypes: Sequence[Dtype | None] = (),
        attributes: Mapping[str, Any] | None = None,
        constant: Collection[str] = (),
    ) -> tuple[str, ...]:
        """Writes an op with several results; a dtype that is not given is operand 0's. Results
        called as in `constant`, integers and masks have no gradient."""
        module = self.full(at)
        given = self.values[operands[0]].dtype if operands else "model"
        grad = any(self.values[v].grad for v in operands)
        results = []
        for dim, base, dtype in zip(dims, names, dtypes or (None,) * len(dims), strict=True):
            result = _unique(base, self.values)
            known = dtype or given
            flows = grad and base not in constant and known in _FLOATS
            self.values[result] = Value(result, dim, known, "activation", flows)
            results.append(result)
        title = _unique(f"{module}.{kind}" if module else kind, {op.name for op in self.ops})
        self.ops.append(
            RawOp(title, kind, tuple(operands), tuple(results), dict(attributes or {}), module)
        )
        return tuple(results)

    def graph(self, outputs: Sequence[str]) -> RawGraph:
        """What has been written."""
        return RawGraph(
            dict(self.values),
            tuple(self.ops),
            tuple(self.inputs),
            tuple(self.inits),
            tuple(outputs),
        )


def _unique(base: str, taken: Mapping[str, Any] | set[str]) -> str:
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name
