"""The law of ops: run on shards and convert back equals run whole, forward and gradient.

For every op of the table, in every signature its rule gives it, on one mesh axis and on two: the
gradient of a result arrives in the dual of the result's type, and the gradient of an operand must
leave in the dual of the operand's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_cases import BUILDERS, Case, cases, factorisations
from op_semantics import SEMANTICS
from simulated import (
    Ranks,
    all_reduce,
    gradients,
    groups,
    local_sizes,
    positions,
    shape_of,
    shard,
    unshard,
)
from torch import Tensor

from shardwright.ir import I, Mesh, NdType, R, Signature, Value, signatures
from shardwright.ir.optable import TABLE
from shardwright.ir.refine import RawGraph, RawOp, refine

ONE_AXIS = [Mesh.of(a=2), Mesh.of(a=3)]
TWO_AXES = [Mesh.of(a=2, b=2), Mesh.of(a=2, b=3), Mesh.of(a=3, b=2)]


def examples(count: int) -> settings:
    """Cases are large on purpose: hypothesis need not warn about it."""
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


# --- ops whose local run depends on where it runs -----------------------------------------------


@dataclass(frozen=True)
class Place:
    """What a rank-aware op knows: its case, the types of its operands, the mesh."""

    case: Case
    operands: tuple[NdType, ...]
    mesh: Mesh

    def splitting(self, operand: int, dim: int) -> list[str]:
        """The axes that split a dim of an operand."""
        return list(self.operands[operand].splitting(dim))

    def rows(self, operand: int, dim: int) -> Ranks:
        """Per rank the global indices of its local part of one dim of an operand."""
        along = [
            (axis, replace(kind, dim=0) if kind.is_split and kind.dim == dim else R)
            for axis, kind in self.operands[operand]
        ]
        dims = self.case.dims(self.case.op.operands[operand])[dim : dim + 1]
        return positions(dims, NdType(tuple(along)), self.mesh)


def embedding(place: Place, operands: list[Ranks]) -> list[Ranks]:
    """Ids outside the local vocabulary give zero; the padding row is wherever it is."""
    padding = place.case.op.attributes.get("padding_idx")
    out = []
    for table, ids, rows in zip(*operands, place.rows(0, 0), strict=True):
        weight = (
            table
            if padding is None
            else torch.where((rows == padding)[:, None], table.detach(), table)
        )
        hits = (ids[..., None] == rows).double()
        out.append(hits @ weight)
    return [out]


def cross_entropy(place: Place, operands: list[Ranks]) -> list[Ranks]:
    """Over a split vocabulary: the maximum, the normaliser and the label's logit are reduced."""
    logits, labels = operands
    last = logits[0].dim() - 1
    axes, mesh = place.splitting(0, last), place.mesh
    top = [x.detach().amax(-1) for x in logits]
    for axis in axes:
        for group in groups(mesh, axis):
            highest = torch.stack([top[rank] for rank in group]).amax(0)
            top = [highest if rank in group else t for rank, t in enumerate(top)]
    norm = [(x - t[..., None]).exp().sum(-1) for x, t in zip(logits, top, strict=True)]
    columns = place.rows(0, last)
    chosen = [
        (x * (y[..., None] == c)).sum(-1) for x, y, c in zip(logits, labels, columns, strict=True)
    ]
    for axis in axes:
        norm, chosen = all_reduce(norm, mesh, axis), all_reduce(chosen, mesh, axis)
    kept = [(y != place.case.op.attributes.get("ignore_index", -100)).double() for y in labels]
    loss = [
        ((n.log() + t - x) * k).sum() for n, t, x, k in zip(norm, top, chosen, kept, strict=True)
    ]
    return [loss, [k.sum() for k in kept]]


def dropout(place: Place, operands: list[Ranks]) -> list[Ranks]:
    """The mask is drawn from the global index of the element."""
    p = place.case.op.attributes["p"]
    indices = positions(place.case.dims("x0"), place.operands[0], place.mesh)
    keep = [((i * 2654435761) % 1000 >= p * 1000).double() for i in indices]
    return [[x * k / (1 - p) for x, k in zip(operands[0], keep, strict=True)]]


RANK_AWARE: dict[str, Callable[[Place, list[Ranks]], list[Ranks]]] = {
    "embedding": embedding,
    "cross_entropy": cross_entropy,
    "dropout": dropout,
}
"""The only ops that must know where they run, or communicate inside."""


# --- the law ------------------------------------------------------------------------------------


