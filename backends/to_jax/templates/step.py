"""One training step: gradients over microbatches, their sums over devices, and AdamW.

The loss of a step is the sum of its terms (valid tokens) over the global batch, divided by their
global count. Everything here runs on local shards under one `shard_map`, whose checker holds the
program to its types: a gradient that is not summed where it must be does not compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import model
import optax
import settings
from jax import Array, lax
from jax.sharding import PartitionSpec
from mesh import AXES, SHARES, mesh, wide_dtype
from parallel import (
    IN_ONE,
    arrays,
    batch_specs,
    gradient_specs,
    parameter_specs,
    shape_of,
    sharding,
    together,
)
from typed import like, take_part, varying

Values = dict[str, Array]

ROUNDS = 1 if IN_ONE else settings.MICROBATCHES
"""How often gradients are added up in a step."""

APART = tuple(axis for axis in ("pp", "dp") if axis in AXES and (axis == "dp" or IN_ONE))
"""Axes along which devices have microbatches, or stages, of their own."""


# --- gradients -----------------------------------------------------------------------------------


def _gradients(params: Values, batch: Values, key: Array | None) -> tuple[Array, Values]:
    """The loss and the gradients of the global batch, from this device's shards and rows."""
    scale = scale_of(batch)
    params = {name: along_dp(value) for name, value in params.items()}
    trained = {name: params[name] for name in gradient_specs()}

    def loss_of(values: Values, rows: Values, at: Array | None) -> Array:
        total = model.loss(together(params | values), **rows, key=at)
        partial = tuple(a for a, kind in model.LOSS_TYPES.items() if kind == "P" and a != "dp")
        return (lax.psum(total, partial) if partial else total) * scale

    def one(sums: tuple[Array, Values], given: Any) -> tuple[tuple[Array, Values], None]:
        total, gradients = sums
        loss, found = jax.value_and_grad(loss_of)(trained, *given)
        if settings.ZERO == 2:
            found = {name: scattered(name, value) for name, value in found.items()}
        return (total + loss, jax.tree.map(jnp.add, gradients, found)), None

    micro = {name: microbatches(name, rows) for name, rows in batch.items()}
    keys = None if key is None else key[None] if IN_ONE else jax.random.split(key, ROUNDS)
    begin = {name: _zeros(name, value) for name, value in trained.items()}
    total = jnp.zeros((), wide_dtype())
    if APART:
        total = lax.pcast(total, APART, to="varying")
    (total, gradients), _ = lax.scan(one, (total, begin), (micro, keys))
    gradients = {name: summed(name, value) for name, value in gradients.items()}
    return (lax.psum(total, APART) if APART else total), gradients


def scale_of(batch: Values) -> Array:
    """One over the number of loss terms of the global batch."""
    count = jnp.asarray(model.count_terms(**batch))
    if _data(count):
        count = lax.psum(count, "dp")
    elif "dp" in AXES:  # a number of elements: the same on all ranks
        count = count * settings.MESH["dp"]
    return 1 / jnp.maximum(count, 1).astype(wide_dtype())


def _data(x: Array) -> bool:
    return "dp" in varying(x)


def along_dp(value: Array) -> Array:
    """R along dp: the gradients of its devices are summands, which are reduced once; so is what all
    stages of a pipeline hold in one program."""
    axes = tuple(axis for axis in APART if axis not in varying(value))  # with ZeRO 3 it is split
    return lax.pcast(value, axes, to="varying") if axes else value


def microbatches(name: str, rows: Array) -> Array:
    """[microbatches, rows of one, …]; what has no rows is the same in all."""
    if "b" not in model.BATCH[name][1][:1]:
        return jnp.broadcast_to(rows, (ROUNDS, *rows.shape))
    return rows.reshape(ROUNDS, -1, *rows.shape[1:])


def _zeros(name: str, value: Array) -> Array:
    """Where the gradient of a parameter accumulates: with ZeRO 2 a part of it."""
    shape, shared = list(value.shape), arrays()[name].shared
    if settings.ZERO == 2 and SHARES and shared is not None:
        shape[shared] //= settings.MESH["dp"]
    return like(jnp.zeros(shape, value.dtype), value)


def scattered(name: str, gradient: Array) -> Array:
    """Summed over dp, of which this device keeps its part."""
    shared = arrays()[name].shared
    if not SHARES or shared is None:
        return gradient
    return lax.psum_scatter(gradient, "dp", scatter_dimension=shared, tiled=True)


def summed(name: str, gradient: Array) -> Array:
    """The whole sum over dp, or this device's part of it."""
    if IN_ONE and ("pp",) not in arrays()[name].axes:
        gradient = lax.psum(gradient, "pp")
    if SHARES and arrays()[name].shared is not None:
        return scattered(name, gradient) if settings.ZERO == 1 else gradient
    return lax.psum(gradient, "dp") if "dp" in AXES else gradient


