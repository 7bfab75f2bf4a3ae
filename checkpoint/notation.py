"""The notation of arrangements: how a stored array is made of logical tensors.

    (g [q k v] d) h

says that the rows of the stored array are a product of the factors g, a *slot* and d, outermost
first, and its columns the factor h. In the slot the parts q, k and v lie one after the other; each
part is a logical tensor with dims of its own, `(g r d) h` for the queries: what it has more than
the stored array, r, is its share of the slot (one, if it has nothing more). A factor may also stand
in the name of a logical tensor: `model.layers.{i}.mlp.weight` of an array stacked as `i o h`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..ir import InvalidInput

SLOT = "[]"
"""The name under which the slot is a factor of the stored array."""

_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*|1)|([()])|\[([\w\s]*)\])")
_INDEX = re.compile(r"\{(\w+)\}")

Dims = tuple[tuple[str, ...], ...]
"""The factors of each dim, outermost first."""


@dataclass(frozen=True, slots=True)
class Part:
    """A logical tensor: `name` with `{index}` factors, its dims, and the factor that is its share
    of the slot ("" if it takes one place, or if there is no slot)."""

    name: str
    dims: Dims
    share: str = ""

    @property
    def indices(self) -> tuple[str, ...]:
        """The factors that stand in the name."""
        return tuple(_INDEX.findall(self.name))


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A stored array: its dims (the slot is the factor `SLOT`) and its parts, in the slot's
    order."""

    dims: Dims
    parts: tuple[Part, ...]

    @staticmethod
    def parse(stored: str, parts: dict[str, tuple[str, str]]) -> Arrangement:
        """From the stored dims and, by the names in the slot, (name, dims) of each part.

        Without a slot there is one part, whose key is free. Raises InvalidInput where the factors
        of a part and of the stored array do not correspond.
        """
        dims, slot = parse_dims(stored)
        if slot is None and len(parts) != 1:
            raise InvalidInput(
                f"{stored!r} has no slot [...], so one part is expected, not {len(parts)}"
            )
        order = tuple(slot) if slot is not None else tuple(parts)
        if set(order) != set(parts) or len(set(order)) != len(order):
            raise InvalidInput(
                f"{stored!r}: the slot names {', '.join(order)}, given are {', '.join(parts)}"
            )
        held = tuple(f for dim in dims for f in dim if f not in ("1", SLOT))
        return Arrangement(dims, tuple(_part(stored, held, *parts[key]) for key in order))

    @staticmethod
    def plain(name: str, dims: int) -> Arrangement:
        """An array that is one logical tensor as it stands."""
        plain = tuple((f"d{k}",) for k in range(dims))
        return Arrangement(plain, (Part(name, plain),))

    @property
    def factors(self) -> tuple[str, ...]:
        """All factors of the stored array, in order."""
        return tuple(f for dim in self.dims for f in dim)


def _part(stored: str, held: tuple[str, ...], name: str, text: str) -> Part:
    dims, slot = parse_dims(text)
    own = [f for dim in dims for f in dim if f != "1"]
    known = {*own, *_INDEX.findall(name)}
    more = [f for f in own if f not in held]
    if slot is not None or len(more) > 1 or (more and SLOT not in _flat(parse_dims(stored)[0])):
        raise InvalidInput(
            f"{name}: {text!r} may have one factor that {stored!r} lacks, its share of the slot; "
            f"it has {', '.join(more) or 'a slot of its own'}"
        )
    if missing := [f for f in held if f not in known]:
        raise InvalidInput(
            f"{name}: the factors {', '.join(missing)} of {stored!r} are neither in {text!r} nor "
            "in the name"
        )
    return Part(name, dims, more[0] if more else "")


def _flat(dims: Dims) -> list[str]:
    return [factor for dim in dims for factor in dim]


def parse_dims(text: str) -> tuple[Dims, list[str] | None]:
    """Dims, and the names in the slot if there is one.

    >>> parse_dims("(g [q k v] d) h")
    ((('g', '[]', 'd'), ('h',)), ['q', 'k', 'v'])
    """
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    slot: list[str] | None = None
    at = 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InvalidInput(f"dims {text!r}: {text[at:]!r} is no factor, (…) or [parts]")
        at = match.end()
        factor, bracket, parts = match.groups()
        if bracket == "(" and group is None:
            group = []
        elif bracket == ")" and group is not None:
            dims.append(tuple(group))
            group = None
        elif bracket:
            raise InvalidInput(f"dims {text!r}: unbalanced {bracket!r}")
        else:
            if factor is None:
                if slot is not None:
                    raise InvalidInput(f"dims {text!r}: more than one slot [...]")
                slot, factor = parts.split(), SLOT
            if group is None:
                dims.append((factor,))
            else:
                group.append(factor)
    if group is not None:
        raise InvalidInput(f"dims {text!r}: unbalanced '('")
    names = [f for dim in dims for f in dim if f != "1"]
    if twice := {f for f in names if names.count(f) > 1}:
        raise InvalidInput(f"dims {text!r}: {', '.join(sorted(twice))} more than once")
    return tuple(dims), slot
