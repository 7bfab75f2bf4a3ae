"""A small hand-made model, and random plans of it that are legal (if seldom good).

The model has what real ones have: a preamble (labels, positions, rotary tables), an embedding, a
repeated layer with attention over grouped heads, a head with a loss; its batch and sequence are
symbols.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from math import prod

from shardwright.ir import (
    Axis,
    AxisType,
    Graph,
    I,
    Init,
    Mesh,
    Model,
    NdType,
    Op,
    P,
    Parameter,
    R,
    S,
    Segment,
    Value,
    signatures,
)
from shardwright.ir.graph import Dims
from shardwright.ir.plan import (
    Alternative,
    Annotation,
    Certificate,
    OpTypes,
    Plan,
    Predicted,
    Stage,
    Strategy,
)
from shardwright.ir.refine import RawGraph, RawOp, refine

VOCABULARY, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 24, 16, 8, 4, 4


def small_model(layers: int = 3) -> Model:
    graphs = refine(
        {"preamble": _preamble(), "Embed": _embed(), "Layer": _layer(), "Head": _head()},
        [
            (("preamble", "cos"), ("Layer", "cos")),
            (("preamble", "sin"), ("Layer", "sin")),
            (("Embed", "x"), ("Layer", "x")),
            (("Layer", "x"), ("Layer", "out")),
            (("Layer", "out"), ("Head", "x")),
        ],
    )
    preamble = graphs.pop("preamble")
    segments = [Segment("Embed", "model.embed", ("model.embed.weight",), ("tokens",), ("h0",))]
    parameters = {"model.embed.weight": _parameter("model.embed.weight", (VOCABULARY, HIDDEN))}
    for i in range(layers):
        module = f"model.layers.{i}"
        names = tuple(f"{module}.{name}" for name in ("norm.weight", "q", "k", "v", "o"))
        shapes = [graphs["Layer"].values[p].shape({}) for p in graphs["Layer"].parameters]
        parameters |= {n: _parameter(n, shape) for n, shape in zip(names, shapes, strict=True)}
        segments.append(Segment("Layer", module, names, (f"h{i}", "cos", "sin"), (f"h{i + 1}",)))
    segments.append(  # tied
        Segment("Head", "", ("model.embed.weight",), (f"h{layers}", "shifted"), ("loss", "count"))
    )
    model = Model(
        name="small",
        inputs=(_value("tokens", ("b",), ("s",)), _value("labels", ("b",), ("s",))),
        preamble=preamble,
        blocks=graphs,
        segments=tuple(segments),
        parameters=parameters,
        loss=("loss", "count"),
        constants={},
        source={"config": {"layers": layers, "ratio": float("inf"), "shape": (1, 2), "on": None}},
    )
    model.check()
    return model


def _parameter(name: str, shape: tuple[int, ...]) -> Parameter:
    ones = Init("constant", 1.0)
    return Parameter(name, shape, ones if len(shape) == 1 else Init("normal", 0.02))


def _value(name: str, *dims: tuple[int | str, ...], grad: bool = False) -> Value:
    return Value(name, dims, "model" if grad else "int64", "activation" if grad else "input", grad)


def _raw(
    values: Mapping[str, Dims],
    ops: list[RawOp],
    inputs: str,
    parameters: str,
    outputs: str,
    plain: str,
) -> RawGraph:
    """Names in one string each; `plain` are the values without gradient."""
    described = {
        name: Value(
            name,
            dims,
            role="parameter" if name in parameters.split() else "activation",
            grad=name not in plain.split(),
        )
        for name, dims in values.items()
    }
    return RawGraph(
        described, tuple(ops), tuple(inputs.split()), tuple(parameters.split()),
        tuple(outputs.split()),
    )  # fmt: skip


def _op(name: str, operands: str, results: str, **attributes: object) -> RawOp:
    kind = name.split(".")[0]
    return RawOp(name, kind, tuple(operands.split()), tuple(results.split()), attributes, "module")


def _preamble() -> RawGraph:
    table: Dims = ((), ("s",), (HEAD_DIM,))
    return _raw(
        {"labels": (("b",), ("s",)), "shifted": (("b",), ("s",)), "at": (("s",),)}
        | {"cos": table, "sin": table},
        [
            _op("shift_labels", "labels", "shifted", ignore_index=-100),
            _op("positions", "", "at"),
            _op("rotary_table", "at", "cos sin", inv_freq=[1.0, 0.01], scaling=1.0),
        ],
        "labels",
        "",
        "shifted cos sin",
        "labels shifted at cos sin",
    )


def _embed() -> RawGraph:
    weight: Dims = ((VOCABULARY,), (HIDDEN,))
    return _raw(
        {"tokens": (("b",), ("s",)), "weight": weight, "x": (("b",), ("s",), (HIDDEN,))},
        [_op("embedding", "weight tokens", "x", padding_idx=None)],
        "tokens",
        "weight",
        "x",
        "tokens",
    )


def _layer() -> RawGraph:
    b, s, h, d = ("b",), ("s",), (HIDDEN,), (HEAD_DIM,)
    values: dict[str, Dims] = {
        "x": (b, s, h), "cos": ((), s, d), "sin": ((), s, d), "norm": (h,), "normed": (b, s, h),
        "out": (b, s, h), "mixed": (b, s, (HEADS,), d), "flat": (b, s, (HEADS * HEAD_DIM,)),
        "projected": (b, s, h), "attended": (b, (HEADS,), s, d),
        "w_o": (h, (HEADS * HEAD_DIM,)),
    }  # fmt: skip
    ops = [_op("rms_norm", "x norm", "normed", eps=1e-5, offset=0.0)]
    for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
        values |= {
            f"w_{name}": ((heads * HEAD_DIM,), h),
            f"{name}0": (b, s, (heads * HEAD_DIM,)),
            f"{name}1": (b, s, (heads,), d),
            f"{name}2": (b, (heads,), s, d),
            f"{name}3": (b, (heads,), s, d),
        }
        ops += [
            _op(f"linear.{name}", f"normed w_{name}", f"{name}0"),
            _op(f"reshape.{name}", f"{name}0", f"{name}1"),
            _op(f"permute.{name}", f"{name}1", f"{name}2", order=[0, 2, 1, 3]),
            _op(f"rotary.{name}", f"{name}2 cos sin", f"{name}3", style="half"),
        ]
    ops += [
        _op("attention", "q3 k3 v3", "attended", causal=True, window=None, scale=0.5, softcap=None),
        _op("permute.out", "attended", "mixed", order=[0, 2, 1, 3]),
        _op("reshape.out", "mixed", "flat"),
        _op("linear.o", "flat w_o", "projected"),
        _op("add", "x projected", "out"),
    ]
    return _raw(values, ops, "x cos sin", "norm w_q w_k w_v w_o", "out", "cos sin")


def _head() -> RawGraph:
    logits: Dims = (("b",), ("s",), (VOCABULARY,))
    return _raw(
        {"x": (("b",), ("s",), (HIDDEN,)), "weight": ((VOCABULARY,), (HIDDEN,))}
        | {"logits": logits, "wide": logits, "shifted": (("b",), ("s",)), "loss": (), "count": ()},
        [
            _op("linear", "x weight", "logits"),
            _op("cast", "logits", "wide", to="wide"),
            _op("cross_entropy", "wide shifted", "loss count", ignore_index=-100),
        ],
        "x shifted",
        "weight",
        "loss count",
        "shifted count",
    )


MESHES = (
    Mesh.of(pp=1, dp=1, tp=1),
    Mesh.of(pp=2, dp=2, tp=2),
    Mesh.of(pp=1, dp=4, tp=2),
    Mesh(Mesh.of(pp=1, dp=2).axes + Mesh.of(tp=4).factored("tp", (2, 2)).axes),
    Mesh((Axis("pp", 3), Axis("dp", 1), Axis("tp", 2))),
)


def random_plan(seed: int, layers: int = 3) -> Plan:
    """A legal plan: every op in a random signature along every axis."""
    rng = random.Random(seed)
    model, mesh = small_model(layers), rng.choice(MESHES)
    tp = prod(axis.size for axis in mesh.axes if axis.parent == "tp")
    strategy = Strategy(
        pp=mesh["pp"].size, dp=mesh["dp"].size, tp=tp, zero=rng.randrange(4),
        recompute=rng.choice(["none", "selective", "full"]), layers=(layers,) * mesh["pp"].size,
    )  # fmt: skip
    cuts = sorted(rng.randrange(len(model.segments) + 1) for _ in range(strategy.pp - 1))
    ends = [0, *cuts, len(model.segments)]
    stages = tuple(
        Stage(a, b, tuple(rng.choice(["none", "selective", "full"]) for _ in range(a, b)))
        for a, b in pairwise(ends)
    )
    return Plan(
        model=model,
        strategy=strategy,
        mesh=mesh,
        annotations={name: annotate(rng, g, mesh) for name, g in model.blocks.items()},
        preamble=annotate(rng, model.preamble, mesh),
        stages=stages,
        workload={"global_batch": 8 * strategy.dp, "seq_len": 64, "precision": "bf16"},
        cluster={"name": "h100-sxm", "nodes": 2, "links": [{"bytes_per_s": 1e11}]},
        predicted=Predicted(
            rng.random(), rng.random() * 1e6, 0.4, (10**9,) * strategy.pp, 8 * 10**10,
            {"compute": 0.1, "all_gather": 1e-7}, ({"parameters": 3},) * strategy.pp,
        ),
        certificate=Certificate(rng.random(), 0.0, 3, 40, 2, 1.5, {"integral": 12}),
        alternatives=(Alternative(Strategy(dp=4), None, 10**11, "does not fit"),),
    )  # fmt: skip


def annotate(rng: random.Random, graph: Graph, mesh: Mesh) -> Annotation:
    """Random types, an op's along each axis from its signatures."""

    def boundary(names: tuple[str, ...]) -> tuple[NdType, ...]:
        return tuple(_random_type(rng, graph.values[name].dims, mesh) for name in names)

    ops = {op.name: _random_signatures(rng, op, graph, mesh) for op in graph.ops}
    inputs, parameters = boundary(graph.inputs), boundary(graph.parameters)
    return Annotation(inputs, parameters, ops, boundary(graph.outputs))