def run(
    case: Case,
    mesh: Mesh,
    types: Sequence[NdType],
    made: Sequence[NdType],
    operands: list[Ranks],
) -> list[Ranks]:
    """The op on every rank: per result the local tensors."""
    op = case.op
    if op.kind in RANK_AWARE:
        return RANK_AWARE[op.kind](Place(case, tuple(types), mesh), operands)
    shapes = [
        shape_of(local_sizes(case.dims(name), t, mesh))
        for name, t in zip(op.results, made, strict=True)
    ]
    ranks = [
        SEMANTICS[op.kind]([x[rank] for x in operands], op.attributes, shapes)
        for rank in range(mesh.size)
    ]
    return [list(result) for result in zip(*ranks, strict=True)]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    scale = 1.0 + (float(expected.abs().max()) if expected.numel() else 0.0)
    assert error <= 1e-10 * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


def check(case: Case, mesh: Mesh, chosen: Sequence[Signature]) -> None:
    """Asserts the law for one case, with a signature per axis of the mesh."""
    op, where = case.op, f"{case} as {'; '.join(map(str, chosen))}"

    def nd(side: str, k: int) -> NdType:
        pairs = zip(mesh.names, chosen, strict=True)
        return NdType(tuple((axis, getattr(s, side)[k]) for axis, s in pairs))

    types = [nd("operands", k) for k in range(len(op.operands))]
    made = [nd("results", k) for k in range(len(op.results))]
    trains = [k for k, name in enumerate(op.operands) if case.values[name].grad]
    flows = [k for k, name in enumerate(op.results) if case.values[name].grad]

    whole = [x.clone().requires_grad_(k in trains) for k, x in enumerate(case.operands)]
    if op.kind == "dropout":  # the oracle's is the identity
        alone = Mesh.of(**dict.fromkeys(mesh.names, 1))
        expected = [r[0] for r in run(case, alone, types, made, [[x] for x in whole])]
    else:
        expected = list(SEMANTICS[op.kind](whole, op.attributes, case.result_shapes))
    local = [
        [
            x.clone().requires_grad_(k in trains)
            for x in shard(full, types[k], case.dims(op.operands[k]), mesh)
        ]
        for k, full in enumerate(case.operands)
    ]
    found = run(case, mesh, types, made, local)
    for k, name in enumerate(op.results):
        back = unshard([y.detach() for y in found[k]], made[k], case.dims(name), mesh)
        close(back.double(), expected[k].detach().double(), f"{where}: result {k}")

    if not trains or not flows:
        return
    seeds = {k: torch.randn_like(expected[k]) for k in flows}
    true = gradients([expected[k] for k in flows], [whole[k] for k in trains], list(seeds.values()))
    dealt = {k: shard(g, made[k].dual, case.dims(op.results[k]), mesh) for k, g in seeds.items()}
    flat = gradients(
        [y for k in flows for y in found[k]],
        [x for k in trains for x in local[k]],
        [g for k in flows for g in dealt[k]],
    )
    for i, k in enumerate(trains):
        mine = flat[i * mesh.size : (i + 1) * mesh.size]
        back = unshard(mine, types[k].dual, case.dims(op.operands[k]), mesh)
        close(back, true[i], f"{where}: gradient of operand {k}")


def splits_evenly(case: Case, mesh: Mesh, chosen: Sequence[Signature]) -> bool:
    """Whether every factor divides by all axes that split it."""
    ways: dict[str, int] = {}
    for axis, signature in zip(mesh.axes, chosen, strict=True):
        if signature.factor:
            ways[signature.factor] = ways.get(signature.factor, 1) * axis.size
    return all(case.op.factor_size(f, {}) % n == 0 for f, n in ways.items())


def check_all(case: Case, mesh: Mesh) -> int:
    """Asserts the law in every combination of signatures; the number of combinations."""
    found = signatures(case.op, case.values)
    combinations = [
        chosen
        for chosen in product(found, repeat=len(mesh.axes))
        if splits_evenly(case, mesh, chosen)
    ]
    assert combinations
    for chosen in combinations:
        check(case, mesh, chosen)
    return len(combinations)


def test_every_op_has_cases() -> None:
    """A line in the table is covered unasked, unless it needs a generator or a meaning."""
    builders = {rule for line in TABLE.values() for rule in line.rules if rule.startswith("@")}
    assert builders <= BUILDERS.keys()
    assert TABLE.keys() <= SEMANTICS.keys()


@pytest.mark.parametrize("kind", TABLE)
@examples(40)
@given(data=st.data())
def test_op_on_one_axis(kind: str, data: Any) -> None:
    mesh = data.draw(st.sampled_from(ONE_AXIS))
    check_all(data.draw(cases(kind, mesh.size)), mesh)


@pytest.mark.parametrize("kind", TABLE)
@examples(15)
@given(data=st.data())
def test_op_on_two_axes(kind: str, data: Any) -> None:
    mesh = data.draw(st.sampled_from(TWO_AXES))
    check_all(data.draw(cases(kind, mesh.size)), mesh)


