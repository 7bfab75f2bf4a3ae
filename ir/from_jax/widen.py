"""Casts to float32, widened: what makes a float64 comparison exact.

JAX's own attention and many models cast to float32 inside. Run in float64, that throws half of the
digits away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .flatten import ITERATIONS, SLICE, Source, flatten


def widen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float64 wherever it asks for float32; call it with float64 arguments, with
    64 bits enabled in JAX. It can be differentiated and jitted.

    Functions with a gradient of their own (`custom_vjp`) keep it, and the casts in them. Scans over
    layers are written out, so this is for small models.
    """

    def widened(*arguments: Any) -> Any:
        closed = jax.make_jaxpr(function)(*arguments)
        leaves = jax.tree.leaves(arguments)
        sources = [Source(tuple(np.shape(x)), x.dtype, "parameter", str(i))
                   for i, x in enumerate(leaves)]  # fmt: skip
        flat, results = flatten(closed, sources, whole=True, through=False)
        known: dict[Source, Any] = dict(zip(sources, leaves, strict=True))

        def value(source: Source) -> Any:
            if source not in known:
                known[source] = _wide(source.value, source.dtype)
            return known[source]

        for node in flat.nodes:
            operands = [value(each) for each in node.operands]
            if node.name == SLICE:
                made: Any = [operands[0][node.params["index"]]]
            elif node.name == ITERATIONS:
                made = [jax.numpy.stack(operands)]
            else:
                params = {name: _wide_dtype(each) for name, each in node.params.items()}
                params = node.primitive.get_bind_params(params)
                made = node.primitive.bind(*operands, **params)
                made = made if node.primitive.multiple_results else [made]
            known.update(zip(node.results, made, strict=True))
        (result,) = (value(each) for each in results)
        return result

    return widened


def _wide(value: Any, dtype: Any) -> Any:
    return jax.numpy.asarray(value, np.float64 if str(dtype) == "float32" else dtype)


def _wide_dtype(value: Any) -> Any:
    is_dtype = isinstance(value, np.dtype) and str(value) == "float32"
    return np.dtype(np.float64) if is_dtype else value
