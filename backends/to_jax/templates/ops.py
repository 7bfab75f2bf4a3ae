"""The ops that JAX does not have, or not in this form, on local shards.

`wide` is the dtype of sums that must not lose digits: at least float32, and the input's own dtype
where that is wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from mesh import model_dtype, wide_dtype
from typed import like

# --- dtypes --------------------------------------------------------------------------------------


def wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def to_model(x: Array) -> Array:
    """The dtype that the model computes in."""
    return x.astype(model_dtype())


# --- normalisation -------------------------------------------------------------------------------


def rms_norm(
    x: Array, weight: Array, eps: float | None, offset: float = 0.0, wide_weight: bool = False
) -> Array:
    """x / rms(x) · (weight + offset), last dim; `wide_weight` multiplies before narrowing."""
    y = wide(x)
    if eps is None:
        eps = float(jnp.finfo(x.dtype).eps)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if wide_weight:
        return (y * (wide(weight) + offset)).astype(x.dtype)
    return y.astype(x.dtype) * (weight + offset if offset else weight)


def layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float
) -> Array:
    """(x − mean) / deviation · weight + bias, last dim, wide."""
    y = wide(x)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.astype(x.dtype)


def softmax(x: Array) -> Array:
    """Over the last dim, summed wide."""
    return jax.nn.softmax(wide(x), axis=-1).astype(x.dtype)


# --- rotary embedding ----------------------------------------------------------------------------


def rotary_table(
    positions: Array, frequencies: Sequence[float], scaling: float = 1.0, style: str = "half"
) -> tuple[Array, Array]:
    """cos and sin of positions [s] or [b, s]: wide, [1 or b, s, d]."""
    if positions.ndim == 1:
        positions = positions[None]
    angles = positions.astype(wide_dtype())[..., None] * jnp.asarray(frequencies, wide_dtype())
    if style == "half":
        angles = jnp.concatenate((angles, angles), axis=-1)
    else:
        angles = jnp.repeat(angles, 2, axis=-1)
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def rotary(x: Array, cos: Array, sin: Array, style: str = "half") -> Array:
    """Turns pairs of the last dim of x [b, n, s, d]: (i, i + d/2), or neighbours if interleaved."""
    if style == "half":
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate((-second, first), axis=-1)
    else:
        turned = jnp.stack((-x[..., 1::2], x[..., 0::2]), axis=-1).reshape(x.shape)
    return (x * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


# --- attention -----------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    drop: tuple[float, Array | None, int, tuple[str, ...]] | None = None,
) -> Array:
    """softmax(scale · q kᵀ) v of [b, n, s, d]; query head k·g + j reads key head k.

    `mask` [b, t] is True where a key may be looked at. `drop` is the probability, key and number of
    a dropout of the weights, and the axes that split them.
    """
    b, heads, s, d = q.shape
    kv, t = k.shape[1], k.shape[2]
    q = q.reshape(b, kv, heads // kv, s, d)
    scores = wide(jnp.einsum("bkgsd,bktd->bkgst", q, k)) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = _allowed(s, t, mask, causal, window)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:  # a query that may look at nothing gives zero
        weights = jnp.where(allowed, weights, 0.0)
    weights = weights.astype(v.dtype)
    if drop is not None:
        weights = dropout(weights, *drop)
    out = jnp.einsum("bkgst,bkte->bkgse", weights, v)
    return checkpoint_name(out.reshape(b, heads, s, v.shape[-1]), "attention")


def _allowed(s: int, t: int, mask: Array | None, causal: bool, window: int | None) -> Array | None:
    """[b or 1, 1, 1, s, t], True where a query may look; None where everywhere."""
    if not causal and window is None and mask is None:
        return None
    behind = np.arange(s)[:, None] - np.arange(t)[None]
    allowed = behind >= 0 if causal else behind == behind
    if window is not None:
        allowed &= np.abs(behind) < window
    found = jnp.asarray(allowed)[None, None, None]
    return found if mask is None else found & mask.astype(bool)[:, None, None, None, :]


# --- split vocabulary ----------------------------------------------------------------------------


def _offset(axes: Sequence[str], size: int) -> Array | int:
    """Where this device's `size` rows begin; `axes` split them, outermost first."""
    index: Array | int = 0
    for axis in axes:
        index = index * lax.axis_size(axis) + lax.axis_index(axis)
    return index * size


