"""The small parts of the IR: mesh, rules, refinement, signatures, types along the data axis."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_cases import small_model

from shardwright.ir import Graph, InvalidInput, Mesh, Model, UnsupportedOp, Value, signatures
from shardwright.ir.graph import Dims, bind
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import data_parallel_types
from shardwright.ir.refine import RawGraph, RawOp, refine
from shardwright.ir.rule import Rule, Size, expand, parse
from shardwright.ir.shape_rules import merge, rule_for

# --- mesh ---------------------------------------------------------------------------------------


def test_mesh_coordinates() -> None:
    """The design's example: the ranks of one tp group are neighbours."""
    mesh = Mesh.of(pp=2, dp=4, tp=8)
    assert mesh.size == 64
    assert (mesh.stride("pp"), mesh.stride("dp"), mesh.stride("tp")) == (32, 8, 1)
    assert mesh.coordinates(0) == {"pp": 0, "dp": 0, "tp": 0}
    assert mesh.coordinates(43) == {"pp": 1, "dp": 1, "tp": 3}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_coordinates_name_ranks(sizes: list[int]) -> None:
    mesh = Mesh.of(**{f"a{i}": size for i, size in enumerate(sizes)})
    seen = {tuple(mesh.coordinates(rank).values()) for rank in range(mesh.size)}
    assert len(seen) == mesh.size == prod(sizes)
    for rank in range(mesh.size):
        where = mesh.coordinates(rank)
        assert sum(where[name] * mesh.stride(name) for name in mesh.names) == rank


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_factored_mesh_has_the_same_ranks(factors: list[int], dp: int) -> None:
    mesh = Mesh.of(dp=dp, tp=prod(factors), cp=2)
    fine = mesh.factored("tp", tuple(factors))
    assert fine.size == mesh.size
    parts = [axis.name for axis in fine.axes if axis.parent == "tp"]
    assert parts == (["tp"] if len(factors) == 1 else [f"tp{i}" for i in range(len(factors))])
    for rank in range(mesh.size):
        where, fine_where = mesh.coordinates(rank), fine.coordinates(rank)
        position = 0
        for part in parts:
            position = position * fine[part].size + fine_where[part]
        assert position == where["tp"]
        assert (fine_where["dp"], fine_where["cp"]) == (where["dp"], where["cp"])


def test_mesh_errors_name_the_axis() -> None:
    with pytest.raises(InvalidInput, match="mesh axis 'tp': size 0, expected at least 1"):
        Mesh.of(tp=0)
    with pytest.raises(InvalidInput, match="mesh axis 'ep': this mesh has dp, tp"):
        Mesh.of(dp=2, tp=4)["ep"]
    with pytest.raises(InvalidInput, match=r"'tp' of size 4 cannot factor into \(2, 3\)"):
        Mesh.of(tp=4).factored("tp", (2, 3))


# --- rules --------------------------------------------------------------------------------------

names = st.sampled_from(["b", "s", "h", "k", "g", "d", "three", "n_0"])


@st.composite
def rules(draw: Any) -> Rule:
    def shape() -> tuple[tuple[str, ...], ...]:
        factors = draw(st.lists(names, max_size=6, unique=True))
        dims: list[tuple[str, ...]] = []
        for factor in factors:
            if dims and draw(st.booleans()):
                dims[-1] = (*dims[-1], factor)
            else:
                dims.append((factor,))
            if draw(st.integers(0, 3)) == 0:
                dims.append(())
        return tuple(dims)

    operands = tuple(shape() for _ in range(draw(st.integers(0, 3))))
    results = tuple(shape() for _ in range(draw(st.integers(1, 3))))
    rule = Rule(operands, results)
    locked = draw(st.sets(st.sampled_from(rule.factors))) if rule.factors else frozenset()
    return Rule(operands, results, frozenset(locked))


