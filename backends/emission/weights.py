"""The weights that a program starts from, by the model's own names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

from ...ir.errors import InvalidInput

WEIGHTS = "weights.safetensors"


def origin(weights: str | os.PathLike[str] | Mapping[str, Any] | None) -> str | None:
    """Where the program finds its weights: relative to itself, or absolute."""
    if weights is None or isinstance(weights, Mapping):
        return None if weights is None else WEIGHTS
    path = Path(weights)
    if not path.exists():
        raise InvalidInput(f"weights {path}: no such file or folder")
    return str(path.resolve())


def by_name(weights: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Weights by the names of a model: `layers.wq[3]` may be a slice of the array `layers.wq`.

    What the model does not name is left out. Raises InvalidInput where one is missing.
    """
    found: dict[str, Any] = {}
    for name in names:
        base, _, index = name.partition("[")
        if name in weights:
            found[name] = weights[name]
        elif base in weights and index.removesuffix("]").isdigit():
            found[name] = weights[base][int(index.removesuffix("]"))]
        else:
            raise InvalidInput(f"weights: {name} is missing; there are {_some(weights)}")
    return found


def _some(weights: Mapping[str, Any]) -> str:
    return ", ".join([*map(str, list(weights)[:4]), *(["…"] if len(weights) > 4 else [])]) or "none"


def save(weights: Mapping[str, Any], path: Path) -> None:
    """Tensors or arrays as safetensors, tied ones under each of their names; torch need not be
    there."""
    kept = {name: _dense(tensor) for name, tensor in weights.items()}
    serialize_file({name: _described(tensor) for name, tensor in kept.items()}, path)


def _dense(tensor: Any) -> Any:
    """A torch tensor, or an array of anything else, in one piece on the host."""
    if hasattr(tensor, "untyped_storage"):
        return tensor.detach().cpu().contiguous()
    if not (hasattr(tensor, "__array__") or isinstance(tensor, int | float)):
        raise InvalidInput(f"weights: a {type(tensor).__name__} has no values; give arrays")
    return np.ascontiguousarray(tensor)


def _described(tensor: Any) -> TensorSpec:
    """Where the bytes are; they must stay there as long as they are written."""
    at = tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(dtype=dtype, shape=list(tensor.shape), data_ptr=at, data_len=tensor.nbytes)
