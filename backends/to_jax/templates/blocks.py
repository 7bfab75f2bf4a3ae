"""How blocks are called: parameters gathered, in a scan over layers, recomputed or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import settings
from jax import Array, lax
from layout import path_in
from mesh import SHARES, model_dtype

Arrays = Mapping[str, Array]
"""The parameters of a block by their paths in it: local shards, whole along dp."""

Recompute = Literal["none", "selective", "full"]


class Lies(NamedTuple):
    """`dims`: stored dims of every dim of a parameter; `shared`: the one that is split along dp."""

    dims: tuple[int, ...]
    shared: int | None


@jax.tree_util.register_pytree_node_class
class Params:
    """Parameters as they are stored, by their keys."""

    def __init__(self, values: Mapping[str, Any], lies: Mapping[str, Lies]) -> None:
        self.values, self.lies = dict(values), dict(lies)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[tuple[str, Lies], ...]]:
        """The arrays, and what is known of them."""
        return tuple(self.values.values()), tuple((k, self.lies[k]) for k in self.values)

    @classmethod
    def tree_unflatten(cls, known: tuple[tuple[str, Lies], ...], values: Any) -> Params:
        """The inverse."""
        lies = dict(known)
        return cls(dict(zip(lies, values, strict=True)), lies)

    def __getitem__(self, layers: slice) -> Params:
        """Some layers of a stack."""
        return Params({key: value[layers] for key, value in self.values.items()}, self.lies)

    def whole(self) -> Arrays:
        """For a block: gathered along dp where ZeRO 3 split them, with the parameter's own dims."""
        return {key: _whole(value, self.lies[key]) for key, value in self.values.items()}


def _whole(value: Array, lies: Lies) -> Array:
    if settings.ZERO == 3 and SHARES and lies.shared is not None:
        value = lax.all_gather(value, "dp", axis=lies.shared, tiled=True)
    sizes, folded = list(value.shape), []
    for count in lies.dims:
        size = 1
        for part in sizes[:count]:
            size *= part
        folded.append(size)
        sizes = sizes[count:]
    return value.reshape(folded)


def under(params: Params, path: str) -> Params:
    """The parameters of a module or of a stack of layers, by their paths in it."""
    found = {short: k for k in params.values if (short := path_in(path, k)) is not None}
    return Params(
        {short: params.values[key] for short, key in found.items()},
        {short: params.lies[key] for short, key in found.items()},
    )


def own(params: Params, *names: str) -> Params:
    """The parameters of these names."""
    return Params({n: params.values[n] for n in names}, {n: params.lies[n] for n in names})


def local(parameter: Array, vary: str | None = None) -> Array:
    """This device's part of a parameter, in the dtype that the model computes in.

    `vary`: an axis along which it goes from I to R, so that gradients are summed there (wide).
    """
    if vary is not None:
        parameter = lax.pcast(parameter, vary, to="varying")
    return parameter.astype(model_dtype())


def fold(key: Array | None, number: int) -> Array | None:
    """Another key for every number."""
    return None if key is None else jax.random.fold_in(key, number)


# --- calls ---------------------------------------------------------------------------------------

_NO_KEY = object()


def run(
    f: Callable[..., Any],
    part: Params,
    *args: Any,
    recompute: Recompute = "none",
    key: Any = _NO_KEY,
) -> Any:
    """`f` with its parameters and arguments."""
    extra = () if key is _NO_KEY else (key,)
    return _recomputed(lambda p, *a: f(p.whole(), *a), recompute)(part, *args, *extra)


def layers(
    f: Callable[..., Any],
    part: Params,
    *args: Any,
    carry: int = 0,
    recompute: Recompute = "none",
    key: Any = _NO_KEY,
) -> Any:
    """`f` layer after layer: argument `carry` of each is the result of the one before."""
    count = next(iter(part.values.values())).shape[0]
    keys = None
    if key is not _NO_KEY and key is not None:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jax.numpy.arange(count))

    def one(x: Any, given: tuple[Params, Array | None]) -> tuple[Any, None]:
        p, own_key = given
        extra = () if key is _NO_KEY else (own_key,)
        block = _recomputed(lambda p, *a: f(p.whole(), *a), recompute, scanned=True)
        return block(p, *args[:carry], x, *args[carry + 1 :], *extra), None

    return lax.scan(one, args[carry], (part, keys))[0]


_KEPT = {"psum", "psum_invariant", "reduce_scatter"}
"""Reductions, whose results `selective` keeps."""


def _selective(primitive: Any, *_: Any, **options: Any) -> bool:
    """Keeps the results of products with parameters, attention and reductions."""
    if primitive.name == "dot_general":
        return not options["dimension_numbers"][1][0]  # none with batch dims: inside attention
    return primitive.name in _KEPT or options.get("name") == "attention"


def _but_parameters(primitive: Any, *_: Any, **options: Any) -> bool:
    """Keeps everything but gathered parameters (ZeRO 3) and what is only another form of them."""
    if primitive.name == "all_gather":
        return "dp" not in options["axis_name"]
    return primitive.name not in ("reshape", "convert_element_type", "transpose", "pvary")


def _recomputed(f: Callable[..., Any], mode: Recompute, scanned: bool = False) -> Any:
    """`f`, of which the backward pass computes again what is not kept."""
    if mode == "full":
        return jax.checkpoint(f, prevent_cse=not scanned)
    if mode == "selective":
        return jax.checkpoint(f, prevent_cse=not scanned, policy=_selective)
    gathered = settings.ZERO == 3 and SHARES and scanned
    if gathered or settings.MESH["pp"] > 1:  # other microbatches come in between
        return jax.checkpoint(f, prevent_cse=not scanned, policy=_but_parameters)
    return f
