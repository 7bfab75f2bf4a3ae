"""From stored arrays to logical tensors: the change of coordinates that every format is.

The same direction serves both ends of a conversion. A reader knows in which boxes of the stored
arrays its bytes are, a writer in which it will put them; both tables are brought to the logical
tensors, and what they have in common there is what has to be moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ..ir import InvalidInput
from .boxes import Boxes
from .factor_boxes import FactorBoxes, factors_of
from .notation import SLOT, Arrangement, Part


@dataclass(frozen=True, slots=True)
class Arranged:
    """An arrangement with the sizes of its factors (the slot's is the sum of its parts')."""

    arrangement: Arrangement
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored array, without padding."""
        return tuple(prod(self.size(f) for f in dim) for dim in self.arrangement.dims)

    @property
    def columns(self) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """Dims as numbers of factors, and the sizes of the factors, in the stored order."""
        dims: list[tuple[int, ...]] = []
        sizes: list[int] = []
        for dim in self.arrangement.dims:
            dims.append(tuple(range(len(sizes), len(sizes) + len(dim))))
            sizes.extend(self.size(f) for f in dim)
        return tuple(dims), tuple(sizes)

    def size(self, factor: str) -> int:
        """Of one factor; that of the slot is what its parts take together."""
        if factor == SLOT:
            return sum(self.share(part) for part in self.arrangement.parts)
        return 1 if factor == "1" else self.sizes[factor]

    def share(self, part: Part) -> int:
        """How many places of the slot a part takes."""
        return self.sizes[part.share] if part.share else 1

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Of a logical tensor."""
        return tuple(prod(self.size(f) for f in dim) for dim in part.dims)

    def names(self, part: Part) -> list[str]:
        """Of all logical tensors of a part: one, unless factors stand in its name."""
        return [_named(part, at) for at in np.ndindex(*(self.size(f) for f in part.indices))]

    def logical(self, stored: Boxes) -> dict[str, Boxes]:
        """Boxes of the stored array as boxes of the logical tensors, by name.

        What lies beyond the array's shape is padding and is left out.
        """
        dims, sizes = self.columns
        table = factors_of(stored.clipped(self.shape), dims, sizes)
        order = list(self.arrangement.factors)
        found: dict[str, Boxes] = {}
        begin = 0
        for part in self.arrangement.parts:
            own, names, lengths = table, list(order), list(sizes)
            if SLOT in order:
                place = order.index(SLOT)
                own = table.within(place, begin, begin + self.share(part))
                begin += self.share(part)
                names[place], lengths[place] = part.share or SLOT, self.share(part)
            found |= _by_name(part, own, names, lengths)
        return found


def _by_name(
    part: Part, table: FactorBoxes, names: list[str], sizes: list[int]
) -> dict[str, Boxes]:
    columns = [names.index(f) for f in part.indices]
    for column in columns:
        table = table.exploded(column)
    members = [[names.index(f) for f in dim if f != "1"] for dim in part.dims]
    at = table.begin[:, columns]
    kinds, which = np.unique(at, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return {
        _named(part, tuple(kind)): table.take(np.flatnonzero(which == k)).as_dims(members, sizes)
        for k, kind in enumerate(kinds.tolist())
    }


def _named(part: Part, at: tuple[int, ...]) -> str:
    name = part.name
    for factor, index in zip(part.indices, at, strict=True):
        name = name.replace("{" + factor + "}", str(index))
    return name


def arrange(
    arrangement: Arrangement,
    known: Mapping[str, int],
    stored: tuple[int, ...] | None = None,
    logical: Mapping[str, tuple[int, ...]] | None = None,
) -> Arranged:
    """Finds the sizes of all factors from what is known.

    `known` sizes by name, the `stored` shape (unpadded), and the `logical` shapes by the name
    patterns of the parts. A dim with one unknown factor gives it. Raises InvalidInput where sizes
    contradict each other or stay unknown (then they have to be given).
    """
    sizes = dict(known)
    equations = [
        *(_equations(arrangement.dims, stored, arrangement, sizes) if stored is not None else ()),
        *(
            equation
            for part in arrangement.parts
            if logical and part.name in logical
            for equation in _equations(part.dims, logical[part.name], arrangement, sizes)
        ),
    ]
    solved = True
    while solved:
        solved = sum(_solve(terms, total, sizes) for terms, total in equations) > 0
    wanted = {f for f in arrangement.factors if f not in (SLOT, "1")}
    wanted |= {part.share for part in arrangement.parts if part.share}
    if missing := sorted(wanted - sizes.keys()):
        raise InvalidInput(
            f"{arrangement.parts[0].name}: the sizes of {', '.join(missing)} do not follow from "
            f"the shape {stored}; give them, as --sizes {missing[0]}=…"
        )
    found = Arranged(arrangement, sizes)
    if stored is not None and found.shape != tuple(stored):
        raise InvalidInput(
            f"{arrangement.parts[0].name}: stored as {tuple(stored)}, expected {found.shape} with "
            + ", ".join(f"{k}={sizes[k]}" for k in sorted(wanted))
        )
    return found


Terms = tuple[tuple[tuple[str, ...], ...], ...]
"""A sum of products: for each summand its factors."""


def _equations(
    dims: tuple[tuple[str, ...], ...],
    shape: tuple[int, ...],
    arrangement: Arrangement,
    sizes: Mapping[str, int],
) -> list[tuple[tuple[tuple[str, ...], tuple[str, ...]], int]]:
    """(plain factors of a dim, shares of the slot if it is in the dim), size."""
    if len(dims) != len(shape):
        raise InvalidInput(
            f"{arrangement.parts[0].name}: {len(shape)} dims {tuple(shape)}, expected {len(dims)}"
        )
    found = []
    for dim, total in zip(dims, shape, strict=True):
        plain = tuple(f for f in dim if f not in (SLOT, "1"))
        shares = tuple(p.share for p in arrangement.parts) if SLOT in dim else ()
        found.append(((plain, shares), total))
    return found


def _solve(
    terms: tuple[tuple[str, ...], tuple[str, ...]], total: int, sizes: dict[str, int]
) -> bool:
    """Finds the one unknown factor of an equation, if there is just one."""
    plain, shares = terms
    open_factors = [f for f in plain if f not in sizes]
    open_shares = [f for f in shares if f and f not in sizes]
    slot = sum(sizes[f] if f else 1 for f in shares if not f or f in sizes) if shares else 1
    known = prod(sizes[f] for f in plain if f in sizes)
    if len(open_factors) == 1 and not open_shares and total % (known * slot) == 0:
        sizes[open_factors[0]] = total // (known * slot)
        return True
    if not open_factors and len(open_shares) == 1 and total % known == 0 and total // known > slot:
        sizes[open_shares[0]] = total // known - slot
        return True
    return False
