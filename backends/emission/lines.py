"""From an op to the line that computes it on local shards."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import UnsupportedOp
from ...ir.graph import Graph, Op
from ...ir.optable import TABLE
from ...ir.rule import FactorName
from .body import Body, Form, Statement, Text
from .language import fill, literal
from .target import order_within


def line(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Statement:
    """The statement of an op."""
    if op.kind not in body.language.templates:
        raise UnsupportedOp(
            f"op {op.kind!r} at {op.module or 'the top level'} ({op.name}): the "
            f"{body.language.name} backend does not know how to write it; add a line to "
            f"backends/to_{body.language.name}/optable.py"
        )
    template = body.language.templates[op.kind]
    if template.text.startswith("@"):
        text = body.language.builders[template.text[1:]](body, op, reads, writes)
    else:

        def text(x: Sequence[str]) -> str:
            return fill(template, list(x), op.attributes)

    if TABLE[op.kind].work == "loss":
        writes = writes[:1]  # the count is known before: see counting.py
    names = template.name.split() or [""]
    names = (names * len(writes))[: len(writes)] if len(names) == 1 else names[: len(writes)]
    return Statement(reads, writes, text, names, role=template.role, op=op)


def splits(op: Op, reads: Sequence[Form], writes: Sequence[Form]) -> dict[str, FactorName]:
    """Axis → the loop that it splits."""
    found: dict[str, FactorName] = {}
    for shape, (_, types) in zip(
        op.rule.operands + op.rule.results, [*reads, *writes], strict=True
    ):
        for axis, kind in types:
            if kind.is_split:
                found[axis] = shape[kind.dim][kind.part]
    return found


def vocabulary(
    body: Body, op: Op, reads: list[Form], writes: list[Form], operand: int
) -> list[str]:
    """The axes that split the vocabulary, outermost first."""
    name, types = reads[operand]
    over = [a for a, f in splits(op, reads, writes).items() if f.split("_")[0] == "v"]
    if not over:
        return []
    dim = types[over[0]].dim
    if any(size.number > 1 for size in body.target.local(body.values[name], types)[dim][:-1]):
        raise UnsupportedOp(f"{name}: the vocabulary is split within a part of it")
    over = [a for a in order_within(types, dim) if a in over]
    body.axes.update(over)
    return over


def draws(graph: Graph) -> bool:
    """Whether a graph draws random numbers."""
    keys = {"dropout": "p", "attention": "dropout"}
    return any(op.attributes.get(keys.get(op.kind, "")) for op in graph.ops)


def rotary_table(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """The tables of cosines and sines, from a constant of the module."""
    frequencies = body.constant("INV_FREQ", op.attributes["inv_freq"])
    options = ""
    for key, default in (("scaling", 1.0), ("style", "half")):
        if op.attributes.get(key, default) != default:
            options += f", {key}={literal(op.attributes[key])}"
    narrow = body.values[writes[0][0]].dtype == "model"

    def text(x: Sequence[str]) -> str:
        table = f"rotary_table({x[0]}, {frequencies}{options})"
        return f"map(to_model, {table})" if narrow else table

    return text
