"""Random instances of every op of the table, made from the op's own line.

An index rule gives the shapes directly; a builder has a generator here. A new op with an index
rule or a known builder needs no line; only attributes that must be there, operands that are no
real numbers of either sign, and a number of operands other than one are said in the tables below.
Ops go through `ir.refine`, as a traced model's do, so that rules and builders are tested with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from simulated import Sizes, int_sizes, shape_of
from torch import Tensor

from shardwright.ir import Op, Value
from shardwright.ir.optable import TABLE
from shardwright.ir.refine import RawGraph, RawOp, refine
from shardwright.ir.rule import expand, parse

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op with its operands' whole tensors."""

    op: Op
    values: dict[str, Value]
    operands: tuple[Tensor, ...]

    def dims(self, name: str) -> Sizes:
        return int_sizes(self.values[name].dims, {})

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(self.dims(name)) for name in self.op.results]

    def __repr__(self) -> str:
        return f"{self.op.kind}[{self.op.rule}] {dict(self.op.sizes)} {dict(self.op.attributes)}"


@dataclass(frozen=True)
class Draw:
    """Draws for one case; `unit` is what every factor that may be split must be a multiple of."""

    draw: Any
    unit: int

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def size(self, free: bool = True) -> tuple[int, ...]:
        """The factors of one loop: none (a size of 1), one, or two."""
        u = self.unit
        options: list[tuple[int, ...]] = [(u,), (u,), (u,), (u,), (2 * u,), (u, 2), (2, u), ()]
        if not free:
            options = [(), (2,), (3,), (2, 2)]
        size: tuple[int, ...] = self.draw(st.sampled_from(options))
        return size

    def dims(self, low: int = 0, high: int = 3) -> Sizes:
        return tuple(self.size() for _ in range(self.draw(st.integers(low, high))))

    def coarse(self, dims: Sizes) -> Sizes:
        """The same dims, perhaps as a tracer sees them: one factor each."""
        if self.pick(True, False):
            return dims
        return tuple((prod(dim),) if prod(dim) > 1 else () for dim in dims)


Shapes = tuple[list[Sizes], list[Sizes], Attributes]
"""Sizes of operands and results, and the attributes they imply."""


def from_index_rule(d: Draw, kind: str) -> Shapes:
    text = d.pick(*TABLE[kind].rules)
    rule = parse(text)
    lead = d.pick(0, 1, 1, 2)
    ranks = [len(s) - 1 + lead if ("...",) in s else len(s) for s in rule.operands]
    rule = expand(rule, tuple(ranks))
    sizes = {f: d.size(free=f not in rule.locked) for f in rule.factors}
    for factor in NOT_ONE.get(kind, ()):  # an even, or at least non-trivial, loop
        sizes[factor] = d.pick((2,), (4,), (2, 2))
    if any(f in dict(TABLE[kind].special) for f in rule.factors):
        sizes |= {f: d.size() for f in dict(TABLE[kind].special)}

    def bound(shapes: Sequence[Any]) -> list[Sizes]:
        return [tuple(tuple(s for f in dim for s in sizes[f]) for dim in shape) for shape in shapes]

    return bound(rule.operands), bound(rule.results), {}


def broadcast(d: Draw, kind: str) -> Shapes:
    result = d.dims()
    operands = [result]
    for _ in range(ARITY.get(kind, 1) - 1):
        other = tuple(d.pick(dim, dim, ()) for dim in result)
        operands.append(other[d.draw(st.integers(0, len(other))) :])
    if len(operands) > 1 and d.pick(True, False):
        operands.reverse()
    return operands, [result], {}


def reshape(d: Draw, kind: str) -> Shapes:
    if d.pick(True, True, True, False):
        atoms = [s for dim in d.dims(1, 4) for s in dim]
        return [d.coarse(_grouped(d, atoms))], [d.coarse(_grouped(d, atoms))], {}
    u = d.unit  # mixes the dims: no common factors
    return [((2 * u,), (3 * u,))], [((3 * u,), (2 * u,))], {}


def _grouped(d: Draw, atoms: Sequence[int]) -> Sizes:
    dims: list[tuple[int, ...]] = [()] if d.pick(False, False, True) else []
    for atom in atoms:
        if dims and dims[-1] and d.pick(True, False):
            dims[-1] = (*dims[-1], atom)
        else:
            dims.append((atom,))
    return tuple(dims)


def permute(d: Draw, kind: str) -> Shapes:
    dims = d.dims(1, 4)
    order = d.draw(st.permutations(range(len(dims))))
    return [dims], [tuple(dims[i] for i in order)], {"order": order}


