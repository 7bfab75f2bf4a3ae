"""The arrays of the program, and how they lie on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import model
import numpy as np
import settings
from blocks import Lies, Params
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from layout import Stored, path_in, renamed, stored
from mesh import AXES, SHARES, mesh, stage_mesh, wide_dtype
from parameters import PARAMETERS

IN_ONE = "pp" in AXES and not model.STAGES
"""Whether one program has all stages of a pipeline, and so takes all microbatches at once."""


@functools.cache
def arrays() -> dict[str, Stored]:
    """Every array of the program by its key: a parameter's name, or a stack's and the path in it
    (`model.layers.0-31.mlp.up_proj.weight`)."""
    keys: dict[str, tuple[str, ...]] = {}
    for stack, modules in model.STACKS.items():
        first = modules[0]
        for name in PARAMETERS:
            if path_in(first, name) is not None:
                layers = tuple(renamed(name, first, module) for module in modules)
                keys[renamed(name, first, stack)] = layers
    stacks = set(keys)
    taken = {name for names in keys.values() for name in names}
    keys |= {name: (name,) for name in PARAMETERS if name not in taken}
    found = {
        key: stored(names, PARAMETERS[names[0]], key in stacks, settings.MESH, SHARES)
        for key, names in keys.items()
    }
    if not IN_ONE:
        return found
    return {
        key: replace(array, axes=(("pp",), *array.axes[1:])) if _is_pipelined(array) else array
        for key, array in found.items()
    }


def _is_pipelined(array: Stored) -> bool:
    """Whether the layers of a stack are split along pp."""
    first = model.STACKS[model.PIPELINED][0]
    return array.stacked and path_in(first, array.names[0]) is not None


def spec(key: str, zero: bool) -> PartitionSpec:
    """How an array lies; `zero`: as ZeRO splits it along dp."""
    return PartitionSpec(*(axes or None for axes in arrays()[key].split(zero and SHARES)))


def parameter_specs() -> dict[str, PartitionSpec]:
    """How parameters are stored between steps: with ZeRO 3 split along dp as well."""
    return {key: spec(key, settings.ZERO == 3) for key in arrays()}


def gradient_specs() -> dict[str, PartitionSpec]:
    """How gradients and the optimizer's state lie at the end of a step: with ZeRO, split."""
    return {key: spec(key, True) for key, array in arrays().items() if array.parameter.trainable}


def batch_specs() -> dict[str, PartitionSpec]:
    """How the batch lies: every data-parallel rank has its rows."""
    rows = PartitionSpec("dp") if "dp" in AXES else PartitionSpec()
    return {
        name: rows if "b" in dims[:1] else PartitionSpec()
        for name, (_, dims, _) in model.BATCH.items()
    }


def sharding(spec: PartitionSpec, stage: int | None = None) -> NamedSharding:
    """On the mesh of this program, or on the part of it that has a stage."""
    where = mesh() if stage is None else stage_mesh(stage % settings.MESH["pp"])
    return NamedSharding(where, spec)


def shape_of(key: str, stage: int | None = None) -> jax.ShapeDtypeStruct:
    """A parameter as it is stored: shape, dtype and sharding."""
    lies = sharding(parameter_specs()[key], stage)
    return jax.ShapeDtypeStruct(arrays()[key].shape, wide_dtype(), sharding=lies)


def shapes() -> Any:
    """The parameters by key; where stages are programs of their own, a list with those of each."""
    if not model.STAGES:
        return {key: shape_of(key) for key in arrays()}
    return [
        {key: shape_of(key, i) for key, a in arrays().items() if i in a.parameter.stages}
        for i in range(len(model.STAGES))
    ]


def made_here(make: Callable[..., Any], like: Any, *given: Any) -> Any:
    """What a function makes of its arguments, compiled, laid out as `like` says; where this process
    has none of its devices, arrays of which it holds nothing."""
    lies = jax.tree.map(lambda array: array.sharding, like)
    if all(each.addressable_devices for each in jax.tree.leaves(lies)):
        return jax.jit(make, out_shardings=lies)(*given)
    return jax.tree.map(
        lambda array: jax.make_array_from_single_device_arrays(
            array.shape, array.sharding, [], dtype=array.dtype
        ),
        like,
    )


def flat(values: Any) -> dict[str, Array]:
    """All by key: of what several stages hold, the first one's."""
    if not model.STAGES:
        return dict(values)
    return {key: value for part in reversed(values) for key, value in part.items()}


def by_name(values: Any) -> dict[str, np.ndarray]:
    """Arrays of the program as whole parameters under the model's own names, on the host."""
    found = {}
    for key, value in flat(values).items():
        array = arrays()[key]
        whole = np.asarray(value).reshape(len(array.names), *array.parameter.shape)
        found |= dict(zip(array.names, whole, strict=True))
    return found


def together(values: dict[str, Array]) -> Params:
    """What the functions of model.py take."""
    lies = {
        key: Lies(array.dims, None if array.shared is None else array.shared - array.stacked)
        for key, array in arrays().items()
    }
    return Params(values, {key: lies[key] for key in values})
