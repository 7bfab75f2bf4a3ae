"""Equal stages in one program: a scan over clock ticks.

At tick t a device runs its layers on microbatch t - r, where r is its coordinate of `pp`, and sends
what comes out on to the next. The first takes what comes before the layers, what the last makes
goes into what comes after them. Both of these every device computes beside the others, and only the
first one's, or the last one's, counts. The backward pass, and its order, is JAX's: all forwards,
then all backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import settings
from blocks import Params
from jax import Array, lax
from typed import varying

Call = Callable[..., Any]


def pipelined(
    params: Params,
    calls: tuple[Call, Call, Call],
    batch: Mapping[str, Array],
    inputs: Mapping[str, Any],
    key: Any,
) -> Array:
    """The sum of the loss terms of all microbatches of this data-parallel rank.

    `calls` are what comes before the layers, a stage's layers, and what comes after them; `inputs`
    is BATCH of model.py.
    Parameters vary along `pp`: those of the layers are the stage's own, and the gradients of the
    others are summands.
    """
    count, stages = settings.MICROBATCHES, settings.MESH["pp"]
    rank = lax.axis_index("pp")
    before, stage, after = calls
    rows = {name: _microbatches(x, "b" in inputs[name][1][:1]) for name, x in batch.items()}
    keys = None if key is None else jax.random.split(key, count)

    def given(microbatch: Any) -> dict[str, Any]:
        own = {name: value[microbatch] for name, value in rows.items()}
        return own | {"key": None if keys is None else keys[microbatch]}

    def enter(microbatch: Array) -> Array:
        return before(params, **given(microbatch))

    def tick(arrived: Array, at: Array) -> tuple[Array, Array]:
        microbatch = jnp.clip(at - rank, 0, count - 1)
        hidden = jnp.where(rank == 0, entered[microbatch], arrived)
        hidden = stage(params, hidden, **given(microbatch))
        return lax.ppermute(hidden, "pp", [(r, r + 1) for r in range(stages - 1)]), hidden

    def leave(microbatch: Array) -> Array:
        return after(params, left[stages - 1 + microbatch], **given(microbatch))

    entered = lax.map(enter, jnp.arange(count))
    # before anything arrives a device works on the first microbatch: numbers that are none of a
    # model's, zeros say, may have no gradient
    _, left = lax.scan(tick, entered[0], jnp.arange(count + stages - 1))
    losses = lax.map(leave, jnp.arange(count))
    return jnp.sum(jnp.where(rank == stages - 1, losses, jnp.zeros_like(losses)))


def _microbatches(value: Array, has_rows: bool) -> Array:
    """[microbatches, rows of one, …], on every device of the pipeline."""
    if has_rows:
        value = value.reshape(settings.MICROBATCHES, -1, *value.shape[1:])
    else:
        value = jnp.broadcast_to(value, (settings.MICROBATCHES, *value.shape))
    return value if "pp" in varying(value) else lax.pcast(value, "pp", to="varying")