def expanded(d: Draw, kind: str) -> Shapes:
    result = d.dims(1, 3)
    operand = tuple(d.pick(dim, ()) for dim in result)
    return [operand[d.pick(0, 0, 1) :]], [result], {}


def reduction(d: Draw, kind: str) -> Shapes:
    dims = d.dims(1, 3)
    gone = d.draw(st.sets(st.integers(0, len(dims) - 1), min_size=1))
    keepdim = d.pick(True, False)
    kept = [() if i in gone else dim for i, dim in enumerate(dims) if i not in gone or keepdim]
    named = [i - len(dims) if d.pick(True, False) else i for i in sorted(gone)]
    return [dims], [tuple(kept)], {"dims": named, "keepdim": keepdim}


def reduce_all(d: Draw, kind: str) -> Shapes:
    return [d.dims()], [(), ()], {}


def matmul(d: Draw, kind: str) -> Shapes:
    lead = d.dims(0, 2)
    m, k, n = d.size(), d.size(), d.size()
    left = lead if d.pick(True, False) else tuple(d.pick(dim, ()) for dim in lead)
    right = tuple(
        dim if not a and dim else d.pick(dim, ()) for a, dim in zip(left, lead, strict=True)
    )
    while right and not right[0] and d.pick(True, False):
        right = right[1:]
    return [(*left, m, k), (*right, k, n)], [(*lead, m, n)], {}


def chunk(d: Draw, kind: str) -> Shapes:
    dims = list(d.dims(1, 3))
    dim, count = d.draw(st.integers(0, len(dims) - 1)), d.pick(2, 3)
    piece = tuple(dims)
    dims[dim] = (count, *dims[dim])
    operand = tuple(dims)
    if d.pick(True, False):
        operand = (*dims[:dim], (prod(dims[dim]),), *dims[dim + 1 :])
    named = dim - len(dims) if d.pick(True, False) else dim
    return [operand], [piece] * count, {"dim": named, "count": count}


def sliced(d: Draw, kind: str) -> Shapes:
    dims = list(d.dims(1, 3))
    dim = d.draw(st.integers(0, len(dims) - 1))
    dims[dim] = (5,)
    result = list(dims)
    start, stop = d.pick((0, 2), (1, 4), (2, -1), (3, None), (1, 2))
    length = (5 if stop in (-1, None) else stop) - start
    result[dim] = (length,) if length > 1 else ()
    return [tuple(dims)], [tuple(result)], {"dim": dim, "start": start, "stop": stop}


def concat(d: Draw, kind: str) -> Shapes:
    base = list(d.dims(1, 3))
    dim = d.draw(st.integers(0, len(base) - 1))
    pieces = [d.pick((2,), (3,), ()) for _ in range(d.pick(1, 2, 3))]
    operands = [tuple(p if i == dim else b for i, b in enumerate(base)) for p in pieces]
    total = sum(prod(p) for p in pieces)
    base[dim] = (total,) if total > 1 else ()
    return operands, [tuple(base)], {"dim": dim}


def fixed(d: Draw, kind: str) -> Shapes:
    dims = d.dims(1, 2)
    value = torch.randn(shape_of(dims)).tolist()
    return [], [dims], {"value": value} if kind == "constant" else {}


BUILDERS: dict[str, Callable[[Draw, str], Shapes]] = {
    "@broadcast": broadcast,
    "@reshape": reshape,
    "@permute": permute,
    "@expand": expanded,
    "@reduce": reduction,
    "@reduce_locked": reduction,
    "@reduce_all": reduce_all,
    "@reduce_all_locked": reduce_all,
    "@matmul": matmul,
    "@chunk": chunk,
    "@slice": sliced,
    "@concat": concat,
    "@fixed": fixed,
}

ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2}
"""Pointwise ops that take more than one operand."""

NOT_ONE = {"rotary": ("d",), "rotary_table": ("d",)}
"""Factors that must be even."""

NO_GRADIENT_RESULTS = {("cross_entropy", 1), ("sum_loss", 1), ("mean_loss", 1), ("top_k", 1)}
"""Counts and choices."""


def _none(d: Draw, operands: list[Sizes], results: list[Sizes]) -> Attributes:
    return {}


