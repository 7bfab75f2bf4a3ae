"""The lines of ops that depend on shapes or types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ...ir.errors import UnsupportedOp
from ...ir.graph import Op
from ..emission.body import Body, Form, Text
from ..emission.language import Builder, literal
from ..emission.lines import rotary_table, splits, vocabulary
from ..emission.target import order_within
from . import views

_DTYPES = {"float64", "float32", "int64", "int32", "bool"}


def device(body: Body) -> str:
    """The device of the arguments."""
    return f"{next(iter(body.inputs.values()))}.device"


def _split_text(op: Op, reads: Sequence[Form], writes: Sequence[Form]) -> str:
    """`, split={"dp": 0, "tp": "v"}`: loops of leading dims by number, others by name."""
    found = []
    for axis, factor in splits(op, reads, writes).items():
        base = factor.split("_")[0]
        lead = base[1:] if base[0] == "n" and base[1:].isdigit() else ""
        found.append(f'"{axis}": {lead or repr(base)}')
    return ", split={" + ", ".join(found).replace("'", '"') + "}" if found else ""


def _linear(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    if any(map(views.has_partial, reads)):
        return lambda x: f"{x[0]} @ {x[1]}.T"  # the checker lets P through a product, not F.linear
    return lambda x: f"F.linear({x[0]}, {x[1]})"


def _attention(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    if op.attributes.get("alibi"):
        raise UnsupportedOp(
            f"op 'attention' ({op.name}): the torch backend does not write ALiBi yet"
        )
    split = _split_text(op, reads, writes)
    options = ""
    for key in ("causal", "window", "scale", "softcap"):
        if op.attributes.get(key):
            options += f", {key}={literal(op.attributes[key])}"
    if p := op.attributes.get("dropout"):
        body.draws = True
        options += f', drop=({p}, draw, f"{{self.path}} {op.name}")'
    return lambda x: f"attention({', '.join(x)}{options}{split})"


def _embedding(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    padding = op.attributes.get("padding_idx")
    options = "" if padding is None else f", padding_idx={padding}"
    if vocab := vocabulary(body, op, reads, writes, 0):
        split = _split_text(op, reads, writes)
        return lambda x: f"embedding({x[0]}, {x[1]}, vocab=[{', '.join(vocab)}]{options}{split})"
    text: Text = lambda x: f"F.embedding({x[1]}, {x[0]}{options})"  # noqa: E731
    return views.unseen(text, reads[0], writes[0]) if views.has_partial(reads[0]) else text


def _cross_entropy(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    ignore = op.attributes.get("ignore_index", -100)
    options = "" if ignore == -100 else f", ignore_index={ignore}"
    if vocab := vocabulary(body, op, reads, writes, 0):
        options = f", vocab=[{', '.join(vocab)}]" + options
    split = _split_text(op, reads, writes)
    return lambda x: f"cross_entropy({x[0]}, {x[1]}{options}{split})"


def _layer_norm(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    dims = body.target.local(body.values[reads[0][0]], reads[0][1])
    size = prod(size.number for size in dims[-1])
    eps = literal(op.attributes["eps"])
    return lambda x: f"F.layer_norm({x[0]}, ({size},), {', '.join([*x[1:], f'eps={eps}'])})"


def _positions(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    *lead, last = body.values[writes[0][0]].dims
    count = " * ".join(body.extent(size) for size in last) or "1"
    index = f"[{'None, ' * len(lead)}:]" if lead else ""
    if any(lead):
        sizes = [" * ".join(map(body.extent, dim)) or "1" for dim in lead]
        index += f".expand({', '.join([*sizes, '-1'])})"
    place = device(body)
    return lambda x: f"torch.arange({count}, device={place}){index}"


def _constant(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    place = device(body)
    return lambda x: f"torch.tensor({op.attributes['value']!r}, device={place})"


def _cast(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    to = op.attributes["to"]
    text: Text
    if to in _DTYPES:
        text = lambda x: f"{x[0]}.to(torch.{to})"  # noqa: E731
    else:
        function = {"wide": "wide", "model": "to_model"}[to]
        text = lambda x: f"{function}({x[0]})"  # noqa: E731
    return views.unseen(text, reads[0], writes[0]) if views.has_partial(reads[0]) else text


def _dropout(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    if not op.attributes["p"]:
        return lambda x: x[0]
    body.draws = True
    value, types = body.values[reads[0][0]], reads[0][1]
    factors, split, rows = [], [], []
    local = body.target.local(value, types)
    for dim, sizes in enumerate(value.dims):
        axes = order_within(types, dim)
        if "b" in sizes:
            rows = (
                [f", rows=({dim}, {sizes.index('b')})"] if (dim, sizes.index("b")) != (0, 0) else []
            )
        fine = len(sizes) > 1 and ("b" in sizes or any(types[a].part for a in axes))
        if fine:
            texts = [size.text(body.symbols) for size in local[dim]]
            factors.append(f"{dim}: ({', '.join(texts)})")
        split += [f'"{a}": {(dim, types[a].part) if fine else dim}' for a in axes]
    if not any("b" in sizes for sizes in value.dims):
        rows = [", rows=None"]
    options = f", split={{{', '.join(split)}}}" if split else ""
    options += "".join(rows)
    options += f", factors={{{', '.join(factors)}}}" if factors else ""
    p, name = op.attributes["p"], f'f"{{self.path}} {op.name}"'
    return lambda x: f"dropout({x[0]}, {p}, draw, {name}{options})"


BUILDERS: Mapping[str, Builder] = {
    "linear": _linear,
    "attention": _attention,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "layer_norm": _layer_norm,
    "rotary_table": rotary_table,
    "positions": _positions,
    "constant": _constant,
    "cast": _cast,
    "dropout": _dropout,
    "reshape": views.reshape,
    "permute": views.permute,
    "expand": views.expand,
    "chunk": views.chunk,
    "slice": views.slice_dim,
    "concat": views.concat,
}