@given(rules())
@example(Rule(((),), ((),)))
@example(Rule((), ((),)))
@example(Rule(((), ()), ((), ())))
def test_rule_text_round_trip(rule: Rule) -> None:
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", sorted({t for k in TABLE.values() for t in k.rules if t[0] != "@"})
)
def test_rules_of_the_table_round_trip(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_rule_parts() -> None:
    rule = parse("b s (k g d), k 1 -> b s k g; d!")
    assert rule.operands == ((("b",), ("s",), ("k", "g", "d")), (("k",), ()))
    assert rule.factors == ("b", "s", "k", "g", "d")
    assert rule.locked == {"d"} == rule.contracted
    assert rule.position(rule.operands[0], "g") == (2, 1)
    assert rule.position(rule.operands[1], "g") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("b s h", "expected 'operands -> results'"),
        ("b s -> b s; h", "flag 'h', expected 'factor!'"),
        ("b s -> b s; h!", r"locks \['h'\]"),
        ("b (s (h)) -> b", "'(' inside '('"),
        ("b s) -> b", "')' without '('"),
        ("b (s -> b", "'(' without ')'"),
        ("b b -> b", "a factor appears twice in 'b b'"),
        ("b * s -> b", "unexpected ' \\* s'"),
    ],
)
def test_bad_rule_is_quoted(text: str, problem: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert problem.replace("\\", "") in str(caught.value)


@given(st.text(alphabet="bs1 ()->,;!._[]", max_size=20))
def test_parse_fails_only_as_invalid_input(text: str) -> None:
    try:
        rule = parse(text)
    except InvalidInput as error:
        assert repr(text) in str(error)
    else:
        assert parse(str(rule)) == rule


def test_ellipsis_takes_what_is_left() -> None:
    rule = expand(parse("... h, o h -> ... o; ...!"), (4, 2))
    assert str(rule) == "n0 n1 n2 h, o h -> n0 n1 n2 o; n0! n1! n2!"
    assert str(expand(parse("v h, ... -> ... h"), (2, 0))) == "v h,  -> h"
    for ranks in [(4,), (4, 3), (0, 2)]:
        with pytest.raises(InvalidInput, match="operands"):
            expand(parse("... h, o h -> ... o"), ranks)
    with pytest.raises(InvalidInput, match="do not fit"):
        expand(parse("... h, ... -> ... h"), (3, 3))


def test_no_rule_fits() -> None:
    with pytest.raises(InvalidInput, match="a dim that must be 1 is not"):
        rule_for(("1 s -> s",), [((2,), ("s",))], [(("s",),)], {})


# --- refinement ---------------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([2, 3, 4, 5, 6, 8, "b", "s"]), max_size=5)
factors = st.lists(st.sampled_from([2, 3, 5, "b"]), max_size=6)


def total(values: list[Size]) -> tuple[int, list[str]]:
    numbers = prod(v for v in values if isinstance(v, int))
    return numbers, sorted(v for v in values if isinstance(v, str))


@st.composite
def coarsenings(draw: Any) -> tuple[list[Size], list[Size], list[Size]]:
    """Atoms, and two ways of multiplying neighbours together."""
    atoms: list[Size] = draw(factors)

    def coarse() -> list[Size]:
        out: list[Size] = []
        for atom in atoms:
            last = out[-1] if out else None
            if isinstance(atom, int) and isinstance(last, int) and draw(st.booleans()):
                out[-1] = last * atom
            else:
                out.append(atom)
        return out

    return atoms, coarse(), coarse()


@given(coarsenings())
def test_merge_finds_the_common_refinement(drawn: Any) -> None:
    """Two coarsenings of one list refine to something between them and the list."""
    atoms, a, b = drawn
    common = merge(a, b)
    assert common is not None
    assert common == merge(b, a)
    assert total(common) == total(a) == total(b)
    assert merge(common, a) == merge(common, b) == common  # finer than both
    assert merge(common, atoms) == atoms  # and no finer than needed
    assert len(common) <= len(atoms)


@given(sizes, sizes)
def test_merge_is_sound(a: list[Size], b: list[Size]) -> None:
    common = merge(a, b)
    assert merge(b, a) == common
    assert merge(a, a) == a
    if total(a) != total(b):
        assert common is None
    elif common is not None:
        assert total(common) == total(a)
        assert merge(common, a) == merge(common, b) == common


def test_merge_examples() -> None:
    assert merge([32, 128], [8, 512]) == [8, 4, 128]
    assert merge([2, 3], [3, 2]) is None
    assert merge(["b", 4], [4, "b"]) is None
    assert merge([], []) == []
    assert merge([], [2]) is None


def graph_of(values: Mapping[str, Dims], *ops: RawOp) -> Graph:
    described = {name: Value(name, dims) for name, dims in values.items()}
    made = {r for op in ops for r in op.results}
    raw = RawGraph(described, ops, tuple(v for v in values if v not in made), (), ops[-1].results)
    graph = refine({"g": raw})["g"]
    graph.check()
    return graph


def test_dims_take_factors_from_both_sides() -> None:
    """A projection's output is one loop to it, heads times head size to the reshape after it."""
    values: dict[str, Dims] = {
        "x": (("b",), (16,)),
        "w": ((24,), (16,)),
        "y": (("b",), (24,)),
        "z": (("b",), (2,), (3,), (4,)),
    }
    graph = graph_of(
        values,
        RawOp("op0", "linear", ("x", "w"), ("y",)),
        RawOp("op1", "reshape", ("y",), ("z",)),
    )
    assert graph.values["w"].dims == ((2, 3, 4), (16,))
    assert graph.values["y"].dims == (("b",), (2, 3, 4))
    assert str(graph.ops[0].rule) == "n0 h, (o_0 o_1 o_2) h -> n0 (o_0 o_1 o_2)"


def test_flattened_batch() -> None:
    """A model that flattens batch and sequence into one dim, and splits heads while it is flat."""
    values: dict[str, Dims] = {
        "x": (("b",), ("s",), (8,)),
        "f": (("b", "s"), (8,)),
        "w": ((8,), (8,)),
        "y": (("b", "s"), (8,)),
        "h": (("b", "s"), (2,), (4,)),
        "z": (("b",), ("s",), (2,), (4,)),
    }
    graph = graph_of(
        values,
        RawOp("op0", "reshape", ("x",), ("f",)),
        RawOp("op1", "linear", ("f", "w"), ("y",)),
        RawOp("op2", "reshape", ("y",), ("h",)),
        RawOp("op3", "reshape", ("h",), ("z",)),
    )
    assert graph.values["y"].dims == (("b", "s"), (2, 4))
    assert not any(op.rule.locked for op in graph.ops)
    types = data_parallel_types(graph)
    assert [str(t) for t in types.ops["op1"].results] == ["{dp: S(0)}"]


def test_factors_without_common_refinement_are_locked() -> None:
    """6 as 2·3 and as 3·2: the op in between cannot be split there, nor where it mixes it with
    another dim; the rest of it can."""
    graph = graph_of(
        {"x": ((8,), (3,), (5,)), "y": ((4,), (6,), (5,)), "z": ((4,), (3,), (2,), (5,))},
        RawOp("op0", "reshape", ("x",), ("y",)),
        RawOp("op1", "reshape", ("y",), ("z",)),
    )
    for op in graph.ops:
        for signature in signatures(op, graph.values):
            split = [k for k in (*signature.operands, *signature.results) if k.is_split]
            assert not split or len(split) == len(op.operands) + len(op.results)
    free = [set(op.rule.factors) - op.rule.locked for op in graph.ops]
    assert all(free)


@pytest.mark.parametrize(
    ("op", "values", "message"),
    [
        (
            RawOp("op0", "mamba", ("x",), ("y",), {}, "model.layers.0"),
            {"x": ((2,),), "y": ((2,),)},
            "op 'mamba' at model.layers.0 (op0): no rule; add a line to ir/optable.py",
        ),
        (
            RawOp("op0", "softmax", ("x", "x"), ("y",)),
            {"x": ((2,),), "y": ((2,),)},
            "op 'softmax' at the top level (op0): shapes",
        ),
        (
            RawOp("op0", "linear", ("x", "w"), ("y",)),
            {"x": ((4,), (6,)), "w": ((2,), (5,)), "y": ((4,), (2,))},
            "op 'linear' at the top level (op0): w has [5] in dim 1",
        ),
        (
            RawOp("op0", "linear", ("x", "w"), ("y",)),
            {"x": ((4,), (6,)), "w": ((2,), (6,)), "y": ((4,), (2,), (2,))},
            "a value of rank 3 does not fit",
        ),
        (
            RawOp("op0", "chunk", ("x",), ("y",), {"dim": 0, "count": 1}),
            {"x": ((7,),), "y": ((2,),)},
            "[7] does not divide by [2]",
        ),
    ],
)
def test_refine_errors_name_the_op(op: RawOp, values: dict[str, Dims], message: str) -> None:
    with pytest.raises(UnsupportedOp) as caught:
        graph_of(values, op)
    assert message in str(caught.value)


# --- signatures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


def texts(graph: Graph, op: str) -> set[str]:
    (found,) = (o for o in graph.ops if o.name == op)
    return {str(s) for s in signatures(found, graph.values)}


def test_signatures_of_a_llama_layer(model: Model) -> None:
    """What tensor parallelism needs is there: column, row, heads, groups of heads, vocabulary."""
    layer, head = model.blocks["Layer"], model.blocks["Head"]
    unsplit = {"I, I -> I", "R, R -> R"}
    partial = {"P, R -> P", "R, P -> P"}
    assert texts(layer, "linear.o") == unsplit | partial | {
        "S(0), R -> S(0)",  # batch
        "S(1), R -> S(1)",  # sequence
        "R, S(0) -> S(2)",  # column
        "S(2), S(1) -> P",  # row, by key head
        "S(2.1), S(1.1) -> P",  # row, by query head of a group
        "S(2.2), S(1.2) -> P",  # row, within heads
    }
    assert texts(layer, "attention") == {"I, I, I -> I", "R, R, R -> R"} | {
        "S(0), S(0), S(0) -> S(0)",
        "S(1), S(1), S(1) -> S(1)",
        "S(1.1), R, R -> S(1.1)",
    }
    assert texts(layer, "rms_norm") == unsplit | {"S(0), R -> S(0)", "S(1), R -> S(1)"}
    along_all = {f"S({d}), S({d}) -> S({d})" for d in range(3)}
    assert texts(layer, "add") == unsplit | {"P, P -> P"} | along_all
    assert texts(head, "cross_entropy") == {"I, R -> I, R", "R, R -> R, R"} | {
        "S(0), S(0) -> P, P",
        "S(1), S(1) -> P, P",
        "S(2), R -> I, R",
    }
    assert texts(model.blocks["Embed"], "embedding") == {"I, R -> I", "R, R -> R", "P, R -> P"} | {
        "S(0), R -> P",
        "S(1), R -> S(2)",
        "R, S(0) -> S(0)",
        "R, S(1) -> S(1)",
    }


# --- the data axis ------------------------------------------------------------------------------


def test_data_parallel_types(model: Model) -> None:
    head = data_parallel_types(model.blocks["Head"])
    assert [str(t) for t in head.inputs] == ["{dp: S(0)}", "{dp: S(0)}"]
    assert [str(t) for t in head.parameters] == ["{dp: R}"]
    assert [str(t) for t in head.outputs] == ["{dp: P}", "{dp: P}"]
    layer = data_parallel_types(model.blocks["Layer"])
    assert [str(t) for t in layer.inputs] == ["{dp: S(0)}", "{dp: R}", "{dp: R}"]
    assert {str(t) for t in layer.parameters} == {"{dp: R}"}
    assert {str(t) for op in layer.ops.values() for t in op.results} == {"{dp: S(0)}"}
    preamble = data_parallel_types(model.preamble)
    assert [str(t) for t in preamble.outputs] == ["{dp: S(0)}", "{dp: R}", "{dp: R}"]


@pytest.mark.parametrize("block", ["Embed", "Layer", "Head", ""])
def test_data_parallel_types_are_signatures(model: Model, block: str) -> None:
    graph = model.blocks[block] if block else model.preamble
    types = data_parallel_types(graph)
    for op in graph.ops:
        chosen = types.ops[op.name]
        sides = tuple(t["dp"] for t in chosen.operands), tuple(t["dp"] for t in chosen.results)
        assert sides in {(s.operands, s.results) for s in signatures(op, graph.values)}


@pytest.mark.parametrize("kind", ["softmax", "sum_loss"])
def test_mixing_the_batch_is_named(kind: str) -> None:
    batch: Dims = (("b",),)
    results: dict[str, Dims] = {"y": batch} if kind == "softmax" else {"y": (), "n": ()}
    graph = graph_of({"x": batch} | results, RawOp("op7", kind, ("x",), tuple(results)))
    with pytest.raises(InvalidInput, match=rf"op '{kind}' at the top level \(op7\) mixes the seq"):
        data_parallel_types(graph)


# --- graph and model ----------------------------------------------------------------------------


def test_bind() -> None:
    assert bind(3, {}) == 3
    assert bind("b", {"b": 2}) == 2
    with pytest.raises(InvalidInput, match=r"size 's' is not bound: known are \['b'\]"):
        bind("s", {"b": 2})
    assert Value("x", (("b", 2), ())).shape({"b": 3}) == (6, 1)


def test_model_queries(model: Model) -> None:
    assert list(model.runs()) == [("Embed", 0, 1), ("Layer", 1, 3), ("Head", 4, 1)]
    assert model.uses()["model.embed.weight"] == [0, 4]
    assert model.elements == 24 * 16 + 3 * (16 + 2 * 32 * 16 + 2 * 16 * 16)
    assert model.with_source({"preset": "x"}).source == {"preset": "x"}
    layer = model.blocks["Layer"]
    assert layer.producer()["out"][0].name == "add"
    assert [op.name for op, _ in layer.consumers()["normed"]] == [
        "linear.q",
        "linear.k",
        "linear.v",
    ]