ATTRIBUTES: dict[str, Callable[[Draw, list[Sizes], list[Sizes]], Attributes]] = {
    "attention": lambda d, x, r: {
        "causal": d.pick(True, False),
        "window": d.pick(None, None, 2),
        "scale": d.pick(None, 0.5),
        "softcap": d.pick(None, 3.0),
        "dropout": 0.0,
    },
    "rotary": lambda d, x, r: {"style": d.pick("half", "interleaved")},
    "rotary_table": lambda d, x, r: {
        "inv_freq": [0.5**i for i in range(shape_of(r[0])[-1] // 2)],
        "scaling": d.pick(1.0, 0.7),
    },
    "rms_norm": lambda d, x, r: {"eps": 1e-5, "offset": d.pick(0.0, 1.0)},
    "layer_norm": lambda d, x, r: {"eps": 1e-5},
    "embedding": lambda d, x, r: {"padding_idx": d.pick(None, 0)},
    "cross_entropy": lambda d, x, r: {"ignore_index": -100},
    "shift_labels": lambda d, x, r: {"ignore_index": -100},
    "scale": lambda d, x, r: {"factor": -1.5},
    "shift": lambda d, x, r: {"term": 0.7},
    "cast": lambda d, x, r: {"to": d.pick("model", "wide")},
    "gelu": lambda d, x, r: {"approximate": d.pick("none", "tanh")},
    "elu": lambda d, x, r: {"alpha": d.pick(0.5, 1.0)},
    "leaky_relu": lambda d, x, r: {"slope": d.pick(0.01, 0.2)},
    "power": lambda d, x, r: {"exponent": d.pick(2, 3, 0.5, -1.0)},
    "dropout": lambda d, x, r: {"p": 0.3},
    "top_k": lambda d, x, r: {"k": d.draw(st.integers(1, shape_of(x[0])[-1]))},
}

Data = Callable[[Draw, tuple[int, ...], tuple[int, ...]], Tensor]
"""(draw, shape, shape of operand 0) → a tensor."""


def _positive(d: Draw, shape: tuple[int, ...], _: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) + 0.5


def _positions(d: Draw, shape: tuple[int, ...], _: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 50, shape)


def _ids(d: Draw, shape: tuple[int, ...], table: tuple[int, ...]) -> Tensor:
    return torch.randint(0, table[0], shape)


def _labels(d: Draw, shape: tuple[int, ...], logits: tuple[int, ...]) -> Tensor:
    labels = torch.randint(0, logits[-1], shape)
    return torch.where(torch.rand(shape) < 0.25, -100, labels)


def _mask(d: Draw, shape: tuple[int, ...], _: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) < 0.7


DATA: dict[tuple[str, int], Data] = {
    ("attention", 3): _mask,
    ("embedding", 1): _ids,
    ("cross_entropy", 1): _labels,
    ("moe_dispatch", 1): _mask,
    ("moe_combine", 2): _mask,
    ("rotary_table", 0): _positions,
    ("shift_labels", 0): _positions,
    ("div", 1): _positive,
    ("log", 0): _positive,
    ("log1p", 0): _positive,
    ("sqrt", 0): _positive,
    ("rsqrt", 0): _positive,
    ("power", 0): _positive,
}
"""Operands that are not drawn from a normal distribution; integers and masks have no gradient."""


@st.composite
def cases(draw: Any, kind: str, unit: int) -> Case:
    """An instance of an op whose splittable factors are multiples of `unit` (or 1)."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    d = Draw(draw, unit)
    rules = TABLE[kind].rules
    generator = BUILDERS[rules[0]] if rules[0].startswith("@") else from_index_rule
    operand_dims, result_dims, attributes = generator(d, kind)
    attributes |= ATTRIBUTES.get(kind, _none)(d, operand_dims, result_dims)

    shapes = [shape_of(dims) for dims in operand_dims]
    data = []
    for k, shape in enumerate(shapes):
        made = DATA.get((kind, k))
        data.append(made(d, shape, shapes[0]) if made else torch.randn(shape))
    data = [x.double() if x.is_floating_point() else x for x in data]
    with_grad = [x.is_floating_point() and d.pick(True, True, True, False) for x in data]

    names = [f"x{k}" for k in range(len(data))], [f"r{k}" for k in range(len(result_dims))]
    values = {
        name: Value(name, dims, grad=grad)
        for name, dims, grad in zip(names[0], operand_dims, with_grad, strict=True)
    } | {
        name: Value(name, dims, grad=any(with_grad) and (kind, k) not in NO_GRADIENT_RESULTS)
        for k, (name, dims) in enumerate(zip(names[1], result_dims, strict=True))
    }
    op = RawOp("op", kind, tuple(names[0]), tuple(names[1]), attributes)
    graph = refine({"g": RawGraph(values, (op,), op.operands, (), op.results)})["g"]
    graph.check()
    return Case(graph.ops[0], dict(graph.values), tuple(data))


@st.composite
def factorisations(draw: Any, total: int) -> tuple[int, ...]:
    """A shape of one to four dims (some perhaps 1) with `total` elements."""
    shape, rest = [], total
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        shape.append(size)
        rest //= size
    return (*shape, rest)
