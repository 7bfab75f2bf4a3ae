"""Mixtures of experts by products over all experts: every expert sees every token and a token's
gates, 0 but for those that it chose, weigh the sum; or one-hot products put tokens into slots and
back (GShard, arXiv:2006.16668, section 2.2). Both are what `moe_dispatch` and `moe_combine` say.

Dims carry tags on the way back from the weighed sum: t (tokens), e (experts), c (slots), f
(features). What cannot be followed stays as it is, all experts on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UnsupportedOp
from ..optable import TABLE
from .contraction import permuted
from .draft import Draft, Op, Wire, uncast
from .evaluate import Array, NoValue
from .router import Router, combined, dispatched

_SYMBOLS = {"b", "s"}


def lift_dense_mixtures(draft: Draft, router: Router) -> None:
    """Replaces weighed sums over all experts of one router. Raises UnsupportedOp for slots that are
    taken in another order than that of the tokens."""
    lifting = _Dense(draft, router)
    for op in list(draft.ops):
        if op.kind == "einsum":
            lifting.product(op)
        elif op.kind == "sum":
            lifting.summed(op)


class _NotSo(Exception):
    """A form that is not followed."""


@dataclass(slots=True)
class _Dense:
    draft: Draft
    router: Router
    dispatched: dict[Wire, Wire] = field(default_factory=dict)
    known: dict[tuple[Wire, str], Wire] = field(default_factory=dict)
    pieces: dict[Op, list[Wire]] = field(default_factory=dict)

    # -- ends -------------------------------------------------------------------------------------

    def product(self, op: Op) -> None:
        """Σ over experts (and slots) of an einsum of gates and what experts return."""
        names, out = ("left", "right"), list(op.attributes["out"])
        for side in (0, 1):
            weights, y = op.operands[side], op.operands[1 - side]
            mine, other = list(op.attributes[names[side]]), list(op.attributes[names[1 - side]])
            summed = [i for i in mine if i in other and i not in out]
            rest = [i for i in other if i not in mine]
            if len(summed) > 2 or len(rest) != 1 or not set(out) <= {*mine, *other}:
                continue
            if [i for i in out if i not in rest] != [i for i in mine if i not in summed]:
                continue
            gates = self.gates(weights) if len(summed) == 1 else None
            slotted = len(summed) == 2 and self.slotted(weights, mine, summed)
            if slotted:
                gates, expert = slotted
            elif gates is not None:
                expert = summed[0]
            if gates is None:
                continue
            tags = "".join(
                "e" if i == expert else "c" if i in summed else "f" if i in rest else "t"
                for i in other
            )
            if out[-1] != rest[0] or not self.ends(op, y, tags, gates):
                continue
            return

    def summed(self, op: Op) -> None:
        """The sum over the dim of experts of what they return times gates."""
        product = uncast(op.operands[0]).made_by("mul")
        if product is None or len(op.attributes["dims"]) != 1:
            return
        dims, at = product.result.dims, int(op.attributes["dims"][0])
        if dims[at] != (self.router.experts,) or at == len(dims) - 1:
            return
        tags = "".join(
            "e" if i == at else "f" if i == len(dims) - 1 else "t" for i in range(len(dims))
        )
        for weights, y in (product.operands, product.operands[::-1]):
            if y.dims != dims or (gates := self.gates(weights)) is None:
                continue
            tail = [dim for dim in weights.dims if dim]
            want = [dim for dim, tag in zip(dims, tags, strict=True) if tag != "f"]
            if tail == want and not weights.dims[-1] and self.ends(op, y, tags, gates):
                return

    def ends(self, op: Op, y: Wire, tags: str, gates: Wire) -> bool:
        try:
            slots = self.slots(y, tags)
        except _NotSo:
            return False
        gates = self.router.by_token(gates, op)
        self.draft.stand_in(op, combined(self.draft, self.router, slots, gates, op))
        return True

    def gates(self, wire: Wire) -> Wire | None:
        """Gates b s e that a wire is, up to its dims' order; None where it may be other than 0 for
        experts that are not chosen."""
        forms = {*self.router.gates.values(), self.router.chosen}
        at, above = wire, wire
        experts = (self.router.experts,)
        while at not in forms:
            op = at.made_by("reshape", "permute", "expand", "cast", "scale", "div", "mul")
            if op is None or (op.kind == "mul" and op.operands[0].dims != op.result.dims):
                return None
            before = op.operands[0]
            views = ("reshape", "permute", "expand")
            if above is at and op.kind in views and above.dims != before.dims:
                above = before
            at = before
        flat = [n for dim in above.dims for n in dim]
        return above if flat == ["b", "s", *experts] and above.dims[-1] == experts else None

    def slotted(
        self, wire: Wire, labels: Sequence[int], summed: Sequence[int]
    ) -> tuple[Wire, int] | None:
        """(gates, label of the experts) of weights b s e c of tokens in slots."""
        found = self.router.weights(wire)
        if found is None:
            return None
        gates, values = found
        for expert, slot in (summed, summed[::-1]):
            order = [*(i for i in labels if i not in summed), expert, slot]
            turned = [v.transpose([list(labels).index(i) for i in order]) for v in values]
            if turned[0].shape[-2] != self.router.experts:
                continue
            if self.in_order(turned, weighted=True):
                return gates, expert
        return None

    def in_order(self, values: Sequence[Array], weighted: bool) -> bool:
        """Whether these [b, s, e, c] put tokens into slots in their order."""
        for value, trial in zip(values, self.router.trials, strict=True):
            marks = np.zeros((trial.b * trial.s, self.router.experts))
            rows = np.arange(len(marks))[:, None]
            marks[rows, trial.experts] = trial.weights if weighted else 1
            by_token = marks.reshape(trial.b, trial.s, -1)
            place = (by_token > 0).cumsum(1) - 1
            slots = np.arange(value.shape[-1])
            taken = (place[..., None] == slots) * by_token[..., None]
            if value.shape != taken.shape:
                return False
            if not np.allclose(value, taken, rtol=1e-9, atol=1e-12):
                places = self.router.op.attributes["place"]
                raise UnsupportedOp(
                    f"op einsum behind top_k at {places}: tokens are put into slots in another "
                    "order than expected: an expert's slots are taken by a sequence's tokens in "
                    "their order, and later ones are left out"
                )
        return True

    # -- back to the tokens -----------------------------------------------------------------------

    def slots(self, wire: Wire, tags: str) -> Wire:
        """The slots e (b c) f of a wire. Raises _NotSo."""
        if (wire, tags) not in self.known:
            self.known[wire, tags] = self.found(wire, tags)
        return self.known[wire, tags]

    def found(self, wire: Wire, tags: str) -> Wire:
        op = wire.producer
        if tags.count("f") != 1 or tags.count("e") > 1 or op is None:
            raise _NotSo
        if "e" not in tags:
            return self.tokens(wire, tags, op)
        if op.kind == "einsum":
            return self.einsum(op, tags)
        if op.kind == "permute":
            back = [""] * len(tags)
            for tag, source in zip(tags, op.attributes["order"], strict=True):
                back[source] = tag
            return self.slots(op.operands[0], "".join(back))
        if op.kind == "reshape":
            return self.slots(op.operands[0], _tags_before(op, tags))
        if op.kind == "expand":
            x, at = op.operands[0], tags.index("e")
            less = len(tags) - x.rank
            if at >= less and x.dims[at - less]:
                raise _NotSo
            kept = [i for i in range(less, len(tags)) if i != at]
            if any(x.dims[i - less] != op.result.dims[i] for i in kept):
                raise _NotSo
            dims = tuple(op.result.dims[i] for i in kept)
            flat = x if x.dims == dims else self.add("reshape", [x], dims, op)
            return self.tokens(flat, "".join(tags[i] for i in kept), op)
        if op.kind in ("chunk", "slice") and tags[op.attributes["dim"]] == "f":
            return self.piece(op, wire, tags)
        return self.pointwise(op, tags)

    def tokens(self, wire: Wire, tags: str, op: Op) -> Wire:
        """The slots of tokens that all experts see."""
        if "c" in tags or tags[-1] != "f":
            raise _NotSo
        if [n for dim in wire.dims[:-1] for n in dim] != ["b", "s"]:
            raise _NotSo
        if wire not in self.dispatched:
            self.dispatched[wire] = dispatched(self.draft, self.router, wire, self.router_end(op))
        return self.dispatched[wire]

    def router_end(self, op: Op) -> Op:
        """The op, or the router's where that comes later: choice and tokens are both needed."""
        ops = self.draft.ops
        return max(op, self.router.op, key=ops.index)

    def einsum(self, op: Op, tags: str) -> Wire:
        """A product of experts' inputs and their weights, or tokens put into slots."""
        names, out = ("left", "right"), list(op.attributes["out"])
        tag = dict(zip(out, tags, strict=True))
        for side in (0, 1):
            x, w = op.operands[side], op.operands[1 - side]
            a, b = list(op.attributes[names[side]]), list(op.attributes[names[1 - side]])
            summed = [i for i in a if i in b and i not in out]
            if _stored(w) and len(summed) == 1 and w.rank == 3:
                mine = {**tag, summed[0]: "f"}
                experts = [i for i in b if tag.get(i) == "e"]
                outputs = [i for i in b if tag.get(i) == "f"]
                if len(experts) != 1 or len(outputs) != 1:
                    continue
                slots = self.slots(x, "".join(mine[i] for i in a))
                return self.grouped(
                    op, slots, w, [b.index(i) for i in (*experts, *summed, *outputs)]
                )
            marked = {"e", "c"} <= {tag.get(i) for i in b}
            if marked and len(summed) == 1 and not _stored(w):
                return self.put(op, x, a, w, b, tag, summed[0])
        raise _NotSo

    def grouped(self, op: Op, slots: Wire, w: Wire, order: list[int]) -> Wire:
        """`order` has the dims of the weights that are experts, inputs and outputs."""
        if turn := w.made_by("permute"):
            w, order = turn.operands[0], [turn.attributes["order"][d] for d in order]
        experts, inputs, outputs = order
        kind = "grouped_linear_io" if inputs < outputs else "grouped_linear"
        w = permuted(self.draft, w, [experts, *sorted((inputs, outputs))], op)
        width = w.dims[2 if kind == "grouped_linear_io" else 1]
        return self.add(kind, [slots, w], (*slots.dims[:2], width), op)

    def put(
        self, op: Op, x: Wire, a: list[int], marks: Wire, b: list[int], tag: dict[int, str],
        token: int,
    ) -> Wire:  # fmt: skip
        """Σ over tokens of x times marks b s e c."""
        expert = [i for i in b if tag.get(i) == "e"]
        slot = [i for i in b if tag.get(i) == "c"]
        lead = [i for i in b if i in a and i != token]
        if len(expert) != 1 or len(slot) != 1 or len(b) != len(lead) + 3:
            raise _NotSo
        order = [b.index(i) for i in (*lead, token, *expert, *slot)]
        try:
            values = [v.transpose(order) for v in self.router.values(marks)]
        except NoValue:
            raise _NotSo from None
        tags = "".join("f" if i not in (*lead, token) else "t" for i in a)
        if not self.in_order(values, weighted=False):
            raise _NotSo
        return self.tokens(x, tags, op)

    def piece(self, op: Op, wire: Wire, tags: str) -> Wire:
        if op not in self.pieces:
            slots = self.slots(op.operands[0], tags)
            at = op.attributes["dim"]
            self.pieces[op] = self.draft.add(
                op.kind, [slots], [(*slots.dims[:2], w.dims[at]) for w in op.results],
                dtype=wire.dtype, attributes=dict(op.attributes) | {"dim": 2}, module=op.module,
                before=op, count=len(op.results),
            ).results  # fmt: skip
        return self.pieces[op][op.results.index(wire)]

    def pointwise(self, op: Op, tags: str) -> Wire:
        kind = TABLE.get(op.kind)
        if kind is None or kind.work != "pointwise" or len(op.results) != 1 or op.kind == "cumsum":
            raise _NotSo
        operands = [self.operand(op, wire, tags) for wire in op.operands]
        made = [wire for wire in operands if len(wire.dims) == 3 and len(wire.dims[1]) == 2]
        if not made:
            raise _NotSo
        dims = (*made[0].dims[:2], op.result.dims[tags.index("f")])
        return self.add(op.kind, operands, dims, op, **op.attributes)

    def operand(self, op: Op, wire: Wire, tags: str) -> Wire:
        """An operand's slots; of a parameter per expert and feature, e 1 f."""
        if wire.dims == op.result.dims and not _stored(wire):
            return self.slots(wire, tags)
        if not _stored(wire):
            raise _NotSo
        mine = tags[len(tags) - wire.rank :]
        kept = [i for i, dim in enumerate(wire.dims) if dim]
        if "".join(mine[i] for i in kept) not in ("ef", "f", "e"):
            raise _NotSo
        dims = tuple(
            next((wire.dims[i] for i in kept if mine[i] == tag), ()) for tag in ("e", "c", "f")
        )
        return self.add("reshape", [wire], dims, op)

    def add(
        self, kind: str, operands: list[Wire], dims: Sequence[tuple[int | str, ...]], like: Op, /,
        **attributes: object,
    ) -> Wire:  # fmt: skip
        before = self.router_end(like)
        return self.draft.add(
            kind, operands, tuple(dims), dtype=like.results[0].dtype, attributes=attributes,
            module=like.module, before=before,
        ).result  # fmt: skip


def _tags_before(op: Op, tags: str) -> str:
    """Tags of the dims that a reshape reads. Raises _NotSo where one has several."""
    flat = [tag for dim, tag in zip(op.result.dims, tags, strict=True) for _ in dim]
    factors = [n for dim in op.result.dims for n in dim]
    before = []
    for dim in op.operands[0].dims:
        mine = {flat.pop(0) for _ in dim if flat and factors.pop(0) is not None}
        if len(mine) > 1:
            raise _NotSo
        before.append(mine.pop() if mine else "t")
    if [n for dim in op.operands[0].dims for n in dim] != [n for d in op.result.dims for n in d]:
        raise _NotSo
    return "".join(before)


def _stored(wire: Wire) -> bool:
    while op := wire.made_by("permute", "reshape", "cast", "expand", "shift"):
        wire = op.operands[0]
    return wire.role == "parameter"
