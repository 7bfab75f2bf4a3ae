"""Writing by a rule: the stored arrays that hold logical tensors, and how a mesh cuts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir import InvalidInput
from .arrangement import Arranged, arrange
from .boxes import Boxes
from .contents import Key, Wanted
from .from_stored import Shape, known_sizes, led, placement_of
from .naming import Pattern
from .notation import Arrangement
from .rules import Rule
from .spec import Spec, evaluate


@dataclass(frozen=True, slots=True, eq=False)
class StoredWanted:
    """A stored array that a writer is to lay out, and how it is made of logical tensors.

    `arranged` has the sizes with padding; `shapes` are the logical tensors' true ones, by name.
    `lead` are places that the array takes along leading dims of the arrangement that it does not
    itself have (an expert of its own among those of one logical tensor). `state` is that of the
    logical tensors: a layout may put it into the stored name, and then the format sees a weight.
    """

    state: str
    wanted: Wanted
    arranged: Arranged
    shapes: Mapping[str, Shape]
    lead: tuple[int, ...] = ()

    def logical(self, stored: Boxes) -> dict[Key, Boxes]:
        """Boxes of the stored array as boxes of logical tensors, by key; padding is left out."""
        made = self.arranged.logical(led(stored, self.lead))
        return {
            (self.state, name): boxes.clipped(self.shapes[name]) for name, boxes in made.items()
        }


def wanted_arrays(
    spec: Spec,
    rule: Rule,
    captures: Mapping[str, str],
    counts: Mapping[str, int],
    state: str,
    tensors: Mapping[str, tuple[Shape, str]],
    known: Mapping[str, Any],
    mesh: Mapping[str, int],
) -> list[StoredWanted]:
    """The arrays of one rule and one set of captures (several where a factor stands in the stored
    name alone, or copies are kept). Raises InvalidInput as `Layout.stored` does."""
    ndim = rule.stored_dims(captures, tensors)
    arrangement = rule.arrangement(captures, ndim)
    shapes: dict[str, Shape] = {}
    dtypes: set[str] = set()
    patterns: dict[str, Shape] = {}
    for part in arrangement.parts:
        blank = Arranged(arrangement, dict(counts))
        for name in blank.names(part):
            if name not in tensors:
                raise InvalidInput(f"layout {spec.layout}: {name} is missing beside its siblings")
            shape, dtype = tensors[name]
            if patterns.setdefault(part.name, shape) != shape:
                raise InvalidInput(
                    f"{name}: {shape}, expected {patterns[part.name]} like its siblings, with "
                    f"which {rule.patterns[0].text} is made"
                )
            shapes[name] = shape
            dtypes.add(dtype)
    if len(dtypes) > 1:
        raise InvalidInput(
            f"{rule.patterns[0].text} is made of {', '.join(sorted(dtypes))}: give one dtype"
        )
    solved = arrange(
        arrangement,
        {f: n for f, n in known_sizes(spec, known).items() if f not in rule.pad} | dict(counts),
        None,
        patterns,
    )
    for part in arrangement.parts:
        if solved.part_shape(part) != patterns[part.name]:
            given = ", ".join(f"{f}={n}" for f, n in sorted(solved.sizes.items()))
            raise InvalidInput(
                f"{part.name}: {patterns[part.name]}, expected {solved.part_shape(part)} with "
                f"{given}; a size that was given is of another model"
            )
    sizes = dict(solved.sizes)
    for factor, expression in rule.pad.items():
        multiple = evaluate(expression, known)
        if multiple is None:
            raise InvalidInput(
                f"{rule.patterns[0].text}: {factor} is padded to {expression!r}, "
                "of which a size is unknown: give it"
            )
        sizes[factor] = -(-sizes[factor] // multiple) * multiple
    arranged = Arranged(arrangement, sizes)
    lead = len(rule.lifted)
    unpadded = solved.shape[lead:] if rule.pad else None
    splits: list[tuple[str, str]] = []
    for one in rule.types:
        ranks = mesh.get(one.axis, 1)
        if ranks == 1 or one.kind == "R":
            continue
        if one.kind == "P":
            if one.combine == "sum":
                raise InvalidInput(
                    f"{rule.patterns[0].text}: partial sums on {one.axis} are read, not written; "
                    "say R in the target's layout"
                )
            continue
        size = _size_of(arranged, one.factor, lead)
        count = ranks
        if one.copies and size < ranks:
            if ranks % size:
                raise InvalidInput(
                    f"{rule.patterns[0].text}: {size} of {one.factor} cannot lie "
                    f"evenly on {one.axis}={ranks}"
                )
            count = size
        splits.append((f"{one.axis}:{count}" if count < ranks else one.axis, one.factor))
    whole = {f for _, f in splits if f not in arrangement.factors}
    placement = placement_of(arranged, splits, whole, lead)
    names = rule.stored_names(captures, known)
    made = []
    for at in np.ndindex(*(sizes[f] for f in rule.lifted)):
        filled = dict(zip(rule.lifted, (str(k) for k in at), strict=True))
        for name in names:
            wanted = Wanted(
                state,
                Pattern(name).filled(filled),
                placement.shape,
                dtypes.copy().pop(),
                placement.dims,
                placement.sizes,
                placement.splits,
                unpadded,
            )
            made.append(StoredWanted(state, wanted, arranged, shapes, tuple(at)))
    return made


def _size_of(arranged: Arranged, factor: str, lead: int) -> int:
    if factor.isdigit():
        return arranged.shape[lead + int(factor)]
    return arranged.size(factor)


def wanted_as_it_is(state: str, name: str, shape: Shape, dtype: str, spec: Spec) -> StoredWanted:
    """A logical tensor for which there is no rule."""
    dims = tuple((k,) for k in range(len(shape)))
    splits = tuple(
        (axis, int(kind[2:-1]))
        for axis, kind in spec.default_types.items()
        if kind[0] == "S" and int(kind[2:-1]) < len(shape)
    )
    wanted = Wanted(state, name, tuple(shape), dtype, dims, tuple(shape), splits)
    return StoredWanted(state, wanted, _plain(name, tuple(shape)), {name: tuple(shape)})


def _plain(name: str, shape: Shape) -> Arranged:
    arrangement = Arrangement.plain(name, len(shape))
    return Arranged(arrangement, {f"d{k}": size for k, size in enumerate(shape)})
