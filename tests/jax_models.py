"""JAX models as people write them, each as (function, parameters, example inputs): what
`package.module:callable` returns."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCABULARY, HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 32, 16, 4, 2, 24, 3
TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


def shapes(initialise: Any, *arguments: Any) -> Any:
    """The shapes of what an initialisation makes, without making it."""
    return jax.eval_shape(initialise, *arguments)


# -- plain functions ------------------------------------------------------------------------------


def mlp() -> tuple[Any, Any, Any]:
    """Layers in a list, a mean of squares."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        for i, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.gelu(x) if i < len(params) - 1 else x
        return jnp.mean((x - y) ** 2)

    size = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = [{"w": size((HIDDEN, HIDDEN)), "b": size((HIDDEN,))} for _ in range(4)]
    return loss, params, (size((4, HIDDEN)), size((4, HIDDEN)))


def rms_norm(x: Any, weight: Any) -> Any:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
    return scaled.astype(x.dtype) * weight


def rope(x: Any, theta: float = 1e4) -> Any:
    """x: [b, s, n, d], halves turned."""
    frequencies = theta ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = jnp.arange(x.shape[1])[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


def plain_layer(layer: Any, x: Any) -> Any:
    """A Llama layer: grouped heads by einsum, softmax written by jax.nn."""
    b, s, h = x.shape
    size = h // HEADS
    normed = rms_norm(x, layer["attn_norm"])
    q = rope((normed @ layer["wq"]).reshape(b, s, HEADS, size))
    k = rope((normed @ layer["wk"]).reshape(b, s, KV_HEADS, size))
    v = (normed @ layer["wv"]).reshape(b, s, KV_HEADS, size)
    q = q.reshape(b, s, KV_HEADS, HEADS // KV_HEADS, size)
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k) / size**0.5
    mask = jnp.tril(jnp.ones((s, s), dtype=bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    heads = jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(b, s, h)
    x = x + heads @ layer["wo"]
    normed = rms_norm(x, layer["ffn_norm"])
    return x + (jax.nn.silu(normed @ layer["w1"]) * (normed @ layer["w3"])) @ layer["w2"]


def plain_head(params: Any, x: Any, labels: Any) -> Any:
    logits = rms_norm(x, params["norm"]) @ params["head"]
    normal = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(normal, labels[..., None], axis=-1).mean()


def plain_params(layers: int, stacked: bool, dtype: Any = jnp.float32) -> Any:
    size = partial(jax.ShapeDtypeStruct, dtype=dtype)
    key = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "wq": (HIDDEN, HIDDEN),
        "wk": (HIDDEN, key), "wv": (HIDDEN, key), "wo": (HIDDEN, HIDDEN),
        "w1": (HIDDEN, FFN), "w3": (HIDDEN, FFN), "w2": (FFN, HIDDEN),
    }  # fmt: skip
    if stacked:
        inner: Any = {n: size((layers, *shape)) for n, shape in layer.items()}
    else:
        inner = [{n: size(shape) for n, shape in layer.items()} for _ in range(layers)]
    return {
        "embed": size((VOCABULARY, HIDDEN)), "layers": inner, "norm": size((HIDDEN,)),
        "head": size((HIDDEN, VOCABULARY)),
    }  # fmt: skip


def plain_llama(layers: int = LAYERS) -> tuple[Any, Any, Any]:
    """Layers in a Python loop."""

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = plain_layer(layer, x)
        return plain_head(params, x, labels)

    return loss, plain_params(layers, stacked=False), (TOKENS, TOKENS)


def plain_scan(layers: int = LAYERS) -> tuple[Any, Any, Any]:
    """The same under lax.scan with rematerialisation."""

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        def body(x: Any, layer: Any) -> tuple[Any, None]:
            return jax.checkpoint(plain_layer)(layer, x), None

        x, _ = jax.lax.scan(body, jnp.take(params["embed"], tokens, axis=0), params["layers"])
        return plain_head(params, x, labels)

    return loss, plain_params(layers, stacked=True), (TOKENS, TOKENS)


# -- flax linen -----------------------------------------------------------------------------------


class LinenAttention(nn.Module):
    heads: int = HEADS
    kv_heads: int = KV_HEADS

    @nn.compact
    def __call__(self, x: Any) -> Any:
        size = x.shape[-1] // self.heads
        dense = partial(nn.DenseGeneral, use_bias=False)
        q = rope(dense((self.heads, size), name="q_proj")(x))
        k = rope(dense((self.kv_heads, size), name="k_proj")(x))
        v = dense((self.kv_heads, size), name="v_proj")(x)
        k, v = (jnp.repeat(each, self.heads // self.kv_heads, axis=2) for each in (k, v))
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.dot_product_attention(q, k, v, mask=mask)
        return dense(x.shape[-1], axis=(-2, -1), name="o_proj")(y)


class LinenLayer(nn.Module):
    ffn: int = FFN
    heads: int = HEADS
    kv_heads: int = KV_HEADS

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        attention = LinenAttention(self.heads, self.kv_heads, name="self_attn")
        x = x + attention(nn.RMSNorm(epsilon=1e-5, name="input_norm")(x))
        y = nn.RMSNorm(epsilon=1e-5, name="post_norm")(x)
        dense = partial(nn.Dense, use_bias=False)
        gate = nn.silu(dense(self.ffn, name="gate_proj")(y)) * dense(self.ffn, name="up_proj")(y)
        return x + dense(x.shape[-1], name="down_proj")(gate), None


class LinenLlama(nn.Module):
    scan: bool
    layers: int = LAYERS
    vocabulary: int = VOCABULARY
    hidden: int = HIDDEN
    ffn: int = FFN
    heads: int = HEADS
    kv_heads: int = KV_HEADS

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.hidden, name="embed_tokens")(tokens)
        sizes = (self.ffn, self.heads, self.kv_heads)
        if self.scan:
            scanned = nn.scan(
                nn.remat(LinenLayer, prevent_cse=False), variable_axes={"params": 0},
                split_rngs={"params": True}, length=self.layers, in_axes=nn.broadcast,
            )  # fmt: skip
            x, _ = scanned(*sizes, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = LinenLayer(*sizes, name=f"layers_{i}")(x)
        x = nn.RMSNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="lm_head")(x)


def linen_llama(scan: bool = False, **sizes: int) -> tuple[Any, Any, Any]:
    """`model.apply`, and optax's cross-entropy."""
    model = LinenLlama(scan, **sizes)

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    made = shapes(model.init, jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    return loss, made["params"], (TOKENS, TOKENS)


def linen_scan() -> tuple[Any, Any, Any]:
    return linen_llama(scan=True)


class LinenViT(nn.Module):
    """Patches by convolution, a learned position for each, mean of the tokens."""

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(HIDDEN, (4, 4), strides=(4, 4), padding="VALID", name="patch_embed")(images)
        x = x.reshape(x.shape[0], -1, HIDDEN)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], HIDDEN))
        for i in range(LAYERS):
            x = LinenEncoderLayer(name=f"block_{i}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(10, name="head")(x.mean(axis=1))


class LinenEncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(y, y)
        y = nn.LayerNorm(name="norm2")(x)
        return x + nn.Dense(HIDDEN, name="fc2")(nn.gelu(nn.Dense(FFN, name="fc1")(y)))


def linen_vit() -> tuple[Any, Any, Any]:
    model = LinenViT()
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def loss(params: Any, images: Any, labels: Any) -> Any:
        logits = model.apply({"params": params}, images)
        hot = jax.nn.one_hot(labels, 10)
        return optax.softmax_cross_entropy(logits, hot).mean()

    made = shapes(model.init, jax.random.key(0), images)
    return loss, made["params"], (images, jax.ShapeDtypeStruct((2,), jnp.int32))


# -- flax nnx -------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(HIDDEN, rngs=rngs)
        self.up = nnx.Linear(HIDDEN, FFN, rngs=rngs)
        self.down = nnx.Linear(FFN, HIDDEN, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def nnx_net() -> tuple[Any, Any, Any]:
    """`nnx.split`, and `nnx.merge` in the function; labels of -100 are left out."""
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        logits = nnx.merge(graph, params)(tokens)
        valid = labels != -100
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
        return jnp.where(valid, terms, 0.0).sum() / valid.sum()

    return loss, state, (TOKENS, TOKENS)


# -- equinox --------------------------------------------------------------------------------------


class GptBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 4)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(HIDDEN), eqx.nn.LayerNorm(HIDDEN)
        self.qkv = eqx.nn.Linear(HIDDEN, 3 * HIDDEN, key=keys[0])
        self.out = eqx.nn.Linear(HIDDEN, HIDDEN, key=keys[1])
        self.up = eqx.nn.Linear(HIDDEN, FFN, key=keys[2])
        self.down = eqx.nn.Linear(FFN, HIDDEN, key=keys[3])

    def __call__(self, x: Any) -> Any:
        """x: [s, h]; the batch is vmapped."""
        y = jax.vmap(self.qkv)(jax.vmap(self.norm1)(x))
        q, k, v = (each.reshape(x.shape[0], HEADS, -1) for each in jnp.split(y, 3, axis=-1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jax.vmap(self.out)(y.reshape(x.shape))
        y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.down)(y)


class Gpt(eqx.Module):
    wte: Any
    wpe: Any
    blocks: list[GptBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, LAYERS + 2)
        self.wte = jax.random.normal(keys[0], (VOCABULARY, HIDDEN))
        self.wpe = jax.random.normal(keys[1], (64, HIDDEN))
        self.blocks = [GptBlock(each) for each in keys[2:]]
        self.norm = eqx.nn.LayerNorm(HIDDEN)

    def __call__(self, tokens: Any) -> Any:
        x = self.wte[tokens] + self.wpe[jnp.arange(tokens.shape[0])]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.wte.T


def equinox_gpt() -> tuple[Any, Any, Any]:
    """Partitioned; tied embeddings; the labels are the tokens moved by one."""
    model = eqx.filter_eval_shape(Gpt, jax.random.key(0))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(params: Any, tokens: Any) -> Any:
        logits = jax.vmap(eqx.combine(params, static))(tokens)
        terms = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return terms.mean()

    return loss, params, (TOKENS,)
