"""First values of parameters: the same for every layout."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import model
from jax import Array
from layout import Stored
from mesh import wide_dtype
from parallel import arrays, made_here, shapes


def initialise(seed: int) -> Any:
    """The parameters of the program, on the mesh, as `shapes` says; what a parameter starts with
    depends on the seed and on its name."""
    whole = shapes()
    return [_on_part(part, seed) for part in whole] if model.STAGES else _on_part(whole, seed)


def _on_part(like: dict[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, Array]:
    """The parameters of the program, or of one of its stages."""

    def first(key: Array) -> dict[str, Array]:
        return {name: _first(key, arrays()[name]) for name in like}

    return made_here(first, like, jax.random.key(seed))


def _first(key: Array, array: Stored) -> Array:
    kind, value = array.parameter.init
    if kind == "constant":
        return jnp.full(array.shape, value, wide_dtype())
    numbers = jnp.asarray([zlib.crc32(name.encode()) for name in array.names], jnp.uint32)
    shape = array.shape[array.stacked :]

    def draw(number: Array) -> Array:
        own = jax.random.fold_in(key, number)
        if kind == "uniform":
            return jax.random.uniform(own, shape, wide_dtype(), -value, value)
        return value * jax.random.normal(own, shape, wide_dtype())

    return jax.vmap(draw)(numbers) if array.stacked else draw(numbers[0])
