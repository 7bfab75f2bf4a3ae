"""Gives values variable names and writes statements down."""

from __future__ import annotations

from collections.abc import Iterable

from .body import Body, Form, Statement
from .text import identifier

_PLAIN = dict.fromkeys(("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2"), "x")
"""Linear layers whose result has a more usual name than the layer's own."""

_CALLED = {"attention": ("q", "k", "v"), "cross_entropy": ("logits",)}
"""What operands of an op are called, as far back as it is the same tensor in other forms."""

_THROUGH = {"reshape", "permute", "rotary", "cast", "chunk", "expand", "slice"}


class Writer:
    """Writes the statements of a body with variables; a name is used again once it is free."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.left = body.uses()
        self.variable: dict[Form, str] = {}
        self.owner: dict[str, Form] = {}
        self.reserved = set(body.inputs.values()) | body.axes | body.language.reserved
        self.called = _called(body.statements)
        for name, variable in body.inputs.items():
            self._give((name, body.made[name]), variable)

    def lines(self) -> list[str]:
        """The lines of the function but for its last, `return`."""
        line = self.body.language.axis
        found = [
            line.format(axis=axis)
            for axis in self.body.target.axes
            if line and axis in self.body.axes
        ]
        groups = _groups(self.body.statements)
        before = groups[0] if groups else ""
        for statement, group in zip(self.body.statements, groups, strict=True):
            if group != before:
                found.append("")
            before = group
            found += self._statement(statement)
        return found

    def result(self) -> list[str]:
        """The variables that the function returns."""
        return [self.variable[form] for form in self.body.outputs]

    def _statement(self, statement: Statement) -> list[str]:
        operands = [self.variable[form] for form in statement.reads]
        for form in statement.reads:
            self.left[form] -= 1
        names = [
            self._name(form, wish, statement)
            for form, wish in zip(statement.writes, statement.names, strict=True)
        ]
        lines = [f"# {statement.comment}"] if statement.comment else []
        if statement.loop:
            if names[0] != operands[0]:
                lines.append(f"{names[0]} = {operands[0]}")
            lines.append(f"for {statement.loop}:")
            inner = [names[0], *operands[1:]]
            return [*lines, f"    {names[0]} = {statement.text(inner)}"]
        return [*lines, f"{', '.join(names)} = {statement.text(operands)}"]

    def _name(self, form: Form, wish: str, statement: Statement) -> str:
        if not self.left.get(form):
            return "_"
        tried = [self.called.get(form) or self._wish(wish, statement)]
        if statement.op is not None and wish:
            tried.append(self._plain(statement.op.module.rpartition(".")[2] or tried[0]))
        if statement.reads:
            tried.append(self._base(statement.reads[0]))
        tried += [f"{tried[0]}_{i}" for i in range(2, 1000)]
        for name in tried:
            owner = self.owner.get(name)
            if name and (owner is None or not self.left.get(owner)) and self._allowed(name, owner):
                return self._give(form, name)
        raise AssertionError("no name is free")

    def _allowed(self, name: str, owner: Form | None) -> bool:
        return owner is not None or name not in self.reserved

    def _give(self, form: Form, name: str) -> str:
        self.variable[form], self.owner[name] = name, form
        return name

    def _base(self, form: Form) -> str:
        return self.variable[form].rstrip("0123456789").rstrip("_") or self.variable[form]

    def _plain(self, text: str) -> str:
        return identifier(text, self.body.language.reserved)

    def _wish(self, wish: str, statement: Statement) -> str:
        reads = statement.reads
        if wish == "@parameter":
            named = [
                self.body.paths[name]
                for name, _ in _all_reads(statement)
                if name in self.body.paths
            ]
            path = named[0] if named else (statement.op.module + ".weight" if statement.op else "")
            parts = [part for part in path.split(".")[:-1] if not part.isdigit()]
            stem = parts[-1] if parts else "x"
            return _PLAIN.get(stem) or self._plain(stem.removesuffix("_proj"))
        if wish == "@module":
            return "x"
        if wish == "@stream":
            stream = next(iter(self.body.inputs.values()), "")
            bases = [self._base(form) for form in reads]
            return stream if stream in bases else bases[0]
        if wish:
            return self._plain(wish)
        if not reads:
            return self._plain(statement.writes[0][0].rpartition(".")[2])
        kinds = {"mul"}
        if statement.op is not None and statement.op.kind in kinds and len(reads) > 1:
            return "x"
        return self._base(reads[0])


def _called(statements: list[Statement]) -> dict[Form, str]:
    """Forms that have a name by what becomes of them."""
    found: dict[Form, str] = {}
    for statement in reversed(statements):
        kind = statement.op.kind if statement.op is not None else ""
        found |= dict(zip(statement.reads, _CALLED.get(kind, ()), strict=False))
        name = found.get(statement.writes[0])
        through = kind in _THROUGH or statement.role == "conversion"
        if name and through and len(statement.writes) == 1 and statement.reads:
            found.setdefault(statement.reads[0], name)
    return found


def returning(lines: list[str], result: list[str]) -> list[str]:
    """The lines with `return`, of the last expression itself where it is all that is returned."""
    start = f"{', '.join(result)} = "
    if lines and lines[-1].startswith(start) and len(result) == 1:
        return [*lines[:-1], f"return {lines[-1].removeprefix(start)}"]
    return [*lines, f"return {', '.join(result)}"]


def _all_reads(statement: Statement) -> list[Form]:
    return [*statement.reads, *statement.absorbed]


def _groups(statements: list[Statement]) -> list[str]:
    """To which submodule each statement belongs; those of none go with the one before."""
    modules = [s.op.module for s in statements if s.op is not None and s.op.module]
    prefix = _common(modules)
    groups: list[str] = []
    for statement in statements:
        path = statement.op.module if statement.op is not None else ""
        part = path.removeprefix(prefix).lstrip(".").split(".")[0]
        groups.append(part)
    last = ""
    for i, statement in enumerate(statements):  # an addition to the residual closes its group
        if statement.op is not None and not groups[i]:
            groups[i] = last
        last = groups[i] or last
    following = ""
    for i in reversed(range(len(statements))):  # conversions belong to what they are made for
        if not groups[i]:
            groups[i] = following
        following = groups[i]
    return groups


def _common(paths: Iterable[str]) -> str:
    """The longest common prefix of dotted paths."""
    parts = [path.split(".") for path in paths]
    if not parts:
        return ""
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)
