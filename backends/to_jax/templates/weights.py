"""Plain weights under the model's own names: a safetensors file, or a folder of them.

Every process reads the slices that its devices want, no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.tree_util import tree_map_with_path
from layout import Stored
from mesh import wide_dtype
from parallel import arrays, shapes
from parameters import PARAMETERS
from safetensors import safe_open


class Source:
    """The tensors of some files."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise SystemExit(f"weights {path}: expected a .safetensors file or a folder of them")
        self.files = {}
        for file in files:
            opened = safe_open(file, framework="flax")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the dtype of master weights."""
        held, layer = self.place(name)
        piece = self.files[held].get_slice(held)
        shape = tuple(piece.get_shape())[len(layer) :]
        if shape != tuple(PARAMETERS[name].shape):
            raise SystemExit(
                f"weights: {name} has shape {shape}, the model {tuple(PARAMETERS[name].shape)}"
            )
        found = np.asarray(piece[(*layer, *index)] if layer or index else piece[...])
        return (found[0] if layer else found).astype(wide_dtype())

    def place(self, name: str) -> tuple[str, tuple[slice, ...]]:
        """The tensor that holds a parameter, and where: `layers.wq[3]` may be a slice of
        `layers.wq`."""
        base, bracket, index = name.partition("[")
        if name in self.files or not bracket or not index.removesuffix("]").isdigit():
            return name, ()
        layer = int(index.removesuffix("]"))
        return base, (slice(layer, layer + 1),)


def load_weights(path: str | Path) -> Any:
    """The parameters of the program, on the mesh, as `shapes` says."""
    source = Source(path)
    missing = [name for name in PARAMETERS if source.place(name)[0] not in source.files]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise SystemExit(f"weights {path}: {', '.join(missing[:5])}{more} missing")
    return tree_map_with_path(lambda path, like: _array(source, path[-1].key, like), shapes())


def _array(source: Source, key: str, like: jax.ShapeDtypeStruct) -> Array:
    array = arrays()[key]

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        layers = index[0] if array.stacked else slice(0, 1)
        inner = index[1:] if array.stacked else index
        read = [_part(source, name, array, inner) for name in array.names[layers]]
        return np.stack(read) if array.stacked else read[0]

    return jax.make_array_from_callback(like.shape, like.sharding, piece, dtype=like.dtype)


def _part(source: Source, name: str, array: Stored, index: tuple[slice, ...]) -> np.ndarray:
    """A slice, in stored dims, of one parameter."""
    if all(count == 1 for count in array.dims):
        return source.read(name, index)
    whole: Any = source.read(name, tuple(slice(None) for _ in array.parameter.shape))
    return whole.reshape(array.shape[array.stacked :])[index]
