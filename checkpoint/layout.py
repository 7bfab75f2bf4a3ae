"""Layouts: which logical tensors the arrays of a checkpoint are made of, and how axes split them.

A layout is an ordered list of rules (`spec.py` has their files; docs/layout-language.md the
language). It works both ways: `logical` takes what a reader found to logical tensors, `stored`
says which arrays a writer has to lay out for given ones. Both ends give boxes in the same
coordinates, those of the logical tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..ir import InvalidInput
from .contents import WEIGHT, Array, Contents, Job, Key
from .from_stored import Piece, Shape, array_as_it_is, joined, read_array
from .naming import Names, Pattern, template
from .rules import Rule, rules_of
from .spec import Spec, builtin, parse_spec, read_spec
from .to_stored import StoredWanted, wanted_arrays, wanted_as_it_is

__all__ = [
    "Layout", "StoredWanted", "choose_layout", "choose_target_layout", "layout_of", "load_layout",
]  # fmt: skip

_AXES = ("tp", "pp", "vpp", "dp", "cp", "ep", "etp")
"""What sizes may ask of the target's mesh: an axis that it does not name is one rank."""


_UNNAMED = re.compile(r"d\d+")
"""Factors of arrays whose dims a layout does not name."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Rules, in the order in which they are tried."""

    name: str
    rules: tuple[Rule, ...] = ()
    spec: Spec = field(default_factory=lambda: Spec(layout="identity"))

    @staticmethod
    def identity() -> Layout:
        """Stored arrays are the logical tensors, under the same names."""
        return Layout("identity")

    @staticmethod
    def of(spec: Spec) -> Layout:
        """From a spec."""
        return Layout(spec.layout, rules_of(spec), spec)

    # ---------------------------------------------------------------- reading

    def logical(
        self, contents: Contents, given: Mapping[str, Any] | None = None
    ) -> dict[Key, Array]:
        """The logical tensors of a checkpoint, whose boxes have the records of `contents`.

        `given` are sizes of factors, and facts, that go before what the checkpoint tells. Raises
        InvalidInput where a size is unknown or an array has no rule in a strict layout, and
        CorruptCheckpoint where shapes contradict each other.
        """
        used: set[int] = set()
        made: dict[Key, list[Piece]] = {}
        sizes: dict[tuple[tuple[str, ...], str], tuple[int, str]] = {}
        for piece in self._pieces(contents, given, used):
            made.setdefault((piece.array.state, piece.name), []).append(piece)
            self._agree(piece, sizes)
        if self.spec.strict and len(used) < len(self.rules):
            idle = next(rule for k, rule in enumerate(self.rules) if k not in used)
            raise InvalidInput(
                f"layout {self.name} is strict, and no array of the checkpoint is named "
                f"{idle.patterns[0].text}: remove the rule, or choose another layout"
            )
        return {key: joined(key, pieces) for key, pieces in made.items()}

    def _agree(
        self, piece: Piece, sizes: dict[tuple[tuple[str, ...], str], tuple[int, str]]
    ) -> None:
        """A factor has one size in all arrays of a layer: names alone make no layout fit."""
        for factor, size in piece.sizes.items():
            if _UNNAMED.fullmatch(factor):
                continue
            before, other = sizes.setdefault((piece.layer, factor), (size, piece.array.name))
            if size != before:
                raise InvalidInput(
                    f"layout {self.name} does not describe this checkpoint: its factor {factor} is "
                    f"{before} in {other} and {size} in {piece.array.name}; give one that does "
                    "with --spec"
                )

    def job(self, contents: Contents, given: Mapping[str, Any] | None = None) -> Job:
        """The job of a checkpoint, with logical names in its param groups."""
        if not any("params" in group for group in contents.job.param_groups):
            return contents.job
        names: dict[str, list[str]] = {}
        for piece in self._pieces(contents, given, set()):
            if piece.array.state == WEIGHT:
                names.setdefault(piece.array.name, []).append(piece.name)
        groups = []
        for group in contents.job.param_groups:
            members = [
                own
                for name in group.get("params", ())
                for own in names.get(name, [name] if isinstance(name, str) else [])
            ]
            groups.append({**group, "params": list(dict.fromkeys(members))})
        return replace(contents.job, param_groups=tuple(groups))

    def _pieces(
        self, contents: Contents, given: Mapping[str, Any] | None, used: set[int]
    ) -> list[Piece]:
        known = {**contents.facts, **contents.conventions, **contents.mesh, **(given or {})}
        own = {name: name for name, size in (given or {}).items() if type(size) is int}
        spec = self.spec.model_copy(update={"sizes": {**self.spec.sizes, **own}})
        stored = [self._plainly_named(array) for array in contents.arrays.values()]
        members = self._lifted_sizes(array.name for array in stored)
        return [
            piece
            for array in stored
            for piece in self._pieces_of(spec, array, known, contents.mesh, members, used)
        ]

    def unruled(self, names: Sequence[str]) -> list[str]:
        """Stored names for which there is no rule: they are taken as they are."""
        return [n for n in names if not self._ignored(n) and not self._candidates(n)]

    def _plainly_named(self, array: Array) -> Array:
        """States that stand in names (`optim.state.{name}.exp_avg`) become states."""
        if array.state != WEIGHT:
            return array
        for state, pattern in self._state_patterns:
            if found := pattern.match(array.name):
                return replace(array, state=state, name=found["name"])
        return array

    @cached_property
    def _state_patterns(self) -> list[tuple[str, Pattern]]:
        return [
            (state, Pattern(text.replace("{name}", "{name*}")))
            for state, text in self.spec.states.items()
        ]

    def _ignored(self, name: str) -> bool:
        return any(pattern.match(name) is not None for pattern in self._ignore)

    @cached_property
    def _ignore(self) -> list[Pattern]:
        return [Pattern(text) for text in self.spec.ignore]

    def _candidates(self, name: str) -> list[tuple[int, Rule, dict[str, str]]]:
        numbers, texts = self._table
        near = [*numbers.get(template(name), ()), *texts]
        found = []
        for number, pattern in sorted(near, key=lambda pair: pair[0]):
            captures = pattern.match(name)
            if captures is not None:
                found.append((number, self.rules[number], captures))
        return found

    @cached_property
    def _table(
        self,
    ) -> tuple[dict[str, list[tuple[int, Pattern]]], list[tuple[int, Pattern]]]:
        """Patterns with the numbers of their rules: by template, and those with any text."""
        numbers: dict[str, list[tuple[int, Pattern]]] = {}
        texts: list[tuple[int, Pattern]] = []
        for number, rule in enumerate(self.rules):
            for pattern in rule.patterns:
                if pattern.texts:
                    texts.append((number, pattern))
                else:
                    numbers.setdefault(pattern.template, []).append((number, pattern))
        return numbers, texts

    def _lifted_sizes(self, names: Any) -> dict[tuple[int, str], int]:
        """How many there are of factors that stand in stored names alone, by rule."""
        if not any(rule.lifted for rule in self.rules):
            return {}
        found: dict[tuple[int, str], int] = {}
        for name in names:
            for number, rule, captures in self._candidates(name):
                for factor in rule.lifted:
                    count = int(captures[factor]) + 1
                    found[number, factor] = max(found.get((number, factor), 0), count)
        return found

    def _pieces_of(
        self,
        spec: Spec,
        array: Array,
        known: Mapping[str, Any],
        mesh: Mapping[str, int],
        members: Mapping[tuple[int, str], int],
        used: set[int],
    ) -> list[Piece]:
        if self._ignored(array.name):
            return []
        for number, rule, captures in self._candidates(array.name):
            if rule.applies(array.state, known):
                used.add(number)
                counts = {f: members[number, f] for f in rule.lifted}
                return read_array(spec, rule, captures, array, known, mesh, counts)
        if self.spec.strict:
            raise InvalidInput(f"layout {self.name} is strict and has no rule for {array.name}")
        return [array_as_it_is(array, mesh, self.spec)]

    # ---------------------------------------------------------------- writing

    def stored(
        self,
        logical: Mapping[Key, tuple[Shape, str]],
        mesh: Mapping[str, int],
        facts: Mapping[str, Any],
    ) -> list[StoredWanted]:
        """The arrays that hold logical tensors of given shapes and dtypes, laid out on a mesh.

        `facts` are sizes of the model (and factors given by hand). Raises InvalidInput where some
        parts of an array are there and others are not, or a size is unknown.
        """
        known = {**facts, **dict.fromkeys(_AXES, 1), **mesh}
        by_state: dict[str, dict[str, tuple[Shape, str]]] = {}
        for (state, name), said in logical.items():
            by_state.setdefault(state, {})[name] = said
        found: list[StoredWanted] = []
        for state, tensors in by_state.items():
            names, taken = Names(tensors), set[str]()
            lacking: dict[str, str] = {}
            for rule in self.rules:
                if not rule.applies(state, known):
                    continue
                for captures, counts in rule.groups(names, taken, lacking):
                    made = wanted_arrays(
                        self.spec, rule, captures, counts, state, tensors, known, mesh
                    )
                    taken |= {name for one in made for name in one.shapes}
                    found += made
            for name, (shape, dtype) in tensors.items():
                if name in taken:
                    continue
                if name in lacking:
                    raise InvalidInput(f"layout {self.name}: {name} is there, {lacking[name]} not")
                if self.spec.strict:
                    raise InvalidInput(f"layout {self.name} is strict and has no rule for {name}")
                found.append(wanted_as_it_is(state, name, shape, dtype, self.spec))
        return [self._named_with_state(one) for one in found]

    def stored_names(self, names: Sequence[str]) -> list[str] | None:
        """The names under which logical tensors would be stored, or None if one has no rule."""
        grouped, taken, lacking = Names(names), set[str](), dict[str, str]()
        found = []
        for rule in self.rules:
            if any("=" not in said and not said.startswith("not ") for said in rule.when):
                continue
            for captures, counts in rule.groups(grouped, taken, lacking):
                taken |= rule.members(captures, counts)
                found.append(
                    rule.patterns[0].filled({**dict.fromkeys(rule.lifted, "0"), **captures})
                )
        return found if len(taken) == len(set(names)) else None

    def tied(self, names: Sequence[str], facts: Mapping[str, Any]) -> dict[str, str]:
        """Logical tensors that would be stored under the name of another's copy, with that other:
        the head, where `facts` say that it is tied to the embedding."""
        places: dict[str, tuple[Rule, str]] = {}
        found: dict[str, str] = {}
        for rule in self.rules:
            name = rule.part_patterns[0].text
            if len(rule.part_patterns) > 1 or name not in names or not rule.applies(WEIGHT, facts):
                continue
            first, other = places.setdefault(rule.patterns[0].text, (rule, name))
            if first.when and name != other:
                found[name] = other
        return found

    def covers(self, names: Sequence[str]) -> bool:
        """Whether there is a rule for any of these logical tensors."""
        grouped = Names(names)
        return any(any(rule.groups(grouped, set(), {})) for rule in self.rules)

    def _named_with_state(self, one: StoredWanted) -> StoredWanted:
        text = self.spec.states.get(one.state)
        if text is None:
            return one
        named = text.replace("{name}", one.wanted.name)
        return replace(one, wanted=replace(one.wanted, state=WEIGHT, name=named))


