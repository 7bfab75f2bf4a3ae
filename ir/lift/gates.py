"""What is computed from a router's choice per token and expert: gates, marks of the chosen, and the
columns of one expert that loops read."""

from __future__ import annotations

from ..graph import Dims
from .draft import Draft, Op, Wire, ancestors
from .evaluate import NoValue
from .router import Router, same


def read_off_gates(draft: Draft, router: Router) -> None:
    """Gates and marks become those of the op table's `top_k`, or columns of these."""
    for op in list(draft.ops):
        if len(op.results) != 1 or op.operands == [router.op.operands[0]]:
            continue
        wire = op.result
        if not wire.carried or wire.rank == 0 or not _from_choice(router, wire):
            continue
        flat = [n for dim in wire.dims for n in dim]
        whole = flat == ["b", "s", router.experts] and bool(wire.dims[-1])
        if not whole and flat != ["b", "s"]:
            continue
        if (found := _known(draft, router, op, whole)) is not None:
            draft.stand_in(op, found)


def _from_choice(router: Router, wire: Wire) -> bool:
    met = ancestors([wire], lambda each: each in router.gates)
    return bool(met & {*router.gates, router.op.results[1]}) and wire not in router.gates


def _known(draft: Draft, router: Router, op: Op, whole: bool) -> Wire | None:
    """What an op computes, if it is gates or marks: of all experts, or of one."""
    weighted = router.weights(op.result)
    if weighted:
        gates, values = weighted
    else:
        gates = router.chosen
        try:
            values = router.values(op.result)
        except NoValue:
            return None
    marks = list(router.marks(weighted=weighted is not None))
    if whole and all(map(same, values, marks)):
        return _as(draft, gates, op)
    for expert in range(0 if whole else router.experts):
        if all(map(same, values, [each[:, expert] for each in marks])):
            dims: Dims = (*gates.dims[:2], ())
            return draft.add(
                "slice", [_as(draft, gates, op)], dims, module=op.module, before=op,
                attributes={"dim": 2, "start": expert, "stop": expert + 1},
            ).result  # fmt: skip
    return None


def _as(draft: Draft, wire: Wire, op: Op) -> Wire:
    """A mark in the dtype of the op that makes it."""
    dtype = op.result.dtype
    if wire.dtype == dtype or wire.dtype != "bool":
        return wire
    return draft.add(
        "cast", [wire], wire.dims, dtype=dtype, attributes={"to": dtype}, module=op.module,
        before=op,
    ).result  # fmt: skip