def _axes(mesh: Mesh) -> list[str]:
    return [name for name in mesh.names if name != "pp"]


def _fits(dims: Dims, kinds: dict[str, AxisType], mesh: Mesh) -> bool:
    ways: dict[tuple[int, int], int] = {}
    for axis, kind in kinds.items():
        if kind.is_split:
            at = kind.dim, kind.part
            ways[at] = ways.get(at, 1) * mesh[axis].size
    sizes = {(d, p): size for d, dim in enumerate(dims) for p, size in enumerate(dim)}
    known = {at: size for at, size in sizes.items() if isinstance(size, int)}
    return all(known.get(at, n) % n == 0 for at, n in ways.items())


def _random_type(rng: random.Random, dims: Dims, mesh: Mesh) -> NdType:
    splits = [S(d, p) for d, factors in enumerate(dims) for p in range(len(factors))]
    while True:
        kinds = {axis: rng.choice([R, I, P, *splits]) for axis in _axes(mesh)}
        if _fits(dims, kinds, mesh):
            return NdType.of(kinds)


def _random_signatures(rng: random.Random, op: Op, graph: Graph, mesh: Mesh) -> OpTypes:
    legal = signatures(op, graph.values)
    while True:
        chosen = {axis: rng.choice(legal) for axis in _axes(mesh)}
        operands = [{a: s.operands[k] for a, s in chosen.items()} for k in range(len(op.operands))]
        results = [{a: s.results[k] for a, s in chosen.items()} for k in range(len(op.results))]
        names = (*op.operands, *op.results)
        pairs = zip(names, [*operands, *results], strict=True)
        if all(_fits(graph.values[name].dims, kinds, mesh) for name, kinds in pairs):
            return OpTypes(tuple(map(NdType.of, operands)), tuple(map(NdType.of, results)))
