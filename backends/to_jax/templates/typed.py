"""The conversions that are more than one collective of `jax.lax`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax


def take_part(x: Array, axis: str, dim: int) -> Array:
    """R → S: this device's part of a dim; the gradient is padded with zeros."""
    size = x.shape[dim] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(_varying(x, axis), lax.axis_index(axis) * size, size, dim)


def pad_part(x: Array, axis: str, dim: int) -> Array:
    """S → P: the part at its place, zeros elsewhere."""
    shape = list(x.shape)
    shape[dim] *= lax.axis_size(axis)
    zeros = jnp.zeros(shape, x.dtype)
    start = lax.axis_index(axis) * x.shape[dim]
    return lax.dynamic_update_slice_in_dim(like(zeros, x), x, start, dim)


def keep_first(x: Array, axis: str) -> Array:
    """R or I → P: the first device keeps it, the others have zeros."""
    first = lax.axis_index(axis) == 0
    return jnp.where(first, _varying(x, axis), jnp.zeros((), x.dtype))


def of_first(x: Array, axis: str) -> Array:
    """R → I: equal copies. JAX takes no one's word for it, so that the first one's is sent."""
    return lax.psum(keep_first(x, axis), axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def cut(x: Array, axis: str, dim: int) -> Array:
    """I → S: this device's part of a dim; the gradient is gathered."""
    return take_part(x, axis, dim)


def _cut_forward(x: Array, axis: str, dim: int) -> tuple[Array, None]:
    return take_part(x, axis, dim), None


def _cut_backward(axis: str, dim: int, _: None, gradient: Array) -> tuple[Array]:
    return (lax.all_gather(gradient, axis, axis=dim, tiled=True, to="invarying"),)


cut.defvjp(_cut_forward, _cut_backward)


def at_factors(
    collective: Callable[[Array], Array], x: Array, factors: Mapping[int, Sequence[int]]
) -> Array:
    """A conversion that works on factors of dims: `factors` gives their local sizes by dim."""
    shape: list[int] = []
    for dim, size in enumerate(x.shape):
        shape += factors.get(dim, (size,))
    y = collective(x.reshape(shape))
    sizes, folded = list(y.shape), []
    for dim in range(x.ndim):
        count = len(factors.get(dim, (0,)))
        folded.append(prod(sizes[:count]))
        sizes = sizes[count:]
    return y.reshape(folded)


def varying(x: Array) -> frozenset[str]:
    """The axes along which the devices' values may differ: JAX's type of x."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def like(x: Array, other: Array) -> Array:
    """x, varying along the axes along which another array does."""
    more = tuple(sorted(varying(other) - varying(x)))
    return lax.pcast(x, more, to="varying") if more else x


def _varying(x: Array, axis: str) -> Array:
    return x if axis in varying(x) else lax.pcast(x, axis, to="varying")
