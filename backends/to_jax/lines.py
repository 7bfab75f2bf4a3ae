"""The lines of ops that depend on shapes or types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir.errors import UnsupportedOp
from ...ir.graph import Op
from ..emission.body import Body, Form, Text
from ..emission.language import Builder, literal
from ..emission.lines import rotary_table, vocabulary
from ..emission.target import LocalSize

_DTYPES = {"float64", "float32", "int64", "int32", "bool"}


def _names(axes: Sequence[str]) -> str:
    """Axes as a tuple of strings."""
    return "(" + "".join(f'"{axis}", ' for axis in axes).rstrip(" " * (len(axes) > 1)) + ")"


def _attention(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    if op.attributes.get("alibi"):
        raise UnsupportedOp(f"op 'attention' ({op.name}): the jax backend does not write ALiBi yet")
    options = ""
    for key in ("causal", "window", "scale", "softcap"):
        if op.attributes.get(key):
            options += f", {key}={literal(op.attributes[key])}"
    if p := op.attributes.get("dropout"):
        options += f", drop=({p}, {_key(body, op, writes[0])})"
    return lambda x: f"attention({', '.join(x)}{options})"


def _key(body: Body, op: Op, form: Form) -> str:
    """`key, 3, ("dp", "tp")`: what numbers are drawn from, different where an axis splits."""
    body.draws = True
    number = int(op.name.rpartition("_")[2]) if op.name.rpartition("_")[2].isdigit() else 0
    number = number or sum(map(ord, op.name))
    return f"key, {number}, {_names([a for a, kind in form[1] if kind.is_split])}"


def _embedding(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    padding = op.attributes.get("padding_idx")
    options = "" if padding is None else f", padding_idx={padding}"
    vocab = vocabulary(body, op, reads, writes, 0)
    if vocab:
        options = f", vocab={_names(vocab)}{options}"
    if not options:
        return lambda x: f"{x[0]}[{x[1]}]"
    return lambda x: f"embedding({x[0]}, {x[1]}{options})"


def _cross_entropy(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    ignore = op.attributes.get("ignore_index", -100)
    options = "" if ignore == -100 else f", ignore_index={ignore}"
    if vocab := vocabulary(body, op, reads, writes, 0):
        options = f", vocab={_names(vocab)}{options}"
    return lambda x: f"cross_entropy({x[0]}, {x[1]}{options})"


def _layer_norm(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    eps = literal(op.attributes["eps"])
    return lambda x: f"layer_norm({', '.join([*x, f'eps={eps}'])})"


def _positions(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    dims = body.values[writes[0][0]].dims
    sizes = [" * ".join(map(body.extent, dim)) or "1" for dim in dims]
    arange = f"jnp.arange({sizes[-1]})"
    if len(sizes) == 1:
        return lambda x: arange
    return lambda x: f"jnp.broadcast_to({arange}, ({', '.join(sizes)}))"


def _cast(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    to = op.attributes["to"]
    if to in _DTYPES:
        return lambda x: f"{x[0]}.astype(jnp.{to})"
    function = {"wide": "wide", "model": "to_model"}[to]
    return lambda x: f"{function}({x[0]})"


def _gelu(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    tanh = op.attributes.get("approximate", "none") == "tanh"
    return lambda x: f"nn.gelu({x[0]}, approximate={tanh})"


def _dropout(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    p = op.attributes["p"]
    if not p:
        return lambda x: x[0]
    key = _key(body, op, writes[0])
    return lambda x: f"dropout({x[0]}, {p}, {key})"


# --- views ---------------------------------------------------------------------------------------


def _sizes(body: Body, dims: Sequence[tuple[LocalSize, ...]], free: bool) -> list[str]:
    """Sizes of a shard; the first that is a symbol's is -1 where one may be `free`."""
    symbolic = [i for i, dim in enumerate(dims) if any(size.symbol for size in dim)]
    first = symbolic[0] if symbolic and free else -1
    return ["-1" if i == first else body.size(dim) for i, dim in enumerate(dims)]


def _reshape(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    local = body.target.local(body.values[writes[0][0]], writes[0][1])
    sizes = ", ".join(_sizes(body, local, free=True)) or "()"
    return lambda x: f"{x[0]}.reshape({sizes})"


def _permute(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    order = [d % len(op.attributes["order"]) for d in op.attributes["order"]]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) == 2:
        return lambda x: f"{x[0]}.swapaxes({moved[0]}, {moved[1]})"
    return lambda x: f"{x[0]}.transpose({', '.join(map(str, order))})"


def _expand(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    local = body.target.local(body.values[writes[0][0]], writes[0][1])
    sizes = ", ".join(_sizes(body, local, free=False))
    return lambda x: f"jnp.broadcast_to({x[0]}, ({sizes},))"


def _chunk(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    dim = op.attributes["dim"] % len(op.rule.operands[0])
    return lambda x: f"jnp.split({x[0]}, {op.attributes['count']}, axis={dim})"


def _slice(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    dim = op.attributes["dim"] % len(op.rule.operands[0])
    start, stop = op.attributes["start"], op.attributes["stop"]
    end = "" if stop is None or stop < 0 else str(stop)
    index = ", ".join([":"] * dim + [f"{start or ''}:{end}"])
    return lambda x: f"{x[0]}[{index}]"


def _concat(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    return lambda x: f"jnp.concatenate([{', '.join(x)}], axis={op.attributes['dim']})"


BUILDERS: Mapping[str, Builder] = {
    "attention": _attention,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "layer_norm": _layer_norm,
    "rotary_table": rotary_table,
    "positions": _positions,
    "cast": _cast,
    "gelu": _gelu,
    "dropout": _dropout,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "chunk": _chunk,
    "slice": _slice,
    "concat": _concat,
}