# ------------------------------------------------------------------- choosing


def load_layout(path_or_name: str | Path) -> Layout:
    """A layout from its file, or a built-in one by its name (`identity` is one).

    Raises InvalidInput with the file, the field, and what was expected.
    """
    if str(path_or_name) == "identity":
        return Layout.identity()
    return Layout.of(read_spec(path_or_name))


def layout_of(mapping: Mapping[str, Any], source: str = "layout") -> Layout:
    """A layout from what a file would say."""
    return Layout.of(parse_spec(dict(mapping), source))


def choose_layout(contents: Contents) -> Layout:
    """The built-in layout of a checkpoint, by the names in it.

    Those of the format that has the names it needs and a rule for every array; the identity for a
    format that has no layouts. Raises InvalidInput, with what is left to say, where several fit or
    none does.
    """
    specs = [spec for name in builtin() if contents.format in (spec := read_spec(name)).formats]
    names = sorted({name for state, name in contents.arrays if state == WEIGHT})
    grouped = Names(names)
    fitting, lacking = [], []
    for spec in specs:
        needed = all(grouped.matching(Pattern(text)) for text in spec.needs)
        barred = any(grouped.matching(Pattern(text)) for text in spec.without)
        if not needed or barred:
            continue
        layout = Layout.of(spec)
        left = layout.unruled(names)
        if left:
            lacking.append(f"{spec.layout} has no rule for {left[0]}")
        else:
            fitting.append(layout)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InvalidInput(
            f"{contents.root}: the names fit several layouts; choose with --spec: "
            + ", ".join(one.name for one in fitting)
        )
    if specs and contents.format.startswith("megatron"):
        raise InvalidInput(
            f"{contents.root}: no built-in layout fits these names"
            + (f" ({'; '.join(lacking)})" if lacking else f" ({', '.join(names[:3])}, …)")
            + f"; give one as --spec FILE (built in are {', '.join(builtin())})"
        )
    return Layout.identity()


