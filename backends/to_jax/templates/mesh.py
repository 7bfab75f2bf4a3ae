"""The device mesh, and the dtypes of the program."""

from __future__ import annotations

import functools
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import settings
from jax.sharding import AxisType, Mesh

jax.config.update("jax_enable_x64", settings.PRECISION == "fp64")

AXES = tuple(name for name, size in settings.MESH.items() if size > 1)
"""The axes that there is anything to split along, outermost first."""

SHARES = settings.ZERO > 0 and "dp" in AXES
"""Whether ZeRO splits anything along dp."""


@functools.cache
def mesh() -> Mesh:
    """All devices of the job, with named axes. A process may be given another's place: `RANKS`."""
    sizes = [settings.MESH[name] for name in AXES] or [1]
    wanted = prod(sizes)
    if jax.device_count() < wanted or (jax.process_count() > 1 and jax.device_count() > wanted):
        raise SystemExit(
            f"this program runs on {wanted} devices, but there are {jax.device_count()}; on a CPU: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    devices = np.asarray(jax.devices()[:wanted])
    if settings.RANKS is not None and len(settings.RANKS) == wanted:
        devices = devices[np.argsort(settings.RANKS)]
    names = AXES or ("dp",)
    return Mesh(devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))


@functools.cache
def stage_mesh(*ranks: int) -> Mesh:
    """The devices of one coordinate of `pp`, without that axis; of several, with it."""
    inner = tuple(name for name in AXES if name != "pp")
    names, sizes = inner or ("dp",), [settings.MESH[name] for name in inner] or [1]
    if len(ranks) > 1:
        names, sizes = ("pp", *inner), [len(ranks), *(settings.MESH[name] for name in inner)]
    devices = mesh().devices[list(ranks)].reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def is_here(rank: int) -> bool:
    """Whether this process has devices of a coordinate of `pp`."""
    return any(d.process_index == jax.process_index() for d in stage_mesh(rank).devices.flat)


# --- dtypes --------------------------------------------------------------------------------------


def model_dtype() -> jnp.dtype:
    """The dtype that blocks compute in."""
    return jnp.dtype({"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}[settings.PRECISION])


def wide_dtype() -> jnp.dtype:
    """The dtype of master weights, gradients and optimizer state, and of the loss."""
    return jnp.dtype("float64" if settings.PRECISION == "fp64" else "float32")
