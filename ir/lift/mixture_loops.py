"""Mixtures of experts by a loop over experts: a sum of what each returns times its column of the
gates, with the weights of each an entry of one parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..optable import TABLE
from .draft import Draft, Op, Wire
from .router import Router, combined, dispatched


def lift_expert_loops(draft: Draft, router: Router) -> None:
    """Replaces sums over all experts of one router, written out. What is no such sum, or has
    experts that differ, stays as it is."""
    for op in list(draft.ops):
        if op.kind == "add" and not any(r.kind == "add" for r in draft.readers(op.result)):
            _sum_of_experts(draft, router, op)


class _NotSo(Exception):
    """Experts that are not one function of entries of parameters."""


def _sum_of_experts(draft: Draft, router: Router, op: Op) -> None:
    found: dict[int, tuple[Wire, Wire]] = {}
    rest: list[Wire] = []
    for term in _terms(draft, op):
        column = _column(router, term)
        if column is None or column[0] in found:
            rest.append(term)
        else:
            found[column[0]] = column[1:]
    if sorted(found) != list(range(router.experts)):
        return
    forms = {gates for gates, _ in found.values()}
    returned = [found[e][1] for e in range(router.experts)]
    if len(forms) != 1:
        return
    try:
        slots = _Drawn(draft, router, op).slots(returned)
    except _NotSo:
        return
    (gates,) = forms
    total = combined(draft, router, slots, gates, op)
    if total.dims != op.result.dims:
        total = draft.add(
            "reshape", [total], op.result.dims, module=op.module, before=op
        ).result  # fmt: skip
    for term in rest:
        total = draft.add(
            "add", [term, total], op.result.dims, dtype=op.result.dtype, module=op.module, before=op
        ).result  # fmt: skip
    draft.stand_in(op, total)


def _terms(draft: Draft, op: Op) -> list[Wire]:
    """What a chain of additions adds up."""
    terms: list[Wire] = []
    for wire in op.operands:
        inner = wire.made_by("add")
        if inner and len(draft.readers(wire)) == 1 and wire.dims == op.result.dims:
            terms += _terms(draft, inner)
        else:
            terms.append(wire)
    return terms


def _column(router: Router, term: Wire) -> tuple[int, Wire, Wire] | None:
    """(expert, gates, what it returns) of a product with a column of the gates."""
    product = term.made_by("mul")
    if product is None:
        return None
    for weights, y in (product.operands, product.operands[::-1]):
        if y.dims != term.dims or [n for dim in weights.dims for n in dim] != ["b", "s"]:
            continue
        if (found := router.weights(weights)) is None:
            continue
        gates, values = found
        marks = list(router.marks(weighted=True))
        for expert in range(router.experts):
            if all(np.allclose(v.reshape(-1), m[:, expert], rtol=1e-9, atol=1e-12)
                   for v, m in zip(values, marks, strict=True)):  # fmt: skip
                return expert, gates, y
    return None


class _Drawn:
    """Draws, on slots, what experts compute alike."""

    def __init__(self, draft: Draft, router: Router, before: Op) -> None:
        self.draft, self.router, self.before = draft, router, before
        self.known: dict[tuple[Wire, ...], Wire] = {}

    def slots(self, wires: Sequence[Wire]) -> Wire:
        """The slots of a wire of every expert. Raises _NotSo."""
        key = tuple(wires)
        if key not in self.known:
            self.known[key] = self.found(wires)
        return self.known[key]

    def found(self, wires: Sequence[Wire]) -> Wire:
        if len(set(wires)) == 1:
            (tokens,) = set(wires)
            if [n for dim in tokens.dims[:-1] for n in dim] != ["b", "s"]:
                raise _NotSo
            return dispatched(self.draft, self.router, tokens, self.before)
        ops = [wire.producer for wire in wires]
        first = ops[0]
        if first is None:
            raise _NotSo
        made = [op for op in ops if op is not None and _alike(op, first)]
        if len(made) < len(ops):
            raise _NotSo
        index = {op.results.index(wire) for op, wire in zip(made, wires, strict=True)}
        if len(index) != 1:
            raise _NotSo
        if first.kind == "einsum":
            return self.product(made, wires[0])
        if first.kind in ("chunk", "slice") and first.attributes["dim"] == wires[0].rank - 1:
            (place,) = index
            return self.piece(made, place)
        return self.pointwise(made, wires[0])

    def product(self, ops: Sequence[Op], like: Wire) -> Wire:
        """x · w[e], for all e."""
        first, names = ops[0], ("left", "right")
        for side in (0, 1):
            weights = _stack([op.operands[1 - side] for op in ops])
            a, b = first.attributes[names[side]], list(first.attributes[names[1 - side]])
            if weights is None or weights.rank != 3 or len(b) != 2:
                continue
            summed = [i for i in b if i in a]
            out = [i for i in first.attributes["out"] if i in b]
            if len(summed) != 1 or a[-1] != summed[0] or first.attributes["out"][-1:] != out:
                continue
            x = self.slots([op.operands[side] for op in ops])
            kind = "grouped_linear_io" if b[0] == summed[0] else "grouped_linear"
            return self.add(kind, [x, weights], like)
        raise _NotSo

    def piece(self, ops: Sequence[Op], index: int) -> Wire:
        first = ops[0]
        x = self.slots([op.operands[0] for op in ops])
        made = self.draft.add(
            first.kind, [x], [(*x.dims[:2], w.dims[-1]) for w in first.results],
            dtype=first.results[0].dtype, attributes=dict(first.attributes) | {"dim": 2},
            module=first.module, before=self.before, count=len(first.results),
        ).results  # fmt: skip
        for place, slots in enumerate(made):
            self.known[tuple(op.results[place] for op in ops)] = slots
        return made[index]

    def pointwise(self, ops: Sequence[Op], like: Wire) -> Wire:
        first = ops[0]
        kind = TABLE.get(first.kind)
        if kind is None or kind.work != "pointwise" or first.kind == "cumsum":
            raise _NotSo
        operands = []
        for place in range(len(first.operands)):
            wires = [op.operands[place] for op in ops]
            if wires[0].dims == like.dims:
                operands.append(self.slots(wires))
            elif (stack := _stack(wires)) is not None and stack.rank == 2:
                dims = (stack.dims[0], (), stack.dims[1])
                operands.append(
                    self.draft.add(
                        "reshape", [stack], dims, module=first.module, before=self.before
                    ).result
                )
            else:
                raise _NotSo
        operands.sort(key=lambda wire: not wire.dims[1]) if first.kind == "add" else None
        return self.add(first.kind, operands, like, **first.attributes)

    def add(self, kind: str, operands: Sequence[Wire], like: Wire, /, **attributes: object) -> Wire:
        dims = (*operands[0].dims[:2], like.dims[-1])
        return self.draft.add(
            kind, operands, dims, dtype=like.dtype, attributes=attributes,
            module=self.before.module, before=self.before,
        ).result  # fmt: skip


def _alike(a: Op, b: Op) -> bool:
    return (a.kind, a.attributes, len(a.operands), [w.dims for w in a.results]) == (
        b.kind, b.attributes, len(b.operands), [w.dims for w in b.results]
    )  # fmt: skip


def _stack(wires: Sequence[Wire]) -> Wire | None:
    """The parameter of which these are the entries, in order."""
    found: set[Wire] = set()
    for index, wire in enumerate(wires):
        while op := wire.made_by("reshape", "cast"):
            wire = op.operands[0]
        op = wire.made_by("slice", "chunk")
        if op is None or op.attributes["dim"] != 0:
            return None
        start = op.attributes["start"] if op.kind == "slice" else op.results.index(wire)
        count = op.attributes["stop"] - start if op.kind == "slice" else 1
        if start != index or count != 1:
            return None
        found.add(op.operands[0])
    (stack,) = found if len(found) == 1 else (None,)
    if stack is None or stack.role != "parameter" or stack.dims[0] != (len(wires),):
        return None
    return stack