def embedding(
    weight: Array, ids: Array, *, vocab: tuple[str, ...] = (), padding_idx: int | None = None
) -> Array:
    """Looks up the rows that this device has; the others' are zero: the devices hold summands.

    The row `padding_idx` gets no gradient.
    """
    rows = weight.shape[0]
    here = ids - _offset(vocab, rows)
    inside = (here >= 0) & (here < rows)
    found = weight[jnp.clip(here, 0, rows - 1)]
    if padding_idx is not None:
        found = jnp.where((ids == padding_idx)[..., None], lax.stop_gradient(found), found)
    return jnp.where(inside[..., None], found, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(
    logits: Array, labels: Array, vocab: tuple[str, ...], ignore_index: int
) -> Array:
    return _cross_entropy_forward(logits, labels, vocab, ignore_index)[0]


Kept = tuple[Array, Array, Array, Array, Array]


def _cross_entropy_forward(
    logits: Array, labels: Array, vocab: tuple[str, ...], ignore_index: int
) -> tuple[Array, Kept]:
    x = wide(logits)
    top = jnp.max(x, axis=-1)
    if vocab:
        top = lax.pmax(top, vocab)
    here = labels - _offset(vocab, x.shape[-1])
    inside = (here >= 0) & (here < x.shape[-1])
    here = jnp.clip(here, 0, x.shape[-1] - 1)
    picked = jnp.where(inside, jnp.take_along_axis(x, here[..., None], axis=-1)[..., 0], 0.0)
    sums = jnp.stack((jnp.exp(x - top[..., None]).sum(-1), picked))
    if vocab:
        sums = lax.psum(sums, vocab)
    log_sum = jnp.log(sums[0]) + top
    valid = labels != ignore_index
    loss = jnp.where(valid, log_sum - sums[1], 0.0).sum()
    return loss, (logits, here, inside, valid, log_sum)


def _cross_entropy_backward(
    vocab: tuple[str, ...], ignore_index: int, kept: Kept, gradient: Array
) -> tuple[Array, None]:
    logits, here, inside, valid, log_sum = kept
    x = jnp.exp(wide(logits) - log_sum[..., None])
    hit = (jnp.arange(x.shape[-1]) == here[..., None]) & inside[..., None]
    x = (x - hit.astype(x.dtype)) * (valid * gradient)[..., None]
    return like(x.astype(logits.dtype), logits), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy(
    logits: Array, labels: Array, *, vocab: tuple[str, ...] = (), ignore_index: int = -100
) -> Array:
    """Sum over the labels that are not `ignore_index`, wide.

    With a split vocabulary the maximum, the sum of exponentials and the label's logit are reduced
    over `vocab`; no device sees all logits of a token.
    """
    return _cross_entropy(logits, labels, vocab, ignore_index)


def sum_loss(x: Array) -> Array:
    """The sum of all elements, wide."""
    return wide(x).sum()


def shift_labels(labels: Array, ignore_index: int = -100) -> Array:
    """The label of a position is the token at the next one; the last position has none."""
    return jnp.pad(labels, ((0, 0), (0, 1)), constant_values=ignore_index)[:, 1:]


# --- dropout -------------------------------------------------------------------------------------


def dropout(x: Array, p: float, key: Array | None, number: int, axes: Sequence[str]) -> Array:
    """Zeroes elements with probability p, in training (with a key).

    Devices along `axes`, which split x, draw different numbers; copies of x draw the same.
    """
    if key is None:
        return x
    key = jax.random.fold_in(key, number)
    for axis in axes:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    kept = jax.random.bernoulli(key, 1 - p, x.shape)
    return jnp.where(kept, x / (1 - p), 0).astype(x.dtype)
