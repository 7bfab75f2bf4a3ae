"""Signatures over several mesh axes at once, and views, which take the types of what they view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..ir.graph import Binding, Graph, Op, Value, bind
from ..ir.mesh import Axis
from ..ir.rule import FactorName
from ..ir.signature import Signature, signatures
from ..ir.types import AxisType, I, NdType, S

VIEWS = frozenset({"reshape", "permute"})
"""Kinds whose result is the operand's data: converting before or after costs the same, so the
program decides once, on the operand."""

Position = tuple[int, int]
"""(dim, part): a factor of a value."""


@dataclass(frozen=True, slots=True)
class NdSignature:
    """Types of an op's operands and results on all axes, and the loop each axis splits."""

    operands: tuple[NdType, ...]
    results: tuple[NdType, ...]
    factors: tuple[FactorName | None, ...]

    @staticmethod
    def combine(axes: Sequence[Axis], parts: Sequence[Signature]) -> NdSignature:
        """One signature per axis, put together."""
        names = [axis.name for axis in axes]

        def column(types: Sequence[AxisType]) -> NdType:
            return NdType(tuple(zip(names, types, strict=True)))

        operands = zip(*(part.operands for part in parts), strict=True)
        results = zip(*(part.results for part in parts), strict=True)
        return NdSignature(
            tuple(column(types) for types in operands),
            tuple(column(types) for types in results),
            tuple(part.factor for part in parts),
        )

    def splits(self, axes: Sequence[Axis]) -> dict[FactorName, int]:
        """Factor → number of devices its loop is split over."""
        found: dict[FactorName, int] = {}
        for axis, factor in zip(axes, self.factors, strict=True):
            if factor is not None:
                found[factor] = found.get(factor, 1) * axis.size
        return found


def nd_signatures(
    op: Op, values: Mapping[str, Value], axes: Sequence[Axis], binding: Binding
) -> tuple[NdSignature, ...]:
    """Every signature of `op` over `axes` whose splits divide the factor sizes.

    An axis of size 1 has nothing to decide: everything is `I` there.
    """
    found: list[NdSignature] = []
    every = signatures(op, values)
    whole = [s for s in every if not any(k.kind in "SP" for k in (*s.operands, *s.results))][:1]
    for parts in product(*(every if axis.size > 1 else whole for axis in axes)):
        candidate = NdSignature.combine(axes, parts)
        splits = candidate.splits(axes)
        if all(bind(op.sizes[f], binding) % ways == 0 for f, ways in splits.items()):
            found.append(candidate)
    return tuple(found)


def storage_types(
    value: Value, axes: Sequence[Axis], binding: Binding, replicated: AxisType = I
) -> tuple[NdType, ...]:
    """Types in which a value can be kept or handed on: replicated, or split evenly, per axis."""
    options: list[AxisType] = [replicated]
    options += [S(d, p) for d, dim in enumerate(value.dims) for p in range(len(dim))]
    found: list[NdType] = []
    for combination in product(*(options if axis.size > 1 else options[:1] for axis in axes)):
        ways: dict[AxisType, int] = {}
        for axis, kind in zip(axes, combination, strict=True):
            if kind.is_split:
                ways[kind] = ways.get(kind, 1) * axis.size
        if all(bind(value.dims[k.dim][k.part], binding) % n == 0 for k, n in ways.items()):
            found.append(NdType(tuple(zip((a.name for a in axes), combination, strict=True))))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Alias:
    """A view: `to_base` maps the positions of its factors to those of `base`."""

    base: str
    to_base: Mapping[Position, Position]

    def base_type(self, kind: NdType) -> NdType:
        """The base's type when the view has type `kind`."""
        return _moved(kind, self.to_base)

    def view_type(self, kind: NdType) -> NdType:
        """The view's type when the base has type `kind`."""
        return _moved(kind, {b: a for a, b in self.to_base.items()})


def _moved(kind: NdType, positions: Mapping[Position, Position]) -> NdType:
    return NdType(
        tuple((axis, S(*positions[k.dim, k.part]) if k.is_split else k) for axis, k in kind)
    )


def aliases(graph: Graph) -> dict[str, Alias]:
    """View values → the value whose data they show (never itself a view)."""
    found: dict[str, Alias] = {}
    for op in graph.ops:
        if not is_view(op):
            continue
        (source,), (target,) = op.rule.operands, op.rule.results
        place = {f: (d, p) for d, dim in enumerate(source) for p, f in enumerate(dim)}
        to_source = {(d, p): place[f] for d, dim in enumerate(target) for p, f in enumerate(dim)}
        base = op.operands[0]
        if base in found:
            above = found[base]
            to_source = {position: above.to_base[q] for position, q in to_source.items()}
            base = above.base
        found[op.results[0]] = Alias(base, to_source)
    return found


def is_view(op: Op) -> bool:
    """Whether the op only shows its operand's data in another shape (and mixes no factors)."""
    return op.kind in VIEWS and not op.rule.locked
