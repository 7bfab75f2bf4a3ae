"""Pytrees of parameters and inputs: leaves under names, their key paths joined with dots."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..errors import InvalidInput
from ..lift.naming import identifier


def named_leaves(tree: Any, what: str) -> tuple[dict[str, Any], Any]:
    """Leaves by name, in the tree's order, and the tree's structure.

    Raises InvalidInput for a leaf that is no array, which is how a container that is no pytree
    shows.
    """
    found: dict[str, Any] = {}
    pairs, structure = tree_flatten_with_path(tree)
    for path, leaf in pairs:
        name = keystr(path, simple=True, separator=".").strip(".").replace("..", ".")
        if not _is_array(leaf):
            raise InvalidInput(
                f"{what} {name or 'tree'}: {type(leaf).__name__} is no array; expected a pytree "
                "(dict, list, dataclass registered with JAX) of arrays or ShapeDtypeStructs"
                + _advice(leaf)
            )
        found[name or what.partition(" ")[0]] = leaf
    if found and all(name.endswith(".value") for name in found):  # variables of flax nnx
        found = {name.removesuffix(".value"): leaf for name, leaf in found.items()}
    return found, structure


def weights_of(tree: Any) -> dict[str, Any]:
    """Arrays of a parameter tree by the names that `trace` gives them.

    Raises InvalidInput for leaves without values.
    """
    found, _ = named_leaves(tree, "weights")
    for name, leaf in found.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InvalidInput(f"weights {name}: a shape has no values; give arrays")
    return found


def _advice(leaf: Any) -> str:
    kind = type(leaf)
    if any(part.__module__.startswith("flax.nnx") for part in kind.__mro__):
        return ": give the state of nnx.split, and merge inside the function"
    if callable(leaf) or isinstance(leaf, str | bytes):
        return ": keep what is no array out of it (equinox: eqx.partition)"
    return ": register the class with jax.tree_util"


def _is_array(leaf: Any) -> bool:
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, int | float)


def structs(leaves: Mapping[str, Any], floating: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of leaves; floats in the dtype `floating`, or as they are for None."""
    return {
        name: jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf, floating))
        for name, leaf in leaves.items()
    }


def _dtype(leaf: Any, floating: Any) -> Any:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if floating is not None and jax.numpy.issubdtype(dtype, jax.numpy.floating):
        return floating
    return dtype


def named_inputs(
    function: Callable[..., Any], inputs: Mapping[str, Any] | Sequence[Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], Any]:
    """Input leaves by name, the positional and keyword arguments, and their structure.

    An array is called like the argument that takes it, an entry of a dict like its key.
    """
    if isinstance(inputs, Mapping):
        arguments: tuple[Any, ...] = ()
        keywords = dict(inputs)
    elif isinstance(inputs, tuple | list):
        arguments, keywords = tuple(inputs), {}
    else:
        arguments, keywords = (inputs,), {}
    try:
        signature = inspect.signature(function)
        bound = signature.bind(None, *arguments, **keywords)
    except TypeError as error:
        takes = list(inspect.signature(function).parameters)[1:]
        if isinstance(inputs, Mapping) and len(takes) == 1:  # one dict, the whole batch
            arguments, keywords = (dict(inputs),), {}
            bound = inspect.signature(function).bind(None, *arguments)
        else:
            raise InvalidInput(
                f"example_inputs: the function takes {', '.join(takes) or 'none'} after its "
                f"parameters ({error})"
            ) from None
    except ValueError:
        bound = None
    names: list[str] = []
    if bound is not None:
        for name, value in list(bound.arguments.items())[1:]:
            many = isinstance(value, tuple) and name not in keywords and len(arguments) > len(
                bound.arguments
            ) - 1  # fmt: skip
            names += [f"{name}_{i}" for i in range(len(value))] if many else [name]
    pairs, structure = tree_flatten_with_path((arguments, keywords))
    found: dict[str, Any] = {}
    for path, leaf in pairs:
        if not _is_array(leaf):
            raise InvalidInput(f"example input {keystr(path)}: {type(leaf).__name__} is no array")
        base = _input_name(path, names)
        name, count = base, 0
        while name in found:
            count += 1
            name = f"{base}_{count}"
        found[name] = leaf
    return found, arguments, keywords, structure


def _input_name(path: tuple[Any, ...], names: Sequence[str]) -> str:
    inner = keystr(path[2:], simple=True, separator="_")
    if inner:
        return identifier(inner)
    key = getattr(path[1], "idx", getattr(path[1], "key", 0))
    if isinstance(key, str):
        return identifier(key)
    return identifier(names[key]) if key < len(names) else f"input_{key}"
