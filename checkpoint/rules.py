"""The rules of a layout: a spec's lines made ready to be matched, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from ..ir import InvalidInput
from .naming import Names, Pattern
from .notation import SLOT, Arrangement, Dims, Part, parse_dims
from .spec import Spec, Tensor

_SLOT_TEXT = re.compile(r"\[[\w\s]*\]")


@dataclass(frozen=True, slots=True)
class Type:
    """How an array lies along an axis: split along a factor (or a dim, by its number), copied, or
    as summands; `copies`: as many ways as there are of the factor, and copies beyond."""

    axis: str
    kind: Literal["S", "R", "P"]
    factor: str = ""
    combine: Literal["sum", "mean"] = "mean"
    copies: bool = False


@dataclass(frozen=True)
class Rule:
    """One line of a spec.

    `patterns` of stored names (the first of them in the chosen variant is written), `generic` the
    arrangement with captures in its names (None: any number of dims, as they are), `plain` the
    logical name then, `stacked` factors that come first in the dims, `lifted` those that stand in
    the stored name but are dims of the logical tensor.
    """

    patterns: tuple[Pattern, ...]
    variants: tuple[str, ...]
    variant_fact: str
    also: tuple[str, ...]
    generic: Arrangement | None
    plain: str
    stacked: tuple[str, ...]
    lifted: tuple[str, ...]
    types: tuple[Type, ...]
    pad: Mapping[str, int | str]
    when: tuple[str, ...]
    beside: tuple[Pattern, ...]
    states: tuple[str, ...]

    def __hash__(self) -> int:
        return hash((self.patterns, self.when, self.states))

    def applies(self, state: str, facts: Mapping[str, Any]) -> bool:
        """Whether the rule is for a state of this checkpoint."""
        if self.states and state not in self.states:
            return False
        return all(_holds(said, facts) for said in self.when)

    @cached_property
    def part_patterns(self) -> tuple[Pattern, ...]:
        """The names of the logical tensors."""
        if self.generic is None:
            return (Pattern(self.plain),)
        return tuple(Pattern(part.name) for part in self.generic.parts)

    @cached_property
    def outer(self) -> tuple[str, ...]:
        """Captures that tell arrays apart: all that are no dims."""
        inner = {*self.lifted, *(self.generic.factors if self.generic else self.stacked)}
        every = [*self.part_patterns[0].numbers, *self.part_patterns[0].texts]
        return tuple(c for c in every if c not in inner)

    def arrangement(self, captures: Mapping[str, str], dims: int) -> Arrangement:
        """That of an array of so many dims, with its captures filled in."""
        outer = {c: v for c, v in captures.items() if c in self.outer}
        if self.generic is None:
            own = tuple((f"d{k}",) for k in range(dims - len(self.stacked)))
            held: Dims = (*((f,) for f in self.stacked), *own)
            return Arrangement(held, (Part(Pattern(self.plain).filled(outer), own),))
        if len(self.generic.dims) - len(self.lifted) != dims:
            raise InvalidInput(
                f"{self.patterns[0].filled(captures)}: {dims} dims, the layout has "
                f"{len(self.generic.dims) - len(self.lifted)}"
            )
        parts = tuple(
            replace(part, name=Pattern(part.name).filled(outer)) for part in self.generic.parts
        )
        return replace(self.generic, parts=parts)

    def stored_dims(
        self, captures: Mapping[str, str], tensors: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> int:
        """How many dims the stored array has; `tensors` are (shape, dtype) of logical ones."""
        if self.generic is not None:
            return len(self.generic.dims) - len(self.lifted)
        first = Pattern(self.plain).filled(dict.fromkeys(self.stacked, "0") | dict(captures))
        return len(tensors[first][0]) + len(self.stacked)

    def groups(
        self, names: Names, taken: set[str], lacking: dict[str, str]
    ) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
        """The captures of every array for which all parts are there, and how many there are of
        each factor that stands in their names; a logical tensor whose siblings are not there is
        put into `lacking`, with the name that was looked for."""
        parts = self.part_patterns
        inner = [f for f in parts[0].numbers if f not in self.outer]
        counts: dict[tuple[str, ...], dict[str, int]] = {}
        seen: list[dict[tuple[str, ...], list[str]]] = []
        for pattern in parts:
            found: dict[tuple[str, ...], list[str]] = {}
            for name, captures in names.matching(pattern):
                if name in taken:
                    continue
                if any(beside.filled(captures) not in names for beside in self.beside):
                    continue
                key = tuple(captures[c] for c in self.outer)
                found.setdefault(key, []).append(name)
                many = counts.setdefault(key, dict.fromkeys(inner, 0))
                for factor in inner:
                    many[factor] = max(many[factor], int(captures[factor]) + 1)
            seen.append(found)
        for key, here in seen[0].items():
            captures = dict(zip(self.outer, key, strict=True))
            absent = [p for p, found in zip(parts, seen, strict=True) if key not in found]
            if absent:
                lacking |= {name: absent[0].filled(captures) for name in here}
            else:
                yield captures, counts[key]
        for found in seen[1:]:
            for key, here in found.items():
                if key not in seen[0]:
                    captures = dict(zip(self.outer, key, strict=True))
                    lacking |= {name: parts[0].filled(captures) for name in here}

    def members(self, captures: Mapping[str, str], counts: Mapping[str, int]) -> set[str]:
        """The names of the logical tensors of one array."""
        places = product(*(range(n) for n in counts.values()))
        return {
            pattern.filled({**captures, **dict(zip(counts, at, strict=True))})
            for at in places
            for pattern in self.part_patterns
        }

    def stored_names(self, captures: Mapping[str, str], facts: Mapping[str, Any]) -> list[str]:
        """The names to write: that of the variant, and those of its copies."""
        chosen = 0
        said = facts.get(self.variant_fact) if self.variant_fact else None
        if said in self.variants:
            chosen = self.variants.index(str(said))
        return [Pattern(text).filled(captures) for text in (self.patterns[chosen].text, *self.also)]


def _holds(said: str, facts: Mapping[str, Any]) -> bool:
    name, equals, value = said.partition("=")
    if equals:
        return str(facts.get(name, "")) == value
    return not facts.get(said[4:]) if said.startswith("not ") else bool(facts.get(said))


def rules_of(spec: Spec) -> tuple[Rule, ...]:
    """The rules of a spec; raises InvalidInput with the rule that is wrong."""
    return tuple(_rule(spec, tensor) for tensor in spec.tensors)


def _rule(spec: Spec, tensor: Tensor) -> Rule:
    named = {"": tensor.stored} if isinstance(tensor.stored, str) else tensor.stored
    first = next(iter(named.values()))
    try:
        return _parsed(spec, tensor, named)
    except InvalidInput as error:
        raise InvalidInput(f"layout {spec.layout}, rule for {first}: {error}") from None


def _parsed(spec: Spec, tensor: Tensor, named: Mapping[str, str]) -> Rule:
    if bool(tensor.logical) == bool(tensor.parts):
        raise InvalidInput("expected either `logical: NAME [as DIMS]` or `parts`")
    texts = [*named.values(), *tensor.also]
    stacked = tuple(f for f, around in spec.stack.items() if any(around in t for t in texts))
    for factor in stacked:
        around = spec.stack[factor]
        texts = [t.replace(around, around.replace("{" + factor + "}.", "")) for t in texts]
    patterns = tuple(Pattern(text) for text in dict.fromkeys(texts))
    written = {key: texts[k] for k, key in enumerate(named)}
    dims = tensor.dims
    generic: Arrangement | None = None
    plain = ""
    lifted: tuple[str, ...] = ()
    single = _named(tensor.logical) if tensor.logical else None
    if dims:
        full = " ".join([*stacked, dims])
        parts = {
            key: _with_dims(_named(text), dims)
            for key, text in (tensor.parts or {"": tensor.logical}).items()
        }
        lifted = _lifted(patterns[0], full, parts)
        generic = Arrangement.parse(" ".join([*lifted, full]), parts)
    elif single is None or single[1]:
        raise InvalidInput("`parts` and `as` need the `dims` of the stored array")
    else:
        plain = single[0]
    types = tuple(_type(axis, said) for axis, said in tensor.types.items())
    factors = {*(generic.factors if generic else ()), *stacked}
    count = len(parse_dims(dims)[0]) if dims else None
    shifted = []
    for one in types:
        if one.factor.isdigit():
            if count is not None and int(one.factor) >= count:
                raise InvalidInput(f"{one.axis}: no dim {one.factor} in {dims!r}")
            moved = str(int(one.factor) + len(stacked))
            alone = moved if generic is None else _alone(generic, len(lifted) + int(moved), moved)
            shifted.append(replace(one, factor=f"d{one.factor}" if generic is None else alone))
        elif one.kind == "S" and one.factor not in factors:
            raise InvalidInput(f"{one.axis}: {one.factor} is no factor of {dims!r}")
        else:
            shifted.append(one)
    for factor in tensor.pad:
        _check_pad(generic, factor, dims)
    return Rule(
        patterns=patterns,
        variants=tuple(named),
        variant_fact=next(iter(spec.variants), ""),
        also=tuple(texts[len(written) :]),
        generic=generic,
        plain=plain,
        stacked=stacked if generic is None else (),
        lifted=lifted,
        types=tuple(shifted),
        pad=tensor.pad,
        when=tuple(tensor.when),
        beside=tuple(Pattern(text) for text in tensor.beside),
        states=tuple(tensor.states),
    )


def _alone(generic: Arrangement, dim: int, number: str) -> str:
    """A dim's only factor, or its number where it has several: then it is split as a whole."""
    members = generic.dims[dim]
    return members[0] if len(members) == 1 and members[0] != SLOT else number


