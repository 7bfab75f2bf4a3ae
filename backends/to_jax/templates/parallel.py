"""The arrays of the program, and how they lie on the mesh."""

from __future__ import annotations

import functools

import jax
import model
import numpy as np
import settings
from blocks import Lies, Params
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from layout import Stored, path_in, renamed, stored
from mesh import AXES, SHARES, mesh, wide_dtype
from parameters import PARAMETERS


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
    return {
        key: stored(names, PARAMETERS[names[0]], key in stacks, settings.MESH, SHARES)
        for key, names in keys.items()
    }


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


def sharding(spec: PartitionSpec) -> NamedSharding:
    """On the mesh of this program."""
    return NamedSharding(mesh(), spec)


def shape_of(key: str) -> jax.ShapeDtypeStruct:
    """A parameter as it is stored: shape, dtype and sharding."""
    lies = sharding(parameter_specs()[key])
    return jax.ShapeDtypeStruct(arrays()[key].shape, wide_dtype(), sharding=lies)


def by_name(values: dict[str, Array]) -> dict[str, np.ndarray]:
    """Arrays of the program as whole parameters under the model's own names, on the host."""
    found = {}
    for key, value in values.items():
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
