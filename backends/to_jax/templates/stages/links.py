"""What passes between stages.

A stage computes on its part of the mesh: the devices of one coordinate of `pp`. What it sends goes
through a small program on the devices of both stages, a `ppermute` over two coordinates of `pp`, so
that a process runs programs on its own devices only, whichever hosts these are on.

What one program hands to the next has one dim more than the value: the devices along it are those
that the value differs on (by JAX's types: the axes along which it varies).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import settings
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from mesh import is_here, mesh, model_dtype, stage_mesh, wide_dtype


@dataclass(frozen=True)
class Carried:
    """An activation that a stage sends to the next: its local shape for `b` sequences of `s`
    tokens, its dtype (`model`: the one the model computes in; `wide`: that, at least float32), and
    its types per axis."""

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    dtype: str
    types: Mapping[str, str]

    @property
    def axes(self) -> tuple[str, ...]:
        """Those along which it differs from device to device: all types but I do."""
        return tuple(axis for axis, kind in self.types.items() if kind != "I")

    def spec(self) -> PartitionSpec:
        """How it lies between programs."""
        return PartitionSpec(self.axes)

    def lies(self, rank: int) -> jax.ShapeDtypeStruct:
        """As an array of the devices of a pipeline rank."""
        many = prod(settings.MESH[axis] for axis in self.axes)
        dtypes = {"model": model_dtype(), "wide": wide_dtype()}
        return jax.ShapeDtypeStruct(
            (many, *self.shape(settings.MICRO_BATCH, settings.SEQ_LEN)),
            dtypes.get(self.dtype, self.dtype),
            sharding=NamedSharding(stage_mesh(rank), self.spec()),
        )


def send(
    values: Sequence[Array] | None, like: Sequence[jax.ShapeDtypeStruct], source: int, target: int
) -> list[Array] | None:
    """Arrays of the devices of pipeline rank `source`, which are as `like` says, on those of
    `target`; None in processes that have none of these."""
    if not (is_here(source) or is_here(target)):
        return None
    pair = stage_mesh(source, target)
    given, specs = [], []
    for i, array in enumerate(like):
        first, *rest = (*array.sharding.spec, None)[: max(1, len(array.sharding.spec))]
        along = first if isinstance(first, tuple) else () if first is None else (first,)
        spec = PartitionSpec(("pp", *along), *rest)
        shards = _shards(values[i]) if values is not None and is_here(source) else []
        shards += _blank(array.sharding.shard_shape(array.shape), array.dtype, target)
        shape = (2 * array.shape[0], *array.shape[1:])
        lies = NamedSharding(pair, spec)
        given.append(
            jax.make_array_from_single_device_arrays(shape, lies, shards, dtype=array.dtype)
        )
        specs.append(spec)
    moved = _moving(source, target, tuple(specs))(given)
    if not is_here(target):
        return None
    return [_on(stage_mesh(target), array, got) for array, got in zip(like, moved, strict=True)]


@functools.cache
def _moving(source: int, target: int, specs: tuple[PartitionSpec, ...]) -> Callable[..., Any]:
    def move(values: list[Array]) -> list[Array]:
        return [lax.ppermute(value, "pp", [(0, 1)]) for value in values]

    given = list(specs)
    mapped = jax.shard_map(
        move, mesh=stage_mesh(source, target), in_specs=(given,), out_specs=given, check_vma=True
    )
    return jax.jit(mapped)


def _shards(array: Array) -> list[Array]:
    return [shard.data for shard in array.addressable_shards]


@functools.cache
def _blank(shape: tuple[int, ...], dtype: Any, rank: int) -> list[Array]:
    """What the devices of a rank put where others have something to send."""
    here = [d for d in stage_mesh(rank).devices.flat if d.process_index == jax.process_index()]
    return [jax.device_put(np.zeros(shape, dtype), device) for device in here]


def _on(part: Any, like: Any, array: Array) -> Array:
    """What the devices of a part of the mesh have of an array."""
    devices = set(part.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    lies = NamedSharding(part, like.sharding.spec)
    return jax.make_array_from_single_device_arrays(like.shape, lies, shards, dtype=like.dtype)


def on_rank(array: Array, rank: int) -> Array:
    """An array that is the same along `pp`, on the devices of one pipeline rank; nothing moves."""
    return _on(stage_mesh(rank), array, array)


def over_ranks(*values: Mapping[int, Array]) -> Array:
    """The sum of numbers that pipeline ranks have (rank → array of one), on all devices."""
    everywhere = []
    for value in values:
        shards: list[Array] = []
        for rank in range(settings.MESH["pp"]):
            given = is_here(rank) and rank in value
            shards += _shards(value[rank]) if given else _blank((1,), wide_dtype(), rank)
        lies = NamedSharding(mesh(), PartitionSpec("pp"))
        everywhere.append(
            jax.make_array_from_single_device_arrays(
                (settings.MESH["pp"],), lies, shards, dtype=wide_dtype()
            )
        )
    return _total()(everywhere)


@functools.cache
def _total() -> Callable[..., Array]:
    def total(values: list[Array]) -> Array:
        return lax.psum(sum(values, jnp.zeros((), wide_dtype()))[0], "pp")

    specs = (PartitionSpec("pp"),)
    mapped = jax.shard_map(
        total, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec(), check_vma=True
    )
    return jax.jit(mapped)
