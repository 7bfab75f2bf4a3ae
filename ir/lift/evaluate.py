"""What lifting asks of a tracer: values of the gradient-free part of its graph, for small sizes.

Masks, positions and rotary tables are recognised by what they compute, not by how they are written:
that survives new versions of the libraries that write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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


def equal(a: Array, b: Array) -> bool:
    """Whether shapes and values are the same."""
    return bool(np.array_equal(a, b))
