"""Evaluates the gradient-free part of a flat program for small sizes, as lifting asks.

Primitives are applied one by one with their symbolic sizes replaced by numbers; floats are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ..errors import UnsupportedOp
from ..lift.evaluate import Array, NoValue, missing_first
from .flatten import ITERATIONS, SLICE, Source, literal_of, walk_back

_ARITHMETIC = frozenset({"add", "sub", "lt", "le", "gt", "ge", "rem", "div", "broadcast_in_dim"})


@dataclass(slots=True)
class Evaluation:
    """Values of sources for one setting (`ir.lift.evaluate.Evaluation`)."""

    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    substitute: Mapping[int, int] = field(default_factory=dict)
    values: dict[Source, Any] = field(default_factory=dict)

    def __call__(self, source: Source) -> Array:
        """The value of a source. Raises NoValue where it has none without parameters."""
        with jax.enable_x64(True):
            for at in missing_first(source, _operands, self.values):
                self._compute(at)
            return np.asarray(self.values[source])

    def _compute(self, source: Source) -> None:
        node = source.node
        if node is None:
            self.values[source] = self._leaf(source)
            return
        operands = [self.values[each] for each in node.operands]
        if node.name in _ARITHMETIC and self.substitute:
            operands = [
                self._replaced(value) if each.role == "literal" else value
                for each, value in zip(node.operands, operands, strict=True)
            ]
        if node.name == SLICE:
            results = [operands[0][node.params["index"]]]
        elif node.name == ITERATIONS:
            results = [np.stack([np.asarray(each) for each in operands])]
        elif node.name == "dim_as_value":
            results = [np.asarray(self._sized(node.params["dim"]), np.int64)]
        else:
            params = {name: self._sized(value) for name, value in node.params.items()}
            try:
                made = node.primitive.bind(*_agreeing(node.name, operands), **params)
            except Exception as error:
                raise UnsupportedOp(
                    f"op {node.name}: it cannot be evaluated ({str(error).splitlines()[0][:120]})"
                ) from error
            results = made if node.primitive.multiple_results else [made]
        for each, value in zip(node.results, results, strict=True):
            self.values[each] = value

    def _replaced(self, value: Any) -> Any:
        number = np.asarray(value)
        if number.dtype.kind == "i" and int(number) in self.substitute:
            return number.dtype.type(self.substitute[int(number)])
        return value

    def _leaf(self, source: Source) -> Any:
        if source.role == "parameter" or source.role == "activation":
            raise NoValue(source.name)
        if source.role == "input" and source.name not in self.inputs:
            raise NoValue(source.name)
        if source.role == "input":
            return self.inputs[source.name]
        if isinstance(source.value, jax.ShapeDtypeStruct):
            raise NoValue("a constant without values")
        return _wide(source.value) if source.role == "constant" else _wide_literal(source)

    def _sized(self, value: Any) -> Any:
        """A parameter with numbers for symbols and float64 for narrower floats."""
        if hasattr(value, "_evaluate"):
            return int(value._evaluate(self.sizes))
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self._sized(each) for each in value)
        if isinstance(value, np.dtype) and _narrow(value):
            return np.dtype(np.float64)
        return value


def _operands(source: Source) -> tuple[Source, ...]:
    return tuple(source.node.operands) if source.node else ()


def _narrow(dtype: Any) -> bool:
    return str(dtype) in ("float32", "float16", "bfloat16")


def _wide(value: Any) -> Any:
    return np.asarray(value, np.float64) if _narrow(value.dtype) else value


def _wide_literal(source: Source) -> Any:
    if _narrow(source.dtype):
        return np.float64(float(str(source.value)))
    return np.asarray(source.value, source.dtype)


def _agreeing(name: str, operands: list[Any]) -> list[Any]:
    """Operands as arrays; those that must agree in dtype do (an index may have been widened)."""
    return [jax.numpy.asarray(each) for each in operands] if name != "pjit" else operands


def _like(value: Array, dtype: Any) -> Array:
    """A given value in its source's dtype; floats stay float64."""
    return value.astype(dtype) if np.issubdtype(dtype, np.integer) else value


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Makes evaluations of a flat program (`ir.lift.evaluate.Settings`)."""

    inputs: tuple[Source, ...]

    def __call__(
        self,
        b: int = 2,
        s: int = 7,
        seed: int = 0,
        substitute: Mapping[int, int] | None = None,
        known: Mapping[Any, Array] | None = None,
        **inputs: Array,
    ) -> Evaluation:
        """An evaluation; inputs that are not given are drawn."""
        generator = np.random.default_rng(seed)
        found = Evaluation({"b": b, "s": s}, {}, dict(substitute or {}), {})
        found.values.update((at, _like(value, at.dtype)) for at, value in (known or {}).items())
        drawn: dict[str, Array] = {}
        for source in self.inputs:
            if jax.numpy.issubdtype(source.dtype, jax.dtypes.prng_key):
                continue  # numbers that are drawn have no values here
            shape = found._sized(source.shape)
            kind = np.dtype(source.dtype).kind if not _narrow(source.dtype) else "f"
            if kind == "b" or "mask" in source.name:
                value = np.ones(shape, source.dtype)
            elif kind in "iu":
                value = generator.integers(1, 5, shape).astype(source.dtype)
            else:
                value = generator.random(shape)
            drawn[source.name] = np.asarray(inputs.get(source.name, value))
        found.inputs = drawn
        return found

    def constants(self, source: Source) -> set[int]:
        """Integers > 1 that take part in the arithmetic which a source depends on."""
        found: set[int] = set()
        for at in walk_back([source], lambda _: False):
            if at.node is not None and at.node.name in _ARITHMETIC:
                for each in at.node.operands:
                    if each.role == "literal" and np.asarray(each.value).dtype.kind == "i":
                        found.add(abs(int(each.value)))
        return {number for number in found if number > 1}


def fixed_value(source: Source) -> Array | None:
    """What a source is whatever the sizes and inputs, or None."""
    for each in walk_back([source], lambda _: False):
        if each.role in ("parameter", "input") or any(not isinstance(n, int) for n in each.shape):
            return None
        if each.node is not None and each.node.name == "dim_as_value":
            return None
    try:
        return Evaluation({}, {})(source)
    except NoValue:
        return None


def number_of(source: Source) -> Any:
    """The Python number that a source is everywhere, or None."""
    if (number := literal_of(source)) is not None or source.shape != () or source.node is None:
        return number
    value = fixed_value(source)
    return None if value is None else value.item()
