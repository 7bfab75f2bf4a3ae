"""Pins in JAX programs: `sw.annotate` of an array, `with_sharding_constraint`, `NamedSharding`.

A pin inside a traced function is a `checkpoint_name`, which every transformation of JAX carries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from ..errors import InvalidInput
from ..types import AxisType

_MARK = "shardwright.pin "


def is_array(target: object) -> bool:
    """Whether this is an array of JAX, traced or not."""
    return isinstance(target, jax.Array)


def annotate(target: Any, *, params: str | None, stage: int | None, axes: Mapping[str, str]) -> Any:
    """See `shardwright.annotate`. Raises InvalidInput for types that are none."""
    if params is not None or stage is not None:
        raise InvalidInput(
            "sw.annotate: params= and stage= are for torch modules; pin a JAX parameter where the "
            "function reads it, or by a NamedSharding on its ShapeDtypeStruct"
        )
    for axis, kind in axes.items():
        if not isinstance(kind, str):
            raise InvalidInput(f'sw.annotate: {axis}={kind!r}, expected a type such as "S(0)"')
    types = {axis: str(AxisType.parse(kind)) for axis, kind in axes.items()}
    if not types:
        raise InvalidInput('sw.annotate: expected an axis and a type, such as tp="S(0)"')
    return checkpoint_name(target, _MARK + json.dumps(types))


def pin_of_name(name: str) -> dict[str, str]:
    """The types of a checkpoint name that is a pin; none for other names."""
    if not name.startswith(_MARK):
        return {}
    found: dict[str, str] = json.loads(name.removeprefix(_MARK))
    return found


def pin_of_sharding(sharding: Any, rank: int) -> dict[str, str]:
    """Types by mesh axis of a NamedSharding: an axis in the spec splits that dim, the others leave
    the type open. Raises InvalidInput for a spec that has several axes on a dim."""
    if not isinstance(sharding, NamedSharding):
        return {}
    types: dict[str, str] = {}
    for dim, names in enumerate(sharding.spec):
        if names is None or names is jax.sharding.PartitionSpec.UNCONSTRAINED:
            continue
        for axis in names if isinstance(names, tuple) else (names,):
            if axis in types or dim >= rank:
                raise InvalidInput(f"sharding {sharding.spec}: axis {axis!r} splits no one dim")
            types[str(axis)] = f"S({dim})"
    return types