def choose_target_layout(format_name: str, logical: Sequence[Key]) -> Layout:
    """The built-in layout in which a format holds logical tensors, by their names.

    Megatron has names of its own; other formats hold any names, and take the logical ones. Raises
    InvalidInput where several fit, or none does.
    """
    if not format_name.startswith("megatron"):
        return Layout.identity()
    names = sorted({name for state, name in logical if state == WEIGHT})
    fitting = []
    specs = [spec for one in builtin() if format_name in (spec := read_spec(one)).formats]
    for spec in specs:
        if spec.read_only:
            continue
        layout = Layout.of(spec)
        stored = layout.stored_names(names)
        if stored is None:
            continue
        made = Names(stored)
        needed = all(made.matching(Pattern(text)) for text in spec.needs)
        if needed and not any(made.matching(Pattern(text)) for text in spec.without):
            fitting.append(layout)
    if len(fitting) > 1:
        raise InvalidInput(
            f"these names fit several layouts of {format_name}; choose with --target-spec: "
            + ", ".join(one.name for one in fitting)
        )
    if fitting:
        return fitting[0]
    raise InvalidInput(
        f"no built-in layout puts {', '.join(names[:2])}, … into {format_name}: give one as "
        f"--target-spec FILE (built in are {', '.join(builtin())})"
    )
