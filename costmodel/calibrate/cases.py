"""The grid of kernels to measure: kinds, dtypes and shapes, smallest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..efficiency import ComputeDtype, Direction, KernelClass

ELEMENT_BYTES: dict[ComputeDtype, int] = {
    "float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float8": 1,
}  # fmt: skip
PRODUCTS_ONLY: frozenset[ComputeDtype] = frozenset({"tf32", "float8"})
"""Arithmetic of matrix units; nothing else is kept in it."""
_HEAD_DIM = 64
_LEVELS = range(14)
"""Sizes of a kind, each 4 or 8 times the work of the one before; time and memory end the climb."""
_BACKWARD_PER_FORWARD_ATTENTION = 2.5
"""FLOPs, FlashAttention-2 (arXiv:2307.08691, section 4.1); as in data/work.yaml."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel of one shape.

    `dims` is (m, k, n) of a product, (maps, positions, head dim) of causal attention, (rows,
    hidden) of a normalisation, (elements,) of pointwise ops and of copies. Cases of the same kind,
    dtype and `level` have about the same work.
    """

    kind: KernelClass
    dtype: ComputeDtype
    level: int
    dims: tuple[int, ...]

    def work(self, direction: Direction) -> float:
        """FLOPs of a product or attention, bytes that the other kinds read and write, of one
        kernel as the cost model counts it (`costmodel.kernels`).

        Backward: one of the two products; attention's recomputation included; gradients of results
        and what was saved are read, gradients of operands written.
        """
        backward = direction == "backward"
        element = ELEMENT_BYTES[self.dtype]
        match self.kind:
            case "matmul":
                m, k, n = self.dims
                return 2.0 * m * k * n
            case "attention":
                maps, positions, head = self.dims
                forward = 2.0 * maps * positions**2 * head  # two products, half of the pairs
                return forward * (_BACKWARD_PER_FORWARD_ATTENTION if backward else 1.0)
            case "normalisation":
                rows, hidden = self.dims
                passes = 3 if backward else 2
                return element * (passes * rows * hidden + (2 if backward else 1) * hidden)
            case "pointwise":
                # The mean of x·y (3 forward, 5 backward), x+y (3, 3) and silu (2, 3).
                return element * (11 if backward else 8) / 3 * self.dims[0]
            case "copy":
                return 2.0 * element * self.dims[0]

    @property
    def memory_bytes(self) -> int:
        """Operands, results and their gradients."""
        element = ELEMENT_BYTES[self.dtype]
        match self.kind:
            case "matmul":
                m, k, n = self.dims
                return 2 * element * (m * k + k * n + m * n)
            case "attention":
                maps, positions, head = self.dims
                return 10 * element * maps * positions * head
            case "normalisation" | "pointwise" | "copy":
                elements = self.dims[0] * (self.dims[1] if len(self.dims) > 1 else 1)
                return 6 * element * elements

    @property
    def directions(self) -> tuple[Direction, ...]:
        """A copy has no backward pass of its own."""
        return ("forward",) if self.kind == "copy" else ("forward", "backward")


def levels(
    kinds: tuple[KernelClass, ...], dtypes: tuple[ComputeDtype, ...], coarse: bool = False
) -> Iterator[list[list[Case]]]:
    """Level by level, the cases of each kind and dtype: when time runs out, all kinds have been
    measured up to about the same size. `coarse` takes every second level, and one shape of each."""
    for level in _LEVELS[:: 2 if coarse else 1]:
        turn = []
        for kind in kinds:
            for dtype in dtypes:
                if kind == "copy" and dtype != dtypes[0]:
                    continue  # bytes are bytes
                if dtype in PRODUCTS_ONLY and kind != "matmul":
                    continue
                shapes = _shapes(kind, level)[: 1 if coarse else None]
                turn.append([Case(kind, dtype, level, dims) for dims in shapes])
        yield turn


def _shapes(kind: KernelClass, level: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of equal work, as training has them: products square, into a wider and from a deeper
    dim; attention of many short and few long maps; rows of two lengths."""
    match kind:
        case "matmul":
            n = 16 * 2**level
            return ((n, n, n), (n // 2, n, 2 * n), (n, 4 * n, n // 4))
        case "attention":
            positions = 16 * 2**level
            return ((16, positions, _HEAD_DIM), (4, 2 * positions, _HEAD_DIM))
        case "normalisation":
            elements = 2 ** (10 + 2 * level)
            return tuple(
                (elements // hidden, hidden)
                for hidden in sorted({min(limit, elements // 4) for limit in (1024, 4096)})
            )
        case "pointwise" | "copy":
            return ((2 ** (10 + 2 * level),),)