# --- the optimizer -------------------------------------------------------------------------------


class Adam(NamedTuple):
    """AdamW's settings; `rate` is the learning rate of a step, counted from 0."""

    rate: Callable[[Array], Array]
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def transformation(self) -> optax.GradientTransformation:
        """Matrices decay, vectors (norms, biases) do not."""

        def decays(values: Values) -> dict[str, bool]:
            return {name: len(arrays()[name].parameter.shape) > 1 for name in values}

        return optax.adamw(self.rate, *self.betas, weight_decay=self.weight_decay, mask=decays)


def update(adam: Adam, params: Values, state: Any, gradients: Values, norm: Array) -> Any:
    """Parameters and state after a step, of whose gradients the norm is given."""
    if adam.clip:
        factor = jnp.minimum(1.0, adam.clip / (norm + 1e-6)).astype(wide_dtype())
        gradients = {name: g * factor for name, g in gradients.items()}
    own = {name: _own_part(name, params[name]) for name in gradients}
    updates, state = adam.transformation().update(gradients, state, own)
    own = optax.apply_updates(own, updates)
    return params | {name: _all_parts(name, value) for name, value in own.items()}, state


def squares(gradients: Values) -> Array:
    """The sum of squares over whole tensors: each element counts once, however many copies are.
    What is split along the same axes is summed in one reduction."""
    sums: dict[tuple[str, ...], Array] = {}
    for gradient in gradients.values():
        total = jnp.sum(jnp.square(gradient))
        split = tuple(sorted(varying(total)))
        sums[split] = sums[split] + total if split in sums else total
    every = (lax.psum(total, axes) if axes else total for axes, total in sums.items())
    return sum(every, jnp.zeros((), wide_dtype()))


def _replicated(name: str) -> bool:
    """Whether ZeRO splits the state of a parameter that is whole along dp itself."""
    return SHARES and settings.ZERO < 3 and arrays()[name].shared is not None


def _own_part(name: str, value: Array) -> Array:
    """What this device updates of a parameter."""
    shared = arrays()[name].shared
    return take_part(value, "dp", shared) if _replicated(name) else value


def _all_parts(name: str, value: Array) -> Array:
    """The parameter as it is stored, from what each device updated."""
    if not _replicated(name):
        return value
    shared = arrays()[name].shared
    return lax.all_gather(value, "dp", axis=shared, tiled=True, to="invarying")


# --- compiled ------------------------------------------------------------------------------------


def gradients() -> Callable[..., tuple[Array, Values]]:
    """`(params, batch, key) → (loss, gradients)`, compiled; `key` is None without dropout."""
    mapped = jax.shard_map(
        _gradients,
        mesh=mesh(),
        in_specs=(parameter_specs(), batch_specs(), PartitionSpec()),
        out_specs=(PartitionSpec(), gradient_specs()),
        check_vma=True,
    )
    return jax.jit(mapped)


def state_specs(adam: Adam, specs: dict[str, PartitionSpec] | None = None) -> Any:
    """How the optimizer's state lies: as the gradients do; `specs`: of some of them."""
    specs = gradient_specs() if specs is None else specs
    transformation = adam.transformation()
    state = jax.eval_shape(transformation.init, {name: shape_of(name) for name in specs})
    return optax.tree.map_params(
        transformation,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )


def state_shapes(adam: Adam) -> Any:
    """AdamW's state as shapes with their shardings: what it takes without making it."""
    trained = {name: shape_of(name) for name in gradient_specs()}
    state = jax.eval_shape(adam.transformation().init, trained)
    return jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding(spec)),
        state,
        state_specs(adam),
    )


def create_state(adam: Adam, params: Values) -> Any:
    """AdamW's state, split as ZeRO says from the beginning."""
    lies = jax.tree.map(sharding, state_specs(adam))
    trained = {name: params[name] for name in gradient_specs()}
    return jax.jit(adam.transformation().init, out_shardings=lies)(trained)


def train_step(adam: Adam) -> Callable[..., Any]:
    """`(params, state, batch, key) → (params, state, loss, norm)`, compiled; takes over the memory
    of params and state."""

    def local(params: Values, state: Any, batch: Values, key: Array | None) -> Any:
        loss, found = _gradients(params, batch, key)
        norm = jnp.sqrt(squares(found))
        params, state = update(adam, params, state, found, norm)
        return params, state, loss, norm

    mapped = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(parameter_specs(), state_specs(adam), batch_specs(), PartitionSpec()),
        out_specs=(parameter_specs(), state_specs(adam), PartitionSpec(), PartitionSpec()),
        check_vma=True,
    )
    return jax.jit(mapped, donate_argnums=(0, 1))
