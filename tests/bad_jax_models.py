"""JAX functions that cannot be planned, each for a reason of its own, as `module:callable`
returns them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Parts = tuple[Any, Any, Any]
ROWS = (jax.ShapeDtypeStruct((2, 8), jnp.float32),)
WEIGHT = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}


def control_flow() -> Parts:
    return lambda p, x: (x @ p["w"]).sum() if x.sum() > 0 else x.sum(), WEIGHT, ROWS


def numpy_inside() -> Parts:
    return lambda p, x: np.asarray(x @ p["w"]).mean(), WEIGHT, ROWS


def container() -> Parts:
    return lambda p, x: (x @ p.w).mean(), type("Weights", (), WEIGHT)(), ROWS


def no_scalar() -> Parts:
    return lambda p, x: (x @ p["w"]).mean(1), WEIGHT, ROWS


def no_batch() -> Parts:
    return lambda p, x: (p["w"] * x).mean(), WEIGHT, (jax.ShapeDtypeStruct((), jnp.float32),)


def unknown_op() -> Parts:
    return lambda p, x: jnp.sin(x @ p["w"]).mean(), WEIGHT, ROWS
