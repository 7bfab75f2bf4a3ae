"""Reading by a rule: from the boxes of a stored array, or of its shards, to logical tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ..ir import CorruptCheckpoint, InvalidInput
from .arrangement import Arranged, arrange
from .boxes import Boxes
from .contents import Array, Key
from .placement import Placement
from .rules import Rule
from .spec import Spec, evaluate

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one stored array has of a logical tensor.

    `layer` are the numbers in the stored name, and `sizes` those of the array's factors.
    """

    name: str
    array: Array
    shape: Shape
    where: Any
    layer: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def joined(key: Key, pieces: list[Piece]) -> Array:
    """A logical tensor of all that stored arrays have of it; raises CorruptCheckpoint where they
    do not agree on its shape and dtype."""
    first = pieces[0]
    for other in pieces[1:]:
        if (other.shape, other.array.dtype) != (first.shape, first.array.dtype):
            raise CorruptCheckpoint(
                f"{key[1]} ({key[0]}): {first.array.name} makes it {first.array.dtype} "
                f"{first.shape}, {other.array.name} {other.array.dtype} {other.shape}"
            )

    def where() -> Boxes:
        return Boxes.joined([piece.where() for piece in pieces], len(first.shape))

    combine = next(
        (p.array.combine for p in pieces if p.array.combine != "copy"), pieces[0].array.combine
    )
    return Array(key[0], key[1], first.shape, first.array.dtype, where, combine)


def led(stored: Boxes, lead: Sequence[int]) -> Boxes:
    """Boxes with leading dims in which they take one place each."""
    if not lead:
        return stored
    rows = len(stored)
    ones = np.ones((rows, len(lead)), np.int64)
    at = ones * np.asarray(lead, np.int64)
    return Boxes(
        np.concatenate([at, stored.begin], 1),
        np.concatenate([ones, stored.size], 1),
        np.concatenate([ones * 0, stored.stride], 1),
        stored.record,
        stored.offset,
    )


def read_array(
    spec: Spec,
    rule: Rule,
    captures: Mapping[str, str],
    array: Array,
    known: Mapping[str, Any],
    mesh: Mapping[str, int],
    counts: Mapping[str, int],
) -> list[Piece]:
    """The logical tensors of an array, by the rule that matched its name with `captures`.

    `known` are facts and sizes, `mesh` the axes along which shards lie, `counts` how many there are
    of factors that stand in the stored name alone.
    """
    lead = tuple(int(captures[f]) for f in rule.lifted)
    local = array.shape[len(array.axes) :]
    arrangement = rule.arrangement(captures, len(local))
    sizes = known_sizes(spec, known) | dict(counts)
    ranks = {axis: mesh.get(axis, 1) for axis in array.axes}
    types = rule.types if array.axes else ()
    splits = [t for t in types if t.kind == "S" and t.axis in ranks and ranks[t.axis] > 1]
    cuts: dict[str, int] = {}
    names: list[tuple[str, str]] = []
    for one in splits:
        count = ranks[one.axis]
        if one.copies and one.factor in sizes:
            count = min(count, sizes[one.factor])
        cuts[one.factor] = cuts.get(one.factor, 1) * count
        names.append((f"{one.axis}:{count}" if count < ranks[one.axis] else one.axis, one.factor))
    factors = set(arrangement.factors)
    shape = list(local)
    whole_dims = {f for f in cuts if f not in factors}
    for dim in whole_dims:
        shape[int(dim)] *= cuts[dim]
    solving = {
        f: size // cuts.get(f, 1)
        for f, size in sizes.items()
        if f not in rule.pad and size % cuts.get(f, 1) == 0
    }
    full_lead = tuple(counts[f] for f in rule.lifted)
    part = arrange(arrangement, solving, (*full_lead, *shape))
    total = {f: n * cuts.get(f, 1) for f, n in part.sizes.items()}
    arranged = Arranged(arrangement, total)
    true = dict(total)
    for factor in rule.pad:
        if factor in sizes:
            if sizes[factor] > total[factor]:
                raise CorruptCheckpoint(
                    f"{array.name}: {total[factor]} of {factor} are stored, {sizes[factor]} are "
                    "expected by the checkpoint's own figures"
                )
            true[factor] = sizes[factor]
    placement = placement_of(arranged, names, whole_dims, len(rule.lifted))
    summed = [t for t in types if t.kind == "P" and ranks.get(t.axis, 1) > 1]
    if summed:
        array = replace(array, combine=summed[0].combine)

    @cache
    def logical() -> dict[str, Boxes]:
        whole = placement.whole(array.where(), array.axes, mesh)
        return arranged.logical(led(whole, lead))

    unpadded = Arranged(arrangement, true)
    found = []
    for member in arrangement.parts:
        expected = unpadded.part_shape(member)
        for name in arranged.names(member):
            where = _Clip(logical, name, expected)
            found.append(Piece(name, array, expected, where, tuple(captures.values()), true))
    return found


