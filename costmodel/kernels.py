"""What an op runs on the device: kernels, with their shapes, FLOPs and bytes.

FLOPs and bytes follow from the op's factor rule and its line in the op table; classes of work are
in `data/work.yaml`. Sizes are *local* factor sizes: what one rank has (`shards.local_sizes`). How
long a kernel takes on a device is the business of `compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..ir.graph import Graph, Op, Value
from ..ir.optable import TABLE, Work
from ..ir.rule import FactorName, RuleShape
from . import yaml_files
from .efficiency import ComputeDtype
from .precision import Precision
from .runtime import Runtime
from .saved import saves

KernelKind = Literal["matmul", "attention", "normalisation", "pointwise"]
"""Which of the device's efficiencies applies; all but the first two run on float32 units, as fast
as memory lets them."""

Sizes = Mapping[FactorName, int]


@dataclass(frozen=True, slots=True)
class Kernel:
    """`launches` equal kernels, their FLOPs and bytes together.

    `product` is (batch, m, n, k) of a matrix product (m x k)·(k x n), `rows` the elements in a row
    of its matrices as they lie in memory; `tiles` the blocks of work of an attention kernel,
    `slower` how much longer it takes than the device's attention, `portable` whether it was not
    written for the device.
    """

    kind: KernelKind
    flops: float
    bytes: float
    dtype: ComputeDtype
    launches: int = 1
    product: tuple[int, int, int, int] | None = None
    rows: tuple[int, ...] = ()
    tiles: int = 0
    slower: float = 1.0
    portable: bool = False
    backward: bool = False


class WorkClass(BaseModel):
    """How a class of the op table runs. Launches are counts of kernels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: KernelKind
    backward_flops_per_forward_flop: float = Field(ge=0)
    forward_launches: int = Field(ge=0)
    backward_launches: int = Field(ge=0)


@cache
def work_class(work: Work) -> WorkClass:
    """The entry of `data/work.yaml` for a class of the op table."""
    return yaml_files.validated(WorkClass, yaml_files.packaged("work")[work], f"work {work}")


@dataclass(frozen=True, slots=True)
class Fusion:
    """Pointwise chains of a graph that run as one kernel: values that never reach memory, and ops
    that are launched as part of the one before them."""

    inside: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()


