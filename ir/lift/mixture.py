"""Mixtures of experts by ragged products: sort by expert, multiply, sort back, sum by token.

Rows of such a program are (token, choice) pairs in some order. Every way of sorting, counting,
gathering and adding up comes down to which pair a row is, which is read off the program's own
values for choices that are drawn. What is done to rows between dispatch and sum is drawn again on
the slots of the op table's `moe_dispatch` and `moe_combine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedOp
from ..optable import TABLE
from .draft import Draft, Op, Wire
from .evaluate import Array, NoValue, Settings
from .gates import read_off_gates
from .mixture_dense import lift_dense_mixtures
from .mixture_loops import lift_expert_loops
from .router import Router, combined, dispatched, routers, same

_MOVES = ("reshape", "permute", "expand", "cast", "slice", "jax.gather", "concat")
"""What may stand between tokens and the rows that experts take."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the program: their slots, e (b c) f, the pair that each is, in each trial, and the
    gates that they were multiplied with."""

    slots: Wire
    pairs: tuple[Array, ...]
    gates: Wire | None = None


def lift_mixtures(draft: Draft, make: Settings) -> None:
    """Replaces routers, and the experts behind them. Raises UnsupportedOp, naming the op and its
    place, for a `top_k` or a ragged product in another form."""
    found = routers(draft, make)
    for op in draft.each("ragged_linear"):
        if not any(router.reads(op.operands[2]) for router in found):
            raise UnsupportedOp(
                f"op ragged_dot at {op.attributes['place']}: its group sizes do not come from the "
                "top_k of a router; expected how many tokens chose each expert"
            )
    for router in found:
        _Ragged(draft, router).run()
        lift_expert_loops(draft, router)
        lift_dense_mixtures(draft, router)  # into slots and back, read off the choice itself
        read_off_gates(draft, router)
        lift_dense_mixtures(draft, router)
    draft.sweep()
    for op in draft.each("choose"):
        readers = ", ".join(dict.fromkeys(_shown(r) for w in op.results for r in draft.readers(w)))
        raise UnsupportedOp(
            f"op top_k at {op.attributes['place']}: {readers} reads it in a form that is not "
            "known; expected a router: weights that are normalised or not, tokens sorted by expert "
            "for ragged_dot, or one-hot products per token and expert"
        )


def _shown(op: Op) -> str:
    name = op.kind.removeprefix("jax.").removeprefix("torch.")
    return f"{name} at {op.attributes['place']}" if "place" in op.attributes else name


class _Ragged:
    """Follows rows from the ragged products of one router to the sum by token."""

    def __init__(self, draft: Draft, router: Router) -> None:
        self.draft, self.router = draft, router
        self.rows: dict[Wire, _Rows] = {}
        self.dispatched: dict[Wire, Wire] = {}
        self.place = router.op.attributes["place"]

    def run(self) -> None:
        for op in list(self.draft.ops):
            if op.kind == "ragged_linear" and self.router.reads(op.operands[2]):
                self.place = op.attributes["place"]
                self.product(op)
            elif any(wire in self.rows for wire in op.operands):
                self.follow(op)

    def refuse(self, op: Op, expected: str) -> UnsupportedOp:
        name = op.kind.removeprefix("jax.").replace("ragged_linear", "ragged_dot")
        place = op.attributes.get("place")
        where = f"at {place}" if place else f"behind ragged_dot at {self.place}"
        return UnsupportedOp(f"op {name} {where}: {expected}")

    # -- products ---------------------------------------------------------------------------------

    def product(self, op: Op) -> None:
        """Rows times the weights of their experts."""
        x, weight, sizes = op.operands
        experts = self.experts_of_rows(op, sizes)
        rows = self.rows.get(x)
        if rows is None:
            rows = self.dispatch(op, x, experts)
        for trial, pairs, expert in zip(self.router.trials, rows.pairs, experts, strict=True):
            if not np.array_equal(trial.experts.reshape(-1)[pairs.reshape(-1)], expert):
                raise self.refuse(op, "its rows are not sorted by the experts that they go to")
        kind = "grouped_linear_io" if op.attributes["inputs_first"] else "grouped_linear"
        turned = weight.made_by("permute")
        if turned and turned.attributes["order"] == [0, 2, 1]:
            weight = turned.operands[0]
            kind = "grouped_linear" if kind == "grouped_linear_io" else "grouped_linear_io"
        slots = self.add(kind, [rows.slots, weight], op.result.dims[-1], op)
        self.rows[op.result] = _Rows(slots, rows.pairs)

    def experts_of_rows(self, op: Op, sizes: Wire) -> list[Array]:
        """The expert of each row, by the group sizes."""
        try:
            counts = self.router.values(sizes)
        except NoValue:
            counts = []
        for count, trial in zip(counts, self.router.trials, strict=False):
            if count.shape != (self.router.experts,) or count.sum() != trial.experts.size:
                counts = []
                break
        if not counts:
            raise self.refuse(
                op, "its group sizes are not how many tokens chose each of the router's experts"
            )
        return [np.repeat(np.arange(count.size), count.astype(int)) for count in counts]

    def dispatch(self, op: Op, x: Wire, experts: list[Array]) -> _Rows:
        """Rows that were tokens: their slots, and the pairs that they are."""
        at: Wire | None = x
        while at is not None:
            if [n for dim in at.dims[:-1] for n in dim] == ["b", "s"] and at.source is not None:
                pairs = self.pairs_of(x, at, experts)
                if pairs is not None:
                    return _Rows(self.slots_of(at, op), pairs)
            made = at.made_by(*_MOVES)
            at = made.operands[0] if made else None
        raise self.refuse(
            op, "its rows are not the router's tokens, each taken once for every expert that it "
            "chose, in the order of the experts"
        )  # fmt: skip

    def pairs_of(self, x: Wire, tokens: Wire, experts: list[Array]) -> tuple[Array, ...] | None:
        labels = [_labels(t.shape(tokens.dims)) for t in self.router.trials]
        try:
            values = self.router.values(x, [(tokens, labels)])
        except NoValue:
            return None
        found = []
        for value, label, expert, trial in zip(
            values, labels, experts, self.router.trials, strict=True
        ):
            rows = _looked_up(value, label.reshape(-1, label.shape[-1]))
            if rows is None or rows.size != expert.size:
                return None
            mine = trial.experts[rows.reshape(-1)] == expert[:, None]
            if not mine.any(-1).all():
                return None
            pairs = rows.reshape(-1) * trial.experts.shape[1] + mine.argmax(-1)
            if not np.array_equal(np.sort(pairs), np.arange(trial.experts.size)):
                return None
            found.append(pairs.reshape(value.shape[:-1]))
        return tuple(found)

    def slots_of(self, tokens: Wire, before: Op) -> Wire:
        if tokens not in self.dispatched:
            self.dispatched[tokens] = dispatched(self.draft, self.router, tokens, before)
        return self.dispatched[tokens]

    # -- between and behind products --------------------------------------------------------------

    def follow(self, op: Op) -> None:
        """An op on rows: the same on slots, another order of rows, or the sum by token."""
        rows = [self.rows[wire] for wire in op.operands if wire in self.rows]
        if len(rows) == len(op.operands) and self.pointwise(op, rows):
            return
        if op.kind in ("chunk", "slice") and op.attributes["dim"] == op.operands[0].rank - 1:
            self.pieces(op, rows[0])
            return
        if len(rows) == 1 and op.kind in ("mul", "div", "add", "sub") and self.weighted(op):
            return
        if len(rows) == 1 and len(op.results) == 1 and self.moved_or_summed(op):
            return
        raise self.refuse(
            op, "it reads rows of experts in a form that is not known; expected pointwise ops, "
            "another order of the rows, products with the router's weights, and their sum by token"
        )  # fmt: skip

    def pointwise(self, op: Op, rows: list[_Rows]) -> bool:
        kind = TABLE.get(op.kind)
        if kind is None or kind.work != "pointwise" or len(op.results) != 1:
            return False
        linear = kind.linear == "sum" and len(rows) == 1
        same = all(
            np.array_equal(a, b) for r in rows for a, b in zip(r.pairs, rows[0].pairs, strict=True)
        )
        if not same or (any(r.gates for r in rows) and not linear):
            return False
        if any(wire.dims != op.result.dims for wire in op.operands) or op.kind == "cumsum":
            return False
        slots = self.add(
            op.kind, [r.slots for r in rows], op.result.dims[-1], op, **op.attributes
        )  # fmt: skip
        self.rows[op.result] = _Rows(slots, rows[0].pairs, rows[0].gates)
        return True

    def pieces(self, op: Op, rows: _Rows) -> None:
        made = self.draft.add(
            op.kind, [rows.slots], [(*rows.slots.dims[:2], w.dims[-1]) for w in op.results],
            dtype=op.results[0].dtype, attributes=dict(op.attributes) | {"dim": 2},
            module=op.module, before=op, count=len(op.results),
        )  # fmt: skip
        for wire, slots in zip(op.results, made.results, strict=True):
            self.rows[wire] = _Rows(slots, rows.pairs, rows.gates)

    def weighted(self, op: Op) -> bool:
        """Rows times the weights of their choices; plus the bias of their experts."""
        mine = next(wire for wire in op.operands if wire in self.rows)
        other = next(wire for wire in op.operands if wire not in self.rows)
        rows = self.rows[mine]
        if op.kind == "mul" and rows.gates is None and (found := self.router.weights(other)):
            gates, values = found
            for value, pairs, trial in zip(values, rows.pairs, self.router.trials, strict=True):
                want = trial.weights.reshape(-1)[pairs][..., None]
                if not _broadcasts(value, want):
                    return False
            self.rows[op.result] = _Rows(rows.slots, rows.pairs, gates)
            return True
        if op.kind in ("add", "mul") and rows.gates is None:
            return self.biased(op, rows, other)
        return False

    def biased(self, op: Op, rows: _Rows, other: Wire) -> bool:
        """A row per expert of a parameter [e, f], taken by the experts of the rows."""
        at: Wire | None = other
        experts = self.router.experts
        while at is not None and not (
            at.role == "parameter" and at.rank == 2 and at.dims[0] == (experts,)
        ):
            made = at.made_by(*_MOVES, "embedding")
            at = made.operands[0] if made else None
        if at is None or other.source is None:
            return False
        labels = [_labels((experts, t.shape(at.dims)[1])) for t in self.router.trials]
        try:
            values = self.router.values(other, [(at, labels)])
        except NoValue:
            return False
        for value, label, pairs, trial in zip(
            values, labels, rows.pairs, self.router.trials, strict=True
        ):
            if not same(value, label[trial.experts.reshape(-1)[pairs]]):
                return False
        bias = self.draft.add(
            "reshape", [at], (at.dims[0], (), at.dims[1]), module=op.module, before=op
        ).result  # fmt: skip
        slots = self.add(op.kind, [rows.slots, bias], op.result.dims[-1], op)
        self.rows[op.result] = _Rows(slots, rows.pairs)
        return True

    def moved_or_summed(self, op: Op) -> bool:
        mine = next(wire for wire in op.operands if wire in self.rows)
        rows, result, trials = self.rows[mine], op.result, self.router.trials
        gates = rows.gates
        features = trials[0].shape(rows.slots.dims[2:])[0]
        table = [_labels((t.experts.size, features), seed=1) for t in trials]
        known = [
            (mine, [each[pairs] for each, pairs in zip(table, rows.pairs, strict=True)])
        ]  # fmt: skip
        forms = self.router.forms([wire for wire in op.operands if wire is not mine])
        if forms:
            if gates is not None or len(forms) > 1:
                return False
            gates = self.router.gates[forms[0]]
            known.append((forms[0], [t.weights.reshape(t.shape(forms[0].dims)) for t in trials]))
            table = [x * t.weights.reshape(-1, 1) for x, t in zip(table, trials, strict=True)]
        if result.source is None or any(wire.source is None for wire, _ in known):
            return False
        try:
            values = self.router.values(result, known)
        except NoValue:
            return False
        summed = [
            x.reshape(*t.experts.shape, -1).sum(1) for x, t in zip(table, trials, strict=True)
        ]
        if gates is not None and all(map(same, values, summed)):
            self.combine(op, rows.slots, gates)
            return True
        moved = [_looked_up(value, each) for value, each in zip(values, table, strict=True)]
        pairs = [each for each in moved if each is not None]
        if len(pairs) < len(moved):
            return False
        if any(not np.array_equal(np.sort(each, None), np.arange(t.experts.size))
               for each, t in zip(pairs, trials, strict=True)):  # fmt: skip
            return False
        self.rows[result] = _Rows(rows.slots, tuple(pairs), gates)
        return True

    def combine(self, op: Op, slots: Wire, gates: Wire) -> None:
        self.draft.stand_in(op, combined(self.draft, self.router, slots, gates, op))

    def add(
        self, kind: str, operands: list[Wire], features: tuple[int | str, ...], like: Op, /,
        **attributes: object,
    ) -> Wire:  # fmt: skip
        dims = (*operands[0].dims[:2], features)
        return self.draft.add(
            kind, operands, dims, dtype=like.results[0].dtype, attributes=attributes,
            module=like.module, before=like,
        ).result  # fmt: skip


def _labels(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).random(shape) + 0.5


def _looked_up(rows: Array, table: Array) -> Array | None:
    """Which row of the table each row is, or None where one is not."""
    if rows.ndim < 1 or rows.shape[-1] != table.shape[-1]:
        return None
    flat = rows.reshape(-1, rows.shape[-1])
    order = np.argsort(table[:, 0])
    at = np.searchsorted(table[order, 0], flat[:, 0] * (1 - 1e-12)).clip(0, len(table) - 1)
    found = order[at]
    return found.reshape(rows.shape[:-1]) if same(flat, table[found]) else None


def _broadcasts(value: Array, want: Array) -> bool:
    try:
        return bool(np.allclose(np.broadcast_to(value, want.shape[:-1] + value.shape[-1:]), want))
    except ValueError:
        return False