@dataclass(frozen=True, slots=True)
class _Clip:
    """The boxes of one logical tensor of several that a stored array is made of."""

    all: Any
    name: str
    shape: Shape

    def __call__(self) -> Boxes:
        found = self.all().get(self.name)
        return Boxes.of([], len(self.shape)) if found is None else found.clipped(self.shape)


def placement_of(
    arranged: Arranged, splits: Sequence[tuple[str, str]], whole_dims: set[str], lead: int
) -> Placement:
    """Factors as an axis needs them: a dim that is split as a whole is one factor."""
    dims: list[tuple[int, ...]] = []
    sizes: list[int] = []
    column: dict[str, int] = {}
    for number, members in enumerate(arranged.arrangement.dims[lead:]):
        if str(number) in whole_dims:
            column[str(number)] = len(sizes)
            dims.append((len(sizes),))
            sizes.append(prod(arranged.size(f) for f in members))
            continue
        dims.append(tuple(range(len(sizes), len(sizes) + len(members))))
        for factor in members:
            column[factor] = len(sizes)
            sizes.append(arranged.size(factor))
    for axis, factor in splits:
        if factor not in column:
            raise InvalidInput(
                f"{arranged.arrangement.parts[0].name}: {axis} splits {factor} and the whole of "
                "its dim; choose one"
            )
    return Placement(tuple(dims), tuple(sizes), tuple((a, column[f]) for a, f in splits))


def known_sizes(spec: Spec, known: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of factors: given under their own names, or as the spec says."""
    found = {}
    for factor, expression in spec.sizes.items():
        own = known.get(factor)
        size = own if isinstance(own, int) else evaluate(expression, known)
        if size is not None:
            found[factor] = size
    return found


def array_as_it_is(array: Array, mesh: Mapping[str, int], spec: Spec) -> Piece:
    """An array for which there is no rule; raises InvalidInput where it lies on several ranks and
    the spec has no type for their axis."""
    lead = len(array.axes)
    ranks = prod(mesh.get(axis, 1) for axis in array.axes)
    local = array.shape[lead:]
    if ranks == 1:
        plain = Placement(tuple((k,) for k in range(len(local))), local, ())
    else:
        said = {a: t for a, t in spec.default_types.items() if a in array.axes}
        if not said:
            axes = ", ".join(f"{a}={mesh.get(a, 1)}" for a in array.axes)
            raise InvalidInput(
                f"{array.name} lies on {axes} and no rule says how: add one (or default_types) to "
                "a layout and give it as --spec"
            )
        splits = tuple(
            (axis, int(kind[2:-1]))
            for axis, kind in said.items()
            if kind[0] == "S" and int(kind[2:-1]) < len(local)
        )
        sizes = list(local)
        for axis, factor in splits:
            sizes[factor] *= mesh.get(axis, 1)
        plain = Placement(tuple((k,) for k in range(len(local))), tuple(sizes), splits)

    def where() -> Boxes:
        return plain.whole(array.where(), array.axes, mesh)

    return Piece(array.name, array, plain.shape, where)