def fusion(graph: Graph) -> Fusion:
    """Chains of pointwise ops linked by values with a single reader."""
    made, uses = graph.producer(), graph.consumers()
    inside, joined = set(), set()
    for op in graph.ops:
        if TABLE[op.kind].work != "pointwise":
            continue
        for name in op.operands:
            source = made.get(name)
            alone = len(uses[name]) == 1 and name not in graph.outputs
            if source and alone and TABLE[source[0].kind].work == "pointwise":
                inside.add(name)
                joined.add(op.name)
    return Fusion(frozenset(inside), frozenset(joined))


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the ops of a graph launch, in a precision and a runtime."""

    values: Mapping[str, Value]
    precision: Precision
    runtime: Runtime
    fusion: Fusion = Fusion()

    @staticmethod
    def of(graph: Graph, precision: Precision, runtime: Runtime) -> Kernels:
        fused = fusion(graph) if runtime.fused_pointwise else Fusion()
        return Kernels(graph.values, precision, runtime, fused)

    def forward(self, op: Op, sizes: Sizes) -> tuple[Kernel, ...]:
        """Kernels of one forward pass; none of a view."""
        work = TABLE[op.kind].work
        if work == "view":
            return ()
        dtype = self._dtype(op)
        if work == "contraction":
            return (self._product(op, sizes, dtype),)
        if work == "attention":
            return self._attention(op, sizes, dtype, backward=False)
        moved = sum(map(self._moved(sizes), op.results, op.rule.results))
        if work == "lookup":  # reads the rows it returns, not the whole table
            moved *= 2
        else:
            moved += sum(map(self._moved(sizes), op.operands, op.rule.operands))
        traits = work_class(work)
        launches = 0 if op.name in self.fusion.joined else traits.forward_launches
        return (Kernel(traits.kernel, op_flops(op, sizes), moved, dtype, launches),)

    def backward(self, op: Op, sizes: Sizes) -> tuple[Kernel, ...]:
        """Kernels of the backward pass; none where no operand has a gradient.

        A contraction does one product per operand with a gradient, attention 2.5 times the forward
        pass. Bytes: gradients of the results (once per product) and what was saved are read,
        gradients of the operands written.
        """
        work = TABLE[op.kind].work
        wanted = [k for k, name in enumerate(op.operands) if self.values[name].grad]
        if work == "view" or not wanted or not any(self.values[r].grad for r in op.results):
            return ()
        dtype = self._dtype(op)
        if work == "contraction":
            return tuple(self._product(op, sizes, dtype, wanted=k) for k in wanted)
        if work == "attention":
            return self._attention(op, sizes, dtype, backward=True)
        moved_of, size_of = self._moved(sizes), self._size(sizes)
        kept = saves(op, self.values)
        moved = sum(map(moved_of, op.results, op.rule.results))
        moved += sum(moved_of(op.operands[k], op.rule.operands[k]) for k in wanted)
        moved += sum(size_of(op.operands[k], op.rule.operands[k]) for k in kept.operands)
        moved += sum(size_of(op.results[k], op.rule.results[k]) for k in kept.results)
        traits = work_class(work)
        launches = 0 if op.name in self.fusion.joined else traits.backward_launches
        flops = traits.backward_flops_per_forward_flop * op_flops(op, sizes)
        return (Kernel(traits.kernel, flops, moved, dtype, launches, backward=True),)

    # --- parts -----------------------------------------------------------------------------------

    def _size(self, sizes: Sizes) -> Callable[[str, RuleShape], int]:
        def size_of(name: str, shape: RuleShape) -> int:
            elements = prod(sizes[f] for dim in shape for f in dim)
            return elements * self.precision.element_bytes(self.values[name].dtype)

        return size_of

    def _moved(self, sizes: Sizes) -> Callable[[str, RuleShape], int]:
        """Bytes of a value, none for one inside a fused chain."""
        size_of = self._size(sizes)
        inside = self.fusion.inside
        return lambda name, shape: 0 if name in inside else size_of(name, shape)

    def _dtype(self, op: Op) -> ComputeDtype:
        """The arithmetic's dtype: the recipe's, but float32 at least where an operand is wide."""
        recipe = self.precision
        if recipe.compute_bytes < 4:
            if any(self.values[name].dtype in ("wide", "float32") for name in op.operands):
                return "float32"
            linear = TABLE[op.kind].work == "contraction" and any(
                self.values[name].role == "parameter" for name in op.operands
            )
            if linear and recipe.linear_dtype is not None:
                return recipe.linear_dtype
        return recipe.compute_dtype

    def _product(
        self, op: Op, sizes: Sizes, dtype: ComputeDtype, wanted: int | None = None
    ) -> Kernel:
        """The product itself, or the one that makes the gradient of operand `wanted`.

        The gradient of A in C = A·B is C·Bᵀ: the loops are the same, another one is contracted.
        """
        sides = [{f for dim in shape for f in dim} for shape in op.rule.operands]
        result = {f for dim in op.rule.results[0] for f in dim}
        if wanted is None:
            a, b, made = sides[0], sides[1], result
        else:
            a, b, made = result, sides[1 - wanted], sides[wanted]

        def extent(factors: set[FactorName]) -> int:
            return prod(sizes[f] for f in factors)

        batch = extent(a & b & made)
        m, n, k = extent((a & made) - b), extent((b & made) - a), extent((a & b) - made)
        size_of = self._size(sizes)
        moved = size_of(op.operands[0], op.rule.operands[0])
        moved += size_of(op.operands[1], op.rule.operands[1])
        moved += size_of(op.results[0], op.rule.results[0])
        flops = op_flops(op, sizes)
        shapes = (*op.rule.operands[:2], op.rule.results[0])
        rows = tuple(prod(sizes[f] for f in shape[-1]) for shape in shapes)
        return Kernel(
            "matmul", flops, moved, dtype, 1, (batch, m, n, k), rows, backward=wanted is not None
        )

    def _attention(
        self, op: Op, sizes: Sizes, dtype: ComputeDtype, backward: bool
    ) -> tuple[Kernel, ...]:
        size_of = self._size(sizes)
        moved = sum(size_of(op.operands[k], op.rule.operands[k]) for k in range(3))
        moved += size_of(op.results[0], op.rule.results[0])
        loops = _AttentionLoops.of(op, sizes)
        if self.runtime.attention == "unfused":
            kernels = _unfused(loops, moved, dtype, self.precision, op, backward)
            return kernels
        traits = work_class("attention")
        ratio = traits.backward_flops_per_forward_flop if backward else 1.0
        kernel = self.runtime.attention
        slower = _FIRST_FLASH if kernel == "flash1" else 1.0
        launches = traits.backward_launches if backward else traits.forward_launches
        tiles = loops.maps * -(-loops.queries // _ATTENTION_ROWS)
        return (
            Kernel(
                "attention",
                ratio * op_flops(op, sizes),
                (2 if backward else 1) * moved,
                dtype,
                launches,
                tiles=tiles,
                slower=slower,
                portable=kernel != "flash",
                backward=backward,
            ),
        )


_FIRST_FLASH = 2.0
"""How much longer FlashAttention's first version takes (arXiv:2307.08691, section 4.1)."""