def _named(text: str) -> tuple[str, str]:
    name, _, dims = text.partition(" as ")
    return name.strip(), dims.strip()


def _with_dims(named: tuple[str, str], stored: str) -> tuple[str, str]:
    """A part's dims are, unless given, those of the stored array without its slot, and without
    the factors in its name."""
    name, dims = named
    if dims:
        return name, dims
    in_name = Pattern(name).numbers
    left = _SLOT_TEXT.sub(" ", stored)
    for factor in in_name:
        left = re.sub(rf"\b{factor}\b", " ", left)
    return name, " ".join(left.split())


def _lifted(pattern: Pattern, dims: str, parts: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    own = {f for dim in parse_dims(dims)[0] for f in dim}
    wanted = {f for _, text in parts.values() for dim in parse_dims(text)[0] for f in dim}
    return tuple(f for f in pattern.numbers if f in wanted and f not in own)


def _type(axis: str, said: str | list[str]) -> Type:
    text = said if isinstance(said, str) else said[0]
    inside = text[2:-1]
    if text == "R":
        return Type(axis, "R")
    if text[0] == "P":
        return Type(axis, "P", combine="sum" if inside == "sum" else "mean")
    return Type(axis, "S", inside, copies=not isinstance(said, str))


def _check_pad(generic: Arrangement | None, factor: str, dims: str) -> None:
    held = generic is not None and factor in generic.factors
    if not held or generic is None:
        raise InvalidInput(f"pad: {factor} is no factor of {dims!r}")
    for part in generic.parts:
        for dim in part.dims:
            if factor in dim and dim[0] != factor:
                raise InvalidInput(
                    f"pad: {factor} must be the outermost factor of its dim in {part.name}"
                )
