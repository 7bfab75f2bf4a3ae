"""First values of parameters: the same for every layout."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jax import Array
from layout import Stored
from mesh import wide_dtype
from parallel import arrays, parameter_specs, sharding


def initialise(seed: int) -> dict[str, Array]:
    """The parameters of the program, on the mesh; what a parameter starts with depends on the seed
    and on its name."""
    lies = {key: sharding(spec) for key, spec in parameter_specs().items()}
    return jax.jit(_all, out_shardings=lies)(jax.random.key(seed))


def _all(key: Array) -> dict[str, Array]:
    return {name: _first(key, array) for name, array in arrays().items()}


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
