"""Joins statements into the lines a person would have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.optable import TABLE
from .body import Body, Form, Statement

_LINEAR = {"linear", "linear_io"}

_INLINED = {
    "leaf": {"op", "view", "pointwise", "conversion", "leaf"},
    "view": {"view"},
    "pointwise": {"arithmetic"},
}
"""Role → roles of the statements that may swallow it."""

_ARITHMETIC = {"mul", "add"}


def simplify(body: Body) -> None:
    """All of the below, in place."""
    _drop_aliases(body)
    _drop_dead(body)
    _drop_casts(body)
    for change in body.language.passes:
        change(body)
    _join_biases(body)
    _inline(body)


def _drop_aliases(body: Body) -> None:
    same: dict[Form, Form] = {}
    kept: list[Statement] = []
    for statement in body.statements:
        statement.reads = [same.get(form, form) for form in statement.reads]
        if statement.role == "alias":
            same[statement.writes[0]] = statement.reads[0]
        else:
            kept.append(statement)
    body.statements = kept
    body.outputs = [same.get(form, form) for form in body.outputs]


def _drop_dead(body: Body) -> None:
    wanted = set(body.outputs)
    kept: list[Statement] = []
    for statement in reversed(body.statements):
        if wanted & set(statement.writes) or statement.loop:
            wanted |= set(statement.reads)
            kept.append(statement)
    body.statements = kept[::-1]


def _drop_casts(body: Body) -> None:
    """Losses compute wide by themselves, and keep what they read as narrow as it came."""
    uses = body.uses()
    for loss in [s for s in body.statements if s.op and TABLE[s.op.kind].work == "loss"]:
        for cast in list(body.statements):
            if cast.op is None or cast.op.kind != "cast" or cast.writes[0] != loss.reads[0]:
                continue
            wide = cast.op.attributes["to"] == "wide" and not cast.text(["x"]).startswith("on_")
            if wide and uses[cast.writes[0]] == 1:
                loss.reads[0] = cast.reads[0]
                body.statements.remove(cast)


def _join_biases(body: Body) -> None:
    """A product and the bias that is added to it become one line."""
    uses = body.uses()
    writers = {form: s for s in body.statements for form in s.writes}
    for i, statement in enumerate(body.statements):
        if statement.op is None or statement.op.kind != "add":
            continue
        for product, bias in (statement.reads, statement.reads[::-1]):
            linear = writers.get(product)
            value = body.values[bias[0]]
            if (
                linear is None
                or linear.op is None
                or linear.op.kind not in _LINEAR
                or uses[product] != 1
                or product[1] != statement.writes[0][1]
                or value.role != "parameter"
                or len(value.dims) != 1
                or any(kind.kind == "P" for _, kind in product[1])
            ):
                continue
            body.statements[i] = replace(
                statement,
                reads=[*linear.reads, bias],
                text=body.language.with_bias(linear.text, linear.op.kind),
                names=linear.names,
                op=linear.op,
            )
            body.statements.remove(linear)
            _join_biases(body)
            return


def _inline(body: Body) -> None:
    """Puts an expression that is read once where it is read."""
    changed = True
    while changed:
        changed = False
        uses = body.uses()
        readers = {form: s for s in body.statements for form in s.reads}
        for statement in body.statements:
            form = statement.writes[0]
            reader = readers.get(form)
            if len(statement.writes) > 1 or uses.get(form) != 1 or reader is None or reader.loop:
                continue
            arithmetic = reader.op is not None and reader.op.kind in _ARITHMETIC
            role = "arithmetic" if arithmetic else reader.role
            if role in _INLINED.get(statement.role, ()) or (
                arithmetic and statement.role == "leaf"
            ):
                _swallow(reader, reader.reads.index(form), statement)
                body.statements.remove(statement)
                changed = True
                break


def _swallow(reader: Statement, at: int, inner: Statement) -> None:
    count, outer_text, inner_text = len(inner.reads), reader.text, inner.text

    def text(x: Sequence[str]) -> str:
        middle = inner_text(x[at : at + count])
        return outer_text([*x[:at], middle, *x[at + count :]])

    reader.text = text
    reader.reads[at : at + 1] = inner.reads
    reader.absorbed += [*inner.writes, *inner.absorbed]
