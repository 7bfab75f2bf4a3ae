"""Names of Megatron-LM before its core, as core's.

The modules are the same ones in the same order, under other names: `language_model.encoder` (or
`transformer`) is `decoder`, `query_key_value` is `linear_qkv`.
Source: megatron/model/{language_model,transformer}.py of Megatron-LM 2.0 to 3.0, and the tables of
its tools/checkpoint/schema_*.py.
"""

from __future__ import annotations

import re

_PREFIXES = [
    (re.compile(r"language_model\.(?:encoder|transformer)\."), "decoder."),
    (re.compile(r"language_model\."), ""),
    (re.compile(r"(?:word_embeddings_for_head|word_embeddings)\."), "output_layer."),
]
_IN_LAYER = {
    "attention.query_key_value": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "input_norm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_LAYER = re.compile(r"(decoder\.layers\.\d+\.)(.+)(\.(?:weight|bias))")
_LAST_NORM = re.compile(r"decoder\.final_(?:layer)?norm\.")


def core_name(name: str) -> str:
    """The name that Megatron-core has for a parameter; its own names stay.

    >>> core_name("language_model.transformer.layers.3.attention.dense.bias")
    'decoder.layers.3.self_attention.linear_proj.bias'
    >>> core_name("word_embeddings_for_head.weight")
    'output_layer.weight'
    """
    for pattern, core in _PREFIXES:
        if matched := pattern.match(name):
            name = core + name[matched.end() :]
            break
    name = _LAST_NORM.sub("decoder.final_layernorm.", name)
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _IN_LAYER:
        return name
    return f"{found[1]}{_IN_LAYER[found[2]]}{found[3]}"
