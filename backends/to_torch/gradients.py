"""What torch wants of gradients that collectives reduce."""

from __future__ import annotations

from ..emission.body import Body, Statement, Text

_DENSE_GRADIENTS = {"linear", "linear_io", "rms_norm", "layer_norm", "embedding"}
"""Kinds whose gradients with respect to operands are contiguous."""


def densify_gradients(body: Body) -> None:
    """An all-reduce wants its input in one piece: so gradients that may be views are copied."""
    for statement in body.statements:
        if statement.step is None or statement.step.backward != "all_reduce":
            continue
        form = statement.writes[0]
        readers = [s for s in body.statements if form in s.reads]
        dense = form not in body.outputs and all(map(_gradient_is_dense, readers))
        if body.values[form[0]].grad and not dense:
            statement.text = _densified(statement.text)


def _gradient_is_dense(reader: Statement) -> bool:
    if reader.step is not None:
        return reader.step.source.is_split or reader.step.target.is_split
    return reader.op is not None and reader.op.kind in _DENSE_GRADIENTS


def _densified(text: Text) -> Text:
    return lambda x: f"dense_gradient({text(x)})"
