"""DeepSeek's latent attention: queries, keys and values through low ranks.

DeepSeek-V2, arXiv:2405.04434, section 2.1, and transformers' DeepseekV3Attention. In training the
compressed form is expanded to whole heads, and attention is the ordinary one over heads whose
queries and keys are longer than their values.
"""

from __future__ import annotations

from .dims import LatentAttention, TransformerDims
from .layers import attend, heads, linear, norm, rotary, swapped
from .names import names_of
from .sheet import Sheet, dims_of


def latent_attention(
    sheet: Sheet, x: str, dims: TransformerDims, latent: LatentAttention, window: int | None
) -> str:
    """Latent attention and its output projection; `x` are the normed activations b s h."""
    module = sheet.under(names_of(dims).attention)
    nope, rope = latent.nope_dim, latent.rope_dim
    bias = dims.bias or dims.attention_bias != "none"
    if latent.q_rank:
        low = linear(module, x, "q_a_proj", (dims.hidden, latent.q_rank), bias=bias)
        low = norm(module, low, dims, "q_a_layernorm")
        q = linear(module, low, "q_b_proj", (latent.q_rank, dims.heads * (nope + rope)))
    else:
        q = linear(module, x, "q_proj", (dims.hidden, dims.heads * (nope + rope)))
    q = swapped(module, heads(module, q, dims.heads, nope + rope, "query"), "query")
    q_nope, q_rope = _cut(module, q, nope, ("query_nope", "query_rope"))

    rank, both = latent.kv_rank, nope + latent.v_dim
    low = linear(module, x, "kv_a_proj_with_mqa", (dims.hidden, rank + rope), bias=bias)
    low, k_rope = _cut(module, low, rank, ("kv_low", "key_rope"))
    low = norm(module, low, dims, "kv_a_layernorm")
    kv = linear(module, low, "kv_b_proj", (rank, dims.heads * both))
    kv = swapped(module, heads(module, kv, dims.heads, both, "key_value"), "key_value")
    k_nope, v = _cut(module, kv, nope, ("key_nope", "value"))

    q_rope = rotary(module, q_rope, dims)
    k_rope = swapped(module, heads(module, k_rope, 1, rope, "key_rope"), "key_rope")
    k_rope = rotary(module, k_rope, dims)
    k_rope = module.op("expand", (k_rope,), dims_of("b", dims.heads, "s", rope),
                       name="key_rope_expand")  # fmt: skip
    whole = dims_of("b", dims.heads, "s", nope + rope)
    q = module.op("concat", (q_nope, q_rope), whole, name="query_whole", attributes={"dim": 3})
    k = module.op("concat", (k_nope, k_rope), whole, name="key_whole", attributes={"dim": 3})
    return attend(module, (q, k, v), dims, window, latent.v_dim)


def _cut(sheet: Sheet, y: str, at: int, names: tuple[str, str]) -> tuple[str, str]:
    """The last dim before and from an element."""
    lead, (whole,) = sheet.values[y].dims[:-1], sheet.values[y].dims[-1]
    assert isinstance(whole, int)
    dim = len(lead)
    first = sheet.op("slice", (y,), (*lead, *dims_of(at)), name=names[0],
                     attributes={"dim": dim, "start": 0, "stop": at})  # fmt: skip
    rest = sheet.op("slice", (y,), (*lead, *dims_of(whole - at)), name=names[1],
                    attributes={"dim": dim, "start": at, "stop": None})  # fmt: skip
    return first, rest
