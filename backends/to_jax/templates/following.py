"""Parameters and AdamW's state from a checkpoint of any format, as `reads.jsonl` says.

Every process reads the slices that its devices want, no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import DictKey, GetAttrKey, tree_map_with_path
from layout import Stored
from parallel import arrays
from reads import Reads

MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}  # optax's names, and those of the list

DTYPES = {
    "F64": jnp.float64, "F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
}  # fmt: skip


def follow(folder: Path, params: Any, state: Any) -> tuple[Any, Any, dict[str, int]]:
    """Parameters and state laid out as those given, which are taken where the list has nothing
    (moments of weights alone), and `step`, `samples` and `seed` as far as the checkpoint knows."""
    source = Reads(folder)
    step = int(source.head["step"] or 0)

    def array(path: tuple[Any, ...], like: Array) -> Array:
        last, fields = path[-1], [part.name for part in path if isinstance(part, GetAttrKey)]
        if not isinstance(last, DictKey):  # a number in the state: it counts the steps
            return _filled(like, lambda _: np.asarray(step))
        kind = next((MOMENTS[name] for name in fields if name in MOMENTS), "weight")
        stored = arrays()[last.key]
        if kind != "weight" and kind not in source.states(stored.names[0]):
            return like

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            layers, inner = (index[0], index[1:]) if stored.stacked else (slice(1), index)
            read = [_part(source, name, kind, stored, inner) for name in stored.names[layers]]
            return np.stack(read) if stored.stacked else read[0]

        return _filled(like, piece)

    known = {key.removeprefix("train."): int(n) for key, n in source.head["train"].items()}
    followed = tree_map_with_path(array, params), tree_map_with_path(array, state)
    return *followed, {"step": step, **known}


def _filled(like: Array, piece: Any) -> Array:
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: piece(index).astype(like.dtype), like.dtype
    )


def _part(
    source: Reads, name: str, state: str, stored: Stored, index: tuple[slice, ...]
) -> np.ndarray:
    """A slice of one parameter, in the dims in which this program stores it."""
    shape = stored.shape[stored.stacked :]
    plain = all(count == 1 for count in stored.dims)
    ranges = [slice_.indices(n) for slice_, n in zip(index, shape, strict=True)]
    begin, sizes = [r[0] for r in ranges], [r[1] - r[0] for r in ranges]
    if not plain:  # an inner factor is split: its dims are taken apart when all is there
        begin, sizes = [0] * len(stored.parameter.shape), list(stored.parameter.shape)
    found, dtype = source.read(name, state, begin, sizes)
    values = found.view(DTYPES[dtype])
    return values if plain else values.reshape(shape)[index]
