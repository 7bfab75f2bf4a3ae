"""Views on local shards: reshapes as `unflatten` and `flatten`, permutations, pieces of a dim.

Sizes are local numbers; the first factor of a dim that is unfolded is written -1, so that it may be
split, and batch and sequence are never written where it can be avoided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.graph import Op
from ...ir.rule import RuleDim
from ..emission.target import LocalSize
from .types import declared

if TYPE_CHECKING:
    from ..emission.body import Body, Form, Text


def unseen(text: Text, read: Form, write: Form) -> Text:
    """A line that the type checker cannot follow, with its types declared.

    `read` is the first of the operands, `write` any of the results.
    """
    reads, makes = declared(read[1]), declared(write[1])

    def declare(x: Sequence[str]) -> str:
        names = ["x", "y", "z"][: len(x)]
        function = f"lambda {', '.join(names)}: {text(names)}"
        return f"on_shards({function}, {', '.join(x)}, reads={reads}, makes={makes})"

    return declare


def has_partial(form: Form) -> bool:
    """Whether the ranks of some axis hold summands."""
    return any(kind.kind == "P" for _, kind in form[1])


@dataclass(frozen=True, slots=True)
class _Group:
    """Dims of the source that become dims of the target, over the same factors."""

    source: tuple[RuleDim, ...]
    target: tuple[RuleDim, ...]


def _groups(source: Sequence[RuleDim], target: Sequence[RuleDim]) -> list[_Group]:
    """The finest grouping; dims of size 1 stand alone."""
    groups: list[_Group] = []
    i = j = 0
    while i < len(source) or j < len(target):
        if i < len(source) and j < len(target) and source[i] == target[j]:
            groups.append(_Group((source[i],), (target[j],)))
            i, j = i + 1, j + 1
            continue
        if i < len(source) and not source[i]:
            groups.append(_Group(((),), ()))
            i += 1
            continue
        if j < len(target) and not target[j]:
            groups.append(_Group((), ((),)))
            j += 1
            continue
        left, right = [source[i]], [target[j]]
        i, j = i + 1, j + 1
        while sum(map(len, left)) != sum(map(len, right)):
            if sum(map(len, left)) < sum(map(len, right)):
                left.append(source[i])
                i += 1
            else:
                right.append(target[j])
                j += 1
        groups.append(_Group(tuple(left), tuple(right)))
    return groups


def reshape(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """A reshape, factor by factor."""
    (source,), (target,) = op.rule.operands, op.rule.results
    local = body.target.local(body.values[writes[0][0]], writes[0][1])
    split = {(k.dim, k.part) for _, k in reads[0][1] if k.is_split}
    if op.rule.locked and _mixes(source, target):
        sizes = ", ".join(body.size(dim) for dim in local)
        return lambda x: f"{x[0]}.reshape({sizes})"
    calls = ""
    seen = True  # by the type checker
    at = 0  # dim of the tensor as it is now
    from_dim = to_dim = 0
    for group in _groups(source, target):
        if not group.source:
            calls += f".unsqueeze({at})"
        elif not group.target:
            calls += f".squeeze({at})"
        elif group.source != group.target:
            dims = [d for d in range(from_dim, from_dim + len(group.source)) if source[d]]
            moved = {(d, p) for d, p in split if d in dims}
            seen = seen and all(d == dims[0] and p == 0 for d, p in moved)
            if len(group.source) > 1:
                calls += f".flatten({at}, {at + len(group.source) - 1})"
            if len(group.target) > 1:
                sizes = _sizes(body, local[to_dim : to_dim + len(group.target)], bool(moved))
                calls += f".unflatten({at}, ({sizes}))"
        at += len(group.target)
        from_dim += len(group.source)
        to_dim += len(group.target)

    def text(x: Sequence[str]) -> str:
        return f"{x[0]}{calls}"

    return text if seen else unseen(text, reads[0], writes[0])


def _mixes(source: Sequence[RuleDim], target: Sequence[RuleDim]) -> bool:
    return {f for d in source for f in d} != {f for d in target for f in d}


def _sizes(body: Body, dims: Sequence[tuple[LocalSize, ...]], first_free: bool) -> str:
    """Sizes of the dims that one dim unfolds into; at most one of them is -1."""
    symbolic = [i for i, dim in enumerate(dims) if any(size.symbol for size in dim)]
    free = 0 if first_free or not symbolic else symbolic[0]
    return ", ".join("-1" if i == free else body.size(dim) for i, dim in enumerate(dims))


def permute(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """A transposition where it is one."""
    order = list(op.attributes["order"])
    moved = [i for i, d in enumerate(order) if i != d % len(order)]
    if len(moved) == 2:
        return lambda x: f"{x[0]}.transpose({moved[0]}, {moved[1]})"
    return lambda x: f"{x[0]}.permute({', '.join(map(str, order))})"


def expand(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """Dims of size 1, or new leading ones, are repeated."""
    local = body.target.local(body.values[writes[0][0]], writes[0][1])
    source, target = op.rule.operands[0], op.rule.results[0]
    lead = len(target) - len(source)
    sizes = [
        "-1" if i >= lead and source[i - lead] == dim else body.size(local[i])
        for i, dim in enumerate(target)
    ]

    def text(x: Sequence[str]) -> str:
        return f"{x[0]}.expand({', '.join(sizes)})"

    grown = {i for i, size in enumerate(sizes) if size != "-1"}
    if any(kind.is_split and kind.dim in grown for _, kind in writes[0][1]):
        return unseen(text, reads[0], writes[0])
    return text


def chunk(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """Equal pieces of a dim; split inside the pieces, every shard has its part of each."""
    dim = op.attributes["dim"] % len(op.rule.operands[0])
    count = op.attributes["count"]

    def text(x: Sequence[str]) -> str:
        return f"{x[0]}.chunk({count}, {dim})"

    if any(kind.is_split and kind.dim == dim for _, kind in reads[0][1]):
        return unseen(text, reads[0], writes[0])
    return text


def slice_dim(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """A range of one dim."""
    dim = op.attributes["dim"] % len(op.rule.operands[0])
    start, stop = op.attributes["start"], op.attributes["stop"]
    end = "" if stop is None or stop < 0 else str(stop)
    index = ", ".join([":"] * dim + [f"{start or ''}:{end}"])
    return lambda x: f"{x[0]}[{index}]"


def concat(body: Body, op: Op, reads: list[Form], writes: list[Form]) -> Text:
    """Operands one after the other along a dim."""
    dim = op.attributes["dim"]
    return lambda x: f"torch.cat([{', '.join(x)}], {dim})"
