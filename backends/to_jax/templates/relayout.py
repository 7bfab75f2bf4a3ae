"""Arrays of checkpoints in other layouts than the program's own.

Layers are stacked as stages have them, so that a checkpoint says of each of its arrays which
parameters it holds. Every process reads the slices that its devices want, no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import model
import numpy as np
import settings
import tensorstore
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, tree_map_with_path
from layout import Stored
from mesh import mesh
from parallel import arrays

Places = Mapping[str, Any]
"""Key → `names` of its parameters, one per layer where it is `stacked`, its `shape`, and `first`:
where it begins in dim 0 of what is saved."""


def kept_form(values: Any, step: int) -> Any:
    """Parameters or optimizer state as they are saved: by key, of all stages together. Numbers in
    the state count the steps."""
    if not model.STAGES:
        return values

    def together(*parts: Any) -> Any:
        if not isinstance(parts[0], dict):
            return np.asarray(step, parts[0].dtype)
        found = {}
        for key in dict.fromkeys(key for part in parts for key in part):
            stage = next(i for i, part in enumerate(parts) if key in part)
            found[key] = _of_all(parts[stage][key], stage % settings.MESH["pp"])
        return found

    return jax.tree.map(together, *values, is_leaf=lambda x: isinstance(x, dict))


def places() -> Places:
    """What the arrays are that `kept_form` gives."""
    found = {}
    for key, array in arrays().items():
        first = 0
        if model.STAGES and jax.process_count() > 1:
            rows = array.shape[0] if array.shape else 1
            first = array.parameter.stages[0] % settings.MESH["pp"] * rows
        found[key] = {
            "names": list(array.names), "first": first, "stacked": array.stacked,
            "shape": list(array.shape),
        }  # fmt: skip
    return found


def _of_all(array: Array, rank: int) -> Array:
    """An array of one pipeline rank as one of all processes, where there are several: orbax saves
    no others. Dim 0 is longer, with nothing in it but in the rank's part."""
    if jax.process_count() == 1:
        return array
    first, *rest = (*array.sharding.spec, None)[: max(1, len(array.sharding.spec))]
    along = first if isinstance(first, tuple) else () if first is None else (first,)
    lies = NamedSharding(mesh(), PartitionSpec(("pp", *along), *rest))
    shape = (array.shape[0] * settings.MESH["pp"], *array.shape[1:])
    own = {shard.device: shard.data for shard in array.addressable_shards}
    blank = np.zeros(array.sharding.shard_shape(array.shape), array.dtype)
    shards = [
        own[device] if device in own else jax.device_put(blank, device)
        for device in mesh().devices.flat
        if device.process_index == jax.process_index()
    ]
    return jax.make_array_from_single_device_arrays(shape, lies, shards, dtype=array.dtype)


class Reader:
    """One item of a checkpoint: `params` or `state`."""

    def __init__(self, folder: Path, places: Places) -> None:
        self.folder = folder
        self.places = places
        self.holders = {
            name: (key, number)
            for key, place in places.items()
            for number, name in enumerate(place["names"])
        }
        self.opened: dict[str, Any] = {}

    def read(self, like: Any) -> Any:
        """A tree of arrays, as `like` has them."""
        return tree_map_with_path(self._array, like)

    def _array(self, path: tuple[Any, ...], like: Array) -> Array:
        within = path[1:] if model.STAGES else path  # the first is the stage
        names = [_written(part) for part in within]
        if not isinstance(within[-1], DictKey):

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                return np.asarray(self._open(".".join(names))[index].read().result())
        else:
            array = arrays()[within[-1].key]

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                layers, inner = (index[0], index[1:]) if array.stacked else (slice(1), index)
                prefix = "".join(f"{name}." for name in names[:-1])
                read = [self._part(prefix, name, array, inner) for name in array.names[layers]]
                return np.stack(read) if array.stacked else read[0]

        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: piece(index).astype(like.dtype), like.dtype
        )

    def _part(self, prefix: str, name: str, array: Stored, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one parameter, in the dims in which this program stores it."""
        if name not in self.holders:
            raise SystemExit(f"checkpoint {self.folder}: {name} is missing")
        key, layer = self.holders[name]
        place, held = self.places[key], self._open(prefix + key)
        if place["shape"]:
            held = held[place["first"] : place["first"] + place["shape"][0]]
            held = held[tensorstore.d[0].translate_to[0]]
        held = held[layer] if place["stacked"] else held
        shape = array.shape[array.stacked :]
        if tuple(held.shape) == shape:
            return np.asarray(held[index].read().result())
        return np.asarray(held.read().result()).reshape(shape)[index]

    def _open(self, name: str) -> Any:
        if name not in self.opened:
            base = f"file://{self.folder.resolve()}/"
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            self.opened[name] = tensorstore.open(
                {"driver": "zarr", "kvstore": store}, read=True
            ).result()
        return self.opened[name]


def _written(part: Any) -> str:
    """A part of a path in a tree as orbax writes it."""
    if isinstance(part, SequenceKey):
        return str(part.idx)
    return str(part.name if isinstance(part, GetAttrKey) else part.key)