@examples(400)
@given(data=st.data())
def test_chains_of_views(data: Any) -> None:
    """Refinement: whatever factors a dim takes from its neighbours, every op keeps the law. Sizes
    without a common refinement (2·3 and 3·2) come up often here."""
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    shape = data.draw(factorisations(72))
    values = {"v0": Value("v0", tuple((n,) if n > 1 else () for n in shape))}
    ops = []
    for i in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["reshape", "reshape", "permute", "gelu"]))
        attributes: dict[str, Any] = {}
        if kind == "reshape":
            shape = data.draw(factorisations(72))
        elif kind == "permute":
            order = data.draw(st.permutations(range(len(shape))))
            shape, attributes = tuple(shape[k] for k in order), {"order": order}
        name = f"v{i + 1}"
        values[name] = Value(name, tuple((n,) if n > 1 else () for n in shape))
        ops.append(RawOp(f"op{i}", kind, (f"v{i}",), (name,), attributes))
    raw = RawGraph(values, tuple(ops), ("v0",), (), (f"v{len(ops)}",))
    graph = refine({"g": raw})["g"]
    graph.check()
    for op in graph.ops:
        x = torch.randn(graph.values[op.operands[0]].shape({}), dtype=torch.float64)
        check_all(Case(op, dict(graph.values), (x,)), Mesh.of(a=2))


# --- wrong rules are caught ---------------------------------------------------------------------

WRONG = {
    "softmax over a split dim": ("softmax", dict(rules=("... h -> ... h",))),
    "rms_norm over a split dim": ("rms_norm", dict(rules=("... h, h -> ... h",))),
    "layer_norm over a split dim": ("layer_norm", dict(rules=("... h -> ... h",))),
    "mean as a sum": ("mean", dict(rules=("@reduce",))),
    "mul of two partial sums": ("mul", dict(linear="sum")),
    "div by a partial sum": ("div", dict(linear="sum")),
    "gelu of a partial sum": ("gelu", dict(linear="sum")),
    "shift of partial sums": ("shift", dict(linear="sum")),
    "add one partial sum to a whole": ("add", dict(linear="product")),
    "a matmul linear in both": ("linear", dict(linear="sum")),
    "count 1 on every part": ("sum_loss", dict(rules=("@reduce_all",))),
    "labels shifted within a shard": ("shift_labels", dict(rules=("b s -> b s",))),
    "keys split without a reduction": (
        "attention",
        dict(rules=("b (k g) s d, b k t d, b k t e -> b (k g) s e; s! d! e!",)),
    ),
    "causal queries split": (
        "attention",
        dict(rules=("b (k g) s d, b k t d, b k t e -> b (k g) s e; t! d! e!",)),
    ),
    "groups outside key heads": (
        "attention",
        dict(rules=("b (g k) s d, b k t d, b k t e -> b (g k) s e; s! t! d! e!",)),
    ),
    "rotary halves split": ("rotary", dict(rules=("b n s d, 1 s d, 1 s d -> b n s d",))),
    "loss over a split vocabulary, summed": (
        "cross_entropy",
        dict(rules=("... v, ... -> ,",), special=()),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_rule_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, change = WRONG[mistake]
    monkeypatch.setitem(TABLE, kind, replace(TABLE[kind], **change))  # type: ignore[arg-type]

    @settings(examples(60), derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def law(data: Any) -> None:
        mesh = data.draw(st.sampled_from(ONE_AXIS))
        check_all(data.draw(cases(kind, mesh.size)), mesh)

    with pytest.raises((AssertionError, ValueError, RuntimeError)):  # wrong numbers, or none at all
        law()


@pytest.mark.parametrize("mistake", ["result", "gradient"])
def test_wrong_signature_is_caught(mistake: str) -> None:
    """A linear layer whose result would be whole, or whose input would come with a whole gradient:
    what a forgotten reduction looks like."""
    weight, x = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    values = {name: Value(name, ((4,), (4,))) for name in ("x", "w", "y")}
    raw = RawGraph(values, (RawOp("op", "linear", ("x", "w"), ("y",)),), ("x",), ("w",), ("y",))
    graph = refine({"g": raw})["g"]
    case = Case(graph.ops[0], dict(graph.values), (x, weight))
    by_factor = {s.factor: s for s in signatures(case.op, case.values)}
    row, column = by_factor["h"], by_factor["o"]
    check(case, Mesh.of(a=2), [row])
    check(case, Mesh.of(a=2), [column])
    if mistake == "result":
        wrong = replace(row, results=(R,))
    else:
        wrong = replace(column, operands=(I, column.operands[1]))
    with pytest.raises(AssertionError, match="differs along a"):
        check(case, Mesh.of(a=2), [wrong])
