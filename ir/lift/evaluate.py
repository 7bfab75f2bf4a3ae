"""What lifting asks of a tracer: values of the gradient-free part of its graph, for small sizes.

Masks, positions and rotary tables are recognised by what they compute, not by how they are written:
that survives new versions of the libraries that write them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

Node = TypeVar("Node")


class NoValue(Exception):
    """The node depends on a parameter, or on a buffer whose values are unknown."""


class Evaluation(Protocol):
    """Values for one setting: numbers for `b` and `s`, arrays for the inputs (by name).

    Everything floating is computed in float64.
    """

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The inputs' values."""

    def __call__(self, source: Any) -> Array:
        """The value of a wire's `source`. Raises NoValue where it has none without parameters."""


class Settings(Protocol):
    """A maker of evaluations. Inputs that are not given are drawn: small non-negative integers,
    ones for masks. `substitute` replaces integer constants of arithmetic: a sliding window of 4096
    shows its form at 4. `known` are values of sources that are not computed: what experts a router
    has chosen."""

    def __call__(
        self,
        b: int = 2,
        s: int = 7,
        seed: int = 0,
        substitute: Mapping[int, int] | None = None,
        known: Mapping[Any, Array] | None = None,
        **inputs: Array,
    ) -> Evaluation: ...

    def constants(self, source: Any) -> set[int]:
        """Integers > 1 that take part in the arithmetic which a source depends on."""


def missing_first(
    source: Node, operands: Callable[[Node], Iterable[Node]], values: Container[Node]
) -> Iterator[Node]:
    """A node and what it depends on, as far as `values` lacks them, each after its operands.

    Who asks for the next one has put the last one's value into `values`. Depth costs no recursion.
    """
    waiting = [source]
    while waiting:
        at = waiting[-1]
        missing = [] if at in values else [each for each in operands(at) if each not in values]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        if at not in values:
            yield at


def equal(a: Array, b: Array) -> bool:
    """Whether shapes and values are the same."""
    return bool(np.array_equal(a, b))
