"""Mixtures of experts as people write them in JAX: by ragged products, by one-hot products and by
loops over experts; each a function (params, x [b, s, h]) -> [b, s, h]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax_models import rms_norm, rope

EXPERTS, CHOSEN = 4, 2


def route(p: Any, tokens: Any) -> tuple[Any, Any]:
    """Mixtral's router: weights and experts [tokens, k]."""
    scores = jax.nn.softmax((tokens @ p["router"]).astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(scores, CHOSEN)
    weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(tokens.dtype), experts


def route_late(p: Any, tokens: Any) -> tuple[Any, Any]:
    """A softmax over the chosen, which is the same."""
    scores, experts = lax.top_k(tokens @ p["router"], CHOSEN)
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(tokens.dtype), experts


def mlp_sorted(p: Any, rows: Any, sizes: Any) -> Any:
    gate = lax.ragged_dot(rows, p["w1"], sizes)
    up = lax.ragged_dot(rows, p["w3"], sizes)
    return lax.ragged_dot(jax.nn.silu(gate) * up, p["w2"], sizes)


def sorted_back(p: Any, x: Any, router: Any = route) -> Any:
    """Tokens sorted by expert, results sorted back."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = router(p, tokens)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=EXPERTS)
    rows = mlp_sorted(p, tokens[order // CHOSEN], sizes)
    back = rows[jnp.argsort(order)].reshape(-1, CHOSEN, x.shape[-1])
    return (back * weights[..., None]).sum(1).reshape(x.shape)


def softmax_late(p: Any, x: Any) -> Any:
    return sorted_back(p, x, route_late)


def added_up(p: Any, x: Any) -> Any:
    """Weights sorted with the rows, results added up at their tokens."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = route(p, tokens)
    order = jnp.argsort(experts.reshape(-1), stable=True)
    token = jnp.repeat(jnp.arange(tokens.shape[0]), CHOSEN)[order]
    sizes = jax.nn.one_hot(experts, EXPERTS, dtype=jnp.int32).sum((0, 1))
    rows = mlp_sorted(p, jnp.take(tokens, token, axis=0), sizes)
    rows = rows * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(tokens).at[token].add(rows).reshape(x.shape)


def repeated(p: Any, x: Any) -> Any:
    """Tokens repeated, then sorted; results scattered back and weighed by an einsum."""
    b, s, h = x.shape
    tokens = x.reshape(b * s, h)
    weights, experts = route(p, tokens)
    order = jnp.argsort(experts.ravel())
    rows = jnp.repeat(tokens, CHOSEN, axis=0)[order]
    sizes = jnp.zeros(EXPERTS, jnp.int32).at[experts.ravel()].add(1)
    rows = mlp_sorted(p, rows, sizes)
    back = jnp.zeros_like(rows).at[order].set(rows).reshape(b * s, CHOSEN, h)
    return jnp.einsum("tkh,tk->th", back, weights).reshape(b, s, h)


def biased_choice(p: Any, x: Any) -> Any:
    """DeepSeek-V3's router: a bias shifts the choice, weights are the scores themselves."""
    tokens = x.reshape(-1, x.shape[-1])
    scores = jax.nn.sigmoid(tokens @ p["router"])
    _, experts = lax.top_k(scores + p["shift"], CHOSEN)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * 2.5
    return sorted_back(p, x, lambda *_: (weights, experts))


def with_biases(p: Any, x: Any) -> Any:
    """Experts with biases, taken by the experts of the rows."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = route(p, tokens)
    flat = experts.reshape(-1)
    order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=EXPERTS)
    rows = lax.ragged_dot(tokens[order // CHOSEN], p["w1"], sizes) + p["b1"][flat[order]]
    rows = rows * jax.nn.silu(rows)
    rows = lax.ragged_dot(rows, p["w2"], sizes) + p["b2"][flat[order]]
    back = rows[jnp.argsort(order)].reshape(-1, CHOSEN, x.shape[-1])
    return (back * weights[..., None]).sum(1).reshape(x.shape)


RAGGED: dict[str, Callable[[Any, Any], Any]] = {
    "sorted back": sorted_back, "softmax of the chosen": softmax_late, "added up": added_up,
    "repeated": repeated,
}  # fmt: skip


def gates_of(p: Any, tokens: Any) -> Any:
    """Weights per token and expert, 0 where it is not chosen."""
    weights, experts = route(p, tokens)
    return (jax.nn.one_hot(experts, EXPERTS, dtype=weights.dtype) * weights[..., None]).sum(-2)


def one_hot(p: Any, x: Any) -> Any:
    """All experts on all tokens, by einsum."""
    gate = jnp.einsum("bsh,ehf->bsef", x, p["w1"])
    up = jnp.einsum("bsh,ehf->bsef", x, p["w3"])
    y = jnp.einsum("bsef,efh->bseh", jax.nn.silu(gate) * up, p["w2"])
    return jnp.einsum("bseh,bse->bsh", y, gates_of(p, x))


def vmapped(p: Any, x: Any) -> Any:
    """A function of one expert, mapped over all."""

    def expert(w1: Any, w3: Any, w2: Any) -> Any:
        return (jax.nn.silu(tokens @ w1) * (tokens @ w3)) @ w2

    tokens = x.reshape(-1, x.shape[-1])
    y = jax.vmap(expert)(p["w1"], p["w3"], p["w2"])
    return (y * gates_of(p, tokens).T[..., None]).sum(0).reshape(x.shape)


def scattered_gates(p: Any, x: Any) -> Any:
    """Gates by a scatter, the sum with experts inside."""
    weights, experts = route(p, x)
    b, s = jnp.ogrid[: x.shape[0], : x.shape[1]]
    gates = (
        jnp.zeros((*x.shape[:2], EXPERTS), x.dtype)
        .at[b[..., None], s[..., None], experts]
        .set(weights)
    )
    gate, up = (jnp.einsum("bsh,ehf->bsef", x, p[w]) for w in ("w1", "w3"))
    y = jnp.einsum("bsef,efh->bseh", jax.nn.silu(gate) * up, p["w2"])
    return (y * gates[..., None]).sum(2)


CAPACITY = 3


def capacity(p: Any, x: Any) -> Any:
    """One-hot products into slots and back; tokens beyond an expert's slots are left out."""
    weights, experts = route(p, x)
    hot = jax.nn.one_hot(experts, EXPERTS, dtype=x.dtype)  # b s k e
    chosen = hot.sum(2)
    place = jnp.cumsum(chosen, axis=1) * chosen - 1
    dispatch = jax.nn.one_hot(place, CAPACITY, dtype=x.dtype)  # b s e c
    combine = dispatch * (hot * weights[..., None]).sum(2)[..., None]
    slots = jnp.einsum("bsh,bsec->ebch", x, dispatch)
    gate, up = (jnp.einsum("ebch,ehf->ebcf", slots, p[w]) for w in ("w1", "w3"))
    y = jnp.einsum("ebcf,efh->ebch", jax.nn.silu(gate) * up, p["w2"])
    return jnp.einsum("ebch,bsec->bsh", y, combine)


DENSE: dict[str, Callable[[Any, Any], Any]] = {
    "one-hot einsums": one_hot, "vmap": vmapped, "scattered gates": scattered_gates,
    "capacity": capacity,
}  # fmt: skip


def looped(p: Any, x: Any) -> Any:
    """One expert after the other on all tokens, weights by a mask."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = route(p, tokens)
    total = jnp.zeros_like(tokens)
    for e in range(EXPERTS):
        mine = jnp.sum(weights * (experts == e), axis=-1)
        y = (jax.nn.silu(tokens @ p["w1"][e]) * (tokens @ p["w3"][e])) @ p["w2"][e]
        total = total + mine[:, None] * y
    return total.reshape(x.shape)


def looped_where(p: Any, x: Any) -> Any:
    """The same over unstacked weights, gates picked by a where, residual inside."""
    weights, experts = route(p, x)
    total = x
    for e, (w1, w3, w2) in enumerate(zip(p["w1"], p["w3"], p["w2"], strict=True)):
        mine = jnp.where(experts == e, weights, 0.0).sum(-1, keepdims=True)
        total = total + (jax.nn.silu(x @ w1) * (x @ w3)) @ w2 * mine
    return total - x


LOOPS: dict[str, Callable[[Any, Any], Any]] = {"loop": looped, "loop with where": looped_where}


def listed(p: Any, x: Any) -> Any:
    """A loop over experts with parameters of their own: every expert on every token."""
    weights, experts = route(p, x)
    total = jnp.zeros_like(x)
    for e, expert in enumerate(p["experts"]):
        mine = (weights * (experts == e)).sum(-1)
        total += (jax.nn.silu(x @ expert["w1"]) @ expert["w2"]) * mine[..., None]
    return total


def scanned(p: Any, x: Any) -> Any:
    """A scan over experts."""
    weights, experts = route(p, x)

    def body(total: Any, expert: Any) -> tuple[Any, None]:
        e, w1, w3, w2 = expert
        mine = (weights * (experts == e)).sum(-1)[..., None]
        return total + (jax.nn.silu(x @ w1) * (x @ w3)) @ w2 * mine, None

    every = (jnp.arange(EXPERTS), p["w1"], p["w3"], p["w2"])
    return lax.scan(body, jnp.zeros_like(x), every)[0]


# -- whole models ---------------------------------------------------------------------------------


def linear(x: Any, weight: Any) -> Any:
    """As torch stores weights: [outputs, inputs]."""
    return jnp.einsum("...i,oi->...o", x, weight)


def fused_mlp(p: Any, rows: Any, sizes: Any) -> Any:
    """Gate and up in one weight, [experts, 2 ffn, hidden], as in transformers."""
    both = lax.ragged_dot(rows, p["gate_up_proj"].swapaxes(1, 2), sizes)
    gate, up = jnp.split(both, 2, axis=-1)
    return lax.ragged_dot(jax.nn.silu(gate) * up, p["down_proj"].swapaxes(1, 2), sizes)


def mixtral_mlp(p: Any, x: Any) -> Any:
    b, s, h = x.shape
    tokens = x.reshape(b * s, h)
    count, k = p["gate"]["weight"].shape[0], CHOSEN
    scores = jax.nn.softmax(linear(tokens, p["gate"]["weight"]).astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(scores, k)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    rows = fused_mlp(p["experts"], tokens[order // k], jnp.bincount(flat, length=count))
    back = rows[jnp.argsort(order)].reshape(b * s, k, h)
    return (back * weights[..., None]).sum(1).reshape(b, s, h)


def mixtral(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, experts: int, vocabulary: int
) -> tuple[Any, Any, Any]:
    """A Mixtral with the parameters of transformers', layers in a list."""
    size = hidden // heads

    def layer(p: Any, x: Any) -> Any:
        b, s, h = x.shape
        y = rms_norm(x, p["input_layernorm"]["weight"])
        q, k, v = (
            linear(y, p["self_attn"][name]["weight"]).reshape(b, s, -1, size)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + linear(y.reshape(b, s, h), p["self_attn"]["o_proj"]["weight"])
        return x + mixtral_mlp(p["mlp"], rms_norm(x, p["post_attention_layernorm"]["weight"]))

    def loss(params: Any, input_ids: Any, labels: Any) -> Any:
        x = params["model"]["embed_tokens"]["weight"][input_ids]
        for p in params["model"]["layers"]:
            x = layer(p, x)
        x = rms_norm(x, params["model"]["norm"]["weight"])
        normal = jax.nn.log_softmax(linear(x, params["lm_head"]["weight"]).astype(jnp.float32))
        return -jnp.take_along_axis(normal, labels[..., None], axis=-1).mean()

    def weight(*sizes: int) -> dict[str, Any]:
        return {"weight": jax.ShapeDtypeStruct(sizes, jnp.float32)}

    def parameters() -> dict[str, Any]:
        return {
            "self_attn": {
                "q_proj": weight(hidden, hidden), "k_proj": weight(kv_heads * size, hidden),
                "v_proj": weight(kv_heads * size, hidden), "o_proj": weight(hidden, hidden),
            },
            "mlp": {
                "gate": weight(experts, hidden),
                "experts": {
                    "gate_up_proj": weight(experts, 2 * ffn, hidden)["weight"],
                    "down_proj": weight(experts, hidden, ffn)["weight"],
                },
            },
            "input_layernorm": weight(hidden), "post_attention_layernorm": weight(hidden),
        }  # fmt: skip

    params = {
        "model": {
            "embed_tokens": weight(vocabulary, hidden),
            "layers": [parameters() for _ in range(layers)], "norm": weight(hidden),
        },
        "lm_head": weight(vocabulary, hidden),
    }  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    return loss, params, (tokens, tokens)