_ATTENTION_ROWS = 128
"""Queries of one block of a flash attention kernel (arXiv:2307.08691, section 3.3)."""


@dataclass(frozen=True, slots=True)
class _AttentionLoops:
    """Maps (sequence x head), their queries and keys, and the dims of q·k and of values."""

    maps: int
    queries: int
    keys: int
    inner: int
    outer: int

    @staticmethod
    def of(op: Op, sizes: Sizes) -> _AttentionLoops:
        query, key, value = op.rule.operands[:3]

        def size(shape: RuleShape, dim: int) -> int:
            return prod(sizes[f] for f in shape[dim])

        maps = size(query, 0) * size(query, 1)
        return _AttentionLoops(maps, size(query, 2), size(key, 2), size(query, 3), size(value, 3))


def _unfused(
    loops: _AttentionLoops,
    moved: float,
    dtype: ComputeDtype,
    precision: Precision,
    op: Op,
    backward: bool,
) -> tuple[Kernel, ...]:
    """Scores, softmax (with scale and mask in one kernel), dropout, and the weighted sum.

    All pairs of queries and keys are computed, masked or not. Heads are copied next to each other
    before and back after: q, k, v and the result are read and written once more.
    """
    element = precision.compute_bytes
    pairs = loops.maps * loops.queries * loops.keys
    scores = pairs * element

    def product(m: int, n: int, k: int) -> Kernel:
        bytes_moved = loops.maps * (m * k + k * n + m * n) * element
        flops = 2.0 * loops.maps * m * n * k
        product, rows = (loops.maps, m, n, k), (d, e, t)
        return Kernel("matmul", flops, bytes_moved, dtype, 1, product, rows, backward=backward)

    q, t, d, e = loops.queries, loops.keys, loops.inner, loops.outer
    dropped = bool(op.attributes.get("dropout"))
    copies = Kernel("pointwise", 0.0, 2 * moved, dtype, 4, backward=backward)
    if not backward:
        softmax = Kernel("normalisation", 8.0 * pairs, 2 * scores, dtype)
        kernels = [product(q, t, d), softmax, product(q, e, t), copies]
    else:
        softmax = Kernel("normalisation", 8.0 * pairs, 3 * scores, dtype, backward=True)
        kernels = [product(q, t, e), product(t, e, q), product(q, d, t), product(t, d, q)]
        kernels += [softmax, copies]
    if dropped:  # reads and writes the probabilities, and a mask of a byte each
        kernels.append(
            Kernel("pointwise", 2.0 * pairs, 2 * scores + pairs, dtype, 1, backward=backward)
        )
    return tuple(kernels)


def op_flops(op: Op, sizes: Sizes) -> float:
    """Forward FLOPs of an op over its local loops (a multiply-add counts 2)."""
    line = TABLE[op.kind]
    if line.work == "attention":
        return line.flops * _attention_products(op, sizes)
    return line.flops * prod(sizes[f] for f in op.rule.factors)


def _attention_products(op: Op, sizes: Sizes) -> float:
    """Multiply-adds of `q·kᵀ` and `p·v`: heads x (query, key) pairs that attend x (d + e).

    Causal attention has half of the pairs; a window of w keys w of t, less its ramp.
    """
    loops = _AttentionLoops.of(op, sizes)
    causal, window = op.attributes.get("causal", False), op.attributes.get("window")
    seen = loops.keys if window is None else min(window, loops.keys)
    share = seen * (1 - seen / (2 * loops.keys)) if causal else seen
    return loops.maps * loops.queries * share * (loops.inner + loops.outer)
